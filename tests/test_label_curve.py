"""How many labels? Draws that follow the seed, the fitted curve, and what twice as many labels are worth."""

import json

import numpy as np
import pytest
from scipy import stats

from delta_transfer import report
from delta_transfer.data.dataset import make_splits
from delta_transfer.data.options import DatasetConfig, SplitConfig
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.sweeps import LABELS, LabelCurve, label_curves, swept

from .miniature import composed, delta_run, source_for
from .test_data import dataset_of
from .test_docs_commands import SMALL, write_photos
from .test_report import record, save

SIZES = (5, 10, 20, 40)


def power_law(n: float, seed: int) -> float:
    """100 - a n^-b with another a and b for each seed."""
    return 100 - (60 + 2 * seed) * n ** -(0.3 + 0.02 * seed)


def curve_records(sizes=SIZES, seeds=3, method="l2", **changes):
    drawn = {"dataset__images_per_class": None, "dataset__redraw": True}
    return [
        record(
            method, seed, power_law(n, seed), n_train=4 * n, num_classes=4, dataset__sample_rate=n / 40,
            run_id=f"{method}-{n}-{seed}", **drawn, **changes,
        )
        for n in sizes
        for seed in range(seeds)
    ]  # fmt: skip


def curve_of(records) -> LabelCurve:
    cells = [row.cells["l2"] for row in compare(records).rows]
    (line,) = swept("l2", cells, LABELS, "test_top1")
    return LabelCurve(line)


def test_each_seed_draws_its_own_images_and_larger_draws_hold_smaller_ones():
    data = dataset_of([0, 1] * 20, [False] * 30 + [True] * 10)

    def train(n: int, seed: int, redraw: bool = True) -> set[int]:
        return set(make_splits(data, DatasetConfig(images_per_class=n, redraw=redraw), SplitConfig(), seed).train)

    assert train(4, 0) != train(4, 1) and train(4, 1) == train(4, 1)
    assert train(4, 1) < train(8, 1)
    assert train(4, 0, redraw=False) == train(4, 1, redraw=False)
    tests = [make_splits(data, DatasetConfig(redraw=True), SplitConfig(), seed).test.tolist() for seed in (0, 1)]
    assert tests[0] == tests[1]


def test_the_fit_finds_the_power_law_of_each_seed():
    curve = curve_of(curve_records())
    assert np.exp(curve.fits[:, 0]) == pytest.approx([60, 62, 64], rel=1e-4)
    assert curve.fits[:, 1] == pytest.approx([0.3, 0.32, 0.34], rel=1e-4)
    assert curve.misfit < 1e-3
    gains = [power_law(80, seed) - power_law(40, seed) for seed in range(3)]
    low, high = stats.t.interval(0.95, 2, np.mean(gains), stats.sem(gains))
    made = curve.doubling
    assert (made.mean, made.low, made.high, made.n) == pytest.approx((np.mean(gains), low, high, 3), rel=1e-3)


def test_a_length_that_follows_from_the_number_of_images_makes_no_other_line():
    records = curve_records()
    for one in records:
        one["config"]["schedule"] |= {"iterations": 300 + one["n_train"], "batch_size": 8 + one["n_train"] // 100}
    assert list(curve_of(records).line.cells) == list(SIZES)


def test_several_lengths_of_one_size_are_lines_of_their_own():
    longer = [one | {"run_id": f"{one['run_id']}-long"} for one in curve_records(schedule__iterations=600)]
    cells = [row.cells["l2"] for row in compare([*curve_records(), *longer]).rows]
    assert [list(line.cells) for line in swept("l2", cells, LABELS, "test_top1")] == [list(SIZES)] * 2


def test_one_seed_has_no_interval_and_perfect_accuracy_has_nothing_to_gain():
    single = curve_of(curve_records(seeds=1)).doubling
    assert (single.low, single.n) == (None, 1) and single.mean == pytest.approx(
        power_law(80, 0) - power_law(40, 0), 1e-3
    )
    perfect = [one | {"test_top1": 100.0} for one in curve_records()]
    assert abs(curve_of(perfect).doubling.mean) < 0.05


def test_seeds_that_lack_a_size_have_no_part_in_the_fit():
    records = [one for one in curve_records() if one["run_id"] != "l2-40-1"]
    assert curve_of(records).fits.shape == (2, 2)


def test_the_table_says_what_twice_as_many_labels_are_worth(tmp_path, capsys):
    records = [*curve_records(), *curve_records(method="delta_noatt")]
    (table,) = label_curves(compare(records))
    assert table.header[1:-1] == [f"{n} per class" for n in SIZES] and len(table.rows) == 2
    gain = curve_of(curve_records()).doubling.mean
    assert table.rows[0][-1].value == pytest.approx(gain)
    assert all(words in table.verdict for words in ("40 to 80", f"{gain:.1f} points", "L2"))
    assert label_curves(compare(curve_records(sizes=(5, 10)))) == []
    for form in ("markdown", "latex", "html"):
        file = tmp_path / f"t.{form}"
        assert report.main([save(tmp_path / form, records), "--format", form, "--output", str(file)]) == 0
        assert f"{gain:.1f} points" in file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_experiment_from_photos_to_the_sentence(tmp_path, monkeypatch, capsys):
    write_photos(tmp_path / "photos")
    source_for("scratch", tmp_path)
    monkeypatch.chdir(tmp_path)
    small = [f"{key}={value}" for key, value in SMALL.items() if key != "schedule.iterations"]
    asked = ["+experiment=label_curve", "dataset.root=photos", "reg=l2", "seed=0,1", "schedule.lr=0.001"]
    assert delta_run(monkeypatch, *asked, *small, "schedule.iterations=2") == 0
    capsys.readouterr()
    assert report.main(["results", "--format", "json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert len(cells) == 4 and all(len({run["run_id"] for run in cell["runs"]}) == 2 for cell in cells)
    assert report.main(["results"]) == 0
    assert "Doubling your labels, from 8 to 16 images per class" in capsys.readouterr().out
    draws = [json.loads(path.read_text()) for path in (tmp_path / "results/runs").glob("*/summary.json")]
    assert sorted({one["n_train"] for one in draws}) == [3, 6, 12, 24]


def test_the_experiment_draws_anew_for_each_seed():
    config = composed("+experiment=label_curve", "dataset.root=photos", "reg=l2", "seed=1", "dataset.sample_rate=0.5")
    assert config.dataset.redraw and config.dataset.sample_rate == 0.5
