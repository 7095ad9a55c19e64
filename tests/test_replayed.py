"""What a CUDA graph records and when. A stand-in without a GPU calls the function again in place of a replay."""

from contextlib import nullcontext

import pytest
import torch

from delta_transfer.methods.fast import cuda_graph as replayed
from delta_transfer.methods.fast.cuda_graph import Replayed


class Doubling:
    """A function of two inputs that notes where it was called."""

    def __init__(self):
        self.called_on = []

    def __call__(self, tensors):
        self.called_on.append([t.data_ptr() for t in tensors])
        return [2 * tensors[0], 2 * tensors[1]]


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The recorded graphs."""
    made = []

    class Graph:
        def __init__(self):
            made.append(self)
            self.replays = 0

        def replay(self):
            self.replays += 1
            for output, value in zip(self.of.outputs, self.function(self.of.inputs), strict=True):
                output.copy_(value)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 100)
    monkeypatch.setattr(replayed, "free_memory", lambda: 200)
    monkeypatch.setattr(replayed, "on_gpu", lambda tensors: True)
    return made


def call(replay: Replayed, function, graphs: list, *values: torch.Tensor) -> None:
    """Calls it and checks the result."""
    before = len(graphs)
    record = replay._record

    def recording(function, inputs):
        record(function, inputs)
        if len(graphs) > before:
            graphs[-1].of, graphs[-1].function = replay, function

    replay._record = recording
    outputs = replay(function, list(values))
    replay._record = record
    for output, value in zip(outputs, values, strict=True):
        assert torch.equal(output, 2 * value)


def test_it_is_recorded_once_and_replayed_on_copies_of_the_inputs(graphs):
    replay, function = Replayed(), Doubling()
    for step in range(5):
        call(replay, function, graphs, torch.full((2,), float(step)), torch.full((3,), step, dtype=torch.int64))
    (graph,) = graphs
    assert graph.replays == 3  # steps 2, 3 and 4
    recorded = [t.data_ptr() for t in replay.inputs]
    assert function.called_on[2:] == [recorded] * 4 and recorded not in function.called_on[:2]


def test_other_shapes_and_kinds_are_launched_as_they_are(graphs):
    replay, function = Replayed(), Doubling()
    for size, dtype in [(2, torch.float32)] * 3 + [(4, torch.float32), (2, torch.float64), (2, torch.float32)]:
        call(replay, function, graphs, torch.rand(size, dtype=dtype), torch.rand(1))
    (graph,) = graphs
    assert graph.replays == 2


def test_outputs_are_not_overwritten_by_the_next_call(graphs):
    replay, function = Replayed(), Doubling()
    for step in range(4):
        call(replay, function, graphs, torch.full((2,), float(step)), torch.zeros(1))
    first = replay(function, [torch.ones(2), torch.zeros(1)])
    replay(function, [torch.zeros(2), torch.zeros(1)])
    assert first[0].tolist() == [2, 2]


def test_with_too_little_memory_nothing_is_recorded(graphs, monkeypatch, capsys):
    monkeypatch.setattr(replayed, "free_memory", lambda: 199)
    replay, function = Replayed(), Doubling()
    for _ in range(5):
        call(replay, function, graphs, torch.rand(2), torch.rand(1))
    assert not graphs and replay.refused and replay.inputs == []
    assert capsys.readouterr().out.count("No CUDA graph: every operation is launched by itself") == 1


def test_what_cannot_be_recorded_is_launched_as_it_is(graphs, monkeypatch, capsys):
    def fails(graph):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", fails)
    replay, function = Replayed(), Doubling()
    for _ in range(5):
        call(replay, function, [], torch.rand(2), torch.rand(1))
    assert replay.refused and replay.graph is None
    said = capsys.readouterr().out
    assert said.count("operation not permitted when stream is capturing)") == 1 and "and more" not in said


def test_on_a_cpu_it_is_called():
    replay, function = Replayed(), Doubling()
    for _ in range(5):
        replay(function, [torch.rand(2), torch.rand(1)])
    assert len(function.called_on) == 5 and replay.graph is None and not replay.refused
