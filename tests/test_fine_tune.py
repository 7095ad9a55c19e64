"""fine_tune: the run of delta-run, from a program, without Hydra."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from delta_transfer import fine_tune
from delta_transfer.common.errors import UserError
from delta_transfer.common.options import as_word
from delta_transfer.experiment.fine_tune import composed as composed_without_hydra
from delta_transfer.experiment.fine_tune import configured

from .miniature import composed, delta_run, names
from .trees import write_folder

OWN = {"dataset": "folder", "backbone": "resnet18", "reg": "l2"}
SMALL = {
    "backbone.weights": "none",
    "backbone.image_size": 16,
    "backbone.resize": 20,
    "schedule.iterations": 2,
    "schedule.batch_size": 4,
}


def words(choices: dict[str, str], settings: dict[str, object]) -> list[str]:
    return [f"{key}={as_word(value)}" for key, value in (choices | settings).items()]


@pytest.mark.parametrize(
    ("more", "settings"),
    [
        ({}, {}),
        ({"reg": "delta"}, {"reg.alpha": 1, "reg.attention.method": "taylor", "seed": 3, "results_dir": "runs"}),
        ({"reg": "lwf_at"}, {"reg.terms.at.alpha": 100, "data_dir": "data"}),
        ({"schedule": "modern", "backbone": "inception_v3"}, {"backbone.mean": [0, 1, 0.5], "schedule.warmup": 0}),
        ({"schedule": "tll", "reg": "co_tuning"}, {"split.folds": 3, "split.fold": 1}),
        ({"schedule": "quick", "optimizer": "nesterov", "average": "ema"}, {"schedule.iterations": 7}),
        ({"schedule": "modern", "optimizer": "adamw"}, {"optimizer.decay_vectors": False, "schedule.epochs": 2}),
        ({"backbone": "torchvision"}, {"backbone.name": "efficientnet_b0", "backbone.weights": "none"}),
    ],
)
def test_the_configuration_is_that_of_the_command(more, settings, monkeypatch):
    monkeypatch.delenv("DELTA_DATA", raising=False)
    choices, settings = OWN | more, {"dataset.root": "a/photos"} | settings
    ours, theirs = configured(choices, settings), composed(*words(choices, settings))
    assert repr(asdict(ours)) == repr(asdict(theirs))  # 1 and 1.0 make two identities
    assert type(ours.reg) is type(theirs.reg) and type(ours.backbone) is type(theirs.backbone)


@pytest.mark.parametrize("group", ["backbone", "reg", "schedule"])
def test_every_choice_can_be_read(group):
    for name in names(group):
        values, schemas = composed_without_hydra(OWN | {group: name})
        assert values[group] and (group != "backbone" or schemas[group])


@pytest.mark.parametrize(
    ("choices", "settings", "key"),
    [
        ({"reg": "detla"}, {}, "reg=detla"),
        ({"optimizer": "adma"}, {}, "optimizer=adma: .*adamw.*nesterov"),
        ({}, {"schedule.lrr": 1}, "lrr"),
        ({}, {"schedule.lr": "fast"}, "schedule.lr"),
        ({}, {"sede": 1}, "sede"),
        ({}, {"seed.x": 1}, "seed"),
        ({}, {"source": "resnet34"}, "source="),
        ({}, {"evaluate.probe": "cub"}, "evaluate="),
        ({}, {"schedule.epochs": 2, "schedule.iterations": 3}, "schedule.epochs"),
    ],
)
def test_what_is_misspelt_is_refused(choices, settings, key):
    with pytest.raises(UserError, match=key):
        configured(OWN | choices, {"dataset.root": "photos"} | settings)


def test_it_is_the_run_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", ants=6, bees=6)
    tuned = fine_tune("photos", backbone="small_resnet", method="l2_sp", settings=SMALL, seed=2, device="cpu")
    (folder,) = Path("results/runs").iterdir()
    assert tuned.record["run_id"] == folder.name and tuned.class_names == ("ants", "bees")
    assert 0 <= tuned.record["test_top1"] <= 100
    assert tuned.network(torch.zeros(1, 3, 16, 16))["logits"].shape == (1, 2)
    asked = {"dataset": "folder", "dataset.root": "photos", "backbone": "small_resnet", "reg": "l2_sp"}
    asked |= {"seed": 2, "device": "cpu"} | SMALL
    assert sorted(tuned.record["overrides"]) == sorted(words(asked, {}))
    assert delta_run(monkeypatch, *words(asked, {})) == 0
    assert "skipped" in capsys.readouterr().out and list(Path("results/runs").iterdir()) == [folder]


def test_it_imports_no_hydra():
    program = "import sys, delta_transfer.experiment.fine_tune; sys.exit(bool({'hydra', 'omegaconf'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", program], timeout=300).returncode == 0
