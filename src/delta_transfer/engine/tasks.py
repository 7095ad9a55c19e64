"""Tasks: what a run reads in a batch, what it minimises, and what it measures. All else is the same for every task.

A task is one object. The loop, the methods and the evaluation call it and never ask for its name.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.console import Display, log, log_once
from ..common.errors import UserError
from ..common.options import OptionError
from ..data.dataset import Dataset, Splits
from ..data.examination import constant_images
from ..data.jitter import Jitter
from ..data.loader import BatchSource, Loader
from ..data.store import Store, bytes_to_write, open_store, store_bytes, store_path
from ..methods.base import SampleLoss
from ..models import ArcFaceConfig, Network
from ..records.arrays import PREDICTIONS
from ..records.metrics import METRICS
from . import devices

if TYPE_CHECKING:
    from .config import RunConfig

Loss = Callable[[Tensor, Tensor], Tensor]  # a scalar of logits (B, K) and labels (B,), or the task's own
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

    def add(self, correct: Tensor | None, count: int, losses: dict[str, Tensor], extra: dict[str, Tensor]) -> None:
        """correct: how many of `count` inputs are right, a scalar; None for tasks without right and wrong."""
        values = losses | extra
        self.losses, self.extra = list(losses), list(extra)
        self.rows.append(torch.stack([value.float() for value in values.values()]))
        if correct is not None:
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
        line = losses | {"loss": sum(losses.values())} | {name: means[name] for name in self.extra}
        if self.correct:
            correct = devices.average(torch.stack(self.correct).sum().double()).item() * devices.processes()
            line["train_top1"] = 100 * correct / self.images
        return line

    def state_dict(self) -> dict[str, Any]:
        """On the CPU, which waits for the device."""
        tensors = {name: torch.stack(kept).cpu() for name in ("rows", "correct") if (kept := getattr(self, name))}
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
    """How many of the labels (B,) have the largest of their logits (B, K), a scalar."""
    return (logits.argmax(dim=1) == labels).sum()


# --- Measured on test images ---


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


@torch.inference_mode()
def outputs_of(network: Network, loader: BatchSource, indices: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """What `network` returns as `name` for test crops of `indices`, (N, D) fp32, and the labels (N, ...), on the CPU.

    It computes in fp32, whatever the precision of the training, so that delta-predict and exported files give the same
    numbers. Several crops of an image give their mean. If memory runs out, smaller batches are taken from then on.
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
    # Every process gets the same number of images; the repeated ones are cut off again.
    own = np.resize(indices, -(-len(indices) // devices.processes()) * devices.processes())
    own = np.array_split(own, devices.processes())[devices.rank()]
    display, done = Display("evaluation", loader.views * len(own), "crop", quiet_seconds=10), 0
    for images, batch_labels in loader.test_batches(own):
        with devices.full_precision(images.device):
            outputs.append(network(images)[name])
        labels.append(batch_labels)
        done += len(batch_labels)
        display.update(done)
        if devices.processes() == 1 and devices.stop_signal() is not None:  # others would wait for this one
            raise devices.Stopped
    mean = torch.cat(outputs).view(len(own), -1, outputs[0].shape[1]).mean(dim=1)
    first = torch.cat(labels).view(len(own), -1, *labels[0].shape[1:])[:, 0]
    return devices.gather(mean.cpu())[: len(indices)], devices.gather(first.cpu())[: len(indices)]


# --- Tasks ---


class Classification:
    """One label of K classes for each image, measured by the top-1 accuracy. Other tasks override what differs."""

    name = "classification"
    inputs = "images"  # their name in messages
    chosen_by = "top1"  # the metric of choices on validation data
    measures: tuple[str, ...] = ("top1", "balanced_accuracy")  # of validation and of test data; the usual one first
    # What goes on with a finished run: {run} is its folder, and {runs} also has the folder of L2.
    commands: tuple[str, ...] = (
        "delta-predict {run} IMAGES",
        "delta-export {run} --format onnx",
        "delta-report trust {runs}",
    )
    one_label = True  # each input has one label of K classes
    loss_name = "cross_entropy"  # in a line of metrics
    # The last test evaluation in the run's folder: the name of its file, and the arrays that have a digest.
    outputs: tuple[str, tuple[str, ...]] = ("predictions", PREDICTIONS)
    # The loss of a head that a method trains or measures itself; its mean over the batch, or one value for each input.
    sample_loss: SampleLoss = staticmethod(F.cross_entropy)

    def check(self, config: "RunConfig") -> None:
        """Raises OptionError for an option that belongs to another task."""
        self.check_inputs(config)
        if config.arcface != ArcFaceConfig():
            raise OptionError("arcface", f"arcface belongs to task=verification: this run has task={self.name}.")

    def check_inputs(self, config: "RunConfig") -> None:
        if config.backbone.inputs != self.inputs:
            raise OptionError(
                "backbone.name",
                f"backbone={config.backbone.name} takes {config.backbone.inputs}, and dataset={config.dataset.name} "
                f"has {self.inputs}.",
            )

    # --- Batches ---

    def open_loader(self, config: "RunConfig", dataset: Dataset, device: torch.device) -> BatchSource:
        """Batches of `dataset`. Its images are decoded first, unless they were before."""
        title = f"{dataset.name}: decoding images"
        with devices.rank0_first(), Display(title, len(dataset.labels), "image", 5) as display:
            store = open_store(dataset, config.backbone.resize, config.resizing, Path(config.cache_dir), display.update)
        if empty := store.constant().tolist():
            log_once(f"{dataset.name}: {constant_images([dataset.names[index] for index in empty])}")
        return loader_of(config, store, dataset.labels, device)

    def stores_to_build(self, config: "RunConfig", dataset: Dataset | None) -> dict[Any, int]:
        """Bytes of the image stores that a run would build. Without the data set, its publisher's counts are used."""
        size, aspect = config.backbone.resize, config.resizing
        if dataset is None:
            official = config.dataset.official
            assert official is not None, "a plan knows the size of a data set that is not here"
            return {(config.dataset.name, size, aspect): store_bytes(official.train + official.test, size, aspect)}
        path = store_path(dataset, size, aspect, Path(config.cache_dir))
        return {} if path.exists() else {path: bytes_to_write(path, len(dataset.labels), size, aspect)}

    def example(self, config: "RunConfig", count: int, classes: int, device: torch.device) -> tuple[Any, Tensor]:
        """`count` random inputs and labels, for measuring what a step costs."""
        side = config.backbone.image_size
        images = torch.rand(count, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        return images, torch.zeros(count, dtype=torch.int64, device=device)

    def in_words(self, config: "RunConfig") -> str:
        """What a batch holds, for messages."""
        return f"images of {config.backbone.image_size} x {config.backbone.image_size} pixels"

    # --- Head and loss ---

    def head(self, config: "RunConfig") -> Callable[[int, int], nn.Linear] | None:
        """Makes the target's head from the numbers of features and classes; None: the network's own kind of head."""
        return None

    def loss(self, config: "RunConfig", weights: Tensor | None = None) -> Loss:
        """The training loss without the method's penalty. weights: of the classes, (K,)."""
        smoothing = config.schedule.label_smoothing
        if weights is not None:
            return partial(weighted_cross_entropy, weights, smoothing)
        return partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else F.cross_entropy

    # --- Metrics ---

    # How many inputs of a training batch are right, a scalar; None for tasks without right and wrong.
    correct: Callable[[Tensor, Tensor], Tensor | None] = staticmethod(correct_labels)

    def measure(
        self, network: Network, loader: BatchSource, dataset: Dataset, split: str, indices: np.ndarray
    ) -> dict[str, Any]:
        """Metrics (floats) and arrays of a split, val or test."""
        return evaluate(network, loader, indices)

    def score(self, network: Network, loader: BatchSource, dataset: Dataset, indices: np.ndarray) -> float:
        """The measure of choices on validation data, signed so that more is better."""
        found: float = self.measure(network, loader, dataset, "val", indices)[self.chosen_by]
        return METRICS[f"val_{self.chosen_by}"].merit(found)

    def answers(self, logits: Tensor, record: Mapping[str, Any]) -> np.ndarray:
        """The predictions that `logits` (N, K) of a finished run stand for: here probabilities, (N, K) in 0..1."""
        found: np.ndarray = logits.double().softmax(dim=1).numpy()
        return found

    # --- Record ---

    def of_labels(self, dataset: Dataset) -> dict[str, Any]:
        """The record's entries about the labels, for users of the network."""
        return {}


TASKS: dict[str, Classification] = {"classification": Classification()}  # others register themselves


Averaged = Callable[[Network], AbstractContextManager[None]]


class Evaluator:
    """Measures a target on validation and test images. Nothing is selected: the last measurement counts."""

    def __init__(
        self,
        task: Classification,
        loader: BatchSource,
        dataset: Dataset,
        splits: Splits,
        measures_test: bool,
    ):
        self.task, self.loader, self.dataset, self.splits = task, loader, dataset, splits
        self.measured = (["val"] if len(splits.val) else []) + (["test"] if measures_test else [])
        self.latest: dict[str, dict[str, Any]] = {}  # by split

    def __call__(self, target: Network, averaged: Averaged) -> Line:
        """Metrics of the task, such as accuracy in percent and loss, named <split>_<what>.

        averaged: gives `target` its averaged weights.
        """
        with averaged(target):
            for split in self.measured:
                indices = getattr(self.splits, split)
                self.latest[split] = self.task.measure(target, self.loader, self.dataset, split, indices)
        return self.scalars()

    def scalars(self) -> Line:
        named = {f"{split}_{key}": value for split, found in self.latest.items() for key, value in found.items()}
        return {name: value for name, value in named.items() if isinstance(value, float)}


def refuse_options_of_classes(config: "RunConfig") -> None:
    """Raises OptionError: only the cross-entropy over classes has a smoothed and a weighted form."""
    for name in ("label_smoothing", "class_weights"):
        if getattr(config.schedule, name) not in (0, "none"):
            key = f"schedule.{name}"
            raise OptionError(key, f"{key} is for losses over classes, which task={config.task} does not have.")


def class_weights(config: "RunConfig", dataset: Dataset, indices: np.ndarray, device: torch.device) -> Tensor | None:
    """N / (K n_k) for each of the K classes with images among `indices`, (classes,); None without the option.

    The mean weight of the N images is 1, so that the loss stays as large as the penalty was tuned for.
    """
    if config.schedule.class_weights == "none":
        return None
    counts = np.bincount(dataset.labels[indices], minlength=len(dataset.classes))
    weights = len(indices) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.tensor(weights, dtype=torch.float32, device=device)


def weighted_cross_entropy(weights: Tensor, smoothing: float, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of w_y * CE. A division by the batch's weights would change the loss with micro-batches."""
    each = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    return (weights[labels] * each).mean()


def loader_of(config: "RunConfig", store: Store, labels: np.ndarray, device: torch.device) -> Loader:
    """Batches of decoded images with labels (N,)."""
    schedule = config.schedule
    jitter = schedule.brightness, schedule.contrast, schedule.saturation
    return Loader(
        store,
        labels,
        crop=config.backbone.image_size,
        mirror=config.dataset.mirror,
        mean=config.backbone.mean,
        std=config.backbone.std,
        batch_size=schedule.batch_size,
        seed=config.seed,
        device=device,
        min_crop_area=schedule.min_crop_area if schedule.train_crop == "random_resized" else None,
        pad=schedule.pad,
        ten_crops=schedule.test_crops == 10,
        whole=schedule.test_image == "whole",
        jitter=Jitter(*jitter) if any(jitter) else None,
        share=devices.share(),
    )
