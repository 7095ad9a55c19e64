"""CUDA graphs: a GPU records the operations of a function once, and replays them."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...common.console import log
from ...data.loader import free_memory

Tensors = list[Tensor]
WARM_UP = 2  # calls before the recording: libraries set themselves up in the first ones


class Replayed:
    """Calls a function of tensors. On a GPU it records the third call as a CUDA graph and replays that from then on.

    A step of many small operations then takes as long as the GPU needs for them, not as long as Python needs to launch
    them. Give the same function in every call. The inputs are copied. Everything else that the function reads may only
    change in place, since a replay reads it where it was recorded. The function must not wait for the device.
    The memory that it works in stays reserved. Where there is too little memory for that, and for inputs whose shapes
    differ from the recorded ones, the function is called as it is.
    """

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.refused = False
        self.inputs: Tensors = []
        self.outputs: Tensors = []

    def __call__(self, function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        self.calls += 1
        if not on_gpu(inputs) or self.calls <= WARM_UP or self.refused:
            return function(inputs)
        if self.graph is None:
            self._record(function, inputs)
        if self.graph is None or [kind(t) for t in inputs] != [kind(t) for t in self.inputs]:
            return function(inputs)
        torch._foreach_copy_(self.inputs, [t.detach() for t in inputs])
        self.graph.replay()
        return [t.clone() for t in self.outputs]

    def _record(self, function: Callable[[Tensors], Tensors], inputs: Tensors) -> None:
        try:
            if free_memory() < 2 * torch.cuda.max_memory_allocated():
                raise RuntimeError("it would need more memory than the GPU has, beside that of the other steps")
            self.inputs = [t.detach().clone() for t in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.outputs = function(self.inputs)
            self.graph = graph
        except RuntimeError as error:  # an operation that waits, or too little memory after all
            self.refused, self.inputs, self.outputs = True, [], []
            log.info(
                f"No CUDA graph: every operation is launched by itself, which is slower ({str(error).splitlines()[0]})"
            )


def on_side_stream(function: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """The function on a stream of its own, where recording happens as well.

    A backward pass adds up the gradient of a parameter on the stream where it first did so. That must not be the
    default stream, which a recording cannot wait for.
    """

    def called(inputs: Tensors) -> Tensors:
        if not on_gpu(inputs) or torch.cuda.is_current_stream_capturing():
            return function(inputs)
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs = function(inputs)
        current.wait_stream(stream)
        return outputs

    return called


def on_gpu(tensors: Tensors) -> bool:
    return tensors[0].is_cuda


def kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype
