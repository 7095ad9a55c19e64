"""A finished run rebuilt from its folder: the same numbers, or a named reason why not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from delta_transfer.common.errors import UserError
from delta_transfer.engine.tasks import evaluate
from delta_transfer.inspect.finished import config_of, run_folder
from delta_transfer.inspect.replay import replay

from .miniature import delta_run, rewrite, tiny_overrides, write_cub


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run on a miniature CUB from a file of source weights: folders by name."""
    top = tmp_path_factory.mktemp("made")
    root = write_cub(top / "CUB_200_2011")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert delta_run(monkeypatch, *tiny_overrides(root, top / "source"), "reg=l2", "seed=3") == 0
        (source,) = (top / "source" / "runs").iterdir()
        weights = source / "model.safetensors"
        overrides = [*tiny_overrides(root, top / "results"), "reg=delta_noatt", f"backbone.weights={weights}"]
        assert delta_run(monkeypatch, *overrides) == 0
    (run,) = (top / "results" / "runs").iterdir()
    return {"top": top, "root": root, "run": run, "weights": weights}


def copied(run: Path, to: Path, **changes) -> Path:
    """The run in another folder, with parts of its record changed."""
    shutil.copytree(run, to)
    record = json.loads((to / "summary.json").read_text())
    rewrite(to, record | changes)
    return to


def test_the_recorded_logits_come_out_again(made):
    run = replay(made["run"])
    recorded = np.load(made["run"] / "predictions.npz")
    again = evaluate(run.target, run.loader, run.splits.test)
    np.testing.assert_allclose(again["logits"], recorded["logits"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run.splits.test, recorded["index"])
    np.testing.assert_array_equal(again["labels"], recorded["labels"])


def test_source_and_target_are_the_networks_that_the_run_had(made):
    run = replay(made["run"])
    start = load_file(made["weights"])
    assert all(torch.equal(value, start[name]) for name, value in run.source.weights().items())
    end = load_file(made["run"] / "model.safetensors")
    assert all(torch.equal(value, end[name]) for name, value in run.target.weights().items())
    assert not torch.equal(run.target.weights()["conv1.weight"], run.source.weights()["conv1.weight"])
    assert not any(p.requires_grad for network in (run.source, run.target) for p in network.parameters())
    assert set(run.source(torch.zeros(1, 3, 16, 16))) == {"logits", "embedding", *run.config.backbone.taps}


def test_images_are_the_centre_crops_in_the_order_asked_for(made):
    run = replay(made["run"])
    run.loader.ten_crops = True  # of the test, not of a picture
    asked = run.splits.test[[3, 0]]
    images = torch.cat(list(run.images(asked)))
    assert images.shape == (2, 3, 16, 16)
    run.loader.ten_crops = False
    expected = torch.cat([batch for batch, _ in run.loader.test_batches(run.splits.test)])
    torch.testing.assert_close(images, expected[[3, 0]])


def test_data_and_weights_at_another_place(made, tmp_path):
    moved = copied(made["run"], tmp_path / "moved")
    record = json.loads((moved / "summary.json").read_text())
    record["config"]["dataset"]["root"] = "/elsewhere/CUB_200_2011"
    record["config"]["backbone"]["weights"] = "source.safetensors"
    rewrite(moved, record)
    with pytest.raises(UserError, match="/elsewhere/CUB_200_2011.*--data-dir DIR"):
        replay(moved, weights=made["weights"])
    with pytest.raises(UserError, match="source.safetensors.*--weights FILE"):
        replay(moved, data_dir=made["root"])
    for place in (made["root"], made["top"]):  # the data set's own folder, or the one around it
        assert replay(moved, data_dir=place, weights=made["weights"]).config.dataset.root == str(made["root"])


def test_other_data_are_refused(made, tmp_path):
    other = write_cub(tmp_path / "other", test=3)
    with pytest.raises(UserError, match="other.*dataset_fingerprint"):
        replay(made["run"], data_dir=other)


def test_other_weights_are_refused(made, tmp_path):
    state = load_file(made["weights"])
    state["conv1.weight"][0, 0, 0, 0] += 1
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="other.safetensors.*weights_fingerprint"):
        replay(made["run"], weights=tmp_path / "other.safetensors")


def test_a_run_without_its_network_or_with_another_one_is_refused(made, tmp_path):
    run = copied(made["run"], tmp_path / "run")
    save_file({"conv1.weight": torch.zeros(1)}, run / "model.safetensors")
    with pytest.raises(UserError, match="model.safetensors"):
        _ = replay(run).target
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors.*delta-run"):
        _ = replay(run).target


def test_records_that_are_not_of_a_finished_run_are_refused(made, tmp_path):
    with pytest.raises(UserError, match="too hot"):
        replay(copied(made["run"], tmp_path / "failed", error="too hot"))
    for config in ({}, None, {"dataset": {"reader": "cub"}}):
        with pytest.raises(UserError, match=made["run"].name):
            config_of({"run_id": made["run"].name, "config": config})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    with pytest.raises(UserError, match="broken.summary.json: "):
        replay(tmp_path / "broken")


def test_a_key_that_this_version_does_not_have_is_named(made):
    record = json.loads((made["run"] / "summary.json").read_text())
    record["config"]["reg"]["gamma"] = 1.0
    with pytest.raises(UserError, match="gamma"):
        config_of(record)
    del record["config"]["reg"]["gamma"]
    record["config"]["schedule"]["batch_size"] = -1
    with pytest.raises(UserError, match="schedule.batch_size"):
        config_of(record)


def test_a_run_is_found_by_its_folder_or_its_id(made, monkeypatch):
    assert run_folder(made["run"]) == made["run"]
    monkeypatch.chdir(made["top"])
    assert run_folder(made["run"].name) == Path("results/runs") / made["run"].name
    with pytest.raises(UserError, match="nothing"):
        run_folder("nothing")
