"""A metric of which less is better, and data sets that are tested on folds: tables, choices and tests on records."""

import pytest

from delta_transfer import report
from delta_transfer.experiment.choosing import best_of
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.leaderboard import leaderboards
from delta_transfer.reporting.rivals import rivals_of, simplest
from delta_transfer.reporting.sections import mean_ranks
from delta_transfer.reporting.selection import choose
from delta_transfer.reporting.statistics import contests, equivalence, paired, standing, winner

from .test_report import record, save

ERRORS = {"l2": [0.9, 1.0, 1.1], "delta": [0.701, 0.8, 0.9], "l2_sp": [1.2, 1.3, 1.401]}


def regressions(**changes):
    return [
        record(method, seed, None, run_id=f"{method}{seed}", test_rmse=value, **changes)
        for method, values in ERRORS.items()
        for seed, value in enumerate(values)
    ]


def test_the_least_error_is_first_wins_and_has_rank_1():
    comparison = compare(regressions(), "test_rmse")
    (table,) = leaderboards(comparison, "l2")
    assert [row[0].text for row in table.rows] == ["DELTA", "L2", "L2-SP"]
    assert table.rows[0][1].text == "0.800 ± 0.100" and table.rows[0][1].bold and table.rows[0][2].value < 0
    assert "less is better" in table.title and "%" not in table.title.partition(",")[0]
    assert "points" not in table.verdict + "".join(table.notes)
    (contest,) = contests(comparison)
    found = standing(contest, "l2")
    assert (winner(contest), found.ahead, found.behind) == ("delta", ["delta"], ["l2_sp"])
    assert "DELTA" in table.verdict and "lowest" not in table.verdict  # it wins
    moved = [one | {"run_id": one["run_id"] + "x"} for one in regressions(dataset__name="other")]
    ranked = mean_ranks(compare([*regressions(), *moved], "test_rmse"))
    assert [row[0].text for row in ranked.rows] == ["DELTA", "L2", "L2-SP"]


def test_no_worse_means_no_larger_an_error():
    (contest,) = contests(compare(regressions(), "test_rmse"))
    better, worse = (equivalence(contest.cells[method], contest.cells["l2"], 0.05) for method in ("delta", "l2_sp"))
    assert (better.found, worse.found) == ("no worse", "worse")


def on_folds(**errors):
    return [
        record(
            method, 0, None, val_rmse=value, split__folds=3, split__fold=fold, run_id=f"{method}{fold}", val_loss=1.0
        )
        for method, values in errors.items()
        for fold, value in enumerate(values)
    ]


def test_the_least_validation_error_is_chosen_and_the_simplest_near_it():
    runs = on_folds(l2=[0.90, 1.00, 1.10], delta=[0.89, 1.02, 1.06], l2_sp=[0.5, 0.9, 1.0])
    choices = choose(compare(runs, "val_rmse"), []).choices
    best = best_of(choices)
    assert best.best.cell.mean == pytest.approx(0.8)  # L2-SP, whose errors are the smallest
    rivals = rivals_of(best, choices)
    assert [rival.difference.mean for rival in rivals] == sorted((r.difference.mean for r in rivals), reverse=True)
    assert not any(rival.equal for rival in rivals) and simplest(best, rivals) is best
    near = choose(compare(on_folds(l2=[0.90, 1.00, 1.10], delta=[0.89, 1.02, 1.06]), "val_rmse"), []).choices
    best = best_of(near)
    assert best.what.startswith("DELTA") and simplest(best, rivals_of(best, near)).what.startswith("L2")


def test_alphas_are_chosen_by_the_least_error():
    runs = [
        record("delta", seed, None, alpha=alpha, val_rmse=value + seed / 100, split__val_fraction=0.2)
        for alpha, value in ((0.1, 0.5), (0.01, 0.4), (0.001, 0.6))
        for seed in (0, 1)
    ]
    (choice,) = choose(compare(runs, "val_rmse"), []).choices
    assert dict(choice.best.reg) == {"reg.alpha": 0.01}


def test_the_report_has_a_table_of_errors_and_files_and_a_page(tmp_path, capsys):
    folder = save(tmp_path, regressions())
    for words in ([], ["--layout", "matrix"], ["--metric", "test_rmse", "--margin", "0.1"], ["--format", "html"]):
        output = tmp_path / "made"
        assert report.main([folder, *words, "--output", str(output)]) == 0
        assert "0.800" in output.read_text() and "RMSE" in output.read_text()


# ---- data sets of folds ----------------------------------------------------------------------------------


def of_proteins(**values):
    return [
        record(
            method,
            seed,
            value,
            dataset__name="proteins",
            dataset__fold=fold,
            dataset__folds=10,
            run_id=f"{method}{seed}{fold}",
        )
        for method, by_seed in values.items()
        for seed, by_fold in enumerate(by_seed)
        for fold, value in enumerate(by_fold)
    ]


def test_a_cell_is_the_mean_over_test_folds_and_seeds_and_pairs_are_folds():
    l2 = [[70.0, 60.0, 80.0], [72.0, 62.0, 82.0]]
    delta = [[73.0, 61.0, 82.0], [73.0, 65.0, 86.0]]  # 2, 2, 3 points more, as means over the seeds
    comparison = compare(of_proteins(l2=l2, delta=delta))
    (row,) = comparison.rows
    assert row.cells["l2"].n == 6 and row.cells["l2"].mean == pytest.approx(71.0)
    found = paired(row.cells["delta"], row.cells["l2"])
    assert (found.n, found.over) == (3, "fold") and found.mean == pytest.approx(7 / 3)
    (table,) = leaderboards(comparison, "l2")
    assert "fold" in table.verdict and any("fold" in note for note in table.notes)


def test_folds_of_one_data_set_are_rows_where_a_fold_of_its_training_split_is_held_out():
    runs = [
        record("l2", 0, None, val_top1=50.0 + k, dataset__fold=fold, split__folds=2, split__fold=k, run_id=f"{fold}{k}")
        for fold in (0, 1)
        for k in (0, 1)
    ]
    rows = compare(runs, "val_top1").rows
    assert [set(row.cells["l2"].values) for row in rows] == [{(0, 0), (0, 1)}] * 2
