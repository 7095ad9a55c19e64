"""What is measured: loss terms and accuracy while a network trains, and its outputs on test images."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.console import log
from ..common.errors import UserError
from ..common.pair_metrics import pair_metrics
from ..data.dataset import Pairs
from ..data.loader import BatchSource
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

    def add(self, correct: Tensor, count: int, losses: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        """correct: how many of `count` inputs are right, a scalar."""
        values = losses | extra
        self.losses, self.extra = list(losses), list(extra)
        self.rows.append(torch.stack([value.float() for value in values.values()]))
        self.correct.append(correct)
        self.images += count * devices.processes()

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


def correct_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels (B,) the largest of the logits (B, K) tells, a scalar."""
    return (logits.argmax(dim=1) == labels).sum()


def evaluate(network: Network, loader: BatchSource, indices: np.ndarray) -> dict[str, Any]:
    """Logits (N, K) fp32, labels (N,), accuracies in percent and mean cross-entropy on test crops of `indices`.

    The balanced accuracy is the mean of the accuracies of the classes that have images.
    """
    logits, labels = outputs_of(network, loader, indices, "logits")
    right = (logits.argmax(dim=1) == labels).double()
    images, of_class = torch.bincount(labels), torch.bincount(labels, weights=right)
    return {
        "logits": logits.numpy(),
        "labels": labels.numpy(),
        "index": indices,
        "top1": 100 * right.mean().item(),
        "balanced_accuracy": 100 * (of_class / images)[images > 0].mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
    }


def evaluate_pairs(network: Network, loader: BatchSource, indices: np.ndarray, pairs: Pairs) -> dict[str, Any]:
    """The similarity (P,) of each pair, which is the cosine of its embeddings, with `pairs` and their rates.

    `indices`: all images of the pairs, ascending; each goes through the network once.
    """
    embeddings, _ = outputs_of(network, loader, indices, "embedding")
    embeddings = F.normalize(embeddings.double())
    first, second = (embeddings[np.searchsorted(indices, images)] for images in (pairs.first, pairs.second))
    similarities = (first * second).sum(dim=1).numpy()
    return {"similarities": similarities, **vars(pairs)} | pair_metrics(similarities, pairs.same, pairs.fold)


@torch.inference_mode()
def outputs_of(network: Network, loader: BatchSource, indices: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """What `network` returns as `name` for test crops of `indices`, (N, D) fp32, and the labels (N, ...), on the CPU.

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


def _outputs_of(network: Network, loader: BatchSource, indices: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
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
    first = torch.cat(labels).view(len(own), -1, *labels[0].shape[1:])[:, 0]
    return devices.gather(mean.cpu())[: len(indices)], devices.gather(first.cpu())[: len(indices)]
