"""Graph tasks: molecules and their splits, the networks of Hu et al., losses and scores, whole runs."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from delta_transfer.cli.data import main as delta_data
from delta_transfer.common.errors import UserError
from delta_transfer.data import load_dataset
from delta_transfer.data.dataset import make_splits
from delta_transfer.data.graphs import GraphLoader, batch_of, chains
from delta_transfer.data.molecules import random_scaffold_split, scaffold_split
from delta_transfer.data.options import SplitConfig
from delta_transfer.data.packed_graphs import PackedGraphs
from delta_transfer.data.readers.moleculenet import MeasuredMoleculesConfig, MoleculesConfig
from delta_transfer.data.readers.tu import TUConfig, stratified_folds
from delta_transfer.data.registry import READERS
from delta_transfer.engine.averages.best_validation import BestValidation, BestValidationConfig
from delta_transfer.engine.config import say_what_it_trains
from delta_transfer.engine.graph_tasks import GraphProperties, GraphRegression, roc_auc
from delta_transfer.experiment.experiment import run
from delta_transfer.methods import DELTA, DELTAWithoutAttention, StochNorm
from delta_transfer.methods.attention import AttentionConfig, channel_attention
from delta_transfer.models.graph_networks import LAYERS, GraphEncoder, GraphNetwork, Neighbours, dropout_mask
from delta_transfer.models.zoo import GraphBackboneConfig, build_source

from .miniature import composed, delta_run

CPU = torch.device("cpu")


def ring(nodes: int, label: int = 0):
    first = np.arange(nodes)
    edges = np.array([first, (first + 1) % nodes])
    return np.tile([label, 0], (nodes, 1)), np.hstack([edges, edges[::-1]]), np.tile([1, 0], (2 * nodes, 1))


@pytest.fixture
def packed():
    """Rings of 3, 5 and 4 nodes with different labels, and a single node."""
    single = np.array([[7, 2]]), np.empty((2, 0)), np.empty((0, 2))
    return PackedGraphs.of([ring(3, 5), ring(5, 6), single, ring(4, 7)])


# ---- batches ---------------------------------------------------------------------------------------------


def test_a_batch_holds_the_chosen_graphs_in_their_order(packed):
    batch = batch_of(packed, np.array([3, 2, 0]), CPU)
    assert batch.node_counts == (4, 1, 3) and batch.edge_counts == (8, 0, 6) and len(batch) == 3
    assert batch.nodes[:, 0].tolist() == [7, 7, 7, 7, 7, 5, 5, 5]
    assert batch.graph.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert batch.edges[:, 8:].tolist() == [[5, 6, 7, 6, 7, 5], [6, 7, 5, 5, 6, 7]]


@pytest.mark.parametrize("name", LAYERS)
def test_parts_of_a_batch_give_what_the_whole_batch_gives(packed, name):
    torch.manual_seed(0)
    network = GraphNetwork(GraphEncoder(LAYERS[name], 2).double(), "head").freeze()
    batch = batch_of(packed, np.arange(4), CPU)
    whole = network(batch)["logits"]
    for parts in (batch.split(3), batch.chunk(2)):
        assert len(parts) == 2
        torch.testing.assert_close(torch.cat([network(part)["logits"] for part in parts]), whole)


# ---- networks --------------------------------------------------------------------------------------------


def naive(name: str, layer, x, neighbours):
    """A layer node by node, from its formula. neighbours[i]: (j, bond type, direction), itself included."""
    out = []
    degree = [len(of) for of in neighbours]
    edge = lambda bond, way: layer.edge_embedding1.weight[bond] + layer.edge_embedding2.weight[way]  # noqa: E731
    if name == "gin":
        return torch.stack([layer.mlp(sum(x[j] + edge(b, d) for j, b, d in of)) for of in neighbours])
    if name == "gat":
        x = F.linear(x, layer.weight_linear.weight, layer.weight_linear.bias)
        for i, of in enumerate(neighbours):
            heads = []
            for half in (slice(0, 300), slice(300, 600)):
                values = [(x[j] + edge(b, d))[half] for j, b, d in of]
                att = layer.att[0, half.start // 300]
                scores = torch.stack([F.leaky_relu(att @ torch.cat([x[i][half], value]), 0.2) for value in values])
                heads.append(sum(w * value for w, value in zip(scores.softmax(0), values, strict=True)))
            out.append((heads[0] + heads[1]) / 2 + layer.bias)
        return torch.stack(out)
    x = F.linear(x, layer.linear.weight, layer.linear.bias)
    for i, of in enumerate(neighbours):
        if name == "gcn":
            out.append(sum((x[j] + edge(b, d)) / (degree[i] * degree[j]) ** 0.5 for j, b, d in of))
        else:
            mean = sum(x[j] + edge(b, d) for j, b, d in of) / len(of)
            out.append(mean / mean.norm())
    return torch.stack(out)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_formula_node_by_node(packed, name):
    torch.manual_seed(0)
    layer, batch = LAYERS[name](300).double(), batch_of(packed, np.array([1, 2, 0]), CPU)
    x, count = torch.randn(9, 300, dtype=torch.float64), 9
    neighbours = [[(i, 4, 0)] for i in range(count)]
    for (j, i), (bond, way) in zip(batch.edges.T.tolist(), batch.edge_features.tolist(), strict=True):
        neighbours[i].append((j, bond, way))
    found, expected = layer(x, Neighbours(batch)), naive(name, layer, x, neighbours)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    parameters = dict(layer.named_parameters())
    gradients = [torch.autograd.grad(out.square().sum(), [*parameters.values()]) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_the_network_is_five_layers_and_the_mean_over_a_graphs_nodes(packed):
    torch.manual_seed(0)
    network = GraphEncoder(LAYERS["gcn"], 2).double().eval()
    batch = batch_of(packed, np.arange(4), CPU)
    beside = Neighbours(batch)
    x = network.x_embedding1.weight[batch.nodes[:, 0]] + network.x_embedding2.weight[batch.nodes[:, 1]]
    for layer, norm in zip(network.gnns[:4], network.batch_norms[:4], strict=True):
        x = norm(layer(x, beside)).relu()
    x = network.batch_norms[4](network.gnns[4](x, beside))  # no ReLU after the last layer
    means = torch.stack([x[batch.graph == graph].mean(0) for graph in range(len(batch))])
    torch.testing.assert_close(network(batch), means @ network.head.weight.T + network.head.bias)


@pytest.mark.slow  # PyTorch Geometric takes seconds to import; the test above has the formulas
def test_gcn_and_gin_sum_as_pytorch_geometric_does(packed):
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    batch, x = batch_of(packed, np.arange(4), CPU), torch.randn(13, 300, dtype=torch.float64)
    beside = Neighbours(batch)
    gcn, gin = LAYERS["gcn"](300).double(), LAYERS["gin"](300).double()
    for layer in (gcn, gin):  # theirs have no edges' vectors
        for embedding in (layer.edge_embedding1, layer.edge_embedding2):
            torch.nn.init.zeros_(embedding.weight)
    theirs = geometric.GCNConv(300, 300, bias=False).double()
    theirs.lin.weight.data.copy_(gcn.linear.weight)
    torch.nn.init.zeros_(gcn.linear.bias)
    torch.testing.assert_close(gcn(x, beside), theirs(x, batch.edges))
    theirs = geometric.GINConv(gin.mlp)  # which gives the network new values
    torch.testing.assert_close(gin(x, beside), theirs(x, batch.edges))


def test_published_weights_load_strictly(tmp_path):
    """The file holds an encoder without a head."""
    torch.manual_seed(1)
    encoder = GraphEncoder(LAYERS["gcn"], 3)
    state = {name: value for name, value in encoder.state_dict().items() if not name.startswith("head.")}
    assert {"x_embedding1.weight", "gnns.4.linear.weight", "gnns.0.edge_embedding2.weight"} <= state.keys()
    torch.save(state, tmp_path / "gcn.pth")
    config = GraphBackboneConfig("gcn", str(tmp_path / "gcn.pth"), head="head", taps=["gnns.4.linear"], dropout=0.25)
    source = build_source(config, 0)
    assert source.model.dropout == 0.25 and source.map_shapes(2, 1, True) == {"gnns.4.linear": (300, 1, 1)}
    assert all(torch.equal(source.weights()[name], value) for name, value in state.items())
    with pytest.raises(UserError):
        build_source(config.replace(name="gat"), 0)


def test_a_file_named_after_another_network_with_the_same_shapes_is_named(tmp_path, capsys):
    state = GraphEncoder(LAYERS["sage"], 3).state_dict()
    for name in ("graphsage_supervised.pth", "gcn_supervised.pth", "my_own.pth"):
        torch.save(state, tmp_path / name)
        build_source(GraphBackboneConfig("gcn", str(tmp_path / name), head="head", taps=["gnns.4.linear"]), 0)
        assert ("it belongs to backbone=sage" in capsys.readouterr().out) == name.startswith("graphsage"), name


def test_dropout_leaves_out_a_share_and_keeps_the_mean(packed):
    torch.manual_seed(0)
    mask = dropout_mask(torch.ones(200, 300), 0.2)
    assert set(mask.unique().tolist()) == {0.0, 1.25} and 0.18 < (mask == 0).float().mean() < 0.22
    network, batch = GraphEncoder(LAYERS["gcn"], 2), batch_of(packed, np.arange(4), CPU)
    network.dropout = 0.5
    assert torch.equal(network.eval()(batch), network(batch))
    assert not torch.equal(network.train()(batch), network(batch))


# ---- molecules -------------------------------------------------------------------------------------------


def read(config, root: Path):
    return READERS[config.reader].thing.read(root, config)


def molecules(root: Path, text: str | bytes, **options):
    (root / "some.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read(MoleculesConfig(reader="molecules", name="some", file="some.csv", **options), root)


def test_a_molecule_by_hand_has_the_right_features():
    pytest.importorskip("rdkit")
    from delta_transfer.data.molecules import graph_of, read_molecule

    nodes, edges, features = graph_of(read_molecule("C[C@H](O)C#N"))
    assert nodes.tolist() == [[5, 0], [5, 2], [7, 0], [5, 0], [6, 0]]
    assert edges.tolist() == [[0, 1, 1, 2, 1, 3, 3, 4], [1, 0, 2, 1, 3, 1, 4, 3]]
    assert features.tolist() == [[0, 0]] * 6 + [[2, 0]] * 2
    _, _, double = graph_of(read_molecule("F/C=C/F"))
    assert double[:, 0].tolist() == [0, 0, 1, 1, 0, 0] and double[0, 1] in (1, 2)
    assert set(graph_of(read_molecule("c1ccccc1"))[2][:, 0]) == {3}
    with pytest.raises(ValueError):
        graph_of(read_molecule("*C"))


def test_unreadable_molecules_are_counted_and_named_and_empty_cells_are_not_known(tmp_path):
    pytest.importorskip("rdkit")
    text = "smiles,id,one,two\nCCO,m1,1,0\nnonsense,m2,0,0\nc1ccccc1,m3,,1.0\nCCN,m4,0,1\n"
    dataset = molecules(tmp_path, text)
    assert dataset.classes == ("one", "two") and dataset.labels.tolist() == [[1, -1], [0, 1], [-1, 1]]
    assert dataset.names == ("CCO", "c1ccccc1", "CCN")
    ((what, why),) = dataset.left_out.items()
    assert "nonsense" in what + why and "3" in what + why
    for wrong, options in (
        (text.replace("m4,0", "m4,2"), {"properties": ["one"]}),
        (text, {"properties": ["three"]}),
        (text, {"smiles": "SMILES"}),
        ("smiles,one\nnonsense,1\n", {}),
        ("smiles,one\n", {}),
        ("", {}),
        (text + "CC,m5,1\n", {}),
    ):
        with pytest.raises(UserError):
            molecules(tmp_path, wrong, **options)


def test_what_a_table_of_molecules_holds_besides_is_named(tmp_path):
    pytest.importorskip("rdkit")
    text = "smiles,id,one,two,later\n\nCCO,m1,1,0,\nnonsense,m2,0,l,\nc1ccccc1,m3,,1,\nOCC,m4,0,1,\n"
    dataset = molecules(tmp_path, text)
    assert dataset.classes == ("one",) and list(dataset.left_out) == ["line 4, nonsense"]
    columns, _, conflicts = dataset.remarks
    assert all(word in columns for word in ("line 3 id='m1'", "line 4 two='l'", "later")) and "1 (CCO)" in conflicts
    semicolons = molecules(tmp_path, text.replace(",", " ;"))
    assert semicolons.fingerprint == dataset.fingerprint
    for wrong in (text.replace("two", "one"), text.replace("later", "sp\u00e4ter").encode("latin-1")):
        with pytest.raises(UserError) as raised:
            molecules(tmp_path, wrong)
        assert "one" in str(raised.value) or "UTF-8" in str(raised.value)


def test_copies_of_a_molecule_in_train_and_test_are_named(tmp_path):
    pytest.importorskip("rdkit")
    lines = [f"{'C' * n}O,{n % 2}\nO{'C' * n},{n % 2}" for n in range(1, 9)]
    leaks = molecules(tmp_path, "\n".join(["smiles,one", *lines]), cut="random").remarks
    assert len(leaks) == 1 and "CO" in leaks[0]


def test_measurements_are_standardised_by_those_of_training_molecules(tmp_path):
    pytest.importorskip("rdkit")
    smiles = ["C" * n + end for n in range(1, 5) for end in ("O", "N", "c1ccccc1", "C1CC1", "C1CCC1")]
    lines = [f"{one},{n / 4 if n % 5 else ''},{-n}e-1,note" for n, one in enumerate(smiles)]
    text = "\n".join(["smiles,solubility,energy,remark", *lines])

    def measured(text: str, **options):
        (tmp_path / "some.csv").write_text(text)
        named = {"reader": "measured_molecules", "name": "some", "file": "some.csv", "cut": "random"}
        return read(MeasuredMoleculesConfig(**named, **options), tmp_path)

    dataset = measured(text, properties=["solubility", "energy"])
    assert dataset.labels.shape == (20, 2) and np.isnan(dataset.labels[5, 0]) and dataset.labels[7, 0] == 1.75
    training = dataset.labels[~dataset.is_test & ~dataset.is_val]
    assert 0 < len(training) < 20
    known = training[np.isfinite(training[:, 0]), 0]
    assert dataset.scale[:, 0] == pytest.approx([known.mean(), known.std()])
    loader = GraphRegression().open_loader(composed("dataset=esol", "schedule.batch_size=4"), dataset, CPU)
    _, labels = next(loader.test_batches(np.flatnonzero(~dataset.is_test & ~dataset.is_val)))
    assert torch.nanmean(labels[:, 1]).item() == pytest.approx(0, abs=1e-6)
    assert labels[:, 1].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    for wrong in ("energy_", "remark"):
        with pytest.raises(UserError):
            measured(text, properties=[wrong])
    for cell in ("inf", "nan", "x"):
        with pytest.raises(UserError):
            measured(text.replace("-3e-1", cell), properties=["energy"])
    with pytest.raises(UserError):
        measured("smiles,energy\n" + "\n".join(f"{one},2.5" for one in smiles), properties=["energy"])


def test_the_scaffold_split_is_the_published_rule():
    """The largest set first; of equal sets the one that begins last; a set that does not fit goes on to the next."""
    scaffolds = ["a"] * 5 + ["b"] * 2 + ["c"] * 2 + ["d"]
    val, test = scaffold_split(scaffolds)
    # a: 5 of 8; c: 7 of 8; b: 9 > 8, but 9 of 9 with validation; d: 8 of 8.
    assert np.flatnonzero(val).tolist() == [5, 6] and np.flatnonzero(test).tolist() == []
    val, test = scaffold_split(["a"] * 7 + ["b"] * 2 + ["c"])
    assert np.flatnonzero(val).tolist() == [7, 8] and not test.any()
    val, test = scaffold_split(["a"] * 9 + ["b"] * 4 + ["c"] * 7)
    assert np.flatnonzero(test).tolist() == [9, 10, 11, 12] and not val.any()


def test_random_splits_keep_scaffolds_whole_and_follow_from_the_seed():
    scaffolds = [str(n // 2) for n in range(40)]
    val, test = random_scaffold_split(scaffolds, 0)
    assert val.sum() == test.sum() == 4 and not (val & test).any()
    assert all(val[n] == val[n + 1] and test[n] == test[n + 1] for n in range(0, 40, 2))
    assert (random_scaffold_split(scaffolds, 1)[0] != val).any()


def write_tu(root: Path, count: int = 30) -> Path:
    """Rings, and rings with all chords, in turn; two node labels."""
    root.mkdir(parents=True, exist_ok=True)
    edges, graph, labels, nodes = [], [], [], 0
    for number in range(count):
        size, dense = 3 + number % 4, number % 2
        pairs = {(i, (i + 1) % size) for i in range(size)} | {(i, j) for i in range(size) for j in range(i) if dense}
        edges += [f"{nodes + a + 1}, {nodes + b + 1}" for a, b in sorted(pairs)]
        graph += [number + 1] * size
        labels += [10 + dense] * size
        nodes += size
    kinds = [f"{1 + n % 2}" for n in range(count)]
    for name, lines in {"A": edges, "graph_indicator": graph, "graph_labels": kinds, "node_labels": labels}.items():
        (root / f"TINY_{name}.txt").write_text("\n".join(map(str, lines)) + "\n")
    return root


def tu_config(**options) -> TUConfig:
    return TUConfig(reader="tu", name="tiny", prefix="TINY", **options)


def test_the_tu_layout_is_read(tmp_path):
    dataset = read(tu_config(fold=2), write_tu(tmp_path))
    assert dataset.classes == ("1", "2") and dataset.graphs.node_counts[:5].tolist() == [3, 4, 5, 6, 3]
    batch = batch_of(dataset.graphs, np.array([0, 1]), CPU)
    assert batch.edge_counts == (6, 12)  # each edge both ways, once
    assert batch.nodes[:, 0].tolist() == [0] * 3 + [1] * 4
    splits = make_splits(dataset, tu_config(fold=2), SplitConfig())
    assert len(splits.test) == 3 and len(splits.train) == 27
    for name, text in (("A", "1, 99\n"), ("graph_labels", "x\n"), ("node_labels", "1\n"), ("A", "1, 30\n")):
        kept = (tmp_path / f"TINY_{name}.txt").read_text()
        (tmp_path / f"TINY_{name}.txt").write_text(text)
        with pytest.raises(UserError):
            read(tu_config(), tmp_path)
        (tmp_path / f"TINY_{name}.txt").write_text(kept)


def test_folds_are_stratified():
    labels = np.array([0] * 663 + [1] * 450)
    folds = stratified_folds(labels, 10, 0)
    assert set(np.bincount(folds)) == {111, 112}
    assert {int((labels[folds == fold] == 1).sum()) for fold in range(10)} == {45}


# ---- loss and scores -------------------------------------------------------------------------------------


def test_the_loss_is_a_mean_over_known_labels():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0], [1.0, 1.0]], requires_grad=True)
    labels = torch.tensor([[1, 0], [-1, 1], [0, 0]])
    found = GraphProperties.sample_loss(logits, labels)
    terms = [F.softplus(torch.tensor(v)).item() for v in (-2.0, 0.5, -3.0)]
    assert found.item() == pytest.approx(sum(terms) / 3)
    assert GraphProperties.sample_loss(logits, labels, reduction="none").tolist() == pytest.approx(
        [terms[0], (terms[1] + terms[2]) / 2, 0]
    )
    found.backward()
    assert logits.grad[0, 1] == 0 and not logits.grad[2].any()
    assert GraphProperties().correct(logits, labels).item() == pytest.approx(1.5)


def test_the_squared_error_is_a_mean_over_known_labels():
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0], [1.0, 1.0]], requires_grad=True)
    labels = torch.tensor([[1.0, torch.nan], [-1.0, 1.0], [torch.nan, torch.nan]])
    found = GraphRegression.sample_loss(logits, labels)
    assert found.item() == pytest.approx((1 + 1.5**2 + 2**2) / 3)
    each = GraphRegression.sample_loss(logits, labels, reduction="none")
    assert each.tolist() == pytest.approx([1.0, (1.5**2 + 2**2) / 2, 0])
    assert GraphRegression.sample_loss(logits, labels, reduction="sum").item() == pytest.approx(each.sum().item())
    found.backward()
    assert logits.grad[0, 1] == 0 and not logits.grad[2].any()


def test_roc_auc_counts_pairs():
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 8, 60).astype(float), random.integers(-1, 2, 60)
    yes, no = scores[labels == 1], scores[labels == -1]
    counted = np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no])
    assert roc_auc(scores, labels) == pytest.approx(counted, abs=1e-12)
    assert roc_auc(scores, np.abs(labels)) is None
    metrics = pytest.importorskip("sklearn.metrics")
    known = labels != 0
    assert roc_auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels[known], scores[known]), abs=1e-12)


# ---- methods on nodes ------------------------------------------------------------------------------------


@pytest.fixture
def source():
    torch.manual_seed(0)
    return GraphNetwork(GraphEncoder(LAYERS["gcn"], 2), "head", ["gnns.4.linear"]).freeze()


def test_delta_is_half_the_squared_distance_summed_over_all_nodes(packed, source):
    target, batch = source.with_new_head(1, 0).requires_grad_(True), batch_of(packed, np.arange(4), CPU)
    with torch.no_grad():
        target.model.gnns[0].linear.weight.mul_(1.1)
    outputs, of_source = target(batch), source(batch)
    difference = (outputs["gnns.4.linear"] - of_source["gnns.4.linear"]).squeeze()
    assert difference.shape == (13, 300)
    found = DELTAWithoutAttention(alpha=1.0, beta=0.0).penalty(target, outputs, of_source)["feature_maps"]
    torch.testing.assert_close(found, 0.5 * difference.square().sum())


def test_attention_removes_channels_of_all_nodes_under_the_tasks_loss(packed, source):
    batch, labels = batch_of(packed, np.arange(4), CPU), torch.tensor([[1, -1], [-1, 0], [1, 1], [-1, 1]])
    options = AttentionConfig(images=4, head_epochs=2)
    delta = DELTA(attention=options)
    delta.sample_loss = GraphProperties.sample_loss
    fitted = delta.fit(source, [(batch, labels)], 2)
    assert fitted["gnns.4.linear"].shape == (300,) and fitted["gnns.4.linear"].std() > 0
    probed = channel_attention(source, [(batch, labels)], None, options, GraphProperties.sample_loss)

    def loss(channel: int | None) -> torch.Tensor:
        def without(module, arguments, output):
            output = output.clone()
            output[:, channel] = 0
            return output

        handle = source.model.gnns[4].linear.register_forward_hook(without) if channel is not None else None
        logits = source.model(batch).double()
        if handle:
            handle.remove()
        return GraphProperties.sample_loss(logits, labels, reduction="none")

    torch.testing.assert_close(probed.rises["gnns.4.linear"][:, 17], loss(17) - loss(None), atol=1e-9, rtol=1e-6)


def test_stochnorm_normalises_nodes(packed, source):
    target, batch = source.with_new_head(1, 0).requires_grad_(True).train(), batch_of(packed, np.arange(4), CPU)
    plain = target.copy().train()(batch)["logits"]
    StochNorm(p=1.0).setup(target)
    torch.testing.assert_close(target(batch)["logits"], plain)


# ---- runs ------------------------------------------------------------------------------------------------


def words(root: Path, results: Path, *more: str) -> list[str]:
    return [
        *("dataset=proteins", f"dataset.root={root}", "dataset.prefix=TINY", "backbone=gcn", "backbone.weights=none"),
        *("schedule.epochs=null", "schedule.iterations=4", "schedule.batch_size=8", "schedule.log_every=1"),
        *(f"results_dir={results}", "device=cpu", *more),
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tu(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("reg", ["l2", "l2_fe", "l2_sp", "delta_noatt", "delta", "bss", "stochnorm", "lp_ft", "rifle"])
def test_a_run_of_each_method_that_fits(tiny, tmp_path, reg):
    few = ["reg.attention.images=4", "reg.attention.head_epochs=1"] if reg == "delta" else []
    done = run(composed(*words(tiny, tmp_path, f"reg={reg}", *few))).summary
    assert done["error"] is None and 0 <= done["test_top1"] <= 100 and done["num_classes"] == 2
    folder = tmp_path / "runs" / done["run_id"]
    assert np.load(folder / "predictions.npz")["logits"].shape == (3, 2)
    before = build_source(composed(*words(tiny, tmp_path)).backbone, 0).weights()
    after = load_file(folder / "model.safetensors")
    frozen = all(torch.equal(before[name], after[name]) for name in before if name.startswith("gnns."))
    assert frozen == (reg == "l2_fe")


@pytest.mark.parametrize("reg", ["at", "afa", "l2t_ww", "bi_tuning", "l2_sp_fisher"])
def test_a_method_that_needs_images_is_refused(tiny, tmp_path, reg):
    with pytest.raises(UserError):
        run(composed(*words(tiny, tmp_path, f"reg={reg}")))
    assert not (tmp_path / "runs").exists()


def test_what_does_not_go_together_is_refused(tiny, tmp_path):
    for more in (["backbone=resnet18"], ["schedule.pad=1"], ["arcface.margin=0.1"], ["average=best_validation"]):
        with pytest.raises(UserError):
            composed(*words(tiny, tmp_path), *more)
    with pytest.raises(UserError):
        composed("dataset=cub", "backbone=gcn")


def write_molecules(root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    smiles = ["C" * n + end for n in range(1, 9) for end in ("O", "N", "c1ccccc1", "C1CC1", "C1CCC1")]
    lines = [f"{n % 2},{(n // 2) % 2 if n % 3 else ''},{one}" for n, one in enumerate(smiles)]
    (root / "BBBP.csv").write_text("\n".join(["first,second,smiles", *lines]) + "\n")
    return root


def test_molecules_train_and_stop_early_and_say_so(tmp_path, capsys):
    pytest.importorskip("rdkit")
    root = write_molecules(tmp_path / "data")
    options = ["dataset=bbbp", f"dataset.root={root}", "backbone.weights=none", "device=cpu", "dataset.cut=random"]
    options += ["schedule.epochs=8", "schedule.batch_size=16", "schedule.eval_epochs=1", f"results_dir={tmp_path}"]
    done = run(composed(*options, "reg=l2", "average=best_validation", "average.patience=2")).summary
    assert done["selection"] == "best validation" and done["best_step"] % 2 == 0
    said = capsys.readouterr().out
    assert re.search(r" \d+ graphs/s", said) and "images" not in said
    lines = [json.loads(line) for line in (tmp_path / "runs" / done["run_id"] / "metrics.jsonl").open()]
    scores = {line["step"]: line["val_roc_auc"] for line in lines if "val_roc_auc" in line}
    assert done["val_roc_auc"] == max(scores.values()) == scores[done["best_step"]]
    assert done["iterations"] == max(scores) == min(done["best_step"] + 4, 16)
    assert done["test_scored_properties"] >= 1 and done["test_top1"] is None
    last = run(composed(*options, "reg=l2")).summary
    assert last["selection"] == "last iteration" and last["run_id"] != done["run_id"] and last["iterations"] == 16


def test_counts_that_are_not_the_official_ones_are_those_of_graphs(tmp_path, capsys):
    pytest.importorskip("rdkit")
    root = write_molecules(tmp_path / "data")
    config = composed("dataset=bbbp", f"dataset.root={root}", "backbone.weights=none", "reg=l2")
    dataset = load_dataset(config.dataset, tmp_path)
    say_what_it_trains("run", config, dataset, make_splits(dataset, config.dataset, config.split), 1)
    said = capsys.readouterr().out
    assert re.search(r"training and \d+ test graphs, properties: \d+; officially 1,835, 204, 1", said)
    assert "image" not in said and "classes" not in said


def test_an_interrupted_run_ends_the_same(tmp_path, monkeypatch, capsys):
    """With attention, dropout, and the epoch that is best on validation molecules."""
    pytest.importorskip("rdkit")
    root = write_molecules(tmp_path / "data")
    options = ["dataset=bbbp", f"dataset.root={root}", "backbone.weights=none", "device=cpu", "dataset.cut=random"]
    options += ["schedule.epochs=4", "schedule.batch_size=16", "schedule.eval_epochs=1", "average=best_validation"]
    options += ["reg=delta", "reg.alpha=0.001", "reg.attention.images=4", "reg.attention.head_epochs=1"]
    assert delta_run(monkeypatch, *options, f"results_dir={tmp_path / 'whole'}") == 0
    batch = GraphLoader.train_batch

    def interrupted(loader, indices, iteration):
        if iteration == 6:
            signal.raise_signal(signal.SIGTERM)
        return batch(loader, indices, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(GraphLoader, "train_batch", interrupted)
        assert delta_run(patch, *options, f"results_dir={tmp_path / 'cut'}") != 0
    assert delta_run(monkeypatch, *options, f"results_dir={tmp_path / 'cut'}") == 0
    assert "resuming after iteration 7" in capsys.readouterr().out
    (whole,), (cut,) = ((tmp_path / name / "runs").iterdir() for name in ("whole", "cut"))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)
    records = [json.loads((folder / "summary.json").read_text()) for folder in (whole, cut)]
    for key in ("best_step", "val_roc_auc", "test_roc_auc", "iterations"):
        assert records[0][key] == records[1][key]


@pytest.fixture(scope="module")
def esol(tmp_path_factory) -> list[str]:
    """Words of a short run on molecules whose value is their number of carbon atoms."""
    pytest.importorskip("rdkit")
    root = tmp_path_factory.mktemp("esol")
    smiles = ["C" * n + end for n in range(1, 9) for end in ("O", "N", "c1ccccc1", "C1CC1", "C1CCC1")]
    lines = [f"{one.count('C') / 10 - 3},{one}" for one in smiles]
    (root / "delaney-processed.csv").write_text("\n".join(["measured log solubility in mols per litre,smiles", *lines]))
    return [
        *("dataset=esol", f"dataset.root={root}", "dataset.cut=random", "backbone.weights=none", "device=cpu"),
        *("schedule.batch_size=16", "schedule.epochs=4", "schedule.log_every=4"),
    ]


def test_a_regression_runs_and_its_error_has_the_unit_of_the_labels(esol, tmp_path):
    done = run(composed(*esol, f"results_dir={tmp_path}", "reg=delta_noatt", "reg.alpha=1e-9")).summary
    folder = tmp_path / "runs" / done["run_id"]
    with np.load(folder / "values.npz") as arrays:
        errors = arrays["predicted"] - arrays["labels"]
        assert arrays["labels"].shape == (4, 1) and -3 < arrays["labels"].min() < arrays["labels"].max() < -1
        assert done["test_rmse"] == pytest.approx(np.sqrt((errors**2).mean())) and len(arrays["names"]) == 4
    mean, std = done["label_scale"]["mean"][0], done["label_scale"]["std"][0]
    assert -3 < mean < -1 and done["test_loss"] == pytest.approx((done["test_rmse"] / std) ** 2, rel=1e-4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert all("squared_error" in line and "train_top1" not in line for line in lines)
    assert lines[-1]["squared_error"] < lines[0]["squared_error"]


def test_early_stopping_keeps_the_least_error(esol, tmp_path):
    words = [*esol, f"results_dir={tmp_path}", "reg=l2", "schedule.eval_epochs=1", "average=best_validation"]
    done = run(composed(*words, "average.measure=rmse")).summary
    lines = [json.loads(line) for line in (tmp_path / "runs" / done["run_id"] / "metrics.jsonl").open()]
    scores = {line["step"]: line["val_rmse"] for line in lines if "val_rmse" in line}
    assert len(scores) == 4 and done["val_rmse"] == min(scores.values()) == scores[done["best_step"]]


@pytest.mark.parametrize("more", [["reg=lp_ft"], ["reg=co_tuning"], ["schedule.class_weights=balanced"]])
def test_a_regression_refuses_what_needs_classes(esol, tmp_path, more):
    with pytest.raises(UserError):
        run(composed(*esol, f"results_dir={tmp_path}", *more))
    assert not (tmp_path / "runs").exists()


def test_the_best_weights_count_once_training_has_ended_and_a_checkpoint_keeps_them(source):
    from types import SimpleNamespace

    kept, seen = BestValidation(BestValidationConfig(patience=2)), []
    at = SimpleNamespace(state=SimpleNamespace(target=source), end=9, done=0)
    for step, score in enumerate([60.0, 70.0, 65.0, 70.0], 1):
        with torch.no_grad():
            source.model.head.bias.fill_(float(step))
        at.done = step
        kept.on_line({"step": step, "val_roc_auc": score})
        kept.on_step(at)
    assert at.end == 4 and kept.best_step == 2
    resumed = BestValidation(BestValidationConfig(patience=2))
    resumed.load_state_dict(kept.state_dict())
    for one in (kept, resumed):
        with one.applied(source):
            seen.append(source.model.head.bias[0].item())
        one.finish(dict)
        with one.applied(source):
            seen.append(source.model.head.bias[0].item())
    assert seen == [4.0, 2.0, 4.0, 2.0]
    with pytest.raises(UserError):
        kept.on_line({"step": 5, "test_roc_auc": 1.0})


def test_the_order_follows_from_seed_and_iteration_alone(packed, tiny):
    dataset = read(tu_config(), tiny)
    one, other = (GraphLoader(dataset, batch_size=6, seed=3, device=CPU) for _ in range(2))
    other.train_batch(np.arange(20), 0)
    for found, expected in zip(one.train_batch(np.arange(20), 5), other.train_batch(np.arange(20), 5), strict=True):
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, expected)
        else:
            assert torch.equal(found.nodes, expected.nodes) and torch.equal(found.edges, expected.edges)


def test_a_chain_for_measuring_has_the_shape_of_a_molecule():
    graphs = chains(3, nodes=4)
    assert len(graphs) == 3 and graphs.nodes.shape == (12, 2) and graphs.edges.shape == (2, 18)
    assert bool(graphs.isfinite())


def test_the_doctor_decodes_no_molecules(tmp_path, capsys):
    pytest.importorskip("rdkit")
    assert delta_data(["doctor", "dataset=bbbp", f"dataset.root={write_molecules(tmp_path)}"]) == 0
    assert "TROUBLE" not in capsys.readouterr().out
