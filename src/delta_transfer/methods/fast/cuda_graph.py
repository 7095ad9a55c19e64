"""A GPU is told once what to do, and then only to do it again: CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...common.console import log

Tensors = list[Tensor]
WARM_UP = 2  # calls before it is recorded: libraries set themselves up in the first ones


class Replayed:
    """Calls a function of tensors; on a GPU it is recorded as a CUDA graph in the third call and replayed from then on.

    A step of many small operations then takes as long as the GPU needs for them, not as long as Python needs to launch
    them. The same function is to be given in every call. What it reads beside its inputs, of which copies are made, is
    read where it was when it was recorded: it may change in place. It must not wait for the device. The memory that it
    works in stays reserved: where there is too little for that, and for inputs of other shapes than those recorded, it
    is launched as it is.
    """

    def __init__(self):
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
                raise RuntimeError("its memory beside that of the other steps would be more than there is")
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


def on_gpu(tensors: Tensors) -> bool:
    return tensors[0].is_cuda


def kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype


def free_memory() -> int:
    """Bytes that this process can still allocate, with those that it only holds back."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
