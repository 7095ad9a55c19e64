"""The one loop. It knows a method only as a Regularizer."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common import interrupts
from ..common.console import log
from ..common.errors import UserError
from ..common.pair_metrics import pair_metrics
from ..config import ScheduleConfig
from ..data.dataset import Pairs
from ..data.loader import Loader
from ..methods import Regularizer
from ..models import Network, forward_in_chunks, frozen_backbone
from . import processes as distributed

GRADIENT_NORM = "gradient_norm"  # beside the loss terms in a line of metrics
CHECKPOINT_SHARE = 0.01  # of the time: where a checkpoint takes long, they are made less often


def start_at(iteration: int, seconds: float = 0.0) -> dict[str, Any]:
    """The progress of a training that begins with `iteration`, when others took `seconds` before it."""
    window = {"first_iteration": iteration, "names": [], "images": 0}
    return {"iterations_done": iteration, "seconds": seconds, "seconds_since_line": 0.0, "window": window}


class NotFinite(UserError):
    """A loss term or the gradient stopped being a finite number at iteration `iteration`, after `steps` steps."""

    def __init__(self, what: str, value: float, iteration: int, steps: int, lr: float):
        super().__init__(f"{what} became {value} at iteration {iteration} (learning rate {lr:g}).")
        self.iteration, self.steps = iteration, steps


@dataclass
class TrainState:
    """The target network with its optimizer, the frozen source beside it, and the precision they compute in."""

    target: Network
    source: nn.Module | None  # models.frozen_maps of it, or a Network
    optimizer: torch.optim.SGD
    precision: str  # fp32 | bf16
    aux_weight: float = 0.0
    compiled: bool = False
    accumulate: int = 1  # parts that a batch goes through in, one after the other
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy  # of logits (B, K) and labels (B,)
    gradient_norm: Tensor | None = field(default=None, init=False)  # of the last step

    def __post_init__(self):
        compiled = torch.compile if self.compiled else lambda network: network
        self._frozen = not any(p.requires_grad for p in self.target.backbone_parameters().values())
        target = frozen_backbone(self.target, self.precision) if self._frozen else self.target
        self._target = compiled(distributed.parallel(target, next(target.parameters()).device))
        self._source = compiled(self.source) if self.source is not None else None
        groups = self.optimizer.param_groups if self.optimizer else []
        of_target = set(self.target.parameters())
        self._trained = [p for group in groups for p in group["params"]]
        self._of_method = [p for p in self._trained if p not in of_target]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(images.device, self.precision):
            return forward_in_chunks(self._target, images) if self._frozen else self._target(images)

    def forward_with(self, parameters: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
        """`forward` with other values of the target's parameters, by their names; BatchNorm's statistics stay.

        Never compiled, so that it can be differentiated twice.
        """
        buffers = {name: buffer.clone() for name, buffer in self.target.traced.named_buffers()}
        with autocast(images.device, self.precision):
            return torch.func.functional_call(self.target.traced, parameters | buffers, (images,))

    @torch.no_grad()
    def forward_source(self, images: Tensor) -> dict[str, Tensor]:
        with autocast(images.device, self.precision):
            return forward_in_chunks(self._source, images)

    def task_loss(self, outputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy, in fp32, and that of an auxiliary head if there is one."""
        terms = {"cross_entropy": self.loss(outputs["logits"].float(), labels)}
        if "aux_logits" in outputs:
            terms["aux"] = self.aux_weight * F.cross_entropy(outputs["aux_logits"].float(), labels)
        return terms

    def split(self, *batch: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The batch in as many parts of equal size as it is accumulated from; for each part `backward` is called."""
        return zip(*(values.chunk(self.accumulate) for values in batch), strict=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a part of the batch; that of the batch is the mean over its parts."""
        (loss / self.accumulate if self.accumulate > 1 else loss).backward()

    def step(self) -> None:
        for parameter in self._of_method:  # those of the target were averaged in the backward pass
            parameter.grad = distributed.average(parameter.grad)
        # The whole gradient in one number, for the log: the loop looks at it without waiting for the device here.
        self.gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def make_optimizer(target: Network, regularizer: Regularizer, schedule: ScheduleConfig) -> torch.optim.SGD:
    """SGD over what the method trains: head and parameters of its own, and the backbone unless it is frozen."""
    if regularizer.freezes_backbone:
        target.freeze()
        for parameter in target.head_parameters().values():
            parameter.requires_grad_(True)
    slowly = dict.fromkeys(regularizer.trained_slowly())
    groups = [
        {"params": list(target.head_parameters().values()), "lr_factor": 1.0},
        {"params": list(target.backbone_parameters().values()), "lr_factor": schedule.backbone_lr_factor},
        {"params": [p for p in regularizer.trained() if p not in slowly], "lr_factor": 1.0},
        {"params": list(slowly), "lr_factor": schedule.backbone_lr_factor},
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
    if schedule.decay == "cosine":
        return schedule.lr * (1 + math.cos(math.pi * iteration / iterations)) / 2
    drops = sum(iteration >= round(at * iterations) for at in (schedule.decay_at, *schedule.decay_also_at))
    return schedule.lr * schedule.decay_factor**drops


def batch_for(regularizer: Regularizer, loader: Loader, indices: np.ndarray, iteration: int) -> tuple[Tensor, ...]:
    """This process' share of the batch: images, labels, and as many further views of the images as the method needs."""
    further = (loader.train_view(indices, iteration, view) for view in range(1, regularizer.views))
    return *loader.train_batch(indices, iteration), *further


def train(
    learner: TrainState,
    regularizer: Regularizer,
    loader: Loader,
    train_indices: np.ndarray,
    schedule: ScheduleConfig,
    *,
    first_iteration: int = 0,
    lr_factor: float = 1.0,
    progress: dict[str, Any] | None = None,
    evaluate_now: Callable[[], dict[str, float]] = dict,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    checkpoint: Callable[[dict[str, Any]], None] = lambda progress: None,
) -> float:
    """Train to the end of the schedule; returns the seconds of training, evaluations left out.

    `first_iteration`: the number of the first batch, where a training goes on from another; steps are counted on.
    `log` gets a line every `schedule.log_every` iterations: step, lr, each loss term, the norm of the gradient and the
    training accuracy as means since the line before, images/s. `checkpoint(progress)` is called every
    `schedule.checkpoint_seconds`, or less often, so that it takes less than CHECKPOINT_SHARE of the time; what it got
    last, passed as `progress`, is where training goes on. Raises NotFinite with term and iteration if a loss or the
    gradient is not finite, and Stopped, after a checkpoint, if this process was asked to end.
    """
    length = schedule.length(len(train_indices))
    end = first_iteration + length
    learner.target.train(not regularizer.freezes_backbone)
    progress = progress or start_at(first_iteration)
    window = _Window.of(progress["window"], loader.device)
    clock = _Clock(progress["seconds"], progress["seconds_since_line"])
    last_checkpoint, checkpoint_cost = time.monotonic(), 0.0
    for iteration in range(progress["iterations_done"], end):
        images, labels, *views = batch_for(regularizer, loader, train_indices, iteration)
        lr = lr_factor * learning_rate(schedule, iteration - first_iteration, length)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        regularizer.before_step(learner, iteration - first_iteration, length, loader.method_seed(iteration))
        torch.manual_seed(loader.step_seed(iteration))  # dropout follows from (seed, iteration), as the batch does
        logits, terms = regularizer.update(learner, images, labels, *views)
        window.add(logits, labels, terms | regularizer.observed | {GRADIENT_NORM: learner.gradient_norm})

        done = iteration + 1
        evaluating = done == end or (schedule.eval_every and done % schedule.eval_every == 0)
        if done % schedule.log_every == 0 or evaluating:
            # The only place that waits for the device.
            line = {"step": done, "lr": lr} | window.close(lr, [*regularizer.observed, GRADIENT_NORM])
            line["images_per_second"] = clock.lap(window.images)
            if evaluating:
                line |= evaluate_now()
                _check_finite(line, iteration, done, lr)
                learner.target.train(not regularizer.freezes_backbone)
            log(line)
            window = _Window(done)
            clock.restart()

        stop = interrupts.received() is not None
        due = time.monotonic() - last_checkpoint > max(schedule.checkpoint_seconds, checkpoint_cost / CHECKPOINT_SHARE)
        # What several processes have seen since the last line is not known to the one that writes.
        if (stop or due) and done < end and (distributed.processes() == 1 or not window.images):
            begun = time.monotonic()
            progress = {"iterations_done": done, "window": window.state()}  # waits for the device
            clock.pause()
            checkpoint(progress | {"seconds": clock.seconds, "seconds_since_line": clock.since_lap})
            if stop:
                raise interrupts.Stopped
            clock.restart()
            last_checkpoint = time.monotonic()
            checkpoint_cost = last_checkpoint - begun
    return clock.seconds


def evaluate(network: Network, loader: Loader, indices: np.ndarray, precision: str) -> dict[str, Any]:
    """On test crops of `indices`: logits (N, K) fp32, labels (N,), top-1 accuracy in percent, mean cross-entropy."""
    logits, labels = outputs_of(network, loader, indices, precision, "logits")
    return {
        "logits": logits.numpy(),
        "labels": labels.numpy(),
        "top1": 100 * (logits.argmax(dim=1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def evaluate_pairs(
    network: Network, loader: Loader, indices: np.ndarray, pairs: Pairs, precision: str
) -> dict[str, Any]:
    """Similarity (P,) of each pair, the cosine of its embeddings, beside `pairs`; what `pair_metrics` makes of them.

    `indices`: all images of the pairs, ascending; each goes through the network once.
    """
    embeddings, _ = outputs_of(network, loader, indices, precision, "embedding")
    embeddings = F.normalize(embeddings.double())
    first, second = (embeddings[np.searchsorted(indices, images)] for images in (pairs.first, pairs.second))
    similarities = (first * second).sum(dim=1).numpy()
    return {"similarities": similarities, **vars(pairs)} | pair_metrics(similarities, pairs.same, pairs.fold)


@torch.inference_mode()
def outputs_of(
    network: Network, loader: Loader, indices: np.ndarray, precision: str, name: str
) -> tuple[Tensor, Tensor]:
    """What `network` returns as `name` for test crops of `indices`, (N, D) fp32, and the labels (N,), on the CPU.

    Of several crops of an image it is the mean. Where memory does not suffice, fewer images go through at once, from
    then on.
    """
    while True:
        try:
            return _outputs_of(network, loader, indices, precision, name)
        except torch.OutOfMemoryError:
            if loader.images_at_once <= 2:
                raise
            loader.images_at_once //= 2
            log.info(f"Out of memory in the evaluation: it goes on with {loader.images_at_once} images at once")


def _outputs_of(
    network: Network, loader: Loader, indices: np.ndarray, precision: str, name: str
) -> tuple[Tensor, Tensor]:
    network.eval()
    outputs, labels = [], []
    # Shares of equal size, so that no process is left without images; what is too much is cut off again.
    own = np.resize(indices, -(-len(indices) // distributed.processes()) * distributed.processes())
    own = np.array_split(own, distributed.processes())[distributed.rank()]
    for images, batch_labels in loader.test_batches(own):
        with autocast(images.device, precision):
            outputs.append(network(images)[name].float())
        labels.append(batch_labels)
    outputs, labels = (torch.cat(parts).unflatten(0, (len(own), -1)) for parts in (outputs, labels))
    return tuple(distributed.gather(t.cpu())[: len(indices)] for t in (outputs.mean(dim=1), labels[:, 0]))


def _check_finite(values: dict[str, float], iteration: int, steps: int, lr: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            what = "The gradient's norm" if name == GRADIENT_NORM else f"The loss term {name!r}"
            raise NotFinite(what, value, iteration, steps, lr)


class _Window:
    """Loss terms and accuracy since the last log line, kept on the device until they are needed."""

    def __init__(self, first_iteration: int):
        self.first_iteration = first_iteration
        self.names: list[str] = []
        self.rows: list[Tensor] = []  # the terms of each step
        self.correct: list[Tensor] = []
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor, terms: dict[str, Tensor]) -> None:
        self.names = list(terms)
        self.rows.append(torch.stack([term.float() for term in terms.values()]))
        self.correct.append((logits.argmax(dim=1) == labels).sum())
        self.images += len(labels) * distributed.processes()

    def close(self, lr: float, observed: list[str]) -> dict[str, float]:
        """Their means; those named `observed` are no part of the loss."""
        rows = distributed.average(torch.stack(self.rows)).tolist()
        for iteration, row in enumerate(rows, self.first_iteration):
            _check_finite(dict(zip(self.names, row, strict=True)), iteration, iteration, lr)
        means = {
            name: sum(column) / len(rows) for name, column in zip(self.names, zip(*rows, strict=True), strict=True)
        }
        beside = {name: means.pop(name) for name in observed}
        correct = distributed.average(torch.stack(self.correct).sum().double()).item() * distributed.processes()
        return means | {"loss": sum(means.values())} | beside | {"train_top1": 100 * correct / self.images}

    def state(self) -> dict[str, Any]:
        tensors = {name: torch.stack(getattr(self, name)).cpu() for name in ("rows", "correct") if self.images}
        return {"first_iteration": self.first_iteration, "names": self.names, "images": self.images} | tensors

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> "_Window":
        window = cls(state["first_iteration"])
        window.names, window.images = state["names"], state["images"]
        if window.images:
            window.rows, window.correct = (list(state[name].to(device)) for name in ("rows", "correct"))
        return window


class _Clock:
    """Seconds of training, in all and since the last lap; it stands still between `pause` and `restart`."""

    def __init__(self, seconds: float, since_lap: float):
        self.seconds, self.since_lap = seconds, since_lap
        self.restart()

    def restart(self) -> None:
        self.started = time.perf_counter()

    def pause(self) -> None:
        elapsed = time.perf_counter() - self.started
        self.seconds += elapsed
        self.since_lap += elapsed

    def lap(self, images: int) -> float:
        """Images per second since the last lap."""
        self.pause()
        seconds, self.since_lap = self.since_lap, 0.0
        return images / seconds
