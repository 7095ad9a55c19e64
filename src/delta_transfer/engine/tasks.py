"""Tasks: what a run reads in a batch, what it minimises, and what it measures. All else is the same for every task.

A task is one object. The loop, the methods and the evaluation ask it and never its name.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.console import Display, log
from ..common.options import OptionError, Options, option
from ..data.dataset import Dataset, Splits
from ..data.examination import constant_images
from ..data.jitter import Jitter
from ..data.loader import BatchSource, Loader
from ..data.store import Store, open_store, store_bytes, store_path
from ..methods.base import SampleLoss
from ..models import ArcFaceLoss, CosineHead, Network
from ..records.arrays import PREDICTIONS, SIMILARITIES
from . import devices
from .evaluation import Line, correct_labels, evaluate, evaluate_pairs
from .loop import Loss

if TYPE_CHECKING:
    from .config import RunConfig


@dataclass
class ArcFaceConfig(Options):
    """The loss of task=verification, with its published values."""

    key: ClassVar[str] = "arcface"

    scale: float = option(64.0, "factor on the cosines", above=0)
    margin: float = option(0.5, "margin between classes, in radians", at_least=0, below=math.pi)


class Classification:
    """One label of K classes for each image. Its measure is the top-1 accuracy. Other tasks change what differs."""

    name = "classification"
    inputs = "images"  # what one is called in messages
    chosen_by = "top1"  # the metric by which a choice on validation data is made
    one_label = True  # each input has one label of K classes
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
        with devices.rank0_first(), Display(title, len(dataset.labels), "image") as display:
            store = open_store(dataset, config.backbone.resize, config.resizing, Path(config.cache_dir), display.update)
        if empty := store.constant().tolist():
            log.info(f"{dataset.name}: {constant_images([dataset.names[index] for index in empty])}")
        return loader_of(config, store, dataset.labels, device)

    def stores_to_build(self, config: "RunConfig", dataset: Dataset | None) -> dict[Any, int]:
        """What a run would decode and keep, in bytes; without the data set as many images as its publisher counts."""
        size, aspect = config.backbone.resize, config.resizing
        if dataset is None:
            official = config.dataset.official
            assert official is not None, "a plan knows the size of a data set that is not here"
            return {(config.dataset.name, size, aspect): store_bytes(official.train + official.test, size, aspect)}
        path = store_path(dataset, size, aspect, Path(config.cache_dir))
        return {} if path.exists() else {path: store_bytes(len(dataset.labels), size, aspect)}

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
        """Makes the target's head from its input's features and the number of classes; None: as the network does."""
        return None

    def loss(self, config: "RunConfig", weights: Tensor | None = None) -> Loss:
        """What the target is trained on, beside the method's penalty. `weights`: of the classes (K,)."""
        smoothing = config.schedule.label_smoothing
        if weights is not None:
            return partial(weighted_cross_entropy, weights, smoothing)
        return partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else F.cross_entropy

    # --- Metrics ---

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How many inputs of a training batch are right, a scalar."""
        return correct_labels(logits, labels)

    def measure(
        self, network: Network, loader: BatchSource, dataset: Dataset, split: str, indices: np.ndarray
    ) -> dict[str, Any]:
        """Metrics (floats) and arrays of a split, val or test."""
        return evaluate(network, loader, indices)

    def score(self, network: Network, loader: BatchSource, dataset: Dataset, indices: np.ndarray) -> float:
        """What is chosen by on validation data, in percent."""
        found: float = self.measure(network, loader, dataset, "val", indices)[self.chosen_by]
        return found


class Verification(Classification):
    """Classes to train on, with ArcFace's loss, and pairs of images of other classes to test on."""

    name = "verification"
    outputs = ("pairs", SIMILARITIES)

    def check(self, config: "RunConfig") -> None:
        self.check_inputs(config)
        refuse_options_of_classes(config)

    def head(self, config: "RunConfig") -> Callable[[int, int], nn.Linear]:
        return partial(CosineHead, scale=config.arcface.scale)

    def loss(self, config: "RunConfig", weights: Tensor | None = None) -> Loss:
        return ArcFaceLoss(**vars(config.arcface))

    def measure(
        self, network: Network, loader: BatchSource, dataset: Dataset, split: str, indices: np.ndarray
    ) -> dict[str, Any]:
        if split == "test" and dataset.pairs is not None:
            return evaluate_pairs(network, loader, indices, dataset.pairs)
        return super().measure(network, loader, dataset, split, indices)


TASKS: dict[str, Classification] = {task.name: task for task in (Classification(), Verification())}


Averaged = Callable[[Network], AbstractContextManager[None]]


class Evaluator:
    """Measures a target on validation and test images. Nothing is selected: the last measurement is what counts."""

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
    """Mean over the batch of w_y * CE: to divide by the batch's weights would make micro-batches another loss."""
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
