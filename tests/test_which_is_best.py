"""Which method is best on a folder of images: the verdict on made-up records, and the whole command on a few images."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from delta_transfer.cli import run
from delta_transfer.cli.grid import asked_and_rest, has
from delta_transfer.cli.predict import main as predict_main
from delta_transfer.cli.which_is_best import compare_methods
from delta_transfer.common.errors import UserError
from delta_transfer.common.tables import Table
from delta_transfer.engine import optimizers
from delta_transfer.experiment import planning as plan
from delta_transfer.experiment.choosing import (
    best_of,
    named,
    next_commands,
    number_of_folds,
    ruled_out,
    verdict,
    without_a_gpu,
)
from delta_transfer.experiment.lookup import Lookup
from delta_transfer.records.reading import Record
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.selection import choose

from .miniature import composed, delta_run
from .test_plan import COST, rows
from .test_report import record
from .test_selection import cross_validated, failed
from .trees import write_folder

RUNS = Path("results/runs")
L2 = cross_validated("l2", 0, [80.0, 81.0, 82.0])
DELTA = [
    *cross_validated("delta", 0.001, [80.0, 81.0, 82.0]),
    *cross_validated("delta", 0.01, [84.0, 85.0, 86.0]),
    *cross_validated("delta", 0.1, [70.0, 71.0, 72.0]),
]


def chosen(validated):
    return best_of(choose(compare(validated, "val_top1"), []).choices)


def said(validated, runs=RUNS, lost=(), **accuracies) -> list[str]:
    best = chosen(validated)
    reg = best.best.cell.runs[0]["config"]["reg"]
    final = [
        record(method, seed, top1, alpha=reg.get("alpha", 0), n_test=153)
        for method, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]
    final = [run | {"folder": runs / run["run_id"]} for run in final]
    return [*verdict(best, best, [*validated, *lost], final), *next_commands(best, final, "top1")]


def predicted(folder: Path, right: int, n: int = 20) -> None:
    """A run's predictions, of which the first ones are right."""
    folder.mkdir(parents=True)
    logits = np.stack([np.arange(n) < right, np.arange(n) >= right], axis=1).astype(float)
    np.savez(folder / "predictions.npz", labels=np.zeros(n, int), logits=logits, index=np.arange(n))


def test_a_clear_win():
    assert said(L2 + DELTA, l2=[80.0, 81.0, 82.0], delta=[85.0, 86.5, 86.5]) == [
        "Chosen on images held out of training: DELTA (reg.alpha=0.01), 85.0 % validation top-1 accuracy.",
        "DELTA (reg.alpha=0.01) won: it has 86.0 % ± 0.9 on the test images, and L2 (plain fine-tuning) has 81.0 % ± "
        "1.0. The difference (+5.0 points, 95 % interval +3.8 to +6.2, 3 seeds, paired) is more than noise.",
        "There are 153 test images, so that each is worth 0.7 points.",
        "The model: results/runs/cub-resnet18-delta-s0-0.01 (trained with the first seed; test images "
        "took no part in the choice)",
        "The model of L2: results/runs/cub-resnet18-l2-s0-0.01",
        "Next: delta-predict results/runs/cub-resnet18-delta-s0-0.01 IMAGES",
        "Next: delta-export results/runs/cub-resnet18-delta-s0-0.01 --format onnx",
        "Next: delta-report trust results/runs/cub-resnet18-delta-s0-0.01 results/runs/cub-resnet18-l2-s0-0.01",
    ]


# Whatever the test images say, the model is of the method that validation chose.
OF_DELTA = "The model: results/runs/cub-resnet18-delta-s0-0.01 "


def test_no_difference():
    lines = said(L2 + DELTA, l2=[80.0, 81.0, 82.0], delta=[81.0, 80.0, 83.0])
    assert lines[1] == (
        "No winner: DELTA (reg.alpha=0.01) has 81.3 % ± 1.5 on the test images, and L2 (plain fine-tuning) has 81.0 % "
        "± 1.0. The difference (+0.3 points, 95 % interval -2.5 to +3.2, 3 seeds, paired) cannot be told from noise."
    )
    assert any(line.startswith(OF_DELTA) for line in lines)


def test_the_best_on_validation_may_be_behind_on_the_test_part():
    lines = said(L2 + DELTA, l2=[85.0, 86.5, 86.5], delta=[80.0, 81.0, 82.0])
    assert lines[1].startswith("L2 won: ") and "(-5.0 points, 95 % interval -6.2 to -3.8" in lines[1]
    assert all(any(line.startswith(start) for line in lines) for start in (OF_DELTA, "The model of L2: "))


def test_nothing_is_better_than_l2_on_validation():
    better = cross_validated("l2", 0, [90.0, 90.0, 90.0])
    lines = said(better + DELTA, l2=[80.0, 81.0, 82.0])
    assert lines[1] == (
        "That is plain fine-tuning: no other method did better on them. It has 81.0 % ± 1.0 on the test images."
    )
    assert any(line.startswith("The model: results/runs/cub-resnet18-l2-s0-") for line in lines)
    assert lines[-1] == "Next: delta-report trust results/runs/cub-resnet18-l2-s0-0"
    assert "no other was tried" in said(better, l2=[80.0, 81.0, 82.0])[1]


def test_what_few_seeds_or_equal_differences_cannot_tell():
    assert said(L2 + DELTA, l2=[80.0], delta=[99.0])[1].startswith("One seed ")
    two = said(L2 + DELTA, l2=[80.0, 81.0], delta=[55.0, 99.0])[1]  # an interval of 322 points to each side
    assert two.startswith("No winner: ") and "-3.5 points" in two and "interval -" not in two and "range(5)" in two
    equal = said(L2 + DELTA, l2=[80.0, 81.0, 82.0], delta=[81.0, 82.0, 83.0])
    assert equal[1].startswith("No winner: ") and "+1.0 points" in equal[1]


@pytest.mark.parametrize(
    ("best", "edge", "more"), [(0.001, "smallest", "0.0001,0.001,0.01,0.1"), (0.1, "largest", "0.001,0.01,0.1,1")]
)
def test_an_alpha_at_the_edge_of_its_grid_is_named(best, edge, more):
    grid = [
        r for alpha in (0.001, 0.01, 0.1) for r in cross_validated("delta", alpha, 3 * [85.0 + 5 * (alpha == best)])
    ]
    lines = said(L2 + grid, l2=[80.0, 81.0, 82.0], delta=[85.0, 86.5, 86.5])
    words = f"reg.alpha={best:g} is the {edge} that was tried, and one beyond it may do better: the same command with "
    assert words + f"reg=delta reg.alpha={more} tries it, too." in lines
    inside = said(L2 + DELTA, l2=[80.0, 81.0, 82.0], delta=[85.0, 86.5, 86.5])
    assert not any("that was tried" in line for line in inside)


def test_an_alpha_beyond_which_runs_diverged_is_not_the_edge():
    grid = cross_validated("delta", 0.001, 3 * [85.0]) + cross_validated("delta", 0.01, 3 * [90.0])
    final = {"l2": [80.0, 81.0, 82.0], "delta": [85.0, 86.5, 86.5]}
    assert any("0.01 is the largest that was tried" in line for line in said(L2 + grid, **final))
    lines = said(L2 + grid, lost=[failed("delta", 0.1, k) for k in range(3)], **final)
    assert not any("that was tried" in line for line in lines)


@pytest.mark.parametrize(("more", "wins"), [(2, False), (8, True)])
def test_seeds_that_agree_on_few_test_images_are_no_win(more, wins, tmp_path):
    """Seeds share the test images, so that other images might give another verdict."""
    extra = [more, more, more + 1]
    for seed in range(3):
        predicted(tmp_path / f"cub-resnet18-l2-s{seed}-0.01", 10)
        predicted(tmp_path / f"cub-resnet18-delta-s{seed}-0.01", 10 + extra[seed])
    lines = said(L2 + DELTA, tmp_path, l2=[50.0] * 3, delta=[50 + 5.0 * one for one in extra])
    if wins:
        assert "won: " in lines[1] and re.search(r"paired; \+\d+\.\d to \+\d+\.\d over 20 test images\)", lines[1])
    else:
        assert lines[1].startswith("No winner: ") and "with so few test images it cannot be told from noise" in lines[1]


def test_as_accurate_as_another_the_lower_loss_is_chosen_then_l2():
    def of(l2, l2_sp):
        return named(chosen(cross_validated("l2", 0, [80.0], **l2) + cross_validated("l2_sp", 0.1, [80.0], **l2_sp)))

    assert of({"val_loss": 0.5}, {"val_loss": 0.4}) == "L2-SP (reg.alpha=0.1)"
    assert of({"val_loss": 0.4}, {"val_loss": 0.4}) == "L2"
    assert of({}, {}) == "L2"


composed_once = cache(composed)  # nothing here changes a configuration


def made(
    words: list[str], results: dict[str, list[float | None]], more: Callable[[Record], Record] = lambda record: record
) -> tuple[list[str], list[list[str]]]:
    """The sentences of compare_methods, and its sweeps, where `results` has the accuracies on folds by method.

    more: adds to each record.
    """
    sweeps = []

    def sweep(asked):
        sweeps.append(asked)
        method = next(word for word in asked if word.startswith("reg=")).removeprefix("reg=")
        if "split.folds=null" in asked:
            return [("done", more(record(method, seed, 80.0 + seed, run_id=f"{method}{seed}"))) for seed in (0, 1)]
        runs = cross_validated(method, 0.1, [value for value in results[method] if value is not None])
        lost = [failed(method, 0.1, k) for k, value in enumerate(results[method]) if value is None]
        return [("done", more(run)) for run in runs] + [("failed", run | {"failure": "diverged"}) for run in lost]

    def look(asked):
        return composed_once(*asked), {"reg": "l2,l2_sp", "seed": "0,1", "split.folds": "3"}

    lines = compare_methods(words, look, sweep, Lookup())
    assert isinstance(lines[0], Table)  # the leaderboard
    return [line for line in lines if isinstance(line, str)], sweeps


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images") / "photos"
    return ["dataset=folder", f"dataset.root={write_folder(folder, ants=9, bees=9)}", "backbone=resnet18"]


def test_a_method_that_lacks_a_fold_is_not_chosen(photos, capsys):
    """The fold that it lacks may be the hard one."""
    lines, _ = made(photos, {"l2": [80.0, 81.0, 40.0], "l2_sp": [82.0, 83.0, None]})
    assert "Chosen on images held out of training: L2, 67.0 %" in lines[0]
    assert "incomplete: L2-SP on cub, resnet18: no run with fold 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="no method has a result on each of the 3 folds"):
        made(photos, {"l2": [80.0, 81.0, None], "l2_sp": [82.0, 83.0, None]})


def test_among_equals_the_simplest_is_chosen_and_trained(photos, capsys):
    words = [*photos, "reg=l2,l2_fe,l2_sp", "reg.alpha=0.1"]
    results = {"l2": [80.0, 81.0, 80.0], "l2_fe": [70.0, 71.0, 75.0], "l2_sp": [82.0, 81.0, 79.0]}
    lines, sweeps = made(words, results)
    assert "L2, 80.3 %" in lines[0] and "L2-SP (reg.alpha=0.1) has 80.7 %" in lines[0]
    assert "within noise of L2-SP on cub, resnet18, paired over 3 folds: L2 on" in capsys.readouterr().out
    assert any("L2-FE has 80.5 % ± 0.7" in line for line in lines)  # it is in the final runs, too
    final = [words for words in sweeps if "split.folds=null" in words]
    assert [next(w for w in words if w.startswith("reg=")) for words in final] == ["reg=l2", "reg=l2_fe"]
    lines, sweeps = made([*words, "prefer=best"], results)
    assert "Chosen on images held out of training: L2-SP (reg.alpha=0.1), 80.7 % validation top-1 accuracy." in lines
    final = [words for words in sweeps if "split.folds=null" in words]
    assert len(final) == 3 and "reg.alpha=0.1" in final[-1]
    with pytest.raises(UserError, match="simple, best"):
        made([*words, "prefer=cheap"], results)


def test_balanced_accuracy_chooses_where_the_command_says_so(photos, capsys):
    """On folds L2-SP gets more images right, and L2 more of the rare class."""
    words = [*photos, "reg=l2,l2_sp", "reg.alpha=0.1", "prefer=best"]
    top1 = {"l2": [80.0, 81.0, 80.0], "l2_sp": [90.0, 91.0, 92.0]}
    balanced = {"l2": [70.0, 71.0, 70.0], "l2_sp": [60.0, 61.0, 62.0]}

    def both(record):
        values = balanced[record["config"]["reg"]["name"]]
        fold = record["config"]["split"]["fold"]
        return record | {"val_balanced_accuracy": values[fold], "test_balanced_accuracy": 55.0 + record["seed"]}

    lines, _ = made(words, top1, both)
    assert "L2-SP (reg.alpha=0.1), 91.0 " in lines[0]
    lines, _ = made([*words, "select=balanced_accuracy"], top1, both)
    assert "L2, 70.3 " in lines[0] and "55.5 % ± 0.7" in lines[1]
    with pytest.raises(UserError, match="top1, balanced_accuracy"):
        made([*words, "select=loss"], top1)


def test_a_network_is_chosen_with_the_method(photos):
    records = {
        name: cross_validated("l2", 0.1, values)
        for name, values in {"resnet18": [80.0, 81.0, 82.0], "resnet34": [90.0, 91.0, 93.0]}.items()
    }
    for name, runs in records.items():
        for one in runs:
            one["config"] = one["config"] | {"backbone": one["config"]["backbone"] | {"name": name}}
            one["run_id"] = f"{name}-{one['run_id']}"
    sweeps = []

    def sweep(asked):
        sweeps.append(asked)
        name = next(word for word in asked if word.startswith("backbone=")).removeprefix("backbone=")
        if "split.folds=null" in asked:
            return [("done", record("l2", seed, 80.0 + seed, run_id=f"l2{seed}")) for seed in (0, 1)]
        return [("done", run) for run in records[name]]

    def look(asked):
        return composed_once(*asked), {"reg": "l2", "seed": "0,1", "split.folds": "3"}

    lines = compare_methods([*photos[:-1], "backbone=resnet18,resnet34"], look, sweep, Lookup())
    assert [word for words in sweeps for word in words if word.startswith("backbone=")] == [
        "backbone=resnet18",
        "backbone=resnet34",
        "backbone=resnet34",
    ]
    assert any(isinstance(line, str) and "on resnet34" in line for line in lines)


def test_a_method_of_which_every_run_diverged_is_named(photos, capsys):
    lines, _ = made(photos, {"l2": [80.0, 81.0, 82.0], "l2_sp": [None, None, None]})
    assert "That is plain fine-tuning" in lines[1]
    assert "not compared: L2-SP: every run failed" in capsys.readouterr().out


def test_alphas_that_were_asked_for_are_tried_by_every_method_that_has_one(photos):
    words = [*photos, "reg=l2_fe,bss,delta", "reg.alpha=1,2"]
    results = dict.fromkeys(["l2", "l2_fe", "bss", "delta"], [80.0, 81.0, 82.0])
    _, sweeps = made(words, results)
    asked = {next(word for word in words if word.startswith("reg=")): words for words in reversed(sweeps)}
    assert {reg for reg, words in asked.items() if "reg.alpha=1,2" in words} == {"reg=bss", "reg=delta"}


def test_options_of_methods_are_of_those_that_have_them(photos):
    results = dict.fromkeys(["l2", "l2_sp", "delta"], [80.0, 81.0, 82.0])
    words = [*photos, "reg=l2,l2_sp,delta", "reg.attention.method=taylor", "reg.weight_decay=0.001"]
    _, sweeps = made(words, results)
    for asked in sweeps:
        assert "reg.weight_decay=0.001" in asked
        assert ("reg.attention.method=taylor" in asked) == ("reg=delta" in asked)
    for word in ("reg.queue=3", "reg.attention.metod=taylor"):
        with pytest.raises(UserError, match=f"{word}: none of l2, l2_sp, delta has it"):
            made([*words, word], results)
    with pytest.raises(UserError, match="reg.alpha=0.1,5: none of l2, l2_fe has it"):
        made([*photos, "reg=l2,l2_fe", "reg.alpha=0.1,5"], results)
    assert has(composed(*photos, "reg=lwf_at").reg, "reg.terms.lwf.alpha")


def test_sums_are_refused(photos):
    with pytest.raises(UserError, match="no sums"):
        made([*photos, "reg=l2,delta", "+reg@reg.terms.sp=l2_sp"], {})


def test_a_misspelt_method_is_found_before_anything_runs(photos):
    with pytest.raises(UserError, match="detla"):
        made([*photos, "reg=l2,detla"], {"l2": [80.0, 81.0, 82.0]})
    with pytest.raises(UserError, match="abc"):
        made([*photos, "reg=l2,l2_sp", "reg.alpha=0.1,abc"], {"l2": [80.0, 81.0, 82.0]})


def test_a_cpu_is_told_what_is_faster(photos, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = composed_once(*photos)
    (line,) = without_a_gpu(config, attention=True)
    assert "reg.attention.method=taylor" in line
    assert "attention" not in without_a_gpu(config, attention=False)[0]
    small = config.replace(backbone=config.backbone.replace(image_size=96, resize=110))
    assert not without_a_gpu(small, attention=True)


@pytest.mark.parametrize("folds", ["1", "2,3", "null"])
def test_folds_are_one_number_of_them(photos, folds):
    with pytest.raises(UserError, match=f"split.folds must be one number, 2 or more, got {folds}"):
        made([*photos, f"split.folds={folds}"], {})


def test_what_rules_a_candidate_out_is_diverging_on_a_fold():
    lost = failed("delta", 0.1, 0)
    assert ruled_out(lost | {"failure": "diverged"})
    assert not ruled_out(lost | {"failure": "out of memory"}) and not ruled_out(None)
    assert not ruled_out(record("delta", 0, None, error="diverged", failure="diverged"))


def test_too_few_images_for_folds():
    assert number_of_folds({"ants": 3, "bees": 40}, 3) == 3
    assert number_of_folds({"ants": 2, "bees": 40}, 3) == 2
    with pytest.raises(UserError, match="Class ants has a single training example"):
        number_of_folds({"ants": 1, "bees": 40}, 3)


def test_what_is_compared_is_told_from_what_all_runs_share():
    words = ["+experiment=which_is_best", "-m", "dataset.root=a b", "reg=l2,delta", "reg.alpha=1", "seed=range(2)"]
    asked = {"reg": ["l2", "delta"], "reg.alpha": ["1"], "seed": ["0", "1"]}
    rest = ["+experiment=which_is_best", "dataset.root=a b"]
    assert asked_and_rest([*words, "reg.beta=0"]) == (asked, [("reg.beta", "reg.beta=0")], rest)
    assert asked_and_rest(["backbone=resnet18,resnet50"])[0] == {"backbone": ["resnet18", "resnet50"]}
    with pytest.raises(UserError, match="schedule.lr=1,2"):
        asked_and_rest(["schedule.lr=1,2"])


def test_showing_the_configuration_runs_nothing(monkeypatch, capsys):
    assert delta_run(monkeypatch, "+experiment=which_is_best", "dataset.root=nowhere", "--cfg", "job") == 0
    assert "root: nowhere" in capsys.readouterr().out


# ---- the whole command -----------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(optimizers, "automatic_length", lambda images, batch_size: (2, 4))
    root = write_folder(tmp_path / "photos", **{"ants": 9, "bees": 11})
    small = ("backbone=small_resnet", "backbone.weights=none", "backbone.image_size=16", "backbone.resize=20")
    places = (f"dataset.root={root}", f"results_dir={tmp_path / 'results'}", "device=cpu")
    methods = ("reg=l2,l2_sp", "reg.alpha=0.1", "seed=0,1", "split.folds=2")
    return ["+experiment=which_is_best", *places, *small, *methods]


def test_both_sweeps_of_a_command(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "measure", lambda *_: COST)
    assert delta_run(monkeypatch, *command, "dry_run=true") == 0
    before = capsys.readouterr().out
    assert "First 4 runs on 2 folds" in before and "The plan counts it as L2-SP" in before
    counts = dict(re.findall(r"^\w+, small_resnet, (\w+, [\w ]+?) {2,}(\d+) ", before, re.M))
    assert counts == {"l2, on 2 folds": "2", "l2_sp, on 2 folds": "2", "l2, final": "2", "l2_sp, final": "2"}
    assert not (tmp_path / "results" / "runs").exists()

    assert delta_run(monkeypatch, *command) == 0
    first = capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("runs/*/summary.json")]
    on_folds = [run for run in records if run["config"]["split"]["folds"]]
    assert len(on_folds) == 4 and all(run["test_top1"] is None for run in on_folds)
    kept = re.search(r"predicted for images held out of training: (.+)", first)[1].split()
    assert len(kept) == 2 and all(Path(path).is_file() for path in kept)
    final = [run for run in records if run not in on_folds]
    assert all(run["n_val"] == 0 and run["n_train"] == 16 for run in final)
    assert {run["seed"] for run in final if run["config"]["reg"]["name"] == "l2"} == {0, 1}
    model = re.search(r"The model: (\S+)", first)[1]
    assert "macro-F1" in first and f"delta-report trust {model}" in first.splitlines()[-1]
    photos = str(tmp_path / "photos")
    assert predict_main([model, photos, "--device", "cpu"]) == 0 and "ants" in capsys.readouterr().out

    assert delta_run(monkeypatch, *command) == 0
    again = capsys.readouterr().out
    assert (
        re.search(rf"^ *skipped +{len(records)}\b", again, re.M) and re.search(r"The model: (\S+)", again)[1] == model
    )

    assert delta_run(monkeypatch, *command, "dry_run=true") == 0
    after = capsys.readouterr().out
    assert "was chosen" in after and "0 to do" in after
    assert rows(after) == {}


def test_a_class_with_one_training_image_ends_it_in_one_sentence(command, tmp_path, monkeypatch, capsys):
    for path in sorted((tmp_path / "photos" / "ants").iterdir())[2:]:
        path.unlink()
    assert delta_run(monkeypatch, *command) == 1
    said = capsys.readouterr()
    assert "Class ants has a single training example" in said.err and "Traceback" not in said.err
    assert not (tmp_path / "results" / "runs").exists()


def test_a_candidate_that_diverges_is_a_result_and_no_failure_of_the_command(command, monkeypatch, capsys):
    command = [word for word in command if not word.startswith("reg.alpha=")]
    for _ in range(2):  # found failed, the second time
        assert delta_run(monkeypatch, *command, "reg.alpha=1e30", "seed=0") == 0
        said = capsys.readouterr()
        assert "not compared: L2-SP: every run failed" in said.out and "The model: " in said.out
        assert "is too large" in said.err


def test_a_final_run_that_fails_is_a_failure(command, monkeypatch, capsys):
    run_job = run.run_job

    def fails(composed, *more):
        if composed.split.folds is None and composed.seed == 1:
            composed.schedule.lr = 1e20
        return run_job(composed, *more)

    monkeypatch.setattr(run, "run_job", fails)
    words = [word for word in command if not word.startswith("reg.alpha=")]
    assert delta_run(monkeypatch, *words, "reg=l2") == 1
    assert "1 of 2 final runs are not there: no verdict" in capsys.readouterr().err


def test_without_results_of_l2_there_is_no_verdict(command, monkeypatch, capsys):
    assert delta_run(monkeypatch, *command, "schedule.lr=1e20") == 1
    said = capsys.readouterr()
    assert "the runs of L2, the baseline, failed" in said.err and "The model" not in said.out
