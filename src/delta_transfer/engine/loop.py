"""The training loop. It knows a method only by its hooks: `before_step`, `penalty`, `after_step`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.loader import BatchSource
from ..methods.base import Batch, Outputs, Regularizer
from ..models import Network, forward_in_chunks, frozen_backbone
from . import devices
from .callbacks import Callback, Clock, Position, Progress, stopped_within
from .optimizers import ScheduleConfig, learning_rate, set_learning_rate
from .tasks import GRADIENT_NORM, Line, Loss, MetricsWindow, check_finite, correct_labels


@dataclass
class TrainState:
    """The target network with its optimizer, the frozen source beside it, and the precision that they compute in."""

    target: Network
    source: nn.Module | None  # models.frozen_maps of it, or a Network
    optimizer: torch.optim.Optimizer
    precision: str  # fp32 | bf16
    aux_weight: float = 0.0  # weight of an auxiliary head's cross-entropy
    compiled: bool = False
    accumulate: int = 1  # micro-batches per step
    loss: Loss = F.cross_entropy
    clip_norm: float | None = None  # largest norm of the gradient
    correct: Callable[[Tensor, Tensor], Tensor | None] = correct_labels  # how many inputs of a batch are right
    loss_name: str = "cross_entropy"

    def __post_init__(self) -> None:
        backbone = self.target.backbone_parameters().values()
        self._frozen = not (self.target.training or any(p.requires_grad for p in backbone))
        target: nn.Module = frozen_backbone(self.target, self.precision) if self._frozen else self.target
        self._target = self._compiled(devices.parallel(target, next(iter(backbone)).device))
        self._source = self._compiled(self.source) if self.source is not None else None
        groups = self.optimizer.param_groups if self.optimizer else []
        of_target = set(self.target.parameters())
        self._trained = [p for group in groups for p in group["params"]]
        self._of_method = [p for p in self._trained if p not in of_target]

    def _compiled(self, network: nn.Module) -> nn.Module:
        return torch.compile(network) if self.compiled else network  # type: ignore[return-value]

    def forward(self, images: Any) -> Outputs:
        """What the target returns for images (B, 3, H, W), or for other inputs of the task."""
        with devices.autocast(images.device, self.precision):
            return forward_in_chunks(self._target, images) if self._frozen else self._target(images)

    @torch.no_grad()
    def forward_source(self, images: Any) -> Outputs | None:
        """What the frozen source returns for the same inputs; None without a source."""
        if self._source is None:
            return None
        with devices.autocast(images.device, self.precision):
            return forward_in_chunks(self._source, images)

    def task_loss(self, outputs: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """The task's loss in fp32, and that of an auxiliary head where there is one."""
        losses = {self.loss_name: self.loss(outputs["logits"].float(), labels)}
        if "aux_logits" in outputs:
            losses["aux"] = self.aux_weight * F.cross_entropy(outputs["aux_logits"].float(), labels)
        return losses

    def optimizer_step(self) -> Tensor:
        """A step on the mean gradient of all micro-batches and processes; returns the norm before it is clipped."""
        # Nothing waits for the norm here: it is read with the next line of metrics.
        for parameter in self._of_method:  # the backward pass has averaged those of the target
            parameter.grad = devices.average(parameter.grad)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained, self.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


Stepped = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]
Step = Callable[[TrainState, Regularizer, Batch], Stepped]


def train_step(state: TrainState, method: Regularizer, batch: Batch) -> Stepped:
    """One optimizer step: the logits (B, K), the loss terms, and the method's extra metrics with the gradient's norm.

    Terms and extra metrics are means over the micro-batches.
    """
    logits, terms, extras = [], [], []
    seen: list[Batch] = []
    seen_by_source: list[Outputs | None] = []
    for micro_batch in batch.split(state.accumulate):
        source_outputs = None if method.skips_source else state.forward_source(micro_batch.images)
        outputs = state.forward(micro_batch.images)
        outputs["labels"] = micro_batch.labels
        outputs |= {f"view_{number}": view for number, view in enumerate(micro_batch.views, 2)}
        losses = state.task_loss(outputs, micro_batch.labels)
        losses |= method.penalty(state.target, outputs, source_outputs)
        logits.append(outputs["logits"].detach())
        if method.needs.micro_batches_again:
            seen.append(micro_batch)
            seen_by_source.append(source_outputs)
        del outputs, source_outputs  # the backward pass needs their memory
        loss: Tensor = sum(losses.values())  # type: ignore[assignment]
        (loss / state.accumulate if state.accumulate > 1 else loss).backward()
        terms.append({name: value.detach() for name, value in losses.items()})
        extras.append(method.extra_metrics)
    gradient_norm = state.optimizer_step()
    extra_metrics = mean_of(extras) | method.after_step(state, seen, seen_by_source)
    extra_metrics[GRADIENT_NORM] = gradient_norm
    return torch.cat(logits), mean_of(terms), extra_metrics


def mean_of(scalars: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each name's scalars."""
    if len(scalars) == 1:
        return scalars[0]
    return {name: torch.stack([one[name] for one in scalars]).mean(dim=0) for name in scalars[0]}


def make_batch(method: Regularizer, loader: BatchSource, indices: np.ndarray, iteration: int) -> Batch:
    """This process' images of the batch of an iteration, with as many views as the method needs."""
    views = (loader.train_view(indices, iteration, view) for view in range(1, method.needs.views))
    return Batch(*loader.train_batch(indices, iteration), tuple(views))


def train(
    state: TrainState,
    method: Regularizer,
    loader: BatchSource,
    indices: np.ndarray,
    schedule: ScheduleConfig,
    progress: Progress,
    callbacks: Sequence[Callback] = (),
    *,
    lr_factor: float = 1.0,
    labels: Line | None = None,
    evaluate: Callable[[], Line] = dict,
    step: Step = train_step,
) -> Position:
    """Trains to the end of the schedule, or until a callback ends it earlier; returns where it ended.

    Args:
        indices: the training images.
        progress: where training begins or goes on: its first iteration numbers the first batch.
        callbacks: told of every step, and every `schedule.log_every` iterations of a line of metrics: step, lr, speed,
            and the means since the line before of each loss term, the gradient's norm and the training accuracy.
        lr_factor: multiplies the schedule's learning rate.
        labels: entries that every line of metrics gets, such as the stage.
        evaluate: measures the target as often as the schedule says, and at the end; its line is added.
        step: makes a step, as `train_step` does.

    Raises NotFinite with term and iteration if a loss or the gradient is not finite.
    """
    length, eval_every = schedule.length(len(indices)), schedule.evaluation_interval(len(indices))
    first, end = progress.first_iteration, progress.first_iteration + length
    window = MetricsWindow.resumed(progress.iterations_done, progress.window, loader.device)
    at = Position(state, progress, end, window, Clock(progress))
    state.target.train(not method.needs.frozen_backbone)

    def rate(iteration: int) -> float:
        return lr_factor * learning_rate(schedule, iteration - first, length, len(indices))

    for iteration in range(progress.iterations_done - progress.unmeasured, end):
        at.done = done = iteration + 1
        lr = rate(iteration)
        if done > progress.iterations_done:  # else this run was stopped in the evaluation below
            batch = make_batch(method, loader, indices, iteration)
            set_learning_rate(state.optimizer, lr)
            method.before_step(state, iteration - first, length, loader.method_seed(iteration))
            torch.manual_seed(loader.step_seed(iteration))  # dropout follows from (seed, iteration), as the batch does
            logits, losses, extra_metrics = step(state, method, batch)
            at.window.add(state.correct(logits, batch.labels), len(batch.labels), losses, extra_metrics)
            for callback in callbacks:
                callback.on_update(at)
        evaluating = done == end or bool(eval_every and done % eval_every == 0)
        if done % schedule.log_every == 0 or evaluating:
            # Nothing else in the loop waits for the device.
            line = {"step": done} | (labels or {}) | {"lr": lr} | at.window.close(rate)
            line["images_per_second"] = at.clock.rate(at.window.images)
            if evaluating:
                with stopped_within(at, callbacks):
                    measured = evaluate()
                for name, value in measured.items():
                    check_finite(name, value, iteration, done, lr)
                line |= measured
                state.target.train(not method.needs.frozen_backbone)
            for callback in callbacks:
                callback.on_line(line)
            at.window = MetricsWindow(done)
            at.clock.next_lap()
        for callback in callbacks:
            callback.on_step(at)
        if at.done >= at.end:
            break
    return at
