"""task=verification: the ArcFace head and loss, accuracy of pairs, ROC, LFW's layout, whole runs with every method."""

import json
import math
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import LFWPairs

from delta_transfer import report
from delta_transfer.cli.data import main as delta_data
from delta_transfer.cli.sources import choices
from delta_transfer.common.errors import UserError
from delta_transfer.common.pair_metrics import best_threshold, fold_accuracies, pair_metrics, roc
from delta_transfer.data import load_dataset
from delta_transfer.data.dataset import make_splits
from delta_transfer.data.embedded.glyph_pairs import GlyphPairsConfig
from delta_transfer.data.embedded.glyphs import letter_shapes
from delta_transfer.data.loader import Loader
from delta_transfer.data.pairs import draw_pairs
from delta_transfer.data.readers.lfw import LFWConfig
from delta_transfer.experiment.experiment import run
from delta_transfer.inspect.replay import replay
from delta_transfer.models import ArcFaceLoss, CosineHead, Network, frozen_backbone
from delta_transfer.records import arrays
from delta_transfer.records import reading as runs
from delta_transfer.records.identity import run_identity
from delta_transfer.reporting import interval_figures
from delta_transfer.reporting.comparison import compare

from . import trees
from .conftest import TinyNet
from .miniature import composed, delta_run, source_for, tiny_overrides, write_cub

METHODS = tuple(name for name in choices("reg") if name != "sum")

# ---- ArcFace ---------------------------------------------------------------------------------------------


def arccos_loss(cosines: torch.Tensor, labels: torch.Tensor, scale: float, margin: float) -> torch.Tensor:
    """The formula, image by image; beyond pi - m what the authors' code has."""
    losses = []
    for row, label in zip(cosines, labels.tolist(), strict=True):
        theta = torch.arccos(row[label])
        turned = torch.cos(theta + margin) if theta + margin < math.pi else row[label] - margin * math.sin(margin)
        logits = [scale * (turned if k == label else value) for k, value in enumerate(row)]
        losses.append(-logits[label] + torch.logsumexp(torch.stack(logits), 0))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("margin", [0.0, 0.5, 2.0])
def test_arcface_is_its_formula_and_so_is_its_gradient(margin):
    torch.manual_seed(0)
    head = CosineHead(3, 4, scale=8.0).double()
    embedding = torch.randn(12, 3, dtype=torch.float64)
    embedding[0] = -5 * head.weight[0].detach() + 0.01 * embedding[0]  # beyond pi - m
    embedding[1] = 5 * head.weight[0].detach() + 0.3 * embedding[1]  # a small angle
    labels = torch.tensor([0, 0, *range(4), *range(4), 1, 2])
    embedding.requires_grad_(True)
    cosines = torch.stack(
        [
            torch.stack([x @ w / (x.square().sum().sqrt() * w.square().sum().sqrt()) for w in head.weight])
            for x in embedding
        ]
    )
    theta = torch.arccos(cosines[torch.arange(12), labels])
    assert margin == 0 or (theta + margin > math.pi).any() and (theta + margin < math.pi).any()

    logits = head(embedding)
    torch.testing.assert_close(logits, 8.0 * cosines)
    loss = ArcFaceLoss(8.0, margin)(logits, labels)
    expected = arccos_loss(cosines, labels, 8.0, margin)
    torch.testing.assert_close(loss, expected)
    inputs = (embedding, head.weight)
    for found, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted)


def test_without_margin_it_is_cross_entropy_of_scaled_cosines():
    logits, labels = 64 * (2 * torch.rand(9, 5) - 1), torch.arange(9) % 5
    torch.testing.assert_close(ArcFaceLoss(64.0, 0.0)(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize("cosine", [1.0, 1 + 1e-7, 1 - 1e-7, -1.0, -1 - 1e-7])
def test_the_gradient_stays_within_bounds_where_the_sine_has_none(cosine):
    logits = torch.tensor([[4 * cosine, 3.0]], requires_grad=True)
    ArcFaceLoss(scale=4.0)(logits, torch.tensor([0])).backward()
    assert logits.grad.abs().min() > 0 and logits.grad.abs().max() < 1  # that of the sine is 2236 at 1 - 1e-7


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_with_a_cosine_head_returns_its_embedding(precision):
    torch.manual_seed(0)
    source = Network(TinyNet(), head="fc", taps=("conv2",))
    target = source.with_new_head(7, 0, partial(CosineHead, scale=16.0)).eval()
    assert list(target.head_parameters()) == ["fc.weight"]
    images = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        outputs, frozen = target(images), frozen_backbone(target, precision)(images)
    cosines = F.cosine_similarity(
        outputs["embedding"].float()[:, None], target.head_parameters()["fc.weight"][None], dim=2
    )
    assert outputs["logits"].dtype == torch.float32  # also under autocast: 64 times a rounded cosine would be coarse
    torch.testing.assert_close(outputs["logits"], 16 * cosines)
    assert frozen.keys() == outputs.keys() == {"logits", "conv2", "embedding"}
    assert target.train()(images).keys() == outputs.keys()


# ---- pairs -----------------------------------------------------------------------------------------------


def naive_threshold(similarities, same):
    """Every threshold that tells anything, the lowest first."""
    values = sorted(set(similarities))
    between = [values[0] - 1, *((a + b) / 2 for a, b in zip(values, values[1:], strict=False)), values[-1] + 1]
    right = [sum((s >= t) == y for s, y in zip(similarities, same, strict=True)) for t in between]
    return between[right.index(max(right))]


def naive_auc(similarities, same):
    """How often a pair of one class is more alike than one of two; half where they are equally so."""
    positive, negative = similarities[same], similarities[~same]
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    return float(np.mean(wins))


def some_pairs(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    same = np.tile([True, False], 60)
    similarities = random.normal(0.4 * same, 0.5)
    return np.round(similarities, 1) if ties else similarities, same, np.repeat(np.arange(5), 24)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [False, True])
def test_accuracy_over_folds_and_roc_are_what_loops_say(seed, ties):
    similarities, same, fold = some_pairs(seed, ties)
    accuracies = []
    for k in range(5):
        threshold = naive_threshold(similarities[fold != k].tolist(), same[fold != k].tolist())
        right = [(s >= threshold) == y for s, y in zip(similarities[fold == k], same[fold == k], strict=True)]
        accuracies.append(sum(right) / len(right))
    found = pair_metrics(similarities, same, fold)
    assert found["pair_accuracy"] == pytest.approx(100 * np.mean(accuracies))
    assert found["pair_accuracy_std"] == pytest.approx(100 * np.std(accuracies, ddof=1))
    assert found["auc"] == pytest.approx(naive_auc(similarities, same))
    assert "tar_at_far_0.01" not in found  # of 60 different pairs

    false_accepts, true_accepts = roc(similarities, same)
    thresholds = sorted(set(similarities), reverse=True)
    assert false_accepts.tolist() == [0, *(np.mean(similarities[~same] >= t) for t in thresholds)]
    assert true_accepts.tolist() == [0, *(np.mean(similarities[same] >= t) for t in thresholds)]


def test_true_accepts_at_a_rate_of_false_ones():
    """Of 200 different pairs two may be accepted at 0.01."""
    similarities = np.concatenate([np.linspace(0, 1, 200), [0.9999, 0.992, 0.989, 0.5]])
    same = np.arange(204) >= 200
    found = pair_metrics(similarities, same, np.arange(204) % 2)
    assert found["tar_at_far_0.01"] == 50.0  # the highest of the different ones: 1, 0.995, 0.990
    assert "tar_at_far_0.001" not in found


def test_the_threshold_of_a_fold_does_not_know_the_fold():
    """Fold 0 alone would be right at 0.5; the others say 0.05, at which half of it is wrong."""
    similarities = np.array([0.6, 0.4] + [0.1, 0.0] * 4)
    same = np.array([True, False] * 5)
    fold = np.repeat(np.arange(5), 2)
    accuracies, thresholds = fold_accuracies(similarities, same, fold)
    assert thresholds[0] == pytest.approx(0.05) and accuracies.tolist() == [0.5, 1, 1, 1, 1]
    changed = similarities.copy()
    changed[fold == 0] = [-3.0, 7.0]
    assert fold_accuracies(changed, same, fold)[1][0] == thresholds[0]
    # Here a threshold of all pairs would be right about all of fold 0.
    similarities = np.array([0.9, 0.3] * 3 + [0.25, 0.2, 0.26, 0.2])
    same, fold = np.array([True, False] * 5), np.repeat([0, 1], [6, 4])
    on_all = best_threshold(similarities, same)
    honest = fold_accuracies(similarities, same, fold)[0]
    assert ((similarities >= on_all) == same)[fold == 0].mean() > honest[0] == 0.5


def test_similarities_that_are_no_numbers_give_no_numbers():
    similarities, same, fold = some_pairs(0, False)
    similarities[3] = np.nan
    assert all(map(math.isnan, pair_metrics(similarities, same, fold).values()))


def test_drawn_pairs_are_all_different_and_a_class_is_in_one_fold():
    labels = np.repeat(np.arange(9), 5)
    drawn = draw_pairs(labels, folds=3, per_fold=20, seed=0)
    assert len(drawn.first) == 3 * 2 * 20 == len({*zip(drawn.first, drawn.second, strict=True)})
    assert (drawn.first != drawn.second).all()
    assert np.array_equal(labels[drawn.first] == labels[drawn.second], drawn.same)
    folds_of = {
        label: set(drawn.fold[(labels[drawn.first] == label) | (labels[drawn.second] == label)]) for label in range(9)
    }
    assert all(len(found) == 1 for found in folds_of.values())
    assert [(drawn.same & (drawn.fold == k)).sum() for k in range(3)] == [20, 20, 20]
    with pytest.raises(UserError, match="A fold has 30 pairs of one class, but 31 are wanted"):
        draw_pairs(labels, folds=3, per_fold=31, seed=0)


# ---- LFW's layout ----------------------------------------------------------------------------------------


def lfw(root, **options):
    return load_dataset(LFWConfig(reader="lfw", name="lfw", root=str(root), **options))


@pytest.fixture
def tree(tmp_path):
    return trees.write_lfw(tmp_path / "lfw-py")


def test_lfw_trains_on_persons_who_are_in_no_pair(tree):
    data = lfw(tree)
    assert data.classes == ("Eve_Orr", "Flo_Kay", "Gus_Hay")  # Hal_Ives has one image
    assert np.bincount(data.labels[~data.is_test]).tolist() == [4, 3, 2]
    assert (data.labels[data.is_test] == -1).all() and data.is_test.sum() == 12  # without Ann_Lee's fourth image
    tested = {name.split("/")[1] for name, test in zip(data.names, data.is_test, strict=True) if test}
    trained = {name.split("/")[1] for name, test in zip(data.names, data.is_test, strict=True) if not test}
    assert tested == {"Ann_Lee", "Bob_Ray", "Cy_Poe", "Di_Fox"} and trained == set(data.classes)
    assert lfw(tree, min_images=3).classes == ("Eve_Orr", "Flo_Kay")
    assert [data.class_of(0), data.class_of(9)] == ["Eve_Orr", "test/Ann_Lee/Ann_Lee_0001.jpg"]


def test_lfw_has_the_pairs_that_torchvision_reads(tree, monkeypatch):
    monkeypatch.setattr(LFWPairs, "_check_integrity", lambda self: True)  # it knows the whole data set alone
    theirs = LFWPairs(tree.parent, image_set="original")
    data, pairs = lfw(tree), lfw(tree).pairs
    ours = [tuple(str(data.files[index]) for index in pair) for pair in zip(pairs.first, pairs.second, strict=True)]
    assert ours == theirs.data and pairs.same.tolist() == [target == 1 for target in theirs.targets]
    assert pairs.fold.tolist() == [0] * 4 + [1] * 4
    for index in (0, 9):
        assert data.load(index).size == (12, 10)


@pytest.mark.parametrize(
    ("line", "text", "expected"),
    [
        (0, "2", r"must begin with the number of folds.*it begins with '2'"),
        (0, "1\t4", "two or more"),
        (0, "ten\t2", "must begin with the number of folds"),
        (0, "2\t3", r"announces 2 folds of 3 \+ 3 pairs, 12 lines, but 8 follow"),
        (0, "2\t0", "0 lines, but 8 follow"),
        (2, None, "8 lines, but 7 follow"),
        (1, "Ann_Lee\t1\t1", "1 lines are no pair of the expected kind.*pair 1 'Ann_Lee 1 1'"),
        (1, "Ann_Lee\t1\tBob_Ray\t2", "pair 1 'Ann_Lee 1 Bob_Ray 2'"),
        (3, "Ann_Lee\t1\tAnn_Lee\t2", "pair 3 'Ann_Lee 1 Ann_Lee 2'"),
        (3, "Ann_Lee\t1\tBob_Ray\ttwo", "pair 3 "),
        (3, "Ann_Lee\t1\tBob_Ray\t-2", "pair 3 "),
        (1, "Ann_Lee\t1\t9", "1 of 12 images of lfw that pairs.txt names are not in .*Ann_Lee_0009.jpg"),
        (1, "../../x\t1\t2", "names files outside"),
    ],
)
def test_a_damaged_list_of_pairs_is_refused(tree, line, text, expected):
    lines = list(trees.LFW_PAIRS)
    lines[line : line + 1] = [] if text is None else [text]
    trees.write_lines(tree / "pairs.txt", lines)
    with pytest.raises(UserError, match=expected):
        lfw(tree)


def test_other_persons_to_train_on(tree, tmp_path):
    other = trees.write_folder(tmp_path / "casia", **{"0000045": 3, "0000099": 2, "0000100": 1})
    data = lfw(tree, train_root=str(other))
    assert data.classes == ("0000045", "0000099") and np.bincount(data.labels[~data.is_test]).tolist() == [3, 2]
    assert data.fingerprint != lfw(tree).fingerprint
    moved = shutil.copytree(other, tmp_path / "elsewhere")
    assert lfw(tree, train_root=str(moved)).fingerprint == data.fingerprint
    trees.write_image(moved / "0000045" / "002.jpg", 77)
    assert lfw(tree, train_root=str(moved)).fingerprint != data.fingerprint


@pytest.mark.parametrize("name", ["Ann_Lee", "ann lee", "ANN-LEE"])
def test_a_person_of_the_pairs_is_not_trained_on(tree, tmp_path, name):
    other = trees.write_folder(tmp_path / "faces", **{name: 3, "0000099": 2})
    with pytest.raises(UserError, match="1 persons or classes of the pairs: Ann_Lee"):
        lfw(tree, train_root=str(other))


def test_too_few_to_train_on(tree, tmp_path):
    with pytest.raises(UserError, match=r"has 1 persons to train on with dataset.min_images=4 .* who are in no pair"):
        lfw(tree, min_images=4)
    with pytest.raises(UserError, match="dataset.train_root: there is no folder"):
        lfw(tree, train_root=str(tmp_path / "nowhere"))


def test_the_archive_is_unpacked_where_it_belongs(tree, tmp_path, capsys):
    """Beside the folder too: it holds a folder lfw, which is not the data set's own."""
    shutil.make_archive(str(tmp_path / "lfw"), "gztar", tree, "lfw")
    (tmp_path / "lfw.tar.gz").rename(tmp_path / "lfw.tgz")
    shutil.rmtree(tree / "lfw")
    small = ["backbone=small_resnet", "backbone.weights=none", f"cache_dir={tmp_path / 'cache'}"]
    overrides = [f"data_dir={tmp_path}", *small]
    assert delta_data(["prepare", "lfw", *overrides]) == 0
    assert (tree / "lfw" / "Ann_Lee" / "Ann_Lee_0001.jpg").exists()
    assert delta_data(["verify", "lfw", *overrides]) == 0
    assert "classes  3" in (said := capsys.readouterr().out) and "test images that are also in train: none" in said


def test_the_task_belongs_to_the_data_set():
    assert composed("dataset=lfw").task == composed("dataset=glyph_pairs").task == "verification"
    assert composed("dataset=cub").task == "classification"
    with pytest.raises(UserError, match="task=verification: .* is for task=classification"):
        composed("dataset=cub", "task=verification")
    with pytest.raises(UserError, match="is for task=verification"):
        composed("dataset=lfw", "task=classification")


def test_a_dry_run_without_the_images_says_where_to_get_them(tmp_path, monkeypatch, capsys):
    """Nothing tells how many images there are, so that the plan cannot go on."""
    assert delta_run(monkeypatch, "dataset=lfw", f"data_dir={tmp_path}", "dry_run=true") == 1
    assert "Labeled Faces in the Wild was not found" in capsys.readouterr().err


# ---- runs ------------------------------------------------------------------------------------------------

ATTENTION = ["reg.attention.images=4", "reg.attention.head_epochs=1"]


def tiny(root, results, *more: str) -> list[str]:
    of_cub = [word for word in tiny_overrides(root, results) if word != "dataset=cub"]
    return ["dataset=lfw", *of_cub, *more]


def run_of(results, name: str = ""):
    (found,) = (results / "runs").glob(f"{name}*")
    return found


def metrics(run) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def train(folder, *methods: str) -> None:
    """A run of each method on the miniature LFW in `folder`."""
    for method in methods:
        options = ATTENTION if method == "delta" else source_for(method, folder)
        run(composed(*tiny(folder / "lfw-py", folder / "results", "schedule.iterations=2"), f"reg={method}", *options))


SHARED = ("l2", "delta", "afa")  # what other tests look at, too
# They read the head or set it; the others' penalties know nothing of the task.
OF_THE_HEAD = ("l2_fe", "lwf", "lp_ft", "rifle", "co_tuning", "bi_tuning", "l2t_ww")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Runs on the miniature LFW, and one on the miniature CUB."""
    folder = tmp_path_factory.mktemp("verification")
    trees.write_lfw(folder / "lfw-py")
    seen: set[int] = set()
    batch = Loader.train_batch

    def watched(loader, indices, iteration):
        images, labels = batch(loader, indices, iteration)
        seen.update(labels.tolist())
        return images, labels

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "train_batch", watched)
        train(folder, *SHARED)
        assert seen == {0, 1, 2}  # never -1: no person of a pair
    run(composed(*tiny_overrides(write_cub(folder / "CUB"), folder / "results"), "reg=l2"))
    return folder / "results"


@pytest.mark.parametrize(
    "method",
    [name if name in SHARED + OF_THE_HEAD else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_every_method_verifies(results, method):
    train(results.parent, *{method}.difference(SHARED))
    made = run_of(results, f"lfw-small_resnet-{method}-")
    summary = json.loads((made / "summary.json").read_text())
    assert summary["error"] is None and summary["test_top1"] is None
    assert (summary["num_classes"], summary["n_train"], summary["n_test"]) == (3, 9, 12)
    arrays = np.load(made / "pairs.npz")
    again = pair_metrics(arrays["similarities"], arrays["same"], arrays["fold"])
    assert {f"test_{key}": value for key, value in again.items()}.items() <= summary.items()
    assert 0 <= summary["test_pair_accuracy"] <= 100 and 0 <= summary["test_auc"] <= 1
    assert not (made / "predictions.npz").exists()
    assert metrics(made)[-1]["test_auc"] == summary["test_auc"]


def test_the_run_trains_with_the_margin(results, tmp_path):
    root = results.parent / "lfw-py"
    run(composed(*tiny(root, tmp_path), "reg=l2", "arcface.margin=0", "schedule.iterations=1"))
    without, with_margin = metrics(run_of(tmp_path)), metrics(run_of(results, "lfw-small_resnet-l2-"))
    assert with_margin[0]["cross_entropy"] > without[0]["cross_entropy"] + 5  # on the same batch


def test_similarities_are_cosines_of_what_the_head_reads(results):
    made = replay(run_of(results, "lfw-small_resnet-delta-"))
    pairs = np.load(made.record["folder"] / "pairs.npz")
    shown = np.unique([pairs["first"], pairs["second"]]).tolist()
    embeddings = torch.cat([made.target(images)["embedding"] for images in made.images(np.array(shown))])
    of = dict(zip(shown, embeddings, strict=True))
    for first, second, similarity in zip(pairs["first"], pairs["second"], pairs["similarities"], strict=True):
        assert similarity == pytest.approx(F.cosine_similarity(of[first], of[second], dim=0).item(), abs=1e-5)


def test_pairs_and_persons_do_not_meet(results):
    """No person of a pair is in the training split, without and with a draw and a validation split."""
    made = replay(run_of(results, "lfw-small_resnet-l2-"))
    config = composed("dataset=lfw", "dataset.images_per_class=2", "split.val_fraction=0.5")
    for splits in (made.splits, make_splits(made.dataset, config.dataset, config.split)):
        used = {made.dataset.names[index].split("/")[1] for index in [*splits.train, *splits.val]}
        assert used == {"Eve_Orr", "Flo_Kay", "Gus_Hay"}
        assert made.dataset.is_test[splits.test].all() and len(splits.test) == 12


def test_an_interrupted_run_ends_the_same(results, tmp_path, monkeypatch, capsys):
    root = results.parent / "lfw-py"
    common = ["reg=afa_channel", "schedule.iterations=5"]
    run(composed(*tiny(root, tmp_path / "whole"), *common))
    batch = Loader.train_batch

    def interrupted(loader, indices, iteration):
        if iteration == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch(loader, indices, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "train_batch", interrupted)
        assert delta_run(patch, *tiny(root, tmp_path / "cut"), *common) != 0
    assert (run_of(tmp_path / "cut") / "last.pt").exists()
    assert delta_run(monkeypatch, *tiny(root, tmp_path / "cut"), *common) == 0
    assert "resuming after iteration 4" in capsys.readouterr().out
    whole, cut = (run_of(tmp_path / name) for name in ("whole", "cut"))
    assert whole.name == cut.name and metrics(whole) == metrics(cut)
    assert np.array_equal(np.load(whole / "pairs.npz")["similarities"], np.load(cut / "pairs.npz")["similarities"])


def test_micro_batches_precision_crops_and_validation(results, tmp_path):
    root = results.parent / "lfw-py"
    options = ["reg=l2", "schedule.accumulate=2", "precision=bf16", "schedule.test_crops=10", "dataset.min_images=3"]
    run(composed(*tiny(root, tmp_path / "more"), *options, "split.val_fraction=0.3"))
    summary = json.loads((run_of(tmp_path / "more") / "summary.json").read_text())
    assert summary["n_val"] == 2 and summary["val_top1"] is not None and summary["test_auc"] is not None
    fold = ["dataset.min_images=3", "split.folds=3", "split.fold=1"]
    run(composed(*tiny(root, tmp_path / "fold"), "reg=l2", *fold))
    made = run_of(tmp_path / "fold")  # which is there to choose settings: the pairs are not looked at
    summary = json.loads((made / "summary.json").read_text())
    assert summary["val_top1"] is not None and "test_auc" not in summary and not (made / "pairs.npz").exists()


def test_glyph_pairs_end_to_end(tmp_path, monkeypatch, capsys):
    small = ["dataset=glyph_pairs", "dataset.train_per_class=1", "dataset.test_per_class=3", "dataset.pair_folds=4"]
    small += ["dataset.pairs_per_fold=10", "backbone.weights=none", "schedule.iterations=2", "schedule.batch_size=4"]
    assert delta_run(monkeypatch, *small, f"results_dir={tmp_path}", "reg=delta_noatt", "device=cpu") == 0
    assert "test pairs " in capsys.readouterr().out
    pairs = np.load(run_of(tmp_path) / "pairs.npz")
    assert len(pairs["same"]) == 4 * 2 * 10 and pairs["same"].sum() == 40


def test_glyph_pairs_are_of_letters_that_look_like_none_that_is_trained_on():
    sizes = {"train_per_class": 1, "test_per_class": 2, "pair_folds": 2, "pairs_per_fold": 5, "render_size": 36}
    greek = partial(GlyphPairsConfig, reader="glyph_pairs", name="glyph_pairs", test_scripts=["greek"], **sizes)
    config = greek(scripts=["latin"])
    data = load_dataset(config)
    tested = {name.split("/")[2].split("-")[0] for name in np.array(data.names)[data.is_test]}
    tested = {chr(int(name[1:], 16)) for name in tested}
    assert "Ω" in tested and not tested & set("ΑΒΟο")  # as Latin A, B, O, o
    trained = set("".join(data.classes))
    for shape in letter_shapes("".join([*trained, *tested])):
        assert not (trained & set(shape) and tested & set(shape)), shape
    with pytest.raises(UserError, match="dataset.test_scripts has 0 letters that look like none of dataset.scripts"):
        load_dataset(greek(scripts=["greek"]))


def test_the_margin_is_part_of_a_verification_and_the_folder_of_its_images_is_not():
    config = composed("dataset=lfw")
    identity = run_identity(config, "data", "weights")
    assert run_identity(config.replace(arcface=config.arcface.replace(margin=0.3)), "data", "weights") != identity
    elsewhere = config.replace(dataset=config.dataset.replace(root="/here", train_root="/there"))
    assert run_identity(elsewhere, "data", "weights") == identity


# ---- reports ---------------------------------------------------------------------------------------------


def test_verifications_have_tables_of_their_own(results, tmp_path, capsys):
    assert report.main([str(results), "--format", "markdown", "--figures", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    top1, pairs = text.index("test top-1 accuracy (%)"), text.index("test pair accuracy (%)")
    assert top1 < pairs < text.index("Verification of test pairs; mean over seeds")
    assert text[pairs:].count("| lfw ") >= len(SHARED)
    assert list(tmp_path.glob("roc-lfw-*.png")) and list(tmp_path.glob("curves-cub-*.png"))

    assert report.main([str(results), "--metric", "test_pair_accuracy", "--format", "csv"]) == 0
    said = capsys.readouterr()
    assert "cub" not in said.out and "left out: 1 runs of other tasks" in said.err


def test_a_report_of_verifications_alone_needs_no_option(results, tmp_path, capsys):
    only = tmp_path / "runs"
    for made in (results / "runs").glob("lfw-*-l2*"):
        shutil.copytree(made, only / made.name)
    assert report.main([str(only), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    assert "top-1" not in text and "test pair accuracy (%)" in text


def test_the_roc_that_is_drawn_is_that_of_the_pairs(results):
    records = [runs.read(run_of(results, "lfw-small_resnet-l2-"))]
    ((stem, figure),) = interval_figures.roc_curves(compare(records, "test_pair_accuracy"), pytest.fail)
    assert stem == "roc-lfw-small_resnet_random_weights_"
    (line,) = figure.axes[0].lines
    pairs = arrays.pair_similarities(records[0])
    expected = roc(pairs.similarities, pairs.same)
    assert np.array_equal(line.get_xdata(), expected[0]) and np.array_equal(line.get_ydata(), expected[1])


def test_pairs_that_do_not_belong_together_are_damaged(tmp_path):
    def check(expected: str, **values) -> None:
        np.savez(tmp_path / "pairs.npz", **values)
        with pytest.raises(runs.Damaged, match=expected):
            arrays.pair_similarities({"folder": tmp_path})

    good = {"similarities": np.array([0.1, 0.2]), "same": np.array([True, False]), "fold": np.array([0, 1])}
    check("do not belong", **good | {"similarities": np.array([0.1, np.nan])})
    check("do not belong", **good | {"fold": np.array([0, 1, 2])})
    check("do not belong", **good | {"same": np.array([True, True])})
    check("cannot be read", similarities=good["similarities"])


def test_a_case_study_of_pairs_is_refused(results, tmp_path, capsys):
    made = run_of(results, "lfw-small_resnet-l2-")
    assert report.main(["case-study", str(made), "--output", str(tmp_path)]) == 1
    assert "verifies pairs" in capsys.readouterr().err


def test_what_excites_a_channel_is_shown_of_pairs_too(results, tmp_path, capsys):
    """Test images of pairs have no class to be called by."""
    made = run_of(results, "lfw-small_resnet-delta-")
    options = ["--patches", "--top", "1", "--output", str(tmp_path)]
    assert report.main(["attention", str(made), *options]) == 0, capsys.readouterr().err
    assert any("patches" in path.name for path in tmp_path.iterdir())
