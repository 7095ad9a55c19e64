"""What is measured: loss terms and accuracy while a network trains, and its outputs on test images."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.console import log
from ..common.errors import UserError
from ..common.pair_metrics import pair_metrics
from ..data.dataset import Pairs, Splits
from ..data.loader import Loader
from ..models import Network
from . import devices

GRADIENT_NORM = "gradient_norm"  # the norm of the whole gradient, beside the loss terms in a line of metrics
Line = dict[str, Any]  # a line of metrics


class NotFinite(UserError):
    """A loss term or the gradient stopped being a finite number at iteration `iteration`, after `steps` steps."""

    def __init__(self, what: str, value: float, iteration: int, steps: int, lr: float):
        super().__init__(f"{what} became {value} at iteration {iteration} (learning rate {lr:g}).")
        self.iteration, self.steps = iteration, steps


def check_finite(name: str, value: float, iteration: int, steps: int, lr: float) -> None:
    """Raises NotFinite if a value measured at `iteration`, after `steps` steps, is no finite number."""
    if not math.isfinite(value):
        what = "The gradient's norm" if name == GRADIENT_NORM else f"The loss term {name!r}"
        raise NotFinite(what, value, iteration, steps, lr)


class MetricsWindow:
    """Loss terms and accuracy since the last line of metrics. They stay on the device until they are needed."""

    def __init__(self, first_iteration: int):
        self.first_iteration = first_iteration
        self.losses: list[str] = []  # names of the loss terms
        self.extra: list[str] = []  # names of the other values
        self.rows: list[Tensor] = []  # the values of each step
        self.correct: list[Tensor] = []
        self.images = 0

    def add(self, logits: Tensor, labels: Tensor, losses: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        values = losses | extra
        self.losses, self.extra = list(losses), list(extra)
        self.rows.append(torch.stack([value.float() for value in values.values()]))
        self.correct.append((logits.argmax(dim=1) == labels).sum())
        self.images += len(labels) * devices.processes()

    def close(self, rate: Callable[[int], float]) -> Line:
        """The means of all values, the whole loss, the training accuracy in percent; raises NotFinite.

        rate: the learning rate of an iteration, for the message.
        """
        rows = devices.average(torch.stack(self.rows)).tolist()
        names = self.losses + self.extra
        for iteration, row in enumerate(rows, self.first_iteration):
            for name, value in zip(names, row, strict=True):
                check_finite(name, value, iteration, iteration, rate(iteration))
        means = {name: sum(column) / len(rows) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
        losses = {name: means[name] for name in self.losses}
        correct = devices.average(torch.stack(self.correct).sum().double()).item() * devices.processes()
        extra = {name: means[name] for name in self.extra}
        return losses | {"loss": sum(losses.values())} | extra | {"train_top1": 100 * correct / self.images}

    def state_dict(self) -> dict[str, Any]:
        """On the CPU, which waits for the device."""
        tensors = {name: torch.stack(getattr(self, name)).cpu() for name in ("rows", "correct") if self.images}
        kept = ("first_iteration", "losses", "extra", "images")
        return {name: getattr(self, name) for name in kept} | tensors

    @classmethod
    def resumed(cls, iterations_done: int, state: dict[str, Any], device: torch.device) -> "MetricsWindow":
        """The window of a checkpoint's `state`, or an empty one."""
        window = cls(iterations_done)
        for name, value in state.items():
            setattr(window, name, list(value.to(device)) if isinstance(value, Tensor) else value)
        return window


Averaged = Callable[[Network], AbstractContextManager[None]]


class Evaluator:
    """Measures a target on validation and test images. Nothing is selected: the last measurement is what counts."""

    def __init__(self, loader: Loader, splits: Splits, pairs: Pairs | None, measures_test: bool):
        self.loader, self.splits, self.pairs = loader, splits, pairs
        self.measured = (["val"] if len(splits.val) else []) + (["test"] if measures_test else [])
        self.latest: dict[str, dict[str, Any]] = {}  # by split

    def __call__(self, target: Network, averaged: Averaged) -> Line:
        """Accuracy in percent, loss and rates, named <split>_<what>. averaged: gives `target` its averaged weights."""
        with averaged(target):
            for split in self.measured:
                indices = getattr(self.splits, split)
                if split == "test" and self.pairs is not None:
                    self.latest[split] = evaluate_pairs(target, self.loader, indices, self.pairs)
                else:
                    self.latest[split] = evaluate(target, self.loader, indices)
        return self.scalars()

    def scalars(self) -> Line:
        named = {f"{split}_{key}": value for split, found in self.latest.items() for key, value in found.items()}
        return {name: value for name, value in named.items() if isinstance(value, float)}


def evaluate(network: Network, loader: Loader, indices: np.ndarray) -> dict[str, Any]:
    """Logits (N, K) fp32, labels (N,), top-1 accuracy in percent and mean cross-entropy on test crops of `indices`."""
    logits, labels = outputs_of(network, loader, indices, "logits")
    return {
        "logits": logits.numpy(),
        "labels": labels.numpy(),
        "top1": 100 * (logits.argmax(dim=1) == labels).double().mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def accuracy(network: Network, loader: Loader, indices: np.ndarray) -> float:
    """Top-1 accuracy in percent."""
    found: float = evaluate(network, loader, indices)["top1"]
    return found


def evaluate_pairs(network: Network, loader: Loader, indices: np.ndarray, pairs: Pairs) -> dict[str, Any]:
    """The similarity (P,) of each pair, which is the cosine of its embeddings, with `pairs` and their rates.

    `indices`: all images of the pairs, ascending; each goes through the network once.
    """
    embeddings, _ = outputs_of(network, loader, indices, "embedding")
    embeddings = F.normalize(embeddings.double())
    first, second = (embeddings[np.searchsorted(indices, images)] for images in (pairs.first, pairs.second))
    similarities = (first * second).sum(dim=1).numpy()
    return {"similarities": similarities, **vars(pairs)} | pair_metrics(similarities, pairs.same, pairs.fold)


@torch.inference_mode()
def outputs_of(network: Network, loader: Loader, indices: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """What `network` returns as `name` for test crops of `indices`, (N, D) fp32, and the labels (N,), on the CPU.

    It computes in fp32, whatever the precision of the training: delta-predict and exported files, which compute in fp32
    too, give the same numbers. Several crops of an image give their mean. Where memory does not suffice, fewer images
    go through at once from then on.
    """
    while True:
        try:
            return _outputs_of(network, loader, indices, name)
        except torch.OutOfMemoryError:
            if loader.images_at_once <= 2:
                raise
            loader.images_at_once //= 2
            log.info(f"Out of memory in the evaluation: it goes on with {loader.images_at_once} images at once")


def _outputs_of(network: Network, loader: Loader, indices: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    network.eval()
    outputs, labels = [], []
    # Every process gets as many images, some of them twice; what is too much is cut off again.
    own = np.resize(indices, -(-len(indices) // devices.processes()) * devices.processes())
    own = np.array_split(own, devices.processes())[devices.rank()]
    for images, batch_labels in loader.test_batches(own):
        with devices.full_precision(images.device):
            outputs.append(network(images)[name])
        labels.append(batch_labels)
    mean = torch.cat(outputs).view(len(own), -1, outputs[0].shape[1]).mean(dim=1)
    first = torch.cat(labels).view(len(own), -1)[:, 0]
    return devices.gather(mean.cpu())[: len(indices)], devices.gather(first.cpu())[: len(indices)]
