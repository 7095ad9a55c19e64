"""What a failed run says of itself: divergence, bad input, a GPU that is too small, a bug; and what it leaves."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from delta_transfer.common.errors import RunFailed
from delta_transfer.data.loader import Loader
from delta_transfer.engine.callbacks import Progress, StageRunner
from delta_transfer.engine.config import RunConfig
from delta_transfer.engine.devices import made_with
from delta_transfer.engine.loop import TrainState
from delta_transfer.experiment.experiment import run
from delta_transfer.methods import L2, METHODS, AFAChannel, DELTAWithoutAttention, method_config
from delta_transfer.models import Network
from delta_transfer.records.checkpoints import write_checkpoint
from delta_transfer.records.run_directory import RunDirectory

from .miniature import composed, delta_run, tiny_overrides, write_cub


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB_200_2011")


@pytest.fixture(scope="module")
def config(cub_root, tmp_path_factory) -> RunConfig:
    tiny = tiny_overrides(cub_root, tmp_path_factory.mktemp("results"))  # where the image store is, for all runs
    return composed(*tiny, "reg=delta_noatt")


def failed(config: RunConfig, results: Path, **reg: object) -> dict:
    """The record of a run that fails, in whose folder nothing else is left to go on from. reg: another method."""
    other = {"reg": method_config(reg)} if reg else {}
    with pytest.raises(RunFailed) as error:
        run(config.replace(results_dir=str(results), **other))
    (path,) = results.glob("runs/*/summary.json")
    assert not (path.parent / "last.pt").exists()
    record = json.loads(path.read_text())
    assert record["error"] in str(error.value)
    return record


def poison(monkeypatch, of: type, name: str, at: int, value: float) -> None:
    """The terms that `name` of the class `of` returns are multiplied by `value` in call number `at`."""
    whole, calls = getattr(of, name), []

    def poisoned(self, *arguments):
        calls.append(1)
        terms = whole(self, *arguments)
        return {key: term * value for key, term in terms.items()} if len(calls) == at + 1 else terms

    monkeypatch.setattr(of, name, poisoned)


def test_a_loss_that_diverges_names_term_iteration_and_rate(config, tmp_path, monkeypatch):
    poison(monkeypatch, DELTAWithoutAttention, "penalty", 1, float("nan"))
    summary = failed(config, tmp_path)
    assert summary["failure"] == "diverged" and summary["test_top1"] is None
    assert "'feature_maps' became nan at iteration 1 (learning rate 0.01)" in summary["error"]
    assert "Images and source network are in order" in summary["error"] and "reg.alpha" in summary["error"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": None},
        {"progress": {"first_iteration": 0}},
        {"stage": 7},
        {"metrics": 3},
    ],
)
def test_a_whole_checkpoint_that_is_not_complete_is_named_and_the_run_starts_again(wrong, config, tmp_path, capsys):
    """Its checksum is right. A value of None stands for a key that lacks."""
    state = dict.fromkeys(("target", "optimizer", "method", "average", "modules"), {}) | {
        **{"stage": 0, "ended": [], "previous": None, "progress": asdict(Progress.beginning()), "metrics": "x"},
    }
    with RunDirectory(tmp_path) as directory:
        for given, used in ((state, True), ({k: v for k, v in (state | wrong).items() if v is not None}, False)):
            with open(directory.checkpoint_path, "wb") as file:
                write_checkpoint(file, {"previous": None} | given, made_with(torch.device("cpu")))
            next(iter(StageRunner(config.reg.build().stages(), 3, directory, torch.device("cpu"), Network)))
            assert directory.checkpoint_path.exists() == used
            assert (str(directory.checkpoint_path) not in capsys.readouterr().out) == used


def test_a_later_stage_that_diverges_leaves_what_the_earlier_came_to(config, tmp_path, monkeypatch):
    poison(monkeypatch, AFAChannel, "penalty", 1, float("nan"))
    summary = failed(config, tmp_path, name="afa")
    assert summary["failure"] == "diverged" and summary["test_top1"] is None
    assert "at iteration 4 (learning rate 0.001)" in summary["error"]
    assert "schedule.lr or reg.alpha or reg.channel_alpha is too large" in summary["error"]
    spatial, channel = summary["stages"]
    assert spatial["method"] == "AFASpatial" and spatial["test_top1"] is not None
    assert channel == {"method": "AFAChannel", "iterations": 3}


def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(config, tmp_path, monkeypatch):
    class Kink(torch.autograd.Function):
        """0, with an infinite slope."""

        @staticmethod
        def forward(ctx, value):
            return torch.zeros_like(value)

        @staticmethod
        def backward(ctx, gradient):
            return torch.full_like(gradient, float("inf"))

    class Method(L2):
        steps = 0

        def penalty(self, target, outputs, source_outputs):
            Method.steps += 1
            return {"kink": Kink.apply(outputs["logits"].sum()) if Method.steps == 2 else outputs["logits"].sum() * 0}

    monkeypatch.delitem(METHODS.entries, "l2")
    METHODS.register("l2", "L2", L2.Config)(Method)
    summary = failed(config, tmp_path, name="l2")
    assert summary["failure"] == "diverged"
    assert summary["error"].startswith("The gradient's norm became ") and "at iteration 1 (" in summary["error"]


def test_a_loss_that_is_not_finite_before_the_first_step_is_no_divergence(config, tmp_path, monkeypatch):
    poison(monkeypatch, DELTAWithoutAttention, "penalty", 0, float("inf"))
    summary = failed(config, tmp_path)
    assert summary["failure"] == "input" and "No step had been taken" in summary["error"]


def test_a_source_network_that_overflows_is_no_divergence(config, tmp_path, monkeypatch):
    """Its maps are not finite for the images of one batch."""
    whole, calls = TrainState.forward_source, []

    def overflowing(self, images):
        maps = whole(self, images)
        calls.append(1)
        return {name: values / 0 for name, values in maps.items()} if len(calls) > 1 else maps

    monkeypatch.setattr(TrainState, "forward_source", overflowing)
    summary = failed(config, tmp_path)
    assert summary["failure"] == "input" and "frozen network's feature maps" in summary["error"]


def test_images_that_are_not_finite_are_no_divergence(config, tmp_path, monkeypatch):
    whole = Loader.train_batch

    def damaged(self, indices, iteration):
        images, labels = whole(self, indices, iteration)
        return (images / 0 if iteration == 1 else images), labels

    monkeypatch.setattr(Loader, "train_batch", damaged)
    summary = failed(config, tmp_path, name="l2")
    assert summary["failure"] == "input" and "images of that batch are not finite" in summary["error"]


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        (2, "schedule.accumulate=2 "),
        (1, "reduce backbone.image_size"),
    ],
)
def test_out_of_memory_says_what_fits(config, tmp_path, monkeypatch, fits, said):
    whole = TrainState.forward

    def small_gpu(self, images):
        if torch.is_grad_enabled() and len(images) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return whole(self, images)

    monkeypatch.setattr(TrainState, "forward", small_gpu)
    summary = failed(config, tmp_path)
    assert summary["failure"] == "out of memory" and said in summary["error"]
    assert ("schedule.accumulate" in summary["error"]) == (fits == 2)
    if fits == 2:  # and the advice is right
        run(config.replace(results_dir=str(tmp_path), schedule=config.schedule.replace(accumulate=2)))


def test_a_device_that_fails_for_once_leaves_the_run_as_interrupted(cub_root, tmp_path, monkeypatch, capsys):
    """Another program took the memory, or the GPU failed: the same command goes on from the checkpoint."""
    whole, calls = TrainState.optimizer_step, []
    errors = [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: uncorrectable ECC")]
    monkeypatch.setattr("delta_transfer.engine.callbacks.CHECKPOINT_SHARE", 1e9)

    def step(self):
        calls.append(1)
        if len(calls) in (3, 7):
            raise errors.pop(0)
        return whole(self)

    monkeypatch.setattr(TrainState, "optimizer_step", step)
    tiny = tiny_overrides(cub_root, tmp_path)
    command = [*tiny, "reg=l2", "schedule.iterations=5", "schedule.checkpoint_seconds=0.000001"]
    for said in ("a training step fits (tried just now)", "The GPU failed (CUDA error: uncorrectable ECC)"):
        assert delta_run(monkeypatch, *command) == 1
        output = capsys.readouterr()
        assert said in output.err and "Traceback" not in output.err
        assert not list(tmp_path.glob("runs/*/summary.json")) and list(tmp_path.glob("runs/*/last.pt"))
    assert delta_run(monkeypatch, *command) == 0
    assert "resuming after iteration" in capsys.readouterr().out


def test_an_evaluation_that_does_not_fit_goes_on_with_fewer_images(config, tmp_path, monkeypatch, capsys):
    whole = Network.forward

    def small_gpu(self, images):
        if not torch.is_grad_enabled() and len(images) > 2:
            raise torch.OutOfMemoryError
        return whole(self, images)

    config = config.replace(reg=method_config({"name": "l2"}))
    expected = run(config.replace(results_dir=str(tmp_path / "whole"))).summary["test_loss"]
    monkeypatch.setattr(Network, "forward", small_gpu)
    found = run(config.replace(results_dir=str(tmp_path / "small"))).summary["test_loss"]
    assert found == pytest.approx(expected)
    assert "with 2 images at once" in capsys.readouterr().out


def test_out_of_memory_in_the_attention_names_its_key(config, tmp_path, monkeypatch):
    def too_much(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("delta_transfer.methods.attention.channel_importance", too_much)
    summary = failed(config, tmp_path, name="delta", attention={"images": 6, "head_epochs": 1})
    assert summary["failure"] == "out of memory" and "reg.attention.forward_images" in summary["error"]


def test_a_bug_is_recorded_shown_with_its_place_and_made_again_only_when_asked(cub_root, tmp_path, monkeypatch, capsys):
    def bug(*_):
        raise KeyError("conv9")

    again = [*tiny_overrides(cub_root, tmp_path), "reg=delta_noatt"]
    with monkeypatch.context() as patch:
        patch.setattr(DELTAWithoutAttention, "penalty", bug)
        assert delta_run(patch, *again) == 1
    (path,) = tmp_path.glob("runs/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["failure"] == "program" and summary["error"] == "KeyError: 'conv9'"
    assert "in bug" in capsys.readouterr().err
    assert delta_run(monkeypatch, *again) == 1
    message = capsys.readouterr().err
    assert "KeyError: 'conv9'" in message and "retry_failed=true" in message and "Traceback" not in message
    assert delta_run(monkeypatch, *again, "retry_failed=true") == 0
    assert json.loads(path.read_text())["error"] is None


def test_a_sweep_says_what_was_done_skipped_and_failed(cub_root, tmp_path, monkeypatch, capsys):
    tiny = tiny_overrides(cub_root, tmp_path)
    assert delta_run(monkeypatch, *tiny, "reg=delta_noatt") == 0
    assert "reason" not in capsys.readouterr().out  # no table of one run
    whole = DELTAWithoutAttention.penalty

    def bug(self, *arguments):
        if self.alpha == 0.5:
            raise ValueError("[red] map\nof another shape")
        return whole(self, *arguments)

    monkeypatch.setattr(DELTAWithoutAttention, "penalty", bug)
    sweep = ["-m", *tiny, "reg=delta_noatt", "reg.alpha=0.01,0.02,0.5"]
    assert delta_run(monkeypatch, *sweep) == 1
    output = capsys.readouterr()
    rows = [line.split() for line in output.out.splitlines()]
    assert ["done", "1"] in rows and ["skipped", "1"] in rows
    (first,) = (row for row in rows if row[:2] == ["failed", "1"])
    assert first[2:] == ["reg.alpha=0.5", "ValueError:", "[red]", "map"]  # the first line, and no markup
    assert output.err.count("Traceback") == 1
    assert delta_run(monkeypatch, *sweep) == 1
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["skipped", "2"] in rows and "done" not in [word for row in rows[-12:] for word in row]
