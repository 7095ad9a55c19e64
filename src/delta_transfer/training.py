"""The one loop. It knows a method only as a Regularizer."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed
from .config import ScheduleConfig
from .data.loader import Loader
from .errors import UserError
from .models import Network, frozen_backbone, in_parts
from .regularizers import Regularizer


class Diverged(UserError):
    """A loss term stopped being a finite number."""


@dataclass
class Learner:
    """The target network with its optimizer, the frozen source beside it, and the precision they compute in."""

    target: Network
    source: nn.Module | None  # models.frozen_maps of it, or a Network
    optimizer: torch.optim.Optimizer
    precision: str  # fp32 | bf16
    aux_weight: float = 0.0
    compiled: bool = False

    def __post_init__(self):
        compiled = torch.compile if self.compiled else lambda network: network
        self._frozen = not any(p.requires_grad for p in self.target.backbone_parameters().values())
        target = frozen_backbone(self.target, self.precision) if self._frozen else self.target
        self._target = compiled(distributed.parallel(target, next(target.parameters()).device))
        self._source = compiled(self.source) if self.source is not None else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(images.device, self.precision):
            return in_parts(self._target, images) if self._frozen else self._target(images)

    @torch.no_grad()
    def forward_source(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(images.device, self.precision):
            return in_parts(self._source, images)

    def task_loss(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, in fp32, and that of an auxiliary head if there is one."""
        terms = {"cross_entropy": F.cross_entropy(outputs["logits"].float(), labels)}
        if "aux_logits" in outputs:
            terms["aux"] = self.aux_weight * F.cross_entropy(outputs["aux_logits"].float(), labels)
        return terms

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def make_optimizer(target: Network, regularizer: Regularizer, schedule: ScheduleConfig) -> torch.optim.SGD:
    """SGD over what the method trains: head and parameters of its own, and the backbone unless it is frozen."""
    if regularizer.freezes_backbone:
        target.freeze()
        for parameter in target.head_parameters().values():
            parameter.requires_grad_(True)
    groups = [
        {"params": [*target.head_parameters().values(), *regularizer.parameters()], "lr_factor": 1.0},
        {"params": list(target.backbone_parameters().values()), "lr_factor": schedule.backbone_lr_factor},
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=schedule.lr,
        momentum=schedule.momentum,
        nesterov=schedule.nesterov,
        weight_decay=regularizer.weight_decay,
        fused=True,
    )


def learning_rate(schedule: ScheduleConfig, iteration: int, iterations: int) -> float:
    """Of the head, in step number `iteration`, counted from 0."""
    decayed = iteration >= round(schedule.decay_at * iterations)
    return schedule.lr * (schedule.decay_factor if decayed else 1.0)


def train(
    learner: Learner,
    regularizer: Regularizer,
    loader: Loader,
    train_indices: np.ndarray,
    schedule: ScheduleConfig,
    *,
    first_iteration: int = 0,
    seconds_before: float = 0.0,
    evaluate_now: Callable[[], dict[str, float]] = dict,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    checkpoint: Callable[[int, float], None] = lambda iteration, seconds: None,
) -> float:
    """Train to the end of the schedule; returns the seconds of training, evaluations left out.

    `log` gets a line every `schedule.log_every` iterations: step, lr, each loss term and the training accuracy as means
    since the line before, images/s. `checkpoint(iterations done, seconds)` is called every
    `schedule.checkpoint_seconds`, after a log line. Raises Diverged with term and iteration if a loss is not finite.
    """
    iterations = schedule.length(len(train_indices))
    learner.target.train(not regularizer.freezes_backbone)
    window = _Window(first_iteration)
    clock = _Clock(seconds_before)
    last_checkpoint = time.monotonic()
    for iteration in range(first_iteration, iterations):
        images, labels = loader.train_batch(train_indices, iteration)  # this process' share of the batch
        lr = learning_rate(schedule, iteration, iterations)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        torch.manual_seed(loader.step_seed(iteration))  # dropout follows from (seed, iteration), as the batch does
        logits, terms = regularizer.update(learner, images, labels)
        window.add(logits, labels, terms)

        done = iteration + 1
        evaluating = done == iterations or (schedule.eval_every and done % schedule.eval_every == 0)
        if done % schedule.log_every == 0 or evaluating:
            line = {"step": done, "lr": lr} | window.close(lr)  # the only place that waits for the device
            line["images_per_second"] = clock.lap(window.images)
            if evaluating:
                line |= evaluate_now()
                _check_finite(line, iteration, lr)
                learner.target.train(not regularizer.freezes_backbone)
            log(line)
            window = _Window(done)
            if time.monotonic() - last_checkpoint > schedule.checkpoint_seconds and done < iterations:
                checkpoint(done, clock.seconds)
                last_checkpoint = time.monotonic()
            clock.restart()
    return clock.seconds


@torch.inference_mode()
def evaluate(network: Network, loader: Loader, indices: np.ndarray, precision: str) -> dict[str, Any]:
    """On test crops of `indices`: logits (N, K) fp32, labels (N,), top-1 accuracy in percent, mean cross-entropy.

    Of several crops of an image the mean of the logits counts.
    """
    network.eval()
    logits, labels = [], []
    # Shares of equal size, so that no process is left without images; what is too much is cut off again.
    own = np.resize(indices, -(-len(indices) // distributed.processes()) * distributed.processes())
    own = np.array_split(own, distributed.processes())[distributed.rank()]
    for images, batch_labels in loader.test_batches(own):
        with autocast(images.device, precision):
            logits.append(network(images)["logits"].float())
        labels.append(batch_labels)
    logits, labels = (torch.cat(parts).unflatten(0, (len(own), -1)) for parts in (logits, labels))
    logits, labels = (distributed.gather(t.cpu())[: len(indices)] for t in (logits.mean(dim=1), labels[:, 0]))
    return {
        "logits": logits.numpy(),
        "labels": labels.numpy(),
        "top1": 100 * (logits.argmax(dim=1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def _check_finite(values: dict[str, float], iteration: int, lr: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise Diverged(
                f"The loss term {name!r} became {value} at iteration {iteration} (learning rate {lr:g}). "
                "Usual causes: the learning rate or reg.alpha is too large."
            )


class _Window:
    """Loss terms and accuracy since the last log line, kept on the device until they are needed."""

    def __init__(self, first_iteration: int):
        self.first_iteration = first_iteration
        self.terms: list[dict[str, Tensor]] = []
        self.correct: list[Tensor] = []
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor, terms: dict[str, Tensor]) -> None:
        self.terms.append(terms)
        self.correct.append((logits.argmax(dim=1) == labels).sum())
        self.images += len(labels) * distributed.processes()

    def close(self, lr: float) -> dict[str, float]:
        names = list(self.terms[0])
        values = torch.stack([torch.stack([terms[name].float() for name in names]) for terms in self.terms])
        values = distributed.average(values).tolist()
        for number, row in enumerate(values):
            _check_finite(dict(zip(names, row, strict=True)), self.first_iteration + number, lr)
        means = [sum(column) / len(values) for column in zip(*values, strict=True)]
        correct = distributed.average(torch.stack(self.correct).sum().double()).item() * distributed.processes()
        accuracy = 100 * correct / self.images
        return dict(zip(names, means, strict=True)) | {"loss": sum(means), "train_top1": accuracy}


class _Clock:
    """Seconds of training and images/s, without the time between a lap and the next `restart`."""

    def __init__(self, seconds_before: float):
        self.seconds = seconds_before
        self.restart()

    def lap(self, images: int) -> float:
        seconds = time.perf_counter() - self.since
        self.seconds += seconds
        return images / seconds

    def restart(self) -> None:
        self.since = time.perf_counter()
