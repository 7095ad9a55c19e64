"""A GPU is told once what to do, and then only to do it again: CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..console import say

Tensors = list[Tensor]
WARM_UP = 2  # calls before it is recorded: libraries set themselves up in the first ones


class Replayed:
    """Calls a function of tensors; on a GPU it is recorded as a CUDA graph and replayed from then on.

    A step of many small operations then takes as long as the GPU needs for them, not as long as Python needs to launch
    them. The function may depend on its inputs alone, of which copies are made, and on what never changes: the same
    function has to be given in every call. It must not wait for the device.
    """

    def __init__(self):
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0
        self.refused = False
        self.inputs: Tensors = []
        self.outputs: Tensors = []

    def __call__(self, function: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        self.calls += 1
        if not inputs[0].is_cuda or self.calls <= WARM_UP or self.refused:
            return function(inputs)
        if [t.shape for t in inputs] != [t.shape for t in self.inputs]:
            self._record(function, inputs)
        if self.graph is None:
            return function(inputs)
        torch._foreach_copy_(self.inputs, [t.detach() for t in inputs])
        self.graph.replay()
        return [t.clone() for t in self.outputs]

    def _record(self, function: Callable[[Tensors], Tensors], inputs: Tensors) -> None:
        self.graph, self.outputs = None, []  # first the memory of what was recorded for other shapes
        self.inputs = [t.detach().clone() for t in inputs]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.outputs = function(self.inputs)
            self.graph = graph
        except RuntimeError as error:  # too little memory for a pool of its own, or an operation that waits
            self.refused, self.inputs = True, []
            say(f"No CUDA graph: every operation is launched by itself, which is slower ({str(error).splitlines()[0]})")
