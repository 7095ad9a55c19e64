"""The tables of a report on synthetic records."""

import re

import numpy as np
import pytest

from delta_transfer import report
from delta_transfer.common import tables
from delta_transfer.common.tables import Entry, Table, entries
from delta_transfer.reporting import page, sections
from delta_transfer.reporting.comparison import compare

from .test_report import record, save, three_methods


def grid(table):
    return [table.header, *([entry.text for entry in row] for row in table.rows)]


# ---- what is said ----------------------------------------------------------------------------------------


def test_only_the_one_ahead_of_all_is_bold():
    made = sections.accuracies(compare(three_methods()))
    assert [entry.text for entry in made.rows[0] if entry.bold] == ["55.0 ± 2.0 (3)"]
    assert made.notes[0] == sections.BOLD
    close = [
        r | {"test_top1": r["test_top1"] - 2} if r["config"]["reg"]["name"] == "delta" else r for r in three_methods()
    ]
    made = sections.accuracies(compare(close))
    assert not any(entry.bold for entry in made.rows[0]) and made.notes[0] == sections.UNSETTLED


def test_without_seeds_in_common_nothing_is_said_of_who_is_ahead():
    notes = sections.accuracies(compare([record("l2", 0), record("delta", 1)])).notes
    assert sections.BOLD not in notes and sections.UNSETTLED not in notes


def test_differences():
    made = sections.differences(compare(three_methods()), "l2")
    assert grid(made) == [
        ["dataset", "backbone", "L2-SP", "DELTA"],
        ["cub", "resnet18", "+0.3 [-0.4, +1.1] (3)", "+3.0 [+2.9, +3.2] (3)"],
    ]
    assert sections.differences(compare([record("l2", 0)]), "l2") is None


def test_no_differences_between_settings_that_were_not_chosen():
    runs = [record("l2", 0, 50.0), *(record("delta", 0, 60.0, alpha=a) for a in (0.1, 0.01))]
    assert sections.differences(compare(runs), "l2") is None
    assert f"{sections.NOT_JUDGED}: DELTA on cub, resnet18" in sections.accuracies(compare(runs)).notes


def test_mean_ranks():
    runs = [*three_methods(), *three_methods(dataset__name="dogs")]
    made = sections.mean_ranks(compare(runs))
    assert grid(made) == [["method", "mean rank"], ["DELTA", "1.00"], ["L2-SP", "2.00"], ["L2", "3.00"]]
    assert made.remarks == ["Too few rows for a critical difference (2; at least 5, and three methods)"]
    many = [r for i in range(6) for r in three_methods(dataset__name=f"set{i}")]
    (said,) = sections.mean_ranks(compare(many)).remarks
    assert said.startswith("Friedman p=0.0025; two methods differ if their mean ranks are more than 1.35 apart")
    assert sections.mean_ranks(compare(three_methods())) is None


def test_settings_are_not_data_sets_to_rank_over():
    runs = [r for n in range(6) for r in three_methods(schedule__iterations=n)]
    assert sections.mean_ranks(compare(runs)) is None
    runs += [r for name in ("dogs", "mit67") for r in three_methods(dataset__name=name)]
    made = sections.mean_ranks(compare(runs))
    assert " 2 rows " in made.title
    assert made.notes == ["Left out, with several settings outside reg: cub with resnet18"]


def test_beside_published():
    made = sections.beside_published(compare([record(backbone__name="resnet101", top1=70.0), record("l2")]), "paper")
    assert grid(made) == [
        ["dataset", "backbone", "method", "ours", "published", "difference", "differs: ours (published)"],
        ["cub", "resnet101", "DELTA", "70.0 (1)", "80.5", "-10.5", made.rows[0][-1].text],
        ["cub", "resnet18", "L2", "57.4 (1)", "–", "–", "–"],
    ]
    assert made.rows[0][-1].text == (
        "image_size 160 (224), iterations 300 (9000), batch_size 32 (64), n_train 500 (5994), n_test 1389 (5794)"
    )
    assert made.remarks == ["cub was not published with resnet18, only with resnet101, inception_v3"]


def test_equivalences():
    runs = [*three_methods(), *(record("afa", s, v) for s, v in enumerate([51.0, 49.0, 57.0]))]
    made = sections.equivalences(compare(runs), "l2", 1.0)
    assert [(row[2].text, row[4].text) for row in made.rows] == [
        ("L2-SP", "equal within 1 point"),
        ("DELTA", "no worse by more than 1 point"),
        ("AFA", "open"),
    ]
    assert made.rows[2][-1].value > 10 and made.rows[0][-1].value is None
    assert sections.equivalences(compare([record("l2"), record("delta")]), "l2", 1.0) is None


# ---- predictions -----------------------------------------------------------------------------------------


def save_predictions(folder, records, right):
    """`right`: share of 100 images that each run gets right, by method."""
    records = [r | {"test_top1": 100 * right[r["config"]["reg"]["name"]]} for r in records]
    save(folder, records)
    for r in records:
        correct = np.arange(100) < 100 * right[r["config"]["reg"]["name"]]
        logits = np.stack([correct, ~correct], axis=1).astype(np.float32)
        np.savez(
            folder / "runs" / r["run_id"] / "predictions.npz",
            labels=np.zeros(100, int),
            logits=logits,
            index=np.arange(100),
        )


def test_per_image_differences(tmp_path, capsys):
    records = [record(name, seed) for name in ("l2", "delta") for seed in range(2)]
    save_predictions(tmp_path, records, {"l2": 0.6, "delta": 0.8})
    assert report.main([str(tmp_path), "--per-image", "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert "paired by test image: mean [95 % bootstrap interval] (n images)**" in out
    # 20 +- 1.96 * sqrt(0.2 * 0.8 / 100), in whole images
    assert re.search(r"\| \+20\.0 \[\+1[123]\.0, \+2[78]\.0\] \(100\) \|", out)


def test_differences_over_too_many_images_are_left_out(tmp_path, capsys, monkeypatch):
    records = [record(name) for name in ("l2", "l2_sp", "delta")]
    save_predictions(tmp_path, records, {"l2": 0.6, "l2_sp": 0.7, "delta": 0.8})
    images = records[0]["n_test"]
    for most, left_out in ((4 * images, ""), (3 * images, "1 differences"), (images, "2 differences")):
        monkeypatch.setattr(sections, "MOST_IMAGES", most)
        assert report.main([str(tmp_path), "--per-image", "--format", "markdown"]) == 0
        out, err = capsys.readouterr()
        assert (left_out in err) and ("are left out" in err) == bool(left_out)
        assert out.count("(100), p=") == (2 if not left_out else 2 - int(left_out[0]))
        assert left_out in out or left_out[0] == "2"  # without any difference there is no table to say it


def test_the_page_looks_at_predictions_of_the_best_results(tmp_path, monkeypatch):
    records = [record(name, num_classes=2) for name in ("l2", "l2_sp", "delta")]
    save_predictions(tmp_path, records, {"l2": 0.6, "l2_sp": 0.7, "delta": 0.8})
    for runs, left_out in ((3, 0), (2, 1)):
        monkeypatch.setattr(page, "MOST_LOGITS", runs * 2 * records[0]["n_test"])
        assert report.main([str(tmp_path), "--format", "html", "--output", str(tmp_path / "page.html")]) == 0
        text = (tmp_path / "page.html").read_text()
        _, _, trust = text.partition('<section id="trust">')
        assert [f"{name} on CUB" in trust for name in ("DELTA", "L2-SP", "L2")] == [True, True, not left_out]
        assert (f"predictions of {runs} runs" in trust) == bool(left_out)


def test_with_one_seed_mcnemar_is_given(tmp_path, capsys):
    save_predictions(tmp_path, [record("l2"), record("delta")], {"l2": 0.6, "delta": 0.8})
    assert report.main([str(tmp_path), "--per-image", "--format", "markdown"]) == 0
    assert "(100), p=1.9e-06 |" in capsys.readouterr().out  # 2 * (1/2)^20


def test_damaged_or_missing_predictions_are_named(tmp_path, capsys):
    save_predictions(tmp_path, [record("l2"), record("delta")], {"l2": 0.6, "delta": 0.8})
    (tmp_path / "runs" / record("delta")["run_id"] / "predictions.npz").write_bytes(b"PK half")
    assert report.main([str(tmp_path), str(tmp_path / "misspelt"), "--per-image", "--format", "markdown"]) == 1
    out, err = capsys.readouterr()
    assert "80.0" in out and "bootstrap" not in out and f"no such folder: {tmp_path / 'misspelt'}" in err
    assert record("delta")["run_id"] in err and "no per-image test" in err


def test_damaged_predictions_of_the_baseline_are_named_once(tmp_path, capsys):
    records = [record(name) for name in ("l2", "l2_sp", "delta")]
    save_predictions(tmp_path, records, {"l2": 0.6, "l2_sp": 0.7, "delta": 0.8})
    path = tmp_path / "runs" / record("l2")["run_id"] / "predictions.npz"
    path.write_bytes(b"PK half")
    assert report.main([str(tmp_path), "--per-image"]) == 0
    assert capsys.readouterr().err.count(str(path)) == 1


def test_predictions_of_other_images_are_not_compared(tmp_path, capsys):
    save_predictions(tmp_path, [record("l2"), record("delta")], {"l2": 0.6, "delta": 0.8})
    path = tmp_path / "runs" / record("delta")["run_id"] / "predictions.npz"
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"index": arrays["index"] + 1})
    assert report.main([str(tmp_path), "--per-image"]) == 0
    assert (
        "no per-image test of DELTA on cub, resnet18: predictions of different test images" in capsys.readouterr().err
    )


# ---- LaTeX ----------------------------------------------------------------------------------------------


def test_bold_in_latex():
    rows = [entries("a_b", Entry("-1.0", -1.0, bold=True), "a word " * 8)]
    text = tables.latex(Table("50 % ± 1", ["name", "value", "words"], rows, 1, notes=["Bold: best"]))
    assert (
        text
        == r"""% needs \usepackage{booktabs}
% Bold: best
\begin{table}[t]
\centering
\caption{50 \% $\pm$ 1. Bold: best}
\begin{tabular}{lrp{5cm}}
\toprule
name & value & words \\
\midrule
a\_b & \textbf{$-$1.0} & a word a word a word a word a word a word a word a word  \\
\bottomrule
\end{tabular}
\end{table}
"""
    )


# ---- the command -----------------------------------------------------------------------------------------


def test_baseline_that_was_not_run(tmp_path, capsys):
    folder = save(tmp_path, three_methods())
    assert report.main([folder, "--baseline", "l2_fe"]) == 1
    assert capsys.readouterr().err == (
        "delta-report: --baseline l2_fe: there are no runs of it, only of l2, l2_sp, delta.\n"
    )
    assert report.main([folder, "--baseline", "delta", "--format", "csv"]) == 0
    assert ",l2,52.0,2.0,3,delta,-3.0333," in capsys.readouterr().out


def test_validation_tables_prove_nothing(tmp_path, capsys):
    runs = [r | {"val_top1": r["test_top1"]} for r in three_methods(split__val_fraction=0.2)]
    assert report.main([save(tmp_path, runs), "--metric", "val_top1", "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert "55.0 ± 2.0" in out and "ifference" not in out and "**55" not in out


@pytest.mark.parametrize(
    "options",
    [
        ["--format", "html"],
        ["--pictures", "x"],
        ["--against", "memory"],
        ["--against", "paper", "--metric", "val_top1"],
        ["--per-image", "--select", "cv"],
        ["--per-image", "--format", "csv"],
        ["--margin", "0"],
        ["--margin", "--format", "csv"],
    ],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(SystemExit):
        report.main(options)
