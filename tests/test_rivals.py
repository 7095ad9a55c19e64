"""Which choices are within noise of the best on held-out images, and which of its equals is chosen."""

from pathlib import Path

import numpy as np
import pytest

from delta_transfer import report
from delta_transfer.records.arrays import Predictions
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.rivals import between_methods, in_words, rivals_of, simplest
from delta_transfer.reporting.selection import choose
from delta_transfer.reporting.statistics import image_differences, paired

from .test_selection import cross_validated, run

FOLDS = np.array_split(np.random.default_rng(0).permutation(60), 3)


def on_folds(method: str, wrong: set[int], folder: Path, seconds: float = 10.0, backbone: str = "resnet18", alpha=0.0):
    """Runs on three folds of 60 images, of which they predict `wrong` ones wrong, with their validation.npz."""
    runs = cross_validated(method, alpha, [100 * float(np.mean([i not in wrong for i in fold])) for fold in FOLDS])
    for made, fold in zip(runs, FOLDS, strict=True):
        made["run_id"] = f"{backbone}-{made['run_id']}"
        made["config"] = made["config"] | {"backbone": made["config"]["backbone"] | {"name": backbone}}
        made |= {"folder": folder / made["run_id"], "train_seconds": seconds}
        made["folder"].mkdir(parents=True)
        right = np.array([i not in wrong for i in fold])
        logits = np.stack([right, ~right], axis=1).astype(float)
        np.savez(made["folder"] / "validation.npz", labels=np.zeros(len(fold), int), logits=logits, index=np.sort(fold))
    return runs


def choices(*groups):
    return choose(compare([made for group in groups for made in group], "val_top1"), []).choices


def named(choice) -> str:
    return choice.what.split(" on ")[0]


def judged(*groups):
    """The best choice, its rivals and the simplest."""
    made = choices(*groups)
    best = max(made, key=lambda one: one.best.cell.mean)
    rivals = rivals_of(best, made)
    return best, {named(rival.choice): rival for rival in rivals}, simplest(best, rivals)


def test_differences_are_paired_over_the_images_of_all_folds(tmp_path):
    best, rivals, _ = judged(
        on_folds("delta", {*range(12)}, tmp_path / "a", alpha=0.1), on_folds("l2", {*range(15)}, tmp_path / "b")
    )
    assert named(best) == "DELTA"
    found = rivals["L2"]
    assert found.over == "images" and found.difference.n == 60
    assert found.difference.mean == pytest.approx(5.0)  # 3 of 60
    each = np.array([100.0] * 3 + [0.0] * 57)
    assert found.error == pytest.approx(each.std(ddof=1) / np.sqrt(60))
    assert found.standing == "near"  # three images are nothing to go by
    far = judged(
        on_folds("delta", set(), tmp_path / "c", alpha=0.1), on_folds("l2", {*range(0, 60, 2)}, tmp_path / "d")
    )[1]["L2"]
    assert far.standing == "far" and not far.equal


def test_the_simplest_within_one_standard_error(tmp_path):
    # L2-FE: as many wrong, but others. L2-SP and L2: behind by more than a standard error.
    delta = on_folds("delta", {1, 2, 3, 4}, tmp_path / "delta", alpha=0.1)
    l2_fe = on_folds("l2_fe", {5, 6, 7, 8, 9}, tmp_path / "fe")
    l2 = on_folds("l2", {1, 2, 3, 4, *range(10, 20)}, tmp_path / "l2")
    best, rivals, chosen = judged(delta, l2_fe, l2)
    assert named(best) == "DELTA" and named(chosen) == "L2-FE"
    assert (rivals["L2-FE"].equal, rivals["L2"].equal) == (True, False)
    lines = between_methods(choices(delta, l2_fe, l2), "simple")
    assert lines[-1].startswith("between methods: L2-FE") and "60 held-out images" in lines[0]
    assert between_methods(choices(delta, l2_fe, l2), "best")[-1].startswith("between methods: DELTA")
    # Without L2-FE nothing is as good: the best stays.
    assert named(judged(delta, l2)[2]) == "DELTA"
    # L2 is simpler than a method that a table has before it.
    same = on_folds("l2", {2, 3, 4, 5}, tmp_path / "same")
    assert named(judged(delta, same)[2]) == "L2"


def test_a_cheaper_network_counts_before_a_simpler_method(tmp_path):
    large = on_folds("l2", {1, 2}, tmp_path / "large", 30.0, "resnet50")
    small = on_folds("l2", {1, 2, 3, 4, 5, 6, 7, 8}, tmp_path / "small", 10.0)
    delta = on_folds("delta", {3, 4, 5}, tmp_path / "delta", 14.0, alpha=0.1)
    best, _, chosen = judged(large, small, delta)
    assert "resnet50" in best.what and chosen.what == "DELTA on cub, resnet18"
    assert len(between_methods(choices(large, small, delta), "simple")) == 2  # of resnet18 alone
    for runs, elapsed, processor in ((large, 30.0, 25.0), (small, 90.0, 8.0), (delta, 95.0, 9.0)):
        for made in runs:  # other programs ran beside the small network
            made |= {"train_seconds": elapsed, "train_processor_seconds": processor}
    assert judged(large, small, delta)[2].what == "DELTA on cub, resnet18"


def test_without_predictions_folds_are_paired():
    made = choices(cross_validated("delta", 0.1, [84.0, 86.0, 90.0]), cross_validated("l2", 0, [83.0, 84.0, 87.0]))
    best = max(made, key=lambda one: one.best.cell.mean)
    (rival,) = rivals_of(best, made)
    assert rival.over == "folds" and rival.difference == paired(best.best.cell, rival.choice.best.cell)
    assert rival.error == pytest.approx(1 / np.sqrt(3)) and not rival.equal  # 1, 2 and 3 points
    even = choices(cross_validated("delta", 0.1, [84.0, 86.0]), cross_validated("l2", 0, [83.0, 85.0]))
    best = max(even, key=lambda one: one.best.cell.mean)
    (rival,) = rivals_of(best, even)
    assert rival.standing == "open" and rival.error == 0 and not rival.equal
    assert "no interval" in in_words(best, [rival])[0]


def test_the_report_says_it_where_settings_are_selected(tmp_path, capsys):
    runs = cross_validated("delta", 0.1, [84.0, 86.0, 90.0]) + cross_validated("l2", 0, [85.0, 86.0, 87.0])
    for prefer, expected in (("simple", "L2"), ("best", "DELTA")):
        code, out, _ = run(tmp_path / prefer, capsys, runs, "--select", "cv", "--prefer", prefer)
        assert code == 0 and f"between methods: {expected} on cub" in " ".join(out.split())
    assert "between methods" not in run(tmp_path / "all", capsys, runs, "--metric", "val_top1")[1]
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--select", "cv", "--prefer", "cheap"])


def test_balanced_differences_weigh_each_class_the_same():
    labels = np.array([0] * 8 + [1] * 2)

    def predicted(right):
        return Predictions(labels, np.where(np.eye(2, dtype=bool)[labels] == right[:, None], 1.0, 0.0), np.arange(10))

    ours = predicted(np.array([True] * 8 + [False] * 2))
    theirs = predicted(np.array([True] * 4 + [False] * 4 + [True] * 2))
    assert image_differences([(ours, theirs)]).mean() == pytest.approx(80 - 60)
    assert image_differences([(ours, theirs)], balanced=True).mean() == pytest.approx((100 + 0) / 2 - (50 + 100) / 2)
