"""The leaderboard and what it says in a sentence, on synthetic records."""

import json

import pytest

from delta_transfer import report
from delta_transfer.reporting import sections
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.leaderboard import leaderboards
from delta_transfer.reporting.statistics import contests, standing

from .test_report import record, save, three_methods


def texts(table):
    return [table.header, *([entry.text for entry in row] for row in table.rows)]


def test_a_row_for_each_method_the_best_first():
    (made,) = leaderboards(compare(three_methods()), "l2")
    assert texts(made) == [
        ["method", "mean ± std", "difference to L2", "", "n", "time of a run"],
        ["DELTA", "55.0 ± 2.0", "+3.0 [+2.9, +3.2]", "", "3", "101.0 s"],
        ["L2-SP", "52.3 ± 2.0", "+0.3 [-0.4, +1.1]", "", "3", "101.0 s"],
        ["L2", "52.0 ± 2.0", "baseline", "", "3", "101.0 s"],
    ]
    assert [bool(row[3].bar) for row in made.rows] == [True, True, False]
    assert [row[1].bold for row in made.rows] == [True, False, False]
    assert "CUB-200-2011" in made.title and made.verdict.startswith("DELTA ")


def test_processor_times_stand_beside_times_that_other_programs_lengthened():
    def times(of_l2: float) -> list[list[str]]:
        runs = [record("l2", 0, 50.0, train_processor_seconds=of_l2)]
        (made,) = leaderboards(compare([*runs, record("delta", 0, 51.0, train_processor_seconds=90.0)]), "l2")
        start = made.header.index("time of a run")
        return [line[start:] for line in texts(made)]

    assert times(30.0) == [["time of a run", "processor time"], ["100.0 s", "90.0 s"], ["100.0 s", "30.0 s"]]
    assert times(80.0) == [["time of a run"], ["100.0 s"], ["100.0 s"]]


def test_a_tie_is_no_win_and_equal_differences_have_no_interval():
    runs = [record(method, seed, 100.0) for method in ("l2", "delta", "l2_sp") for seed in (0, 1)]
    (made,) = leaderboards(compare(runs), "l2")
    assert made.verdict.startswith("L2, L2-SP and DELTA share ") and "no interval" in made.verdict
    assert "range(5)" not in made.verdict
    (single,) = leaderboards(compare([run for run in runs if run["seed"] == 0]), "l2")
    assert "one seed" in single.verdict


def test_the_verdict_says_over_which_seeds_methods_with_unequal_numbers_differ():
    runs = [record("l2", seed, value) for seed, value in enumerate((60.0, 61.0, 40.0, 41.0))]
    runs += [record("delta", seed, value) for seed, value in enumerate((59.0, 60.5))]  # behind where both have runs
    (made,) = leaderboards(compare(runs), "l2")
    assert "DELTA has the highest mean; its difference to L2 over the 2 seeds that both have is -0.8" in made.verdict
    (equal,) = leaderboards(compare([one for one in runs if one["seed"] < 2]), "l2")
    assert "that both have" not in equal.verdict


def test_two_seeds_bring_the_advice_to_run_more():
    comparison = compare([one for one in three_methods() if one["seed"] < 2])
    (made,) = leaderboards(comparison, "l2")
    assert "range(5)" in made.verdict and "range(5)" in sections.differences(comparison, "l2").notes[0]
    assert "range(5)" not in leaderboards(compare(three_methods()), "l2")[0].verdict
    assert sections.differences(compare(three_methods()), "l2").notes == []


def test_a_row_for_each_setting_and_no_judgement_among_them():
    runs = [record("l2", s, 50.0 + s) for s in (0, 1)]
    runs += [record("delta", s, 60.0 + 2 * s + a, alpha=a) for a in (0.1, 0.01) for s in (0, 1)]
    (made,) = leaderboards(compare(runs), "l2")
    assert [[entry.text for entry in row[:2]] for row in made.rows] == [
        ["DELTA", "alpha=0.1"],
        ["DELTA", "alpha=0.01"],
        ["L2", ""],
    ]
    assert not any(entry.bold for row in made.rows for entry in row) and "DELTA" in made.verdict


def test_a_table_for_each_data_set_with_the_notes_under_the_last():
    comparison = compare([*three_methods(), *three_methods(dataset__name="dogs_120")])
    first, last = leaderboards(comparison, "l2")
    assert first.notes + comparison.notes == last.notes
    # One title for two names tells nothing apart.
    assert first.title.startswith("cub,") and last.title.startswith("dogs_120,")


def test_a_seed_that_the_baseline_lacks_is_counted():
    runs = [record("l2", s, 50.0 + s) for s in (0, 1)] + [record("delta", s, 51.0 + s * s) for s in (0, 1, 2)]
    (made,) = leaderboards(compare(runs), "l2")
    assert made.rows[0][2].text.endswith("(2)") and made.rows[0][4].text == "3"


def with_further(runs):
    """Beside test images, sketches, the source's answers and a probe on dogs; the last run lacks them."""
    for one in runs[:-1]:
        one["config"]["evaluate"] = {"also": {"sketches": "/drawings"}}
        one |= {"also_sketches_top1": one["test_top1"] - 20.0 + one["seed"], "kept_agreement": one["test_top1"]}
        one |= {"kept_probe_top1": 40.0, "kept_probe_top1_before": 42.5}
        one["further_sets"] = {"sketches": "a" * 64, "dogs": "b" * 64}
    return runs


def test_further_measures_are_columns_with_paired_intervals():
    comparison = compare(with_further(three_methods()))
    (made,) = leaderboards(comparison, "l2")
    columns = ["sketches", "source's answers", "probe, dogs"]
    at = made.header.index("sketches")
    assert made.header[at : at + 3] == columns
    delta, l2_sp, l2 = ([entry.text for entry in row[at : at + 3]] for row in made.rows)
    assert all(text.endswith("(2)") for text in delta)
    assert l2_sp == ["33.3, +0.3 [-0.4, +1.1]", "52.3, +0.3 [-0.4, +1.1]", "40.0, 0.0"]
    assert l2 == ["33.0", "52.0", "40.0"]
    assert any("42.5" in note for note in made.notes)


def test_other_images_are_another_measure():
    runs = with_further(three_methods())
    runs[0]["further_sets"]["sketches"] = "c" * 64
    (made,) = leaderboards(compare(runs), "l2")
    assert {"sketches (aaaaaaaa)", "sketches (cccccccc)", "probe, dogs"} <= set(made.header)


def test_further_measures_are_in_files_for_programs_and_in_every_text(tmp_path, capsys):
    folder = save(tmp_path, with_further(three_methods()))
    assert report.main([folder, "--format", "json"]) == 0
    l2_sp = json.loads(capsys.readouterr().out)["cells"][1]
    assert l2_sp["also_sketches_top1"] == 33.3333 and l2_sp["also_sketches_top1_difference"] == 0.3333
    assert l2_sp["also_sketches_top1_low"] == -0.3838 and l2_sp["kept_probe_top1_low"] is None
    for form in ("table", "markdown", "latex", "html"):
        output = tmp_path / f"report.{form}"
        assert report.main([folder, "--format", form, "--output", str(output)]) == 0
        assert all(words in output.read_text("utf-8") for words in ("sketches", "33.3, +0.3", "probe, dogs"))


def test_validation_tables_have_no_differences():
    runs = [r | {"val_top1": r["test_top1"]} for r in three_methods(split__val_fraction=0.2)]
    (made,) = leaderboards(compare(runs, "val_top1"), None)
    assert made.header == ["method", "mean ± std", "n", "time of a run"]
    assert not any(entry.bold for row in made.rows for entry in row)


@pytest.mark.parametrize(
    ("values", "best", "wins", "ahead", "behind"),
    [
        ({"delta": [3.0, 3.1, 2.9], "afa": [1.0, 1.1, 1.2]}, "delta", True, ["delta", "afa"], []),
        ({"delta": [0.9, 1.0, 1.1], "afa": [4.0, 0.0, 1.0]}, "afa", False, ["delta"], []),
        ({"delta": [-0.9, -1.0, -1.1], "afa": [-3.0, 1.0, 3.0]}, "afa", False, [], ["delta"]),
        ({"delta": [-0.9, -1.0, -1.1]}, "l2", True, [], ["delta"]),
    ],
)
def test_standing(values, best, wins, ahead, behind):
    l2 = [50.0, 52.0, 54.0]
    runs = [record("l2", seed, value) for seed, value in enumerate(l2)]
    runs += [record(m, s, l2[s] + plus) for m, all_ in values.items() for s, plus in enumerate(all_)]
    comparison = compare(runs)
    (contest,) = contests(comparison)
    made = standing(contest, "l2")
    assert (made.best, made.wins, made.ahead, made.behind) == (best, wins, ahead, behind)
    (table,) = leaderboards(comparison, "l2")
    assert comparison.display(best) in table.verdict
