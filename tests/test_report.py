"""delta-report: synthetic records -> exact text. `pytest tests/test_report.py --regenerate` writes the text anew."""

import json
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from delta_transfer import report
from delta_transfer.common import tables
from delta_transfer.common.options import Options
from delta_transfer.records.integrity import with_digest
from delta_transfer.records.reading import run_folders
from delta_transfer.records.run_directory import SCHEMA
from delta_transfer.reporting import sections
from delta_transfer.reporting.comparison import Cell, compare
from delta_transfer.reporting.record_views import NOT_SETTINGS, problem, within

GOLDEN = Path(__file__).parent / "golden"
TITLES = {
    **{"l2": "L2", "l2_fe": "L2-FE", "l2_sp": "L2-SP", "delta_noatt": "DELTA w/o ATT", "delta": "DELTA", "afa": "AFA"},
    **{"scratch": "Scratch", "lwf": "LwF", "lwf_at": "LwF+AT", "fm": "FM", "l2t_w": "L2T-w", "l2t_ww": "L2T-ww"},
}


def assert_golden(request, name, text):
    """Asserts that `text` is the content of tests/golden/`name`; with --regenerate it is written there instead."""
    if request.config.getoption("--regenerate"):
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / name).write_text(text, encoding="utf-8")
    assert text == (GOLDEN / name).read_text(encoding="utf-8")


def record(method="delta", seed=0, top1=57.4, alpha=0.01, **changes):
    """One record. `changes` are top-level keys, or config keys with two underscores: schedule__lr=0.1."""
    reg = {"name": method, "weight_decay": 1e-4}
    if method not in ("l2", "l2_fe"):
        reg = {"name": method, "alpha": alpha, "beta": 0.01}
    config = {
        "seed": seed,
        "precision": "fp32",
        "device": "cpu",
        "results_dir": "results",
        "dataset": {"name": "cub", "root": "/data", "images_per_class": 10},
        "backbone": {"name": "resnet18", "weights": "IMAGENET1K_V1", "image_size": 160},
        "reg": reg,
        "schedule": {"iterations": 300, "batch_size": 32, "lr": 0.01, "log_every": 10},
        "split": {"val_fraction": 0.0, "folds": None, "fold": 0},
    }
    made = {
        "schema": SCHEMA,
        "titles": {"method": TITLES.get(method, method), "dataset": "CUB-200-2011"},
        "seed": seed,
        "config": config,
        "n_train": 500,
        "n_test": 1389,
        "dataset_fingerprint": "d" * 64,
        "weights_fingerprint": "e" * 64,
        "test_top1": top1,
        "val_top1": None,
        "selection": "last iteration",
        "iterations": 300,
        "train_seconds": 100.0 + seed,
        "versions": {"torch": "2.15.0", "python": "3.11.7"},
        "device": "cpu: Intel Xeon, 2 threads",
        "git_commit": "abc1234def",
        "error": None,
    }
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        if group:
            config[group][name] = value
        else:
            made[key] = value
    dataset, backbone = config["dataset"]["name"], config["backbone"]["name"]
    made.setdefault("run_id", f"{dataset}-{backbone}-{method}-s{seed}-{alpha}")
    return made


def four_methods():
    return [
        *(record("l2", s, v) for s, v in enumerate([50.0, 52.0, 54.0])),
        *(record("l2_sp", s, v, alpha=0.1) for s, v in enumerate([55.0, 56.0])),
        record("delta", 0, 57.4),
        record("my_reg", 0, 40.0),
        record("l2", 0, 61.25, dataset__name="dogs_120", dataset__root="/elsewhere"),
    ]


def test_processor_times_stand_beside_times_that_other_programs_lengthened():
    def cells(**of_delta):
        records = [record("l2", 0, 50.0, train_processor_seconds=90.0), record("delta", 0, 51.0, **of_delta)]
        table = sections.costs(compare([*records, record("l2_sp", 0, 52.0)]))
        return table.header.count("processor time"), [[entry.text for entry in row] for row in table.rows]

    waited, rows = cells(train_processor_seconds=30.0)
    assert waited == 1 and [row[:4] for row in rows] == [
        ["L2", "300", "100.0 s", "90.0 s"],
        ["L2-SP", "300", "100.0 s", "–"],  # a record from before there was such a time
        ["DELTA", "300", "100.0 s", "30.0 s"],
    ]
    for quiet in ({"train_processor_seconds": 80.0}, {}):
        waited, rows = cells(**quiet)
        assert waited == 0 and {len(row) for row in rows} == {5}


def test_a_method_with_stages_is_compared_where_its_iterations_are_the_same_in_all():
    """AFA takes the schedule twice: beside it stands a DELTA of twice the iterations, not one of half its cost."""
    both = {"iterations": 600, "stages": [{"iterations": 300}, {"iterations": 300}]}
    records = [record("l2", s, 50.0) for s in (0, 1)] + [record("delta", s, 51.0) for s in (0, 1)]
    records += [record("afa", s, 54.0, alpha=0.1, **both) for s in (0, 1)]
    records += [record("delta", s, 53.0, schedule__iterations=600, iterations=600) for s in (0, 1)]
    made = compare(records)
    assert [(row.settings, set(row.cells)) for row in made.rows] == [
        ("schedule.iterations=300", {"l2", "delta"}),
        ("schedule.iterations=600", {"delta", "afa"}),
    ]
    assert any("AFA (alpha=0.1, beta=0.01, stages=2)" in note for note in made.notes)
    assert [[entry.text for entry in row] for row in sections.costs(made).rows] == [
        ["L2", "300", "100.5 s", "335 ms", "2"],
        ["DELTA", "300", "100.5 s", "335 ms", "2"],
        ["DELTA", "600", "100.5 s", "168 ms", "2"],
        ["AFA", "600 in 2 stages", "100.5 s", "168 ms", "2"],
    ]


def save(folder, records):
    for r in records:
        run = folder / "runs" / r["run_id"]
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps(r))
    return str(folder)


def settings_and_cells(records, metric="test_top1"):
    rows = compare(records, metric).rows
    return [(row.settings, {m: str(c) for m, c in row.cells.items()}) for row in rows]


def main_table(records):
    return sections.accuracies(compare(records))


# ---- golden text -----------------------------------------------------------------------------------------

SEEDS = {"l2": [50.0, 52.0, 54.0], "l2_sp": [50.5, 52.0, 54.5], "delta": [53.0, 55.1, 57.0]}


def three_methods(**changes):
    return [record(name, seed, value, **changes) for name, all_ in SEEDS.items() for seed, value in enumerate(all_)]


@pytest.mark.parametrize("form", ["table", "markdown", "latex", "csv", "json", "matrix"])
def test_every_format(form, tmp_path, capsys, request):
    """Two data sets, one of them with a winner, beside published numbers; to a pipe and to a file."""
    dogs = {"method": "", "dataset": "Stanford Dogs"}
    other = three_methods(dataset__name="dogs_120", backbone__name="resnet101")
    other = [r | {"titles": dogs | {"method": r["titles"]["method"]}} for r in other]
    folder = save(tmp_path, [*three_methods(), record("my_reg", 0, 40.0), *other])
    options = ["--layout", "matrix"] if form == "matrix" else ["--format", form]
    assert report.main([folder, *options, "--against", "paper"]) == 0
    piped = capsys.readouterr().out
    assert_golden(request, f"report.{form}", piped)
    assert report.main([folder, *options, "--against", "paper", "--output", str(tmp_path / "new" / "t")]) == 0
    assert (tmp_path / "new" / "t").read_text(encoding="utf-8") == piped and capsys.readouterr().out == ""


# ---- what may be averaged --------------------------------------------------------------------------------


def test_cell():
    three = Cell({(0, None): 1.0, (1, None): 2.0, (2, None): 3.0})
    assert (three.mean, three.std) == (2.0, 1.0)
    assert Cell({(0, None): 57.4}).std is None
    assert str(Cell({(0, None): 57.4})) == "57.4 (1)"


def test_methods_come_in_the_fixed_order():
    names = ["zzz", "delta", "abc", "delta_noatt", "l2_sp", "l2_fe", "l2"]
    expected = ["l2", "l2_fe", "l2_sp", "delta_noatt", "delta", "abc", "zzz"]
    assert compare([record(name) for name in names]).methods == expected


def test_alphas_of_one_method_split_rows_in_numeric_order():
    records = [record("l2", 0, 50.0)] + [record("l2_sp", 0, a, alpha=a) for a in (10.0, 0.5, 1)]
    assert settings_and_cells(records) == [
        ("", {"l2": "50.0 (1)"}),
        ("reg.alpha=0.5", {"l2_sp": "0.5 (1)"}),
        ("reg.alpha=1", {"l2_sp": "1.0 (1)"}),
        ("reg.alpha=10.0", {"l2_sp": "10.0 (1)"}),
    ]


def test_nested_reg_settings_split_rows():
    records = [record(reg__attention={"images": n}) for n in (64, 256)]
    shown = [row.settings for row in compare(records).rows]
    assert shown == ["reg.attention.images=64", "reg.attention.images=256"]


def test_alphas_of_different_methods_share_a_row():
    assert len(compare([record("l2_sp", alpha=0.1), record("delta", alpha=0.01)]).rows) == 1


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"schedule__iterations": 9000}, "schedule.iterations=9000"),
        ({"split__val_fraction": 0.2}, "split.val_fraction=0.2"),
        ({"dataset_fingerprint": "0123456789abcdef"}, "dataset_fingerprint=01234567"),
        ({"weights_fingerprint": "0123456789abcdef"}, "weights=01234567"),
        ({"weights_fingerprint": None, "backbone__weights": "mine.pth"}, "weights=mine.pth"),
        ({"selection": "best on validation"}, "selection=best on validation"),
    ],
)
def test_settings_outside_reg_split_rows(change, shown):
    rows = compare([record(seed=0), record(seed=1, **change)]).rows
    assert len(rows) == 2 and shown in [row.settings for row in rows]


def test_places_and_logging_do_not_split_rows():
    other = record(seed=1, dataset__root="/b", backbone__weights="/c.pth", schedule__log_every=50, run_id="b")
    other["config"] |= {"results_dir": "/tmp", "device": "cuda"}
    other["config"]["dataset"]["official"] = {"classes": 200, "train": 5994}
    assert len(compare([record(seed=0), other]).rows) == 1


def test_same_settings_and_seed_twice_is_said_and_counted_once():
    made = compare([record(top1=50.0, run_id="b"), record(top1=60.0, run_id="a")])
    assert made.rows[0].cells["delta"].values == {(0, None): 60.0}
    assert made.warnings == ["duplicate b: same settings and seed as a, which is kept"]


# ---- the command -----------------------------------------------------------------------------------------


def test_problems_are_named():
    assert problem(record()) is None
    assert problem(record(schema=SCHEMA - 1)) == f"unknown schema {SCHEMA - 1} (this version reads {SCHEMA})"
    assert problem(record(error="out of\nmemory", test_top1=None)) == "failed: out of memory"
    assert problem(record(config=None)) == "no config.dataset.name"
    assert problem(record(test_top1=None)) == "no test_top1"
    assert problem(record(test_top1=float("nan"))) == "test_top1 is not a finite number: nan"
    assert problem(record(), "val_top1") == "no val_top1"
    assert problem([]) == "not a JSON object"


def test_a_record_with_only_the_necessary_keys_is_enough():
    config = {"seed": 3, "dataset": {"name": "d"}, "backbone": {"name": "b"}, "reg": {"name": "l2"}}
    bare = {"schema": SCHEMA, "run_id": "x", "config": config, "test_top1": 1}
    assert problem(bare) is None
    made = compare([bare])
    assert made.title == "Test top-1 accuracy (%); mean ± sample std over seeds (n)"
    assert made.notes == []
    assert "| d       | b        | 1.0 (1) |" in tables.as_markdown([sections.accuracies(made)])


def test_a_key_that_came_later_splits_rows_only_where_it_is_not_the_default():
    records = [record("l2", 0), record("l2", 1, schedule__warmup=0.0), record("l2", 2, schedule__warmup=0.1)]
    for one, changed in zip(records, ({}, {}, {"warmup": 0.1}), strict=True):
        one["identity"] = {"version": 1, "schedule": {"version": 1, **changed}}
    (row,) = compare(records[:2]).rows
    assert row.cells["l2"].n == 2
    assert [(row.settings, row.cells["l2"].n) for row in compare(records).rows] == [
        ("schedule.warmup=0.0", 2),
        ("schedule.warmup=0.1", 1),
    ]


def test_another_version_of_a_group_is_another_row():
    records = [record("l2", seed) for seed in (0, 1)]
    records[0]["identity"] = {"version": 1, "reg": {"version": 2}}
    records[1]["identity"] = {"version": 1, "reg": {"version": 1}}
    assert [row.settings for row in compare(records).rows] == ["reg.version=2", "reg.version=?"]


def test_a_method_without_a_title_is_shown_by_its_name():
    untitled = record("delta")
    del untitled["titles"]
    assert compare([untitled]).display("delta") == "delta"
    assert compare([untitled, record("delta", 1, run_id="z")]).display("delta") == "DELTA"


def test_many_skipped_runs_are_counted(tmp_path, capsys):
    failed = [record(error="boom", run_id=f"failed{number}") for number in range(report.MOST_NAMED + 5)]
    assert report.main([save(tmp_path, [record("l2"), *failed]), "--format", "csv"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("skipped failed") for line in lines) == report.MOST_NAMED
    assert "skipped 5 further runs: delta-report trust names each, with the reason" in lines


def test_skipped_and_unfinished_runs_are_listed(tmp_path, capsys):
    others = [record(error="boom", run_id="failed"), record(schema=9, run_id="new")]
    folder = save(tmp_path, [record("l2"), *others])
    for name, text in [("cut", '{"schema": 3, "conf'), ("list", "[]")]:
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "summary.json").write_text(text)
    (tmp_path / "runs" / "going").mkdir()

    assert report.main([folder, "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["cub,resnet18,,l2,57.4,,1,,,,"]
    skipped = err.splitlines()
    assert skipped[0].startswith("skipped cut: ")
    assert skipped[1:] == [
        "skipped failed: failed: boom",
        "skipped list: its summary.json cannot be used: not a JSON object",
        f"skipped new: unknown schema 9 (this version reads {SCHEMA})",
        "unfinished: 1 (going)",
    ]


def test_final_runs_are_left_out_of_a_validation_table_in_one_line(tmp_path, capsys):
    validated = record("l2", val_top1=50.0, split__val_fraction=0.2)
    folder = save(tmp_path, [record(seed=0), record(seed=1), validated])
    assert report.main([folder, "--metric", "val_top1", "--format", "csv"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["cub,resnet18,,l2,50.0,,1"]
    assert err == "left out: 2 runs without a validation split\n"


def test_nothing_to_report(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert str(tmp_path) in err and "delta-run" in err
    assert report.main([str(tmp_path / "absent")]) == 1


@pytest.mark.parametrize("form", ["table", "markdown", "latex", "json", "html"])
def test_a_record_that_was_edited_by_hand_is_named_in_the_report_itself(form, tmp_path, capsys):
    edited = with_digest(record("delta", 0, 57.4, run_id="edited")) | {"test_top1": 99.25}
    folder, output = save(tmp_path, [record("l2"), edited]), tmp_path / "report"
    assert report.main([folder, "--format", form, "--output", str(output)]) == 0
    text = output.read_text(encoding="utf-8")
    assert "edited: its summary.json" in text and "99.2" not in text
    assert "edited" in capsys.readouterr().err


def test_latex_has_the_form_of_a_table(tmp_path, capsys):
    runs = three_methods(dataset__name="a_b & 50 %")
    assert report.main([save(tmp_path, runs), "--format", "latex"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("%")]
    text = "\n".join(lines)
    opened, closed = (re.findall(rf"\\{word}\{{(.*?)\}}", text) for word in ("begin", "end"))
    assert sorted(opened) == sorted(closed) and {"table", "tabular"} <= {name.rstrip("*") for name in opened}
    columns = re.search(r"begin\{tabular\}\{([lr]+)\}", text)[1]
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len(rows) == 4 and all(len(re.findall(r"(?<!\\)&", row)) == len(columns) - 1 for row in rows)
    assert not re.search(r"(?<!\\)[%#_]", text) and text.count("{") == text.count("}")


def test_watch_makes_the_page_anew_when_a_run_has_ended(tmp_path, monkeypatch):
    folder, output = save(tmp_path, [record("l2")]), tmp_path / "report.html"
    pages = []

    def another_run(seconds):
        pages.append(output.read_text(encoding="utf-8"))
        if len(pages) == 3:
            raise KeyboardInterrupt
        if len(pages) == 2:
            save(tmp_path, [record("delta", 1)])

    monkeypatch.setattr(report.time, "sleep", another_run)
    assert report.main([folder, "--format", "html", "--output", str(output), "--watch", "5"]) == 130
    assert [text.partition('id="runs"')[2].count("<tr><td>") for text in pages] == [1, 1, 2]
    assert all("refresh" in text for text in pages) and "refresh" not in output.read_text(encoding="utf-8")


def test_who_reads_a_page_while_it_is_made_anew_has_the_old_one(tmp_path):
    folder, output = save(tmp_path, [record("l2")]), tmp_path / "report.md"
    link = tmp_path / "link.md"
    link.symlink_to(output)
    assert report.main([folder, "--format", "markdown", "--output", str(link)]) == 0
    before = output.read_text(encoding="utf-8")
    with open(output, encoding="utf-8") as opened:
        save(tmp_path, [record("delta")])
        assert report.main([folder, "--format", "markdown", "--output", str(link)]) == 0
        assert opened.read() == before != output.read_text(encoding="utf-8")
    assert link.is_symlink() and not list(tmp_path.glob(".*.tmp"))


def test_watch_waits_for_the_first_run(tmp_path, monkeypatch, capsys):
    looked = []

    def first_run(seconds):
        looked.append(capsys.readouterr().out)
        if len(looked) == 2:
            raise KeyboardInterrupt
        save(tmp_path, [record("l2")])

    monkeypatch.setattr(report.time, "sleep", first_run)
    assert report.main([str(tmp_path), "--watch"]) == 130
    assert looked[0] == "" and "57.4" in looked[1] and capsys.readouterr().err == ""


def test_where_runs_are_found(tmp_path, monkeypatch, capsys):
    save(tmp_path / "results", [record("l2"), record("delta")])
    runs = tmp_path / "results" / "runs"
    one = next(runs.iterdir())
    both = run_folders([runs])
    assert len(both) == 2
    assert run_folders([tmp_path / "results", runs, one]) == both
    assert run_folders([one]) == [one]
    published = runs.rename(tmp_path / "published")
    (published / "figures").mkdir()
    assert len(run_folders([published])) == 2

    published.rename(runs)
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 0
    assert "57.4" in capsys.readouterr().out


def test_start_up_is_light(tmp_path):
    """A table needs no torch and no Hydra; without seeds in common it needs none of the others either."""
    folder = save(tmp_path, [record("l2"), record("delta")])
    heavy = "{'torch', 'hydra', 'omegaconf', 'pandas', 'scipy', 'matplotlib'}"
    code = "import sys; from delta_transfer import report; assert report.main(sys.argv[1:]) == 0; "
    code += f"print('loaded:', sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded: []"


def test_keys_that_change_no_result_are_no_settings():
    """The options say which keys are no part of a run's identity; a report has to agree with them."""
    import delta_transfer.engine.config  # noqa: F401 - declares the options

    def keys(options):
        for kind in options.__subclasses__():
            # Other tests declare options of their own; a base of methods need not be a dataclass.
            if kind.__module__.startswith("delta_transfer.") and is_dataclass(kind):
                yield from ((kind.key, field.name, field.metadata.get("identity", True)) for field in fields(kind))
            yield from keys(kind)

    unimportant = {f"{group}.{name}".lstrip(".") for group, name, counts in keys(Options) if not counts}
    assert unimportant and not [key for key in unimportant if not within(key, NOT_SETTINGS)]


@pytest.mark.parametrize(
    ("key", "names", "expected"),
    [
        ("split", ["split"], True),
        ("split.fold", {"split", "seed"}, True),
        ("backbone.weights.file", {"backbone.weights"}, True),
        ("splits.fold", {"split"}, False),
        ("split", {"split.fold"}, False),
        ("a.split", {"split"}, False),
    ],
)
def test_a_key_is_within_itself_and_what_it_is_nested_below(key, names, expected):
    assert within(key, names) is expected
