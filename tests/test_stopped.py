"""A run that is asked to end while it measures."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from delta_transfer.data import loader
from delta_transfer.data.loader import Loader
from delta_transfer.engine import loop
from delta_transfer.experiment import experiment
from delta_transfer.records.arrays import predictions

from .miniature import delta_run, tiny_overrides, write_cub


def only_run(results: Path) -> Path:
    (run,) = (results / "runs").iterdir()
    return run


@pytest.mark.parametrize(("reg", "step"), [("l2", 3), ("delta_noatt", 2)])
def test_a_run_that_is_stopped_in_an_evaluation_goes_on_with_it(reg, step, tmp_path, monkeypatch):
    """It ends at once, keeps all steps, and the same command reaches the result of an undisturbed run."""
    root = write_cub(tmp_path / "CUB")
    monkeypatch.setattr(loader, "images_at_once", lambda device, size: 4)  # two batches of the six test images
    found, batches = {}, Loader.test_batches
    seen, steps = [0], []

    def stopped(self, indices, *of):
        for number, batch in enumerate(batches(self, indices, *of)):
            seen[0] += 1
            if number == 0 and len(steps) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    train_step = loop.train_step
    monkeypatch.setattr("delta_transfer.engine.config.train_step", lambda *of: steps.append(of) or train_step(*of))
    for name in ("undisturbed", "stopped"):
        words = [*tiny_overrides(root, tmp_path / name), f"reg={reg}", "schedule.eval_every=1"]
        steps.clear()
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(Loader, "test_batches", stopped)
                seen[0] = 0
                assert delta_run(monkeypatch, *words) == 128 + signal.SIGTERM
            assert seen[0] == 2 * (step - 1) + 1  # two batches of each evaluation before, one of this
            assert len(steps) == step and (only_run(tmp_path / name) / "last.pt").exists()
            assert not (only_run(tmp_path / name) / "summary.json").exists()
        assert delta_run(monkeypatch, *words) == 0
        assert len(steps) == 3  # none twice
        run = only_run(tmp_path / name)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert all(line.pop("images_per_second") < 1e5 for line in lines)
        found[name] = lines, load_file(run / "model.safetensors"), predictions({"folder": run}).logits
    (lines, weights, logits), (its_lines, its_weights, its_logits) = found.values()
    assert lines == its_lines and np.array_equal(logits, its_logits)
    assert all(torch.equal(value, its_weights[key]) for key, value in weights.items())


def test_a_run_that_is_stopped_while_its_files_are_written_is_finished(tmp_path, monkeypatch):
    words = [*tiny_overrides(write_cub(tmp_path / "CUB"), tmp_path / "results"), "reg=l2", "seed=0,1"]
    write = experiment.write_outputs

    def stopped(*of):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*of)

    monkeypatch.setattr(experiment, "write_outputs", stopped)
    assert delta_run(monkeypatch, "-m", *words) == 128 + signal.SIGTERM
    run = only_run(tmp_path / "results")  # the second one did not begin
    assert (run / "summary.json").exists() and not (run / "last.pt").exists()


class Killed(BaseException):
    """As SIGKILL does, it leaves everything as it is."""


def test_a_run_that_is_killed_in_its_last_evaluation_repeats_no_step(tmp_path, monkeypatch):
    root = write_cub(tmp_path / "CUB")
    steps, train_step = [], loop.train_step
    monkeypatch.setattr("delta_transfer.engine.callbacks.CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr("delta_transfer.engine.config.train_step", lambda *of: steps.append(of) or train_step(*of))
    found = {}
    for name in ("undisturbed", "killed"):
        words = [*tiny_overrides(root, tmp_path / name), "reg=l2", "schedule.checkpoint_seconds=0.000001"]
        steps.clear()
        if name == "killed":
            with monkeypatch.context() as patch:
                patch.setattr(Loader, "test_batches", lambda *_: (_ for _ in ()).throw(Killed))
                with pytest.raises(Killed):
                    delta_run(monkeypatch, *words)
            assert not (only_run(tmp_path / name) / "summary.json").exists()
        assert delta_run(monkeypatch, *words) == 0
        assert len(steps) == 3
        found[name] = load_file(only_run(tmp_path / name) / "model.safetensors")
    assert all(torch.equal(value, found["killed"][key]) for key, value in found["undisturbed"].items())
