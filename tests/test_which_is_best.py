"""Which method is best on a folder of images: the verdict on made-up records, and the whole command on a few images."""

import json
import re
from pathlib import Path

import pytest

from delta_transfer import config, plan
from delta_transfer.errors import UserError
from delta_transfer.reporting.comparison import compare
from delta_transfer.reporting.selection import choose
from delta_transfer.which_is_best import asked_and_rest, asked_for, best_of, named, number_of_folds, verdict

from .miniature import delta_run
from .test_plan import COST, rows
from .test_report import record
from .test_selection import cross_validated
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


def said(validated, **accuracies) -> list[str]:
    best = chosen(validated)
    reg = best.best.cell.runs[0]["config"]["reg"]
    final = [
        record(method, seed, top1, alpha=reg.get("alpha", 0), n_test=153)
        for method, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]
    return verdict(best, validated, final, RUNS)


def test_a_clear_win():
    assert said(L2 + DELTA, l2=[80.0, 81.0, 82.0], delta=[85.0, 86.5, 86.5]) == [
        "Chosen on images held out of training: DELTA (reg.alpha=0.01), 85.0 % of them right.",
        "DELTA (reg.alpha=0.01) won: 86.0 % ± 0.9 against 81.0 % ± 1.0 of L2 on the test images. The difference "
        "(+5.0 points, 95 % interval +3.8 to +6.2, 3 seeds, paired) is more than noise.",
        "There are 153 test images: one of them is 0.7 points.",
        "Use DELTA. The model: results/runs/cub-resnet18-delta-s0-0.01/model.safetensors (seed 0; none was picked by "
        "its test accuracy)",
    ]


def test_no_difference():
    lines = said(L2 + DELTA, l2=[80.0, 81.0, 82.0], delta=[81.0, 80.0, 83.0])
    assert lines[1] == (
        "No winner: 81.3 % ± 1.5 against 81.0 % ± 1.0 of L2 on the test images. The difference (+0.3 points, 95 % "
        "interval -2.5 to +3.2, 3 seeds, paired) is no more than noise: use L2, it is the cheapest."
    )
    assert lines[-1].startswith("Use L2. The model: results/runs/cub-resnet18-l2-s0-")


def test_the_best_on_validation_may_be_behind_on_the_test_part():
    lines = said(L2 + DELTA, l2=[85.0, 86.5, 86.5], delta=[80.0, 81.0, 82.0])
    assert lines[1].startswith("L2 won: ") and "is behind (-5.0 points, 95 % interval -6.2 to -3.8" in lines[1]
    assert lines[-1].startswith("Use L2.")


def test_nothing_is_better_than_l2_on_validation():
    better = cross_validated("l2", 0, [90.0, 90.0, 90.0])
    lines = said(better + DELTA, l2=[80.0, 81.0, 82.0])
    assert lines[1] == (
        "Plain fine-tuning, L2, won: no other method did better there. On the test images: 81.0 % ± 1.0."
    )


def test_a_frozen_network_is_cheaper_than_l2():
    lines = said(L2 + cross_validated("l2_fe", 0, [90.0, 90.0, 90.0]), l2=[80.0, 81.0, 82.0], l2_fe=[81.0, 80.0, 83.0])
    assert "no more than noise: use L2-FE, it is the cheapest" in lines[1] and lines[-1].startswith("Use L2-FE. ")


def test_what_one_seed_or_equal_differences_cannot_tell():
    assert said(L2 + DELTA, l2=[80.0], delta=[99.0])[1].startswith(
        "One seed cannot tell DELTA (reg.alpha=0.01) from L2"
    )
    equal = said(L2 + DELTA, l2=[80.0, 81.0, 82.0], delta=[81.0, 82.0, 83.0])
    assert equal[1].startswith("No winner: ") and "+1.0 points with every one of 3 seeds" in equal[1]
    assert equal[-1].startswith("Use L2.")


@pytest.mark.parametrize(
    ("best", "edge", "more"), [(0.001, "smallest", "0.0001,0.001,0.01,0.1"), (0.1, "largest", "0.001,0.01,0.1,1")]
)
def test_an_alpha_at_the_edge_of_its_grid_is_named(best, edge, more):
    grid = [
        r for alpha in (0.001, 0.01, 0.1) for r in cross_validated("delta", alpha, 3 * [85.0 + 5 * (alpha == best)])
    ]
    lines = said(L2 + grid, l2=[80.0, 81.0, 82.0], delta=[85.0, 86.5, 86.5])
    words = f"reg.alpha={best:g} is the {edge} that was tried, and one beyond it may do better: the same command with "
    assert words + f"reg.alpha={more} tries it, too." in lines
    inside = said(L2 + DELTA, l2=[80.0, 81.0, 82.0], delta=[85.0, 86.5, 86.5])
    assert not any("that was tried" in line for line in inside)


def test_as_accurate_as_another_the_lower_loss_is_chosen_then_l2():
    def of(l2, l2_sp):
        return named(chosen(cross_validated("l2", 0, [80.0], **l2) + cross_validated("l2_sp", 0.1, [80.0], **l2_sp)))

    assert of({"val_loss": 0.5}, {"val_loss": 0.4}) == "L2-SP (reg.alpha=0.1)"
    assert of({"val_loss": 0.4}, {"val_loss": 0.4}) == "L2"
    assert of({}, {}) == "L2"


def test_too_few_images_for_folds():
    assert number_of_folds({"ants": 3, "bees": 40}, 3) == 3
    assert number_of_folds({"ants": 2, "bees": 40}, 3) == 2
    with pytest.raises(UserError, match="Class ants has a single training image"):
        number_of_folds({"ants": 1, "bees": 40}, 3)


def test_what_is_compared_is_told_from_what_all_runs_share():
    words = ["+experiment=which_is_best", "-m", "dataset.root=a b", "reg=l2,delta", "reg.alpha=1", "seed=range(2)"]
    asked = {"reg": ["l2", "delta"], "reg.alpha": ["1"], "seed": ["0", "1"]}
    assert asked_and_rest(words) == (asked, ["+experiment=which_is_best", "dataset.root=a b"])
    with pytest.raises(UserError, match="backbone=resnet18,resnet50"):
        asked_and_rest(["backbone=resnet18,resnet50"])


def test_showing_the_configuration_runs_nothing():
    assert asked_for(["+experiment=which_is_best", "-m"])
    assert not any(asked_for(["+experiment=which_is_best", *shows]) for shows in (["--help"], ["--cfg", "job"]))
    assert not asked_for(["+experiment=demo"])


# ---- the whole command -----------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(config, "automatic", lambda images, batch_size: (2, 4))
    root = write_folder(tmp_path / "photos", **{"ants": 9, "bees": 11})
    small = ("backbone=small_resnet", "backbone.weights=none", "backbone.image_size=16", "backbone.resize=20")
    places = (f"dataset.root={root}", f"results_dir={tmp_path / 'results'}", "device=cpu")
    methods = ("reg=l2,l2_sp", "reg.alpha=0.1,1", "seed=0,1", "split.folds=2")
    return ["+experiment=which_is_best", *places, *small, *methods]


def test_both_sweeps_of_a_command(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "measure", lambda *_: COST)
    assert delta_run(monkeypatch, *command, "dry_run=true") == 0
    before = capsys.readouterr().out
    assert "First 6 runs on 2 folds" in before and "for which L2-SP stands here" in before
    counts = dict(re.findall(r"^folder, small_resnet, (\w+, [\w ]+?) {2,}(\d+) ", before, re.M))
    assert counts == {"l2, on 2 folds": "2", "l2_sp, on 2 folds": "4", "l2, final": "2", "l2_sp, final": "2"}
    assert not (tmp_path / "results" / "runs").exists()

    assert delta_run(monkeypatch, *command) == 0
    first = capsys.readouterr().out
    records = [json.loads(path.read_text()) for path in (tmp_path / "results").glob("runs/*/summary.json")]
    on_folds = [run for run in records if run["config"]["split"]["folds"]]
    assert len(on_folds) == 6 and all(run["test_top1"] is None for run in on_folds)
    final = [run for run in records if run not in on_folds]
    assert all(run["n_val"] == 0 and run["n_train"] == 16 for run in final)
    assert {run["seed"] for run in final if run["config"]["reg"]["name"] == "l2"} == {0, 1}
    model = re.search(r"The model: (\S+)", first)[1]
    assert Path(model).exists()

    assert delta_run(monkeypatch, *command) == 0
    again = capsys.readouterr().out
    assert re.search(rf"^ *{len(records)} +skipped", again, re.M) and again.splitlines()[-1] == first.splitlines()[-1]

    assert delta_run(monkeypatch, *command, "dry_run=true") == 0
    after = capsys.readouterr().out
    assert "did best: it is what the final runs train beside L2" in after and "0 to do" in after
    assert rows(after) == {}


def test_a_class_with_one_training_image_ends_it_in_one_sentence(command, tmp_path, monkeypatch, capsys):
    for path in sorted((tmp_path / "photos" / "ants").iterdir())[2:]:
        path.unlink()
    assert delta_run(monkeypatch, *command) == 1
    said = capsys.readouterr()
    assert "Class ants has a single training image" in said.err and "Traceback" not in said.err
    assert not (tmp_path / "results" / "runs").exists()


def test_without_results_of_l2_there_is_no_verdict(command, monkeypatch, capsys):
    assert delta_run(monkeypatch, *command, "schedule.lr=1e20") == 1
    said = capsys.readouterr()
    assert "the runs of L2, the baseline, failed" in said.err and "The model" not in said.out
