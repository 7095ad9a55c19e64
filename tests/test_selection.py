"""delta-report --select: synthetic records of folds -> what is chosen, what is said, which commands come out."""

import shlex
import subprocess

import pytest

from delta_transfer import report
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.selection import choose, final

from .test_report import record, save, settings_and_cells

SPELLED = ["dataset=cub", "+experiment=quick", "backbone.taps=[layer1,layer2]", "dataset.root=/data/my birds"]


def fold(method, alpha, k, top1, *, folds=3, seed=0, **changes):
    """The record of one fold. Its test accuracy, which real ones lack, is high wherever the validation is low."""
    where = f"{changes.get('dataset__name', 'cub')}-{changes.get('backbone__name', 'resnet18')}"
    made = {
        "top1": None if top1 is None else 100.0 - top1,
        "val_top1": top1,
        "split__folds": folds,
        "split__fold": k,
        "run_id": f"{where}-{method}-{alpha}-s{seed}-f{k}of{folds}",
        "overrides": [*SPELLED, f"reg={method}", f"reg.alpha={alpha}", f"split.folds={folds}", f"split.fold={k}"],
    }
    if method == "l2":  # has no alpha
        made["overrides"].remove(f"reg.alpha={alpha}")
    return record(method, seed, alpha=alpha, **made | changes)


def cross_validated(method, alpha, values, **changes):
    return [fold(method, alpha, k, value, **changes) for k, value in enumerate(values)]


def failed(method, alpha, k, **changes):
    return fold(method, alpha, k, None, error="diverged at iteration 7", **changes)


def grid():
    """Three methods: one candidate, two that tie in accuracy, three of which one has a failed fold."""
    return [
        *cross_validated("l2", 0, [50.0, 52.0, 54.0]),
        *cross_validated("l2_sp", 0.01, [54.0, 56.0, 58.0], val_loss=1.5),
        *cross_validated("l2_sp", 0.1, [56.0, 54.0, 58.0], val_loss=1.25),
        *cross_validated("delta", 0.001, [55.0, 57.0, 59.0]),
        *cross_validated("delta", 0.01, [58.0, 60.0, 62.0]),
        *cross_validated("delta", 0.1, [70.0, 71.0]),
        failed("delta", 0.1, 2),
    ]


def chosen(records):
    """The choices, without "best on validation"; and everything that is not chosen, with the reason."""
    usable = [r for r in records if not r["error"]]
    made = choose(compare(usable, "val_top1"), [r for r in records if r["error"]])
    return [str(choice).removeprefix("best on validation: ") for choice in made.choices], made.undecided + made.warnings


def run(tmp_path, capsys, records, *arguments):
    folder = save(tmp_path, records)
    code = report.main([folder, *arguments])
    out, err = capsys.readouterr()
    return code, out, err


# ---- golden text -----------------------------------------------------------------------------------------

TABLE = """\
**Validation top-1 accuracy (%), last iteration; mean ± sample std over folds (n)**

| dataset | backbone | settings        |             L2 |          L2-SP |          DELTA |
| ------- | -------- | --------------- | -------------: | -------------: | -------------: |
| cub     | resnet18 |                 | 52.0 ± 2.0 (3) |              – |              – |
| cub     | resnet18 | reg.alpha=0.001 |              – |              – | 57.0 ± 2.0 (3) |
| cub     | resnet18 | reg.alpha=0.01  |              – | 56.0 ± 2.0 (3) | 60.0 ± 2.0 (3) |
| cub     | resnet18 | reg.alpha=0.1   |              – | 56.0 ± 2.0 (3) | 70.5 ± 0.7 (2) |

- best on validation: L2 on cub, resnet18: 52.0 ± 2.0 (3), the only setting
- best on validation: L2-SP on cub, resnet18: reg.alpha=0.1, 56.0 ± 2.0 (3), best of 2; as good as \
reg.alpha=0.01, lower validation loss
- best on validation: DELTA on cub, resnet18: reg.alpha=0.01, 60.0 ± 2.0 (3), best of 2 (1 more not compared)
- within noise of DELTA on cub, resnet18, paired over 3 folds: L2-SP on cub, resnet18 (-4.0 points)
- behind DELTA on cub, resnet18 by as much every time, which has no interval: L2 on cub, resnet18 (-8.0 points)
- between methods: DELTA on cub, resnet18, the simplest within one standard error of the best
- Settings: L2-SP, DELTA (beta=0.01)
- All runs: iterations=300, batch_size=32, lr=0.01, image_size=160, n_train=500, precision=fp32
- Hardware: cpu: Intel Xeon, 2 threads
- Versions: python 3.11.7, torch 2.15.0
- Commits: abc1234
"""
MATRIX = ("--format", "markdown", "--layout", "matrix")
SAID = """\
skipped cub-resnet18-delta-0.1-s0-f2of3: failed: diverged at iteration 7
not compared: DELTA on cub, resnet18, reg.alpha=0.1: lacks fold 2
"""
KEPT = "dataset=cub +experiment=quick 'backbone.taps=[layer1,layer2]' 'dataset.root=/data/my birds'"
COMMANDS = f"""\
delta-run -m {KEPT} reg=l2 seed='range(5)'
delta-run -m {KEPT} reg=l2_sp reg.alpha=0.1 seed='range(5)'
delta-run -m {KEPT} reg=delta reg.alpha=0.01 seed='range(5)'
"""


def test_table_and_choices(tmp_path, capsys):
    assert run(tmp_path, capsys, grid(), "--select", "cv", *MATRIX) == (0, TABLE, SAID)


def test_only_commands_go_to_stdout(tmp_path, capsys):
    arguments = ("--select", "cv", *MATRIX, "--emit-overrides", "--with-paths")
    assert run(tmp_path, capsys, grid(), *arguments) == (0, COMMANDS, SAID + TABLE)


@pytest.mark.parametrize("form", ["table", "latex", "csv"])
def test_every_format_comes_with_the_choices(form, tmp_path, capsys):
    code, out, err = run(tmp_path, capsys, grid(), "--select", "cv", "--format", form)
    assert code == 0
    assert (out + err).count("best on validation: ") == 3
    if form == "csv":
        assert all(line.count(",") == 6 for line in out.splitlines())


# ---- folds in a comparison -------------------------------------------------------------------------------


def title_over(records, metric="val_top1"):
    return compare(records, metric).title.partition("std over ")[2]


def test_a_validation_cell_averages_over_folds_a_test_cell_does_not():
    records = cross_validated("l2", 0, [50.0, 52.0, 54.0])
    assert settings_and_cells(records, "val_top1") == [("", {"l2": "52.0 ± 2.0 (3)"})]
    assert [row for row, _ in settings_and_cells(records)] == ["split.fold=0", "split.fold=1", "split.fold=2"]


def test_runs_on_folds_are_left_out_of_a_test_table_in_one_line(tmp_path, capsys):
    folds = with_test_accuracies(cross_validated("l2", 0, [50.0, 52.0]), lambda r: None)
    records = [record("l2"), record("delta", top1=None, run_id="odd"), *folds]
    code, out, err = run(tmp_path, capsys, records, "--format", "csv")
    assert (code, out.splitlines()[1:]) == (0, ["cub,resnet18,,l2,57.4,,1,,,,"])
    assert err == "skipped odd: no test_top1\nleft out: 2 runs on folds, which are validated and not tested\n"


def test_different_numbers_of_folds_are_not_averaged():
    records = cross_validated("l2", 0, [50.0, 52.0]) + cross_validated("l2", 0, [60.0, 62.0], folds=5)
    shown = [("split.folds=3", {"l2": "51.0 ± 1.4 (2)"}), ("split.folds=5", {"l2": "61.0 ± 1.4 (2)"})]
    assert settings_and_cells(records, "val_top1") == shown


def test_the_title_says_what_is_averaged():
    over_folds = cross_validated("l2", 0, [50.0, 52.0])
    again = cross_validated("l2", 0, [50.0, 52.0], seed=1)
    held_out = [record("l2", seed, val_top1=50.0, split__val_fraction=0.2) for seed in (0, 1)]
    assert title_over(over_folds) == "folds (n)"
    assert title_over(over_folds[:1]) == "folds (n)"
    assert title_over(over_folds + again) == "seeds and folds (n)"
    assert title_over(over_folds[:1] + again[:1]) == "seeds (n)"
    assert title_over(held_out) == "seeds (n)"
    assert title_over(held_out + over_folds) == "folds or seeds (n)"
    assert title_over(over_folds, "test_top1") == "seeds (n)"


def test_duplicates_are_of_one_seed_and_fold():
    records = [fold("l2", 0, k, 50.0 + k, seed=seed) for seed in (0, 1) for k in (0, 1)]
    assert compare(records, "val_top1").warnings == []
    made = compare([*records, fold("l2", 0, 1, 99.0, run_id="z")], "val_top1")
    same = "same settings, seed and fold as cub-resnet18-l2-0-s0-f1of3"
    assert made.warnings == [f"duplicate z: {same}, which is kept"]
    assert made.rows[0].cells["l2"].values == {(0, 0): 50.0, (0, 1): 51.0, (1, 0): 50.0, (1, 1): 51.0}


def test_without_folds_the_number_of_the_fold_says_nothing():
    records = [record("l2", seed, val_top1=50.0, split__val_fraction=0.2, split__fold=seed) for seed in (0, 1)]
    assert settings_and_cells(records, "val_top1") == [("", {"l2": "50.0 ± 0.0 (2)"})]


# ---- the rule --------------------------------------------------------------------------------------------


def test_highest_mean_over_folds():
    lines, unsaid = chosen(cross_validated("delta", 0.1, [60, 50, 50]) + cross_validated("delta", 0.01, [55, 54, 55]))
    assert lines == ["DELTA on cub, resnet18: reg.alpha=0.01, 54.7 ± 0.6 (3), best of 2"]
    assert unsaid == []


def test_a_method_with_one_candidate_has_its_strength_named():
    lines, _ = chosen(cross_validated("delta", 0.01, [55.0, 55.0, 55.0]))
    assert lines == ["DELTA on cub, resnet18: reg.alpha=0.01, reg.beta=0.01, 55.0 ± 0.0 (3), the only setting"]


def test_a_tie_is_decided_by_the_mean_loss():
    losses = {0.01: [1.0, 1.4], 0.1: [1.1, 1.2], 1.0: [0.9, 1.6]}
    records = [
        fold("l2_sp", alpha, k, 60.0, folds=2, val_loss=loss)
        for alpha, pair in losses.items()
        for k, loss in enumerate(pair)
    ]
    remark = "best of 3; as good as reg.alpha=0.01 and reg.alpha=1.0, lower validation loss"
    assert chosen(records)[0] == [f"L2-SP on cub, resnet18: reg.alpha=0.1, 60.0 ± 0.0 (2), {remark}"]


def test_a_loss_that_not_every_fold_recorded_decides_nothing():
    records = cross_validated("l2_sp", 0.01, [60.0, 60.0, 60.0], val_loss=2.0)
    records += cross_validated("l2_sp", 0.1, [60.0, 60.0, 60.0], val_loss=1.0)
    records[-1]["val_loss"] = None
    assert "reg.alpha=0.01, 60.0 ± 0.0 (3), best of 2; a tie with reg.alpha=0.1" in chosen(records)[0][0]


def test_a_lower_loss_does_not_beat_a_higher_accuracy():
    records = cross_validated("l2_sp", 0.01, [60.0, 60.0, 60.0], val_loss=9.0)
    records += cross_validated("l2_sp", 0.1, [59.0, 60.0, 60.0], val_loss=0.1)
    assert "reg.alpha=0.01, 60.0" in chosen(records)[0][0]


@pytest.mark.parametrize("losses", [{}, {10.0: 1.5, 9.0: 1.5}, {10.0: 1.5}])
def test_what_ties_to_the_end_is_said_and_the_smallest_is_taken(losses):
    # 9 before 10: by number, not by text. And a last bit of difference in a mean is none.
    records = cross_validated("l2_sp", 10.0, [100 / 3, 200 / 3, 50.0], val_loss=losses.get(10.0))
    records += cross_validated("l2_sp", 9.0, [200 / 3 + 1e-13, 50.0, 100 / 3], val_loss=losses.get(9.0))
    remark = "best of 2; a tie with reg.alpha=10.0: the smallest is taken"
    assert chosen(records)[0] == [f"L2-SP on cub, resnet18: reg.alpha=9.0, 50.0 ± 16.7 (3), {remark}"]


def test_datasets_backbones_and_settings_are_chosen_for_apart():
    places = [
        {},
        {"dataset__name": "dogs"},
        {"backbone__name": "resnet50"},
        {"schedule__lr": 0.1, "dataset__name": "dogs"},
    ]
    best = dict(zip(range(len(places)), (0.1, 0.01, 1.0, 0.1), strict=True))
    records = [
        fold("delta", alpha, 0, 60.0 if alpha == best[i] else 50.0, run_id=f"{i}-{alpha}", **place)
        for i, place in enumerate(places)
        for alpha in (0.01, 0.1, 1.0)
    ]
    assert [line.partition(", 60.0")[0] for line in chosen(records)[0]] == [
        "DELTA on cub, resnet18: reg.alpha=0.1",
        "DELTA on cub, resnet50: reg.alpha=1.0",
        "DELTA on dogs, resnet18, schedule.lr=0.01: reg.alpha=0.01",
        "DELTA on dogs, resnet18, schedule.lr=0.1: reg.alpha=0.1",
    ]


# ---- missing and failed folds ----------------------------------------------------------------------------


def test_a_candidate_that_lacks_a_fold_is_not_compared():
    records = cross_validated("delta", 0.1, [80.0, 80.0]) + cross_validated("delta", 0.01, [55.0, 54.0, 55.0])
    lines, said = chosen(records)
    assert lines == ["DELTA on cub, resnet18: reg.alpha=0.01, 54.7 ± 0.6 (3), the only complete one of 2"]
    assert said == ["not compared: DELTA on cub, resnet18, reg.alpha=0.1: lacks fold 2"]


def test_a_missing_seed_is_named_with_its_folds():
    records = cross_validated("delta", 0.1, [80.0, 80.0, 80.0])
    for seed in (0, 1):
        records += cross_validated("delta", 0.01, [55.0, 54.0, 55.0], seed=seed)
    missing = "seed 1 fold 0, seed 1 fold 1, seed 1 fold 2"
    assert chosen(records)[1] == [f"not compared: DELTA on cub, resnet18, reg.alpha=0.1: lacks {missing}"]


def test_a_candidate_without_any_finished_fold_is_named():
    elsewhere = [failed("delta", 7.0, 0, dataset__name="dogs"), failed("l2_sp", 7.0, 0)]
    diverged = [failed("delta", alpha, k) for alpha in (10.0, 1.0) for k in range(3)]
    lines, said = chosen([*cross_validated("delta", 0.01, [55.0, 54.0, 55.0]), *diverged, *elsewhere])
    assert [line.rpartition(", ")[2] for line in lines] == ["the only complete one of 3"]
    assert said == [f"not compared: DELTA on cub, resnet18, reg.alpha={a}: every run failed" for a in (1.0, 10.0)]


def test_failed_runs_of_a_method_with_stages_are_among_its_candidates():
    both = {"iterations": 600, "stages": [{"iterations": 300}, {"iterations": 300}]}
    records = [made | both for made in cross_validated("afa", 0.001, [55.0, 54.0, 55.0], reg__channel_alpha=0.002)]
    diverged = [failed("afa", 0.1, k, reg__channel_alpha=0.002) | both for k in range(3)]
    lines, said = chosen(records)
    assert "reg.alpha=0.001, reg.channel_alpha=0.002, reg.beta=0.01" in lines[0]
    lines, said = chosen([*records, *diverged])
    assert [line.rpartition(", ")[2] for line in lines] == ["the only complete one of 2"]
    assert said == ["not compared: AFA on cub, resnet18, reg.alpha=0.1: every run failed"]


def test_the_command_line_knows_of_failed_runs(tmp_path, capsys):
    records = [*cross_validated("delta", 0.01, [55.0, 54.0, 55.0]), failed("delta", 10.0, 0)]
    _, out, err = run(tmp_path, capsys, records, "--select", "cv")
    assert "the only complete one of 2" in out
    assert err.endswith("not compared: DELTA on cub, resnet18, reg.alpha=10.0: every run failed\n")


def test_a_fold_that_no_candidate_has_is_named_but_compares():
    records = cross_validated("delta", 0.1, [50.0, 51.0]) + cross_validated("delta", 0.01, [55.0, 54.0])
    lines, said = chosen(records)
    assert lines == ["DELTA on cub, resnet18: reg.alpha=0.01, 54.5 ± 0.7 (2), best of 2"]
    assert said == ["incomplete: DELTA on cub, resnet18: no run with fold 2"]


def test_no_choice_between_candidates_with_different_folds(tmp_path, capsys):
    records = cross_validated("l2", 0, [50.0, 50.0, 50.0])
    records += [fold("delta", 0.1, 0, 50.0), fold("delta", 0.1, 1, 50.0)]
    records += [fold("delta", 0.01, 1, 60.0), fold("delta", 0.01, 2, 60.0)]
    code, out, err = run(tmp_path, capsys, records, "--select", "cv", "--emit-overrides", "--with-paths")
    assert "no choice: DELTA on cub, resnet18: every candidate lacks a run that another one has\n" in err
    assert (code, out.count("delta-run"), "reg=l2 " in out) == (1, 1, True)


# ---- which records, and which of their numbers -----------------------------------------------------------


def with_test_accuracies(records, made_up):
    return [r | {"test_top1": made_up(r), "test_loss": made_up(r)} for r in records]


@pytest.mark.parametrize("form", ["table", "markdown", "latex", "csv"])
@pytest.mark.parametrize("made_up", [lambda r: None, lambda r: r["val_top1"], lambda r: "nonsense"])
def test_no_test_number_matters(form, made_up, tmp_path, capsys):
    arguments = ("--select", "cv", "--emit-overrides", "--with-paths", "--format", form)
    changed = with_test_accuracies(grid(), made_up)
    assert run(tmp_path / "a", capsys, grid(), *arguments) == run(tmp_path / "b", capsys, changed, *arguments)


def test_nothing_is_chosen_by_test_accuracy():
    with pytest.raises(ValueError, match="not by test_top1"):
        choose(compare(grid()[:9]), [])


def test_hold_out_and_folds_are_selected_from_apart(tmp_path, capsys):
    held_out = [
        record("delta", alpha=alpha, val_top1=top1, split__val_fraction=0.2) for alpha, top1 in ((1, 70.0), (2, 60.0))
    ]
    folder = save(tmp_path, [*held_out, *cross_validated("delta", 0.01, [50.0, 50.0, 50.0]), record("l2")])

    assert report.main([folder, "--select", "cv"]) == 0
    out, err = capsys.readouterr()
    assert "reg.alpha=0.01, reg.beta=0.01, 50.0 ± 0.0 (3), the only setting" in out and "reg.alpha=1" not in out
    assert err == "left out: 1 runs without a validation split\nleft out: 2 runs without split.folds\n"

    assert report.main([folder, "--select", "val"]) == 0
    out, err = capsys.readouterr()
    assert "DELTA on cub, resnet18: reg.alpha=1, 70.0 (1), best of 2" in out and "0.01, 50.0" not in out
    assert err == "left out: 1 runs without a validation split\nleft out: 3 runs with split.folds\n"


def test_nothing_to_select_from(tmp_path, capsys):
    code, out, err = run(tmp_path, capsys, [record("l2")], "--select", "cv", "--emit-overrides", "--with-paths")
    assert (code, out) == (1, "")
    assert "no finished runs with val_top1 and split.folds" in err


def test_the_plain_validation_table_names_the_best_of_several(tmp_path, capsys):
    code, out, err = run(tmp_path, capsys, grid(), "--metric", "val_top1", *MATRIX)
    of_select = ("the only setting", "within noise", "behind", "between methods")
    contested = [line for line in TABLE.splitlines() if not any(words in line for words in of_select)]
    assert (code, out.splitlines(), err) == (0, contested, SAID)
    code, out, _ = run(tmp_path / "test", capsys, [record("delta", alpha=a) for a in (1, 2)], "--format", "markdown")
    assert code == 0 and "best on" not in out


# ---- commands --------------------------------------------------------------------------------------------


def emitted(tmp_path, capsys, overrides, *arguments):
    folds = cross_validated("delta", 0.01, [50.0, 51.0, 52.0], overrides=overrides)
    return run(tmp_path, capsys, folds, "--select", "cv", "--emit-overrides", "--with-paths", *arguments)


def test_only_what_the_final_runs_share_is_kept():
    given = ["split.folds=3", "++split.fold=1", "split={folds:3}", "seed=0", "dry_run=false", "device=cuda", "+seed=1"]
    kept = ["dataset.subset_seed=2", "reg.attention.seed=1", "precision=fp32", "~reg.beta", "results_dir=/r"]
    assert final([*given, *kept]) == kept


def test_of_one_key_the_last_wins():
    assert final(["reg.alpha=1", "+x=1", "reg=delta", "reg.alpha=2", "x=2"]) == [
        "+x=1",
        "reg=delta",
        "reg.alpha=2",
        "x=2",
    ]


@pytest.mark.parametrize(
    "override",
    ["backbone.taps=[a,b]", 'dataset.root=/my data/`echo 1` & "a"', "backbone.weights='it,s.pth'", "~reg.beta"],
)
def test_a_shell_reads_back_what_was_spelled(override, tmp_path, capsys):
    code, out, _ = emitted(tmp_path, capsys, ["reg=delta", override])
    assert code == 0
    words = ["delta-run", "-m", "reg=delta", override, "seed=range(5)"]
    assert shlex.split(out) == words
    shell = subprocess.run(["sh", "-c", out.replace("delta-run", "printf '%s\\n' delta-run", 1)], capture_output=True)
    assert shell.stdout.decode().splitlines() == words


OF_THE_RUN = [*("results_dir=/r", "cache_dir=/c", "data_dir=/d"), *("logging=tensorboard", "dataset.download=true")]
FILES = ["dataset.root=/photos", "backbone.weights=evil.pth", "source=[{use:/a/b.safetensors,taps:[c]}]"]
EVIL = [
    *("reg.alpha=${oc.env:SECRET}", "dataset.name=${oc.env:SECRET}", "x@hydra.callbacks.y=z", "hydra.run.dir=/tmp"),
    *("+hydra.callbacks.x._target_=os.abort", "hydra/launcher=evil", "--config-dir=/tmp", "x=1", "reg@hydra=l2"),
    *("reg.alpha=choice(1,2)", "schedule=../evil", "reg.name='a b'", "experiment=/evil", "dataset.classes=a\nb"),
]


def test_a_command_says_settings_and_leaves_files_to_the_person(tmp_path, capsys):
    given = [
        "reg=delta",
        "reg.alpha=0.5",
        "schedule.iterations=30",
        "backbone.weights=IMAGENET1K_V1",
        *OF_THE_RUN,
        *FILES,
    ]
    folds = cross_validated("delta", 0.5, [50.0] * 3, overrides=given)
    code, out, err = run(tmp_path / "a", capsys, folds, "--select", "cv", "--emit-overrides")
    asked = ["dataset.root=???", "backbone.weights=???", "source=???"]
    assert code == 0 and shlex.split(out)[2:-1] == [*given[:3], *asked] and "???" in err
    code, out, _ = emitted(tmp_path / "b", capsys, given)
    assert code == 0 and shlex.split(out)[2:-1] == [*given[:3], *OF_THE_RUN[:3], *FILES]


@pytest.mark.parametrize("override", EVIL)
def test_no_command_is_made_from_what_is_no_setting(override, tmp_path, capsys):
    code, out, err = emitted(tmp_path, capsys, ["reg=delta", override])
    assert (code, out) == (1, "") and "no command for DELTA on cub, resnet18" in err


def test_a_chosen_value_that_was_the_default_is_spelled_out(tmp_path, capsys):
    records = [*cross_validated("delta", 0.01, [60.0] * 3), *cross_validated("delta", 0.1, [50.0] * 3)]
    for r in records:
        r["overrides"] = [o for o in r["overrides"] if o != "reg.alpha=0.01"]
    _, out, _ = run(tmp_path, capsys, records, "--select", "cv", "--emit-overrides", "--with-paths")
    assert out == f"delta-run -m {KEPT} reg=delta reg.alpha=0.01 seed='range(5)'\n"


def test_number_of_seeds(tmp_path, capsys):
    assert emitted(tmp_path, capsys, ["reg=delta"], "--seeds", "3")[1] == "delta-run -m reg=delta seed='range(3)'\n"


@pytest.mark.parametrize("overrides", [None, [], "reg=delta", [1]])
def test_records_without_overrides_give_no_command(overrides, tmp_path, capsys):
    code, out, err = emitted(tmp_path, capsys, overrides)
    assert (code, out) == (1, "")
    assert "no command for DELTA on cub, resnet18: its records do not hold their overrides" in err


def test_one_record_with_overrides_is_enough(tmp_path, capsys):
    old, *new = grid()
    del old["overrides"]
    _, out, _ = run(tmp_path, capsys, [old, *new], "--select", "cv", "--emit-overrides", "--with-paths")
    assert out == COMMANDS


def test_one_command_for_one_experiment(tmp_path, capsys):
    """Cross-validated twice, with the same result."""
    twice = [r for folds in (2, 3) for r in cross_validated("delta", 0.01, [50.0] * folds, folds=folds)]
    code, out, err = run(tmp_path, capsys, twice, "--select", "cv", "--emit-overrides", "--with-paths")
    assert (code, out) == (0, f"delta-run -m {KEPT} reg=delta reg.alpha=0.01 seed='range(5)'\n")
    assert err.count("best on validation") == 2


def test_table_to_a_file_commands_to_stdout(tmp_path, capsys):
    table = tmp_path / "table.md"
    arguments = ("--select", "cv", *MATRIX, "--emit-overrides", "--with-paths", "--output", str(table))
    assert run(tmp_path, capsys, grid(), *arguments) == (0, COMMANDS, SAID)
    assert table.read_text(encoding="utf-8") == TABLE


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--emit-overrides"], "needs --select"),
        (["--select", "cv", "--seeds", "0"], "at least 1"),
        (["--select", "cv", "--metric", "test_top1"], "never on test data"),
    ],
)
def test_options_that_make_no_sense(arguments, why, capsys):
    with pytest.raises(SystemExit):
        report.main(arguments)
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ((60.0, 50.0, 40.0), "; reg.alpha is the smallest that was tried"),
        ((40.0, 50.0, 60.0), "; reg.alpha is the largest that was tried"),
        ((40.0, 60.0, 50.0), ""),
        ((60.0, 50.0), ""),  # of two, one is always at the edge
    ],
)
def test_a_choice_at_the_edge_of_the_grid_says_so(accuracies, words):
    records = [
        run
        for alpha, accuracy in zip((0.001, 0.01, 0.1), accuracies, strict=False)
        for run in cross_validated("delta", alpha, [accuracy - 1, accuracy, accuracy + 1])
    ]
    (line,), _ = chosen(records)
    assert line.endswith(f"best of {len(accuracies)}{words}")
