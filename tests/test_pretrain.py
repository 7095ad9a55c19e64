"""The embedded default: a source network that is trained once, then used."""

import json
import sys

import pytest
from safetensors.torch import load_file

from delta_transfer.cli import pretrain, run
from delta_transfer.cli.compose import compose_config
from delta_transfer.experiment import pretraining

from .miniature import delta_run

TINY = ["dataset.train_per_class=1", "dataset.test_per_class=1", "schedule.iterations=2", "schedule.batch_size=8"]


@pytest.fixture
def tiny_recipe(monkeypatch):
    monkeypatch.setattr(run, "compose_config", lambda name, overrides: compose_config(name, [*overrides, *TINY]))
    pretraining._tried.clear()
    run._recipe.cache_clear()
    yield
    run._recipe.cache_clear()


def test_default_run_trains_its_source_once(tiny_recipe, tmp_path, monkeypatch):
    overrides = [f"results_dir={tmp_path}", *TINY, "device=cpu"]
    assert delta_run(monkeypatch, *overrides, "reg=l2_fe") == 0
    (source,) = (tmp_path / "pretrained" / "runs").iterdir()
    (target,) = (tmp_path / "runs").iterdir()
    # L2-FE shows which weights were used: those of the pretrained source, head apart.
    pretrained, tuned = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert all((tuned[k] == v).all() for k, v in pretrained.items() if not k.startswith("fc."))
    assert len(tuned["fc.bias"]) == 33 and len(pretrained["fc.bias"]) > 80

    pretraining._tried.clear()
    monkeypatch.setattr(run, "pretrain", lambda recipe: pytest.fail("it is trained again"))
    assert delta_run(monkeypatch, *overrides, "reg=l2") == 0


def test_other_backbones_have_no_embedded_weights(tiny_recipe, tmp_path, monkeypatch, capsys):
    overrides = [f"results_dir={tmp_path}", "backbone=resnet18", "backbone.weights=glyphs"]
    assert delta_run(monkeypatch, *overrides) == 1
    assert "backbone.weights=glyphs exists for small_resnet only" in capsys.readouterr().err


def test_delta_pretrain_is_an_ordinary_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["delta-pretrain", f"results_dir={tmp_path}", *TINY, "device=cpu"])
    with pytest.raises(SystemExit) as stop:
        pretrain.main()
    assert not stop.value.code
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["config"]["backbone"]["weights"] == "none"
