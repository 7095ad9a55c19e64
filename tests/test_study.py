"""scripts/studies.py chooses strengths by decades; scripts/read_study.py makes the study's tables of records."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from delta_transfer.reporting.comparison import Cell

SCRIPTS = Path(__file__).parent.parent / "scripts"
TITLES = {"l2": "L2", "l2_fe": "L2-FE", "delta": "DELTA"}


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import read_study

    return read_study


def cell(*values: float) -> Cell:
    return Cell({(seed, None): value for seed, value in enumerate(values)})


def test_over_sets_is_a_t_interval_of_their_means(study):
    found = study.over_sets([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.high - found.mean == pytest.approx(4.302652730 / 3**0.5)  # t(0.975, 2) * 1 / sqrt(3)
    assert study.over_sets([1.0, 2.0]).low is None and study.over_sets([]) is None


def test_the_line_needs_four_data_sets(study):
    slope, low, high = map(float, re.findall(r"[-+][\d.]+", study.line_through([(0, 0), (1, 2), (2, 4.1), (3, 6)])))
    assert slope == pytest.approx(2.01) and low < slope < high
    assert study.line_through([(0, 0), (1, 1), (2, 2)]) == study.line_through([(1, y) for y in range(4)]) == "-"


def test_what_did_not_finish_is_a_dash(study):
    sets = {"a": {"l2": cell(50, 51), "l2_fe": cell(52, 54)}, "b": {"l2": cell(60, 61), "delta": cell(61, 63)}}
    text = study.reading(sets, TITLES)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert rows["**mean over data sets**"].count("(1)") == 2
    assert "| - |" in text and "53.0 ± 1.4 (2)" in text


def test_what_predicts_the_gain_is_read_off_each_row(study, monkeypatch):
    rows = [("a", 4, 1.0, 0.5), ("b", 16, 3.0, 1.5), ("c", 64, 5.0, 2.5), ("d", 2, None, 0.0)]
    sets = {}
    for name, images, frozen, gain in rows:
        sets[name] = {"l2": cell(50, 51), "delta": cell(50 + gain, 51 + gain)}
        sets[name]["l2"].runs.append({"config": {"dataset": {"name": name}}, "n_train": 3 * images, "num_classes": 3})
        if frozen is not None:
            sets[name]["l2_fe"] = cell(50 + frozen, 51 + frozen)
    found = {name: study.differences_of(cells)["delta"] for name, cells in sets.items()}
    frozen, images, confidence = study.predictors({"a": 20.0, "b": 60.0})
    assert study.points_of(frozen, sets, found) == [(1, 0.5), (3, 1.5), (5, 2.5)]
    assert study.points_of(images, sets, found) == [(2, 0.5), (4, 1.5), (6, 2.5), (1, 0.0)]
    assert study.points_of(confidence, sets, found) == [(2, 0.5), (6, 1.5)]
    assert [one.name for one in study.predictors()] == ["frozen_features", "images_per_class"]
    panels = study.figure_of(images, sets, TITLES, ["l2_fe", "delta"]).axes
    drawn = [next(iter(panel.containers)).lines[0].get_xydata().tolist() for panel in panels]
    assert drawn[0] == [[4, 1], [16, 3], [64, 5]] and drawn[1] == [[4, 0.5], [16, 1.5], [64, 2.5], [2, 0]]


def test_what_attention_adds_is_paired_by_seed_and_averaged_over_data_sets(study):
    titles = TITLES | {"delta_noatt": "DELTA w/o ATT"}
    rows = {"a": (cell(63, 65), cell(61, 64)), "b": (cell(50, 51), cell(50, 52)), "c": (cell(70, 71), cell(69, 69))}
    sets = {name: {"l2": cell(50, 50), "delta": delta, "delta_noatt": plain} for name, (delta, plain) in rows.items()}
    sets["d"] = {"l2": cell(50, 50), "delta": cell(60, 61)}
    table = study.reading(sets, titles).split("Difference to L2")[1]
    found = [line.rstrip(" |").rpartition("| ")[2] for line in table.splitlines() if line.startswith("|")][:7]
    assert found[0] == "DELTA - DELTA w/o ATT"
    assert [one.split()[0] for one in found[2:]] == ["+1.5", "-0.5", "+1.5", "-", "+0.8"]
    assert found[-1].endswith("(3)")


def test_forgetting_has_a_table_where_it_was_measured(study):
    sets = {"a": {"l2": cell(50, 51), "l2_fe": cell(52, 54)}}
    assert "30.0 ± 0.0 (2)" in study.reading(sets, TITLES, {"a": {"l2": cell(30, 30)}})
    assert study.reading(sets, TITLES, {"a": {}}) == study.reading(sets, TITLES)


def test_two_runs_of_one_seed_are_refused(study):
    run = {"schema": None, "folder": "x"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "problem", lambda record, metric: None)
        patch.setattr(study, "folds", lambda record: None)
        patch.setattr(study, "method_of", lambda record: "l2")
        patch.setattr(study, "replicate", lambda record, metric: (0, None))
        with pytest.raises(SystemExit):
            study.cells_of([run | {"test_top1": 1.0}] * 2)


def test_decades_are_added_until_the_best_is_no_edge(study, tmp_path, monkeypatch):
    import studies

    curve = {-9: 1.0, -8: 2.0, -7: 2.0, -6: 1.0, -5: 0.0}  # the weaker one of a tie counts
    ran: list[tuple[str, ...]] = []

    def records(dirs):
        decades = [-6, *(round(math.log10(float(words[1].partition("=")[2]))) for words in ran)]  # -6 ran before
        alphas = {10.0**decade: curve[decade] for decade in decades}
        return [
            {"seed": seed, "val_roc_auc": value, "config": {"reg": {"name": "delta", "alpha": alpha}}}
            for alpha, value in alphas.items()
            for seed in range(3)
        ], []

    monkeypatch.setattr(studies, "read_all", records)
    trial = studies.Trial(("seed=0,1",), range(2), 2, "val_roc_auc")
    one = studies.Study(["+experiment=some"], tmp_path / "bbbp", trial, {"delta": (-7, -6, -5)}, (-9, 1))
    monkeypatch.setattr(one, "run", lambda *words: ran.append(words))
    one.results.mkdir()
    assert one.strength("l2") == [] and one.strength("delta") == ["reg.alpha=1e-08"]
    assert [words[1] for words in ran] == ["reg.alpha=1e-07", "reg.alpha=1e-05", "reg.alpha=1e-08"]
    one.final("delta", 5)
    assert ran[3:] == [("delta", "reg.alpha=1e-08", "seed=range(5)")]


def test_the_attention_study_has_a_row_for_each_finished_variant(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS)
    import attention_study

    tests = {"delta_noatt": (80.0, 81.0, 82.5), "delta": (80.1, 81.2, 82.5), "every_4": (70.0, 72.0, 71.0)}
    for name in (*tests, "every_8"):
        (tmp_path / name).mkdir()
    records = {name: [{"name": name}] for name in tests} | {"every_8": [{"name": "every_8", "error": "diverged"}] * 2}
    run = {"fit": {"conv1/split_half": 0.25, "conv2/split_half": 0.75, "seconds": 3}}
    monkeypatch.setattr(attention_study, "read_all", lambda folders: (records[folders[0].name], []))

    def cells_of(found):
        name = found[0]["name"]
        runs = [run if name == "delta" else {}]
        return {"m": Cell(cell(*tests[name]).values, runs=runs)} if name in tests else {}

    monkeypatch.setattr(attention_study, "cells_of", cells_of)
    rows = [line.split(" | ") for line in attention_study.reading(tmp_path).splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [*tests, "every_8"]
    assert [row[3] for row in rows] == ["-", "equal", "worse", "-"]
    assert [row[4] for row in rows] == ["-", "0.50", "-", "-"]
    assert [row[5].strip("| ") for row in rows] == ["0", "0", "0", "2"] and rows[3][1] == "-"


def test_a_curve_is_compared_at_each_measured_iteration(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import read_curves

    def runs(*curves: tuple[float, ...]) -> Cell:
        records = [{"metrics": [{"step": 10 * n, "test_top1": a} for n, a in enumerate(c, 1)]} for c in curves]
        return Cell({(seed, None): c[-1] for seed, c in enumerate(curves)}, runs=records)

    monkeypatch.setattr(read_curves, "method_title", lambda record: "DELTA")
    cells = {"l2": runs((10, 20, 30, 40), (12, 20, 30, 42)), "delta": runs((15, 24, 34, 42), (18, 25, 33, 44))}
    text = read_curves.reading(cells)
    assert text.count("| DELTA |") == 3  # at each iteration, what is missing, roughness
    first, missing, rough = (line.split(" | ") for line in text.splitlines() if line.startswith("| DELTA |"))
    assert [one.split()[0] for one in first[1:]] == ["+5.5", "+4.5", "+3.5", "+2.0"]
    assert [one.split()[0] for one in missing[1:]] == ["-3.5", "-2.5", "-1.5"]
    assert rough[1].startswith("+0.8")  # the mean of (1 + 2) / 2 - 0 and (1 + 3) / 2 - (2 + 2) / 2
    with pytest.raises(SystemExit):
        read_curves.reading({"l2": runs((10, 20)), "delta": runs((10, 20), (10, 20))})
    with pytest.raises(SystemExit):
        read_curves.reading({"l2": runs((10,)), "delta": runs((20,))})


def test_silent_channels_are_counted_over_all_taps(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import read_channels

    before, after = np.array([0.0, 0.0, 1.0, 1.0, 1.0]), np.array([0.0, 0.5, 0.0, 1.0, 1.0])
    change = read_channels.Change("run", "l2", "L2", {"a": before, "b": before}, {"a": after, "b": before})
    assert read_channels.silent_and_woken(change, 0.1) == (4, 1)
