"""The whole step as a CUDA graph, without a GPU: what replays a recording here calls the step again."""

import numpy as np
import pytest
import torch
from torch import nn

from delta_transfer.common.console import log_once
from delta_transfer.engine import graphed_step
from delta_transfer.engine.graphed_step import GraphedStep, graphed, put_rates_on, same_every_step
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import AdamWConfig, SGDConfig
from delta_transfer.methods import DELTA, L2, L2FE, L2SP, RIFLE, SPD, DELTAWithoutAttention, LoRA, StochNorm
from delta_transfer.methods.base import Batch
from delta_transfer.methods.fast import cuda_graph
from delta_transfer.methods.fast.cuda_graph import Replayed
from delta_transfer.models import Network

from .conftest import TinyNet
from .test_training import learn, loader  # noqa: F401 - a fixture

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """How many tensors each replay gave. A recording computes nothing, as on a GPU."""
    made: list[int] = []

    class Graph:
        def __init__(self, of: Replayed, function):
            self.of, self.function = of, function

        def replay(self) -> None:
            self.of.outputs = self.function(self.of.inputs)
            made.append(len(self.of.outputs))

    def record(self, function, inputs) -> None:
        self.inputs, self.graph = [t.detach().clone() for t in inputs], Graph(self, function)

    monkeypatch.setattr(cuda_graph, "on_gpu", lambda tensors: True)
    monkeypatch.setattr(graphed_step, "on_side_stream", lambda function: function)
    monkeypatch.setattr(Replayed, "_record", record)
    return made


@pytest.mark.parametrize("optimizer", [SGDConfig, AdamWConfig])
@pytest.mark.parametrize("method", [L2, L2FE, L2SP, DELTAWithoutAttention])
def test_a_replayed_step_trains_the_same(method, optimizer, tiny_source, loader, replays):  # noqa: F811
    options = {"optimizer": optimizer(), "decay_at": 0.5}  # the learning rate falls after the recording
    expected, lines = learn(tiny_source, loader, method(), **options)
    found, again = learn(tiny_source, loader, method(), **options, step=GraphedStep())
    assert len(replays) == 4  # of 6 steps, after two that are launched
    assert [set(line) for line in again] == [set(line) for line in lines]
    for line, other in zip(lines, again, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4) and other["lr"] == line["lr"]
    for value, other in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)


def test_a_recording_that_fails_leaves_no_gradients(tiny_source, loader, replays, monkeypatch):  # noqa: F811
    def record(self, function, inputs) -> None:
        """Fails after the backward pass, as where the memory ends there."""
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(TrainState, "optimizer_step", lambda state: 1 / 0)
            function(inputs)
        self.refused = True

    expected, _ = learn(tiny_source, loader, L2SP())
    monkeypatch.setattr(Replayed, "_record", record)
    found, _ = learn(tiny_source, loader, L2SP(), step=GraphedStep())
    for value, other in zip(expected.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("draws", ["dropout", "StochNorm"])
def test_each_replay_draws_with_the_seed_of_its_own_step(draws, loader, replays, monkeypatch):  # noqa: F811
    model, method = TinyNet(), StochNorm if draws == "StochNorm" else L2
    if draws == "dropout":
        model.relu = nn.Sequential(nn.ReLU(), nn.Dropout(0.5))
    source = Network(model, "fc", ("conv1", "conv2")).freeze()

    def losses(**options) -> list[float]:
        return [line["loss"] for line in learn(source, loader, method(), log_every=1, **options)[1]]

    launched = losses()
    assert losses(step=GraphedStep()) == pytest.approx(launched, rel=1e-4) and len(replays) == 4
    monkeypatch.setattr(type(loader), "step_seed", lambda self, iteration: 0)
    assert losses() != pytest.approx(launched, rel=1e-2)  # it does draw


def test_a_resumed_optimizer_gets_its_learning_rates_on_the_device():
    """A checkpoint is read to the CPU. A recording would keep a rate that is there, whatever the schedule says."""
    weight = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    put_rates_on(torch.device("meta"), optimizer)
    rate = optimizer.param_groups[0]["lr"]
    assert rate.device.type == "meta"
    put_rates_on(torch.device("meta"), optimizer)
    assert optimizer.param_groups[0]["lr"] is rate  # a replay reads it where it was recorded


def test_inputs_that_are_no_tensors_are_launched(monkeypatch, capsys):
    monkeypatch.setattr(graphed_step, "train_step", lambda *arguments: arguments)
    log_once.cache_clear()
    arguments = (object(), L2(), Batch(np.zeros(2), torch.zeros(2)))
    step = GraphedStep()
    assert step(*arguments) == step(*arguments) == arguments
    assert capsys.readouterr().out.count("cuda_graph=true has no effect: inputs") == 1


@pytest.mark.parametrize(
    ("method", "same"),
    [
        *((method(), True) for method in (L2, L2FE, L2SP, DELTA, DELTAWithoutAttention, StochNorm)),
        *((method, False) for method in (RIFLE(), SPD(), LoRA(), DELTA(every=2), L2SP(decoupled=True))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_methods_that_act_between_steps_are_launched(method, same, capsys):
    assert same_every_step(method) is same
    step = graphed(method, GPU)
    assert isinstance(step, GraphedStep) is same
    assert ("cuda_graph=true has no effect" in capsys.readouterr().out) is not same


def test_without_a_gpu_it_has_no_effect(capsys):
    assert graphed(L2(), CPU) is train_step
    assert "cuda_graph=true has no effect: there is no GPU" in capsys.readouterr().out
