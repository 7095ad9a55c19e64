"""The regularizers in somebody else's loop: any module, maps of any layout, nothing imported before it is asked for."""

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import delta_transfer
from delta_transfer import (
    AT,
    BSS,
    DELTA,
    FM,
    L2SP,
    L2TWW,
    LPFT,
    RIFLE,
    AFAChannel,
    AFASpatial,
    AttentionConfig,
    BiTuning,
    CoTuning,
    DELTAWithoutAttention,
    HookedNetwork,
    L2SPFisher,
    LwF,
    Network,
    StochNorm,
    channel_attention,
    tapped,
)
from delta_transfer.common.errors import UserError
from delta_transfer.common.options import OptionError
from delta_transfer.methods import METHODS, method_config
from delta_transfer.methods.attention import attention_weights
from delta_transfer.methods.l2_sp_fisher import FisherConfig
from delta_transfer.methods.lp_ft import ProbeConfig
from delta_transfer.models.layouts import LAYOUTS, as_feature_map, in_layout

from .conftest import TinyNet, randomise_batchnorm


class Tokens(nn.Module):
    """(B, 6, 4) -> (B, 3): tokens that look at each other, overwritten in place behind the tap; untraceable."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(4, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        if x.mean() > 1e6:  # control flow on values is what torch.fx cannot trace
            raise ValueError
        y = self.block(x)
        y += y.softmax(dim=1) * y.mean(dim=1, keepdim=True)
        return self.head(F.gelu(self.mix(y)).mean(dim=1))


class Nodes(nn.Module):
    """Nodes (N, 4) of graphs, their adjacency (N, N) and graph (N,) -> (graphs, 3)."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x, adjacency, graph):
        y = self.second(F.relu(adjacency @ self.first(x)))
        pooled = y.new_zeros(int(graph.max()) + 1, 5).index_add(0, graph, torch.tanh(y))
        return self.head(pooled)


def tokens_network() -> HookedNetwork:
    torch.manual_seed(0)
    return tapped(Tokens().double(), "head", ["block"], layout="BNC").freeze()


def nodes_network() -> HookedNetwork:
    torch.manual_seed(0)
    return tapped(Nodes().double(), "head", ["second"], layout="NC").freeze()


def node_inputs():
    """Two graphs of 3 and 4 nodes."""
    torch.manual_seed(1)
    adjacency = torch.block_diag(torch.rand(3, 3), torch.rand(4, 4)).double()
    return torch.randn(7, 4).double(), adjacency, torch.tensor([0, 0, 0, 1, 1, 1, 1])


def moved(source: Network) -> Network:
    target = source.with_new_head(3, seed=1).requires_grad_(True).train()
    torch.manual_seed(2)
    with torch.no_grad():
        for p in target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return target


def raw(network: Network, layer: str, *inputs) -> torch.Tensor:
    """The output of the layer itself, in a model without our hooks."""
    values, model = [], network.copy()._model[0]
    model.get_submodule(layer).register_forward_hook(lambda module, arguments, output: values.append(output.clone()))
    with torch.no_grad():
        model(*inputs)
    return values[0]


# ------------------------------------------------------------------------------------------------------ penalties


def test_delta_of_tokens_is_a_sum_over_the_batch_divided_by_their_number():
    source, v = tokens_network(), torch.randn(5, dtype=torch.float64)
    target, x = moved(source), torch.randn(2, 6, 4, dtype=torch.float64)
    delta = DELTA(alpha=0.3, beta=0.0)
    delta.load_fitted({"block": v})
    found = delta.penalty(target, target(x), source(x))["feature_maps"]
    difference, w = raw(target, "block", x) - raw(source, "block", x), attention_weights(v, 5.0)
    expected = sum(
        0.3 * 0.5 * 5 * float(w[c]) * float(difference[b, n, c]) ** 2 / 6
        for b in range(2)
        for n in range(6)
        for c in range(5)
    )
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_delta_of_nodes_is_a_sum_over_nodes_with_the_factor_c_that_the_graph_code_leaves_out():
    source, v, inputs = nodes_network(), torch.randn(5, dtype=torch.float64), node_inputs()
    target = moved(source)
    delta = DELTA(alpha=0.3, beta=0.0)
    delta.load_fitted({"second": v})
    found = delta.penalty(target, target(*inputs), source(*inputs))["feature_maps"]
    difference, w = raw(target, "second", *inputs) - raw(source, "second", *inputs), attention_weights(v, 5.0)
    graph_code = sum(0.5 * float(w[c]) * float(difference[n, c]) ** 2 for n in range(7) for c in range(5))
    assert found.item() == pytest.approx(0.3 * 5 * graph_code, rel=1e-12)


def test_afa_of_tokens_weighs_them():
    source = tokens_network()
    target, x = moved(source), torch.randn(2, 6, 4, dtype=torch.float64)
    afa = AFASpatial(alpha=0.3, beta=0.0)
    afa.setup(target, source.map_shapes_on(x))
    afa.double()
    found = afa.penalty(target, target(x), source(x))["feature_maps"]
    source_map = raw(source, "block", x)
    a = afa.modules_by_tap["block"].layers(source_map.mean(dim=2)).softmax(dim=1)
    difference = raw(target, "block", x) - source_map
    expected = 0.3 * 0.5 / 2 * ((6 * a[:, :, None] * difference) ** 2).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_gradient_of_a_penalty_on_tokens_reaches_the_layer():
    source = tokens_network()
    target, x = moved(source), torch.randn(2, 6, 4, dtype=torch.float64)
    DELTAWithoutAttention(alpha=1.0, beta=0.0).penalty(target, target(x), source(x))["feature_maps"].backward()
    layer, difference = target._model[0].block, raw(target, "block", x) - raw(source, "block", x)
    expected = torch.einsum("bnc,bni->ci", difference / 6, x)
    torch.testing.assert_close(layer.weight.grad, expected)


def test_l2_sp_starts_from_any_module_and_says_where_it_has_nothing_to_keep():
    source = nodes_network()
    l2_sp, target = L2SP(alpha=1.0, beta=0.0), source.with_new_head(3, seed=1).requires_grad_(True)
    l2_sp.setup(target)
    with torch.no_grad():
        target._model[0].first.bias.add_(2.0)
    assert l2_sp.penalty(target, {}, None)["weights"].item() == pytest.approx(0.5 * 5 * 4)
    with pytest.raises(UserError, match="scope=all"):
        L2SP(scope="conv").setup(target)


def test_every_method_can_be_used_as_the_documentation_says():
    """docs/library.md, "What each method needs"."""
    torch.manual_seed(0)
    model = TinyNet(num_classes=5)
    randomise_batchnorm(model)
    source = tapped(model, "fc", ["conv1", "conv2"]).freeze()
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    batches = [(images, labels)]
    shapes = source.map_shapes_on(images)

    def trained(method, before=lambda method, target: None, penalty=None, after=lambda method, target, sgd: None):
        """The target after three steps; its loss falls."""
        target = source.with_new_head(3, seed=0).requires_grad_(True).train()
        before(method, target)
        sgd = torch.optim.SGD([*target.parameters(), *method.trained()], lr=0.01)
        losses = []
        for _ in range(3):
            outputs = target(images)
            loss = F.cross_entropy(outputs["logits"], labels)
            if penalty is not None:
                loss = loss + sum(penalty(method, target, outputs).values())
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        after(method, target, sgd)
        assert losses[-1] < losses[0]
        return target

    def with_source(method, target, outputs):
        return method.penalty(target, outputs, source(images))

    def alone(method, target, outputs):
        return method.penalty(target, outputs, None)

    def with_labels(method, target, outputs):
        return method.penalty(target, outputs | {"labels": labels}, None)

    def contrast(method, target, outputs):
        method.follow(target)
        return method.penalty(target, outputs | {"labels": labels, "view_2": images.flip(3)}, None)

    def fit(method, target):
        method.fit(source, batches, 3)

    def fit_and_setup(method, target):
        method.fit(source, batches, 3)
        method.setup(target)

    def setup(method, target):
        method.setup(target)

    def setup_with_shapes(method, target):
        method.setup(target, target.map_shapes_on(images), shapes)

    trained(DELTA(1e-4, attention=AttentionConfig(images=6, head_epochs=1)), fit, with_source)
    trained(DELTAWithoutAttention(1e-4), penalty=with_source)
    trained(L2SP(), setup, alone)
    trained(L2SPFisher(fisher=FisherConfig(images=2)), fit_and_setup, alone)
    trained(AFASpatial(1e-4), lambda m, t: m.setup(t, shapes), with_source)
    trained(AFAChannel(1e-4), lambda m, t: m.setup(t, shapes), with_source)
    trained(BSS(), penalty=alone)
    trained(CoTuning(0.1), fit_and_setup, with_labels)
    trained(LPFT(probe=ProbeConfig(c=1.0)), fit_and_setup)
    trained(StochNorm(), setup)
    before = source.with_new_head(3, seed=0).head_parameters()["fc.weight"]
    target = trained(RIFLE(), after=lambda m, t, sgd: m.redraw(t, sgd, seed=9))
    assert not torch.allclose(target.head_parameters()["fc.weight"], before, atol=0.1)
    trained(BiTuning(alpha=1e-3), setup, contrast)
    trained(LwF(0.1), lambda m, t: m.setup(t, {}, {"logits": (5,)}), with_source)
    trained(AT(1.0), setup_with_shapes, with_source)
    trained(FM(1e-3), setup_with_shapes, with_source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DELTA(alpha=-1), "reg.alpha must be at least 0, got -1"),
        (lambda: L2SP(beta=float("nan")), "reg.beta must be at least 0, got nan"),
        (lambda: L2SP(scope="convolutions"), "reg.scope must be one of all, conv, got 'convolutions'"),
        (lambda: L2SPFisher(form="sum"), "reg.form must be one of add, min"),
        (lambda: RIFLE(bound="both"), "reg.bound must be one of features, classes"),
        (lambda: L2TWW(where="relu7"), "reg.where must be one of relu6, relu, relu_mean, constant, off"),
        (lambda: FM(pairs="all"), "reg.pairs must be one of all_to_all, one_to_one, single"),
        (lambda: DELTA(attention={"images": 0}), "reg.attention.images must be more than 0"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        make()


def test_what_a_loop_forgot_is_named():
    source = tokens_network()
    target, x = moved(source), torch.randn(2, 6, 4, dtype=torch.float64)
    outputs = target(x)
    with pytest.raises(UserError, match="penalty\\(\\) needs what the source returns"):
        DELTAWithoutAttention().penalty(target, outputs, None)
    with pytest.raises(ValueError, match="shape of the maps at block: setup\\(target, target.map_shapes_on"):
        AFASpatial(alpha=0.1).setup(target)
    co_tuning = CoTuning()
    co_tuning.fit(source, [(x, torch.tensor([0, 1]))], 3)
    co_tuning.setup(target)
    with pytest.raises(UserError, match="needs the labels of the batch"):
        co_tuning.penalty(target, outputs, None)
    assert co_tuning.penalty(target, outputs | {"labels": torch.tensor([0, 1])}, None)["source_classes"] > 0


# --------------------------------------------------------------------------------------------------------- registry


def test_options_are_read_from_plain_data_and_build_what_they_name():
    values = {"name": "any", "beta": 0.2, "terms": {"a": {"name": "at", "alpha": 3.0}, "d": {"name": "delta"}}}
    config = method_config(values)
    made = config.build()
    assert (type(made).__name__, made.beta, made.terms["a"].alpha) == ("Sum", 0.2, 3.0)
    assert config.title == "AT+DELTA" and method_config({"name": "l2t_w"}).title == "L2T-w"
    for values, key in (
        ({"name": "delta", "alpha": -1.0}, "reg.alpha"),
        ({"name": "s", "terms": {"a": {"name": "delta", "attention": {"images": 0}}}}, "reg.terms.a.attention.images"),
        ({"name": "nothing"}, "reg.name"),
    ):
        with pytest.raises(OptionError) as raised:
            method_config(values)
        assert raised.value.key == key
    with pytest.raises(OptionError) as raised:
        METHODS["l2"].options(name="delta").build()
    assert raised.value.key == "reg.name"


# -------------------------------------------------------------------------------------------------------- attention


def brute_force(network: HookedNetwork, layer: str, inputs, labels) -> torch.Tensor:
    """(samples, C): rises of the loss with one channel's weights and bias at 0, in a copy of the model."""
    model = network.copy()._model[0].eval()
    with torch.no_grad():
        intact = F.cross_entropy(model(*inputs), labels, reduction="none")
        rises = []
        for channel in range(model.get_submodule(layer).out_features):
            ablated = network.copy()._model[0].eval()
            ablated.get_submodule(layer).weight[channel] = 0
            ablated.get_submodule(layer).bias[channel] = 0
            rises.append(F.cross_entropy(ablated(*inputs), labels, reduction="none") - intact)
    return torch.stack(rises, dim=1)


def test_attention_of_tokens_equals_removing_the_filters():
    network, x, labels = tokens_network(), torch.randn(5, 6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    batches = list(zip(x.split(3), labels.split(3), strict=True))
    found = channel_attention(network, batches, options=AttentionConfig(images=4, forward_images=2))
    expected = brute_force(network, "block", (x[:4],), labels[:4])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.rises["block"], expected)
    torch.testing.assert_close(found.importance["block"], expected.mean(dim=0).float())
    torch.testing.assert_close(found.weights["block"], attention_weights(expected.mean(dim=0).float(), 5.0))


def test_attention_of_nodes_has_a_row_for_each_labelled_graph():
    network, inputs = nodes_network(), node_inputs()
    expected = brute_force(network, "second", inputs, torch.tensor([2, 0]))
    assert expected.abs().max() > 1e-3
    found = channel_attention(network, [(inputs, torch.tensor([2, 0]))], options=AttentionConfig(images=2))
    torch.testing.assert_close(found.rises["second"], expected)
    found = channel_attention(network, [(inputs, torch.tensor([2, -100]))], options=AttentionConfig(images=1))
    torch.testing.assert_close(found.rises["second"], expected[:1])
    with pytest.raises(ValueError, match="empty"):
        channel_attention(network, [(inputs, torch.tensor([-100, -100]))])


def test_hooks_and_the_traced_way_agree_on_a_residual_network(tiny_source):
    torch.manual_seed(3)
    hooked = HookedNetwork(tiny_source.copy()._model[0], "fc", tiny_source.taps).freeze()
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    batches, options = [(images, labels)], AttentionConfig(images=4, head_epochs=2)
    for network in (tiny_source, hooked):  # conv2's map is added to in place behind its BatchNorm
        assert torch.equal(network(images)["conv2"], tiny_source(images)["conv2"])
    traced, by_hooks = (channel_attention(n, batches, 3, options).rises for n in (tiny_source, hooked))
    torch.testing.assert_close(by_hooks, traced, rtol=1e-3, atol=1e-5)
    taylor = AttentionConfig(images=4, head_epochs=1, method="taylor")
    traced, by_hooks = (channel_attention(n, batches, 3, taylor).rises for n in (tiny_source, hooked))
    torch.testing.assert_close(by_hooks, traced, rtol=1e-3, atol=1e-5)


def test_a_first_order_estimate_of_nodes_is_refused():
    network, inputs = nodes_network(), node_inputs()
    with pytest.raises(UserError, match="exact"):
        channel_attention(network, [(inputs, torch.tensor([2, 0]))], options=AttentionConfig(method="taylor"))


def test_the_probed_network_stays_as_it_is():
    torch.manual_seed(0)
    model = TinyNet()
    randomise_batchnorm(model)
    network = HookedNetwork(model, "fc", ["conv1"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    channel_attention(network, [(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))], 3, AttentionConfig(head_epochs=1))
    assert model.training and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------- tapped networks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_seen_as_images_and_undone(layout):
    sizes = {"B": 2, "C": 3, "H": 4, "W": 5, "N": 6}
    value = torch.randn([sizes[axis] for axis in layout])
    seen = as_feature_map(value, layout)
    positions = {"BCHW": (4, 5), "BHWC": (4, 5), "NC": (1, 1)}.get(layout, (6, 1))
    assert seen.shape == (6 if layout == "NC" else 2, 3, *positions)
    assert torch.equal(in_layout(seen, layout), value)
    channel = value.select(layout.index("C"), 1)
    assert torch.equal(seen[:, 1].flatten().sort()[0], channel.flatten().sort()[0])


def test_a_map_is_what_its_layer_returned_though_it_is_overwritten_later():
    network, x = tokens_network(), torch.randn(2, 6, 4, dtype=torch.float64)
    model = network._model[0]
    assert torch.equal(network(x)["block"][..., 0], F.linear(x, model.block.weight, model.block.bias).transpose(1, 2))
    assert torch.equal(network(x)["logits"], model(x))
    assert not model.block._forward_hooks  # the model is left without hooks


def test_what_can_be_traced_is_traced_and_the_rest_has_hooks():
    assert type(tapped(TinyNet(), "fc", ["conv1"])) is Network
    assert type(tapped(TinyNet(), "fc", ["conv1"], layout={"conv1": "BHWC"})) is HookedNetwork
    assert type(tokens_network()) is type(nodes_network()) is HookedNetwork
    copied = tokens_network().copy()
    assert type(copied) is HookedNetwork and copied.layouts == {"block": "BNC"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("head", ["blok"], "BNC"), "no layer 'blok'"),
        (("head", ["block"], "BXC"), "none of BCHW"),
        (("head", ["block"], {"other": "BNC"}), "none of BCHW"),
        (("mix", ["head"], "BNC"), None),
    ],
)
def test_mistakes_are_named(arguments, message):
    head, taps, layout = arguments
    if message is None:
        with pytest.raises(UserError, match="layout BNC has 3 axes"):
            tapped(Tokens(), head, taps, layout)(torch.randn(2, 6, 4))
    else:
        with pytest.raises(UserError, match=message):
            tapped(Tokens(), head, taps, layout)


def test_a_layer_has_to_run_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.never, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(self.layer(x)))

    with pytest.raises(UserError, match="runs twice"):
        tapped(Twice(), "head", ["layer"], "NC")(torch.randn(2, 4))
    with pytest.raises(UserError, match="'never' did not run"):
        tapped(Twice(), "head", ["never"], "NC")(torch.randn(2, 4))


def test_a_head_may_be_called_by_the_name_of_its_argument():
    class Named(Tokens):
        def forward(self, x):
            return self.head(input=self.block(x).mean(dim=1))

    x = torch.randn(2, 6, 4)
    network = tapped(Named(), "head", ["block"], "BNC")
    assert torch.equal(network(x)["embedding"], network.model.block(x).mean(dim=1))


def test_a_layer_that_returns_no_tensor_is_refused_and_leaves_no_hooks():
    class Records(nn.Linear):
        def forward(self, x):
            return {"tokens": super().forward(x)}

    class Recorded(Tokens):
        def __init__(self):
            super().__init__()
            self.block = Records(4, 5)

        def forward(self, x):
            return self.head(self.block(x)["tokens"].mean(dim=1))

    network = tapped(Recorded(), "head", ["block"], "BNC")
    with pytest.raises(UserError, match="'block' returns a dict"):
        network(torch.randn(2, 6, 4))
    assert not any(module._forward_hooks for module in network.model.modules())


@pytest.mark.parametrize("method", [DELTAWithoutAttention(), AFASpatial(alpha=0.1)])
def test_maps_are_penalised_only_where_some_are_tapped(method):
    network = tapped(Tokens(), "head", layout="BNC")
    outputs = network(torch.randn(2, 6, 4))
    with pytest.raises(UserError, match="no taps"):
        method.penalty(network, outputs, outputs)


@pytest.mark.parametrize("method", [L2SP(), AFASpatial(alpha=0.1)])
def test_a_penalty_before_setup_says_so(method):
    network = tapped(Tokens(), "head", ["block"], "BNC")
    outputs = network(torch.randn(2, 6, 4))
    with pytest.raises(RuntimeError, match=r"call setup\(\) before penalty"):
        method.penalty(network, outputs, outputs)


def test_a_map_without_a_layout_is_refused_by_the_penalty():
    traced = tapped(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), "1", ["0"])
    outputs = traced(torch.randn(2, 4))
    with pytest.raises(UserError, match="name its layout"):
        DELTAWithoutAttention().penalty(traced, outputs, outputs)


# ----------------------------------------------------------------------------------------------------------- import


def modules_after(code: str) -> set[str]:
    """The top-level packages that a new interpreter has imported after `code`."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_does_not_import_torch():
    # Nor does looking for a submodule, or for a name that is not there.
    code = "import delta_transfer; from delta_transfer import common; hasattr(delta_transfer, 'other')"
    assert not {"torch", "hydra", "omegaconf"} & modules_after(code)


def test_the_methods_import_neither_hydra_nor_omegaconf():
    found = modules_after("from delta_transfer import *; DELTA, tapped, Sum")
    assert "torch" in found and not {"hydra", "omegaconf"} & found


def test_every_public_name_is_there_and_no_other():
    assert set(delta_transfer.__all__) <= set(dir(delta_transfer))
    assert {entry.thing.__name__ for entry in METHODS.entries.values()} <= set(delta_transfer.__all__)
    assert {"AttentionConfig", "ChannelImportance", "HookedNetwork", "Regularizer"} <= set(delta_transfer.__all__)
    for name in delta_transfer.__all__:
        assert getattr(delta_transfer, name).__name__ == name
    with pytest.raises(AttributeError, match="Delta"):
        delta_transfer.Delta  # noqa: B018


# ------------------------------------------------------------------------------------------------ slips of a loop


def prepared():
    """A source, its target, images, labels and DELTA's options that fit quickly."""
    torch.manual_seed(0)
    source = tapped(TinyNet(num_classes=5), "fc", ["conv1", "conv2"]).freeze()
    target = source.with_new_head(3, seed=0).requires_grad_(True).train()
    return source, target, torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])


SLIPS = {
    "an image without a batch": lambda s, t, x, y: s(x[0]),
    "channels last": lambda s, t, x, y: s(x.movedim(1, 3)),
    "pixels": lambda s, t, x, y: s(x.to(torch.uint8)),
    "another device": lambda s, t, x, y: s(x.to("meta")),
    "too few classes": lambda s, t, x, y: DELTA(attention={"head_epochs": 1}).fit(s, [(x, y)], 2),
    "labels that are shares": lambda s, t, x, y: DELTA().fit(s, [(x, y.float())], 3),
    "too few classes for Co-Tuning": lambda s, t, x, y: CoTuning().fit(s, [(x, y)], 2),
    "too few classes for LP-FT": lambda s, t, x, y: LPFT(probe={"c": 1.0}).fit(s, [(x, y)], 2),
    "no class": lambda s, t, x, y: s.with_new_head(0, seed=0),
    "half a class": lambda s, t, x, y: s.with_new_head(2.5, seed=0),
    "a tap of the target alone": lambda s, t, x, y: DELTAWithoutAttention().penalty(t, t(x), {"conv1": s(x)["conv1"]}),
    "other images for the source": lambda s, t, x, y: DELTAWithoutAttention().penalty(t, t(x), s(x[:2])),
    "an option that is none": lambda s, t, x, y: DELTA(attention={"image": 3}),
    "a value that is none": lambda s, t, x, y: DELTA(attention={"images": 0}),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_gives_a_sentence_of_ours(slip, capfd):
    with pytest.raises(UserError) as told:
        SLIPS[slip](*prepared())
    assert "\n" not in str(told.value) and str(told.value).endswith(".")
    assert capfd.readouterr() == ("", "")  # torch.fx prints its own words beside an error


def test_the_state_of_a_fitted_method_carries_what_was_fitted():
    source, target, images, labels = prepared()
    delta = DELTA(attention={"images": 6, "head_epochs": 1})
    delta.fit(source, [(images, labels)], 3)
    assert delta.attention == AttentionConfig(images=6, head_epochs=1)
    again = DELTA()
    again.load_state_dict(delta.state_dict())
    outputs, expected = target(images), source(images)
    with torch.no_grad():
        outputs["conv1"] += 1
    assert again.penalty(target, outputs, expected) == delta.penalty(target, outputs, expected)
    assert again.fit_report == delta.fit_report
    assert delta.to("meta").relative_weights("conv1").is_meta  # it moves with the method
    DELTA().load_state_dict(DELTA().state_dict())  # of one that is not fitted
