"""which_is_best where a data set has a validation split of its own: it chooses there, and trains nothing twice."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from delta_transfer.cli import run
from delta_transfer.cli.export import main as export_main
from delta_transfer.cli.predict import main as predict_main
from delta_transfer.cli.which_is_best import compare_methods
from delta_transfer.common.errors import UserError
from delta_transfer.data.readers.folder import FolderConfig
from delta_transfer.data.registry import READERS
from delta_transfer.experiment import planning
from delta_transfer.experiment.choosing import ruled_out
from delta_transfer.experiment.lookup import Lookup

from .miniature import composed, delta_run
from .test_graphs import write_molecules
from .test_plan import COST
from .test_report import record
from .trees import write_folder

# ---- on made-up records ----------------------------------------------------------------------------------

MEASURES = {"bbbp": ("graph_properties", "roc_auc"), "esol": ("graph_regression", "rmse")}


def made(dataset: str, results: dict, *more: str) -> tuple[list[str], list[list[str]]]:
    """The sentences of compare_methods, and its sweeps.

    results: by method and alpha, the validation and the test values of its seeds; None for a run that diverged.
    """
    (task, measure), sweeps, seeds = MEASURES[dataset], [], len(next(iter(results.values()))[0])

    def one(method, alpha, seed, validated, tested):
        changes = {f"val_{measure}": validated, f"test_{measure}": tested, "n_val": 4, "n_test": 40}
        changes |= {} if validated is not None else {"error": "diverged", "failure": "diverged"}
        found = record(method, seed, None, alpha, dataset__name=dataset, backbone__name="gcn", **changes)
        found["config"]["task"] = task
        return "done" if validated is not None else "failed", found

    def sweep(asked):
        sweeps.append(asked)
        words = dict(word.split("=", 1) for word in asked)
        alphas = [float(alpha) for alpha in words.get("reg.alpha", "0").split(",")]
        assert words["split.folds"] == "null" and words["seed"] == ",".join(map(str, range(seeds)))
        return [
            one(words["reg"], alpha, seed, *values)
            for alpha in alphas
            for seed, values in enumerate(zip(*results[words["reg"], alpha], strict=True))
        ]

    def look(asked):
        return composed(*asked), {"reg": "l2,l2_sp", "seed": ",".join(map(str, range(seeds))), "split.folds": "3"}

    lines = compare_methods([f"dataset={dataset}", "backbone=gcn", "reg.alpha=0.1,1", *more], look, sweep, Lookup())
    return [line for line in lines if isinstance(line, str)], sweeps


L2, WEAK, STRONG = ("l2", 0.0), ("l2_sp", 0.1), ("l2_sp", 1.0)


def test_validation_molecules_choose_whatever_the_test_molecules_say():
    results = {L2: ([60, 61, 62], [80, 81, 83]), WEAK: ([70, 72, 71], [60, 60, 62]), STRONG: ([50, 50, 50], [99] * 3)}
    lines, sweeps = made("bbbp", results)
    assert lines[0] == "Chosen on validation graphs: L2-SP (reg.alpha=0.1), 71.0 % validation ROC-AUC."
    assert lines[1].startswith("L2 won: L2-SP (reg.alpha=0.1) has 60.7 % ± 1.2 on the test graphs")
    assert "(-20.7 points, 95 % interval -22.1 to -19.2, 3 seeds, paired)" in lines[1]
    assert not any(re.search("image|IMAGES|trust|onnx|is worth", line) for line in lines)
    assert any(line.startswith("There are 40 test graphs, and no interval") for line in lines)
    # The final runs have the words of the first ones, and so their names.
    first, last = sweeps[:2], sweeps[2:]
    assert [sorted(words) for words in last] == [
        sorted(first[0]),
        sorted("reg.alpha=0.1" if word == "reg.alpha=0.1,1" else word for word in first[1]),
    ]


def test_less_error_is_better_in_the_choice_and_in_the_verdict():
    results = {L2: ([1.0, 1.1, 1.2], [1.5, 1.6, 1.7]), WEAK: ([0.7, 0.8, 0.9], [1.3, 1.39, 1.5])}
    lines, _ = made("esol", results | {STRONG: ([2.0, 2.0, 2.0], [0.1, 0.1, 0.1])})
    assert lines[0] == "Chosen on validation graphs: L2-SP (reg.alpha=0.1), 0.800 validation RMSE."
    assert lines[1].startswith("L2-SP (reg.alpha=0.1) won: it has 1.397 ± 0.100 on the test graphs")
    assert "The difference (-0.203, 95 % interval" in lines[1]
    none, _ = made("esol", {L2: results[L2], WEAK: ([1.3, 1.4, 1.5], [0.1] * 3), STRONG: ([1.3] * 3, [0.1] * 3)})
    assert "L2, 1.100 " in none[0] and "no other method did better" in none[1]


def test_a_method_that_lacks_a_seed_is_not_chosen_and_without_l2_there_is_no_verdict():
    results = {L2: ([60, 61], [80, 81]), WEAK: ([70, None], [60, None]), STRONG: ([50, 50], [99, 99])}
    assert "L2, 60.5 %" in made("bbbp", results)[0][0]
    with pytest.raises(UserError, match="1 of 4 final runs are not there"):
        made("bbbp", results | {L2: ([60, None], [80, None]), WEAK: ([70, 71], [60, 61])})
    with pytest.raises(UserError, match="on each of the 2 seeds"):
        made("bbbp", {key: ([60, None], [80, None]) for key in results})
    assert ruled_out(record("l2_sp", 0, None, failure="diverged", n_val=4))
    assert not ruled_out(record("l2_sp", 0, None, failure="diverged", n_val=0))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["select=top1"], "roc_auc"),
        (["split.folds=3"], "leave out split.folds"),
        (["budget=45m"], "leave them out"),
        (["dataset=proteins", "preset=quick"], "leave them out"),
        (["dataset=lfw", "backbone=resnet18"], "task=verification"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(words, said):
    def look(asked):
        return composed(*asked), {"reg": "l2", "seed": "0", "split.folds": "3"}

    usual = [] if any(word.startswith("dataset=") for word in words) else ["dataset=bbbp"]
    network = [] if any(word.startswith("backbone=") for word in words) else ["backbone=gcn"]
    with pytest.raises(UserError, match=said):
        compare_methods([*usual, *network, *words], look, pytest.fail, Lookup())


def test_alphas_of_graphs_are_those_of_a_sum_over_nodes():
    def look(asked):
        return composed(*asked), {"reg": "l2,delta_noatt", "seed": "0", "split.folds": "3"}

    class Enough(Exception):
        pass

    def sweep(asked):
        if "reg=delta_noatt" in asked:
            assert "reg.alpha=1e-11,1e-10,1e-9" in asked
            raise Enough
        return []

    with pytest.raises(Enough):
        compare_methods(["dataset=bbbp", "backbone=gcn"], look, sweep, Lookup())


# ---- the whole command -----------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch) -> Counter:
    """How often each run is carried out, by its seed and method."""
    counts, run_job = Counter(), run.run_job

    def counted(config, *more):
        counts[config.reg.name, config.reg.get("alpha"), config.seed] += 1
        return run_job(config, *more)

    monkeypatch.setattr(run, "run_job", counted)
    return counts


def records_in(results: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in results.glob("runs/*/summary.json")]


def test_molecules_from_the_plan_to_the_verdict(tmp_path, monkeypatch, trained, capsys):
    pytest.importorskip("rdkit")
    root = write_molecules(tmp_path / "data")
    words = ["+experiment=which_is_best", "dataset=bbbp", f"dataset.root={root}", "dataset.cut=random", "backbone=gcn"]
    words += ["backbone.weights=none", "schedule.epochs=1", "schedule.batch_size=16", "device=cpu", "prefer=best"]
    words += [f"results_dir={tmp_path / 'results'}", "reg=l2,l2_sp", "reg.alpha=0.1,1", "seed=0,1"]
    monkeypatch.setattr(planning, "measure", lambda *_: COST)
    assert delta_run(monkeypatch, *words, "dry_run=true") == 0
    plan = capsys.readouterr().out
    assert "6 runs are every method" in plan and "nothing is trained twice" in plan and "6 to do" in plan
    trained.clear()

    assert delta_run(monkeypatch, *words) == 0
    said, records = capsys.readouterr().out, records_in(tmp_path / "results")
    assert len(trained) == len(records) == 6 and set(trained.values()) == {1}
    means = Counter()
    for one in records:
        means[one["config"]["reg"]["name"], one["config"]["reg"].get("alpha")] += one["val_roc_auc"] / 2
    best = re.search(r"Chosen on validation graphs: \S+(?: \(reg.alpha=(\S+)\))?, (\S+) % validation ROC-AUC", said)
    assert float(best[2]) == pytest.approx(max(means.values()), abs=0.051)
    model = re.search(r"The model: (\S+)", said)[1]
    assert predict_main([model, str(root / "BBBP.csv"), "--device", "cpu"]) == 0
    assert export_main([model, "--format", "safetensors"]) == 0
    assert f"Next: delta-predict {model} MOLECULES.csv" in said

    assert delta_run(monkeypatch, *words) == 0
    again = capsys.readouterr().out
    assert sum(trained.values()) == 6 and f"The model: {model} " in again
    assert delta_run(monkeypatch, *words, "dry_run=true") == 0
    after = capsys.readouterr().out
    assert "On validation graphs" in after and "6 finished, 0 to do" in after


def test_images_with_a_validation_list_of_their_own(tmp_path, monkeypatch, trained, capsys):
    """Every third image of each class is one."""
    entry = READERS["folder"]

    def with_validation(root, config):
        dataset = entry.thing.read(root, config)
        return replace(dataset, is_val=~dataset.is_test & (np.arange(len(dataset.labels)) % 3 == 0))

    monkeypatch.setattr(FolderConfig, "own_validation", True)
    monkeypatch.setitem(READERS.entries, "folder", replace(entry, thing=replace(entry.thing, read=with_validation)))
    root = write_folder(tmp_path / "photos", ants=9, bees=11)
    words = ["+experiment=which_is_best", f"dataset.root={root}", "backbone=small_resnet", "backbone.weights=none"]
    words += ["backbone.image_size=16", "backbone.resize=20", "schedule=quick", "schedule.iterations=2"]
    words += ["schedule.batch_size=4", f"results_dir={tmp_path / 'results'}", "device=cpu"]
    words += ["reg=l2,l2_fe", "seed=0,1", "select=balanced_accuracy"]
    assert delta_run(monkeypatch, *words) == 0
    said, records = capsys.readouterr().out, records_in(tmp_path / "results")
    assert len(records) == sum(trained.values()) == 4 and all(one["n_val"] for one in records)
    assert "Chosen on validation images: " in said and "validation balanced accuracy" in said
    assert said.count("classes, the worst first") == 1  # the model alone, which kept its validation predictions
    kept = re.search(r"predicted for validation images: (.+)", said)[1].split()
    assert len(kept) == 2 and all(Path(path).is_file() for path in kept)
    assert "temperature" in said and "--format onnx" in said
