"""The whole training step as one CUDA graph: cuda_graph=true.

On a GPU the step of a small batch is limited by launching its operations from Python, one by one. A graph has them all:
the forward passes of target and source, the penalty, the backward pass and the optimizer's step. This was tested with a
stand-in for the recording. It was not measured, since no GPU was at hand.
"""

import torch
from torch import Tensor

from ..common.console import log, log_once
from ..methods.base import Batch, FeaturePenalty, Regularizer
from ..methods.fast.cuda_graph import Replayed, Tensors, on_side_stream
from ..methods.sum import Sum
from . import devices
from .loop import Step, Stepped, TrainState, train_step


def graphed(method: Regularizer, device: torch.device) -> Step:
    """The step to train with; one line says so where it is launched operation by operation after all."""
    reason = (
        "there is no GPU"
        if device.type != "cuda"
        else "several processes share the run"
        if devices.processes() > 1
        else ""
        if same_every_step(method)
        else f"{type(method).__name__} does not do the same in every step"
    )
    if reason:
        log.info(f"cuda_graph=true has no effect: {reason}")
        return train_step
    return GraphedStep()


def same_every_step(method: Regularizer) -> bool:
    """Whether all steps do the same: no hook of the method acts between them."""
    if isinstance(method, Sum):
        return all(same_every_step(term) for term in method.by_name().values())
    if method.needs.idle_hooks:
        return True
    own = type(method)
    in_every_step = isinstance(method, FeaturePenalty) and method.every == 1
    before = FeaturePenalty.before_step if in_every_step else Regularizer.before_step
    return own.before_step is before and own.after_step is Regularizer.after_step


class GraphedStep:
    """`train_step` of one method and one target. The third call records it, and later calls replay the recording.

    Images, labels, learning rates and the seed of what a step draws are inputs: PyTorch hands a replay the generator's
    current seed, which the loop sets before each step. The rates are fp32 tensors on the GPU, which the optimizer reads
    in every step; other numbers of its groups are those of the recording. Inputs that are not tensors, such as graphs,
    go through `train_step`.
    """

    def __init__(self) -> None:
        self.replayed = Replayed()
        self.names: tuple[list[str], list[str]] = [], []  # of the terms and of the extra metrics

    def __call__(self, state: TrainState, method: Regularizer, batch: Batch) -> Stepped:
        if not isinstance(batch.images, Tensor):
            log_once("cuda_graph=true has no effect: inputs of this task, such as graphs, differ in size")
            return train_step(state, method, batch)
        put_rates_on(batch.images.device, state.optimizer)

        def step(inputs: Tensors) -> Tensors:
            images, labels, *views = inputs
            state.optimizer.zero_grad(set_to_none=True)  # a recording that failed left gradients that nobody computed
            logits, terms, extras = train_step(state, method, Batch(images, labels, tuple(views)))
            self.names = list(terms), list(extras)
            return [logits, *terms.values(), *extras.values()]

        logits, *scalars = self.replayed(on_side_stream(step), [batch.images, batch.labels, *batch.views])
        names, extras = self.names
        count = len(names)
        return logits, dict(zip(names, scalars[:count], strict=True)), dict(zip(extras, scalars[count:], strict=True))


def put_rates_on(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    """Makes each group's learning rate a tensor on the device. That of a checkpoint is a tensor on the CPU."""
    for group in optimizer.param_groups:
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=device)
        if "capturable" in group:  # Adam's count of steps is read on the GPU, too
            group["capturable"] = True
