"""Tasks on graphs: one label of K classes; yes/no properties; or measurements. The last two may be partly unknown."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.errors import UserError
from ..common.options import OptionError
from ..data.dataset import Dataset
from ..data.graphs import GraphLoader, Graphs, chains
from ..data.loader import BatchSource
from ..data.packed_graphs import GraphDataset
from ..models import Network
from ..records.arrays import PREDICTIONS, VALUES
from . import devices
from .optimizers import ScheduleConfig
from .tasks import TASKS, Classification, Loss, outputs_of, refuse_options_of_classes

if TYPE_CHECKING:
    from .config import RunConfig

OF_IMAGES = ("aspect", "train_crop", "min_crop_area", "pad", "test_crops")  # options of the schedule


class GraphClassification(Classification):
    """One label of K classes for each graph."""

    name = "graph_classification"
    inputs = "graphs"
    commands: tuple[str, ...] = ("delta-export {run} --format safetensors", "delta-report trust {runs}")

    def check(self, config: "RunConfig") -> None:
        super().check(config)
        usual = {entry.name: entry.default for entry in fields(ScheduleConfig)}
        for name in OF_IMAGES:
            if getattr(config.schedule, name) != usual[name]:
                raise OptionError(
                    f"schedule.{name}", f"schedule.{name} is for images, and {config.dataset.name} has none."
                )

    def open_loader(self, config: "RunConfig", dataset: Dataset, device: torch.device) -> BatchSource:
        assert isinstance(dataset, GraphDataset)
        size = config.schedule.batch_size
        return GraphLoader(dataset, batch_size=size, seed=config.seed, device=device, share=devices.share())

    def stores_to_build(self, config: "RunConfig", dataset: Dataset | None) -> dict[Any, int]:
        return {}

    def example(self, config: "RunConfig", count: int, classes: int, device: torch.device) -> tuple[Graphs, Tensor]:
        return chains(count, device=device), torch.zeros(count, dtype=torch.int64, device=device)

    def in_words(self, config: "RunConfig") -> str:
        return "graphs"


class GraphProperties(GraphClassification):
    """T yes/no properties of each graph: labels (B, T) are 1, -1, or 0 where a property is not known.

    The loss is the binary cross-entropy, a mean over the known labels. The measure is the mean ROC-AUC in percent over
    the properties that have both labels in a split.
    """

    name = "graph_properties"
    chosen_by = "roc_auc"
    measures = ("roc_auc",)
    commands = ("delta-predict {run} MOLECULES.csv", "delta-export {run} --format safetensors")
    one_label = False
    outputs = ("properties", PREDICTIONS)

    def check(self, config: "RunConfig") -> None:
        super().check(config)
        refuse_options_of_classes(config)

    @staticmethod
    def sample_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """mean: over all known labels. none: for each graph the mean over its known labels, (B,); sum: their sum."""
        known = labels != 0
        losses = F.binary_cross_entropy_with_logits(logits, (labels > 0).to(logits), reduction="none") * known
        return mean_over_known(losses, known, reduction)

    def loss(self, config: "RunConfig", weights: Tensor | None = None) -> Loss:
        return self.sample_loss

    def example(self, config: "RunConfig", count: int, classes: int, device: torch.device) -> tuple[Graphs, Tensor]:
        return chains(count, device=device), torch.ones(count, classes, dtype=torch.int64, device=device)

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor | None:
        """The sum over graphs of the fraction of its known labels that are right."""
        known = labels != 0
        right = ((logits > 0) == (labels > 0)) & known
        return (right.sum(dim=1) / known.sum(dim=1).clamp(min=1)).sum()

    def answers(self, logits: Tensor, record: Mapping[str, Any]) -> np.ndarray:
        """The probability of yes."""
        found: np.ndarray = logits.double().sigmoid().numpy()
        return found

    def measure(
        self, network: Network, loader: BatchSource, dataset: Dataset, split: str, indices: np.ndarray
    ) -> dict[str, Any]:
        logits, labels = outputs_of(network, loader, indices, "logits")
        scores = {
            name: roc_auc(column.numpy(), wanted.numpy())
            for name, column, wanted in zip(dataset.classes, logits.T, labels.T, strict=True)
        }
        found = [score for score in scores.values() if score is not None]
        if not found:
            raise UserError(
                f"{dataset.name}: no property has both labels in the {split} split, so that none has a score."
            )
        return {
            "logits": logits.numpy(),
            "labels": labels.numpy(),
            "index": indices,
            "roc_auc": 100 * sum(found) / len(found),
            "scored_properties": float(len(found)),
            "loss": self.sample_loss(logits, labels).item(),
        }


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """The area under the ROC curve, from 0 to 1: how often a yes (1) scores higher than a no (-1); ties count half.

    Labels of 0 are left out. None if there is no yes or no no. It is Mann and Whitney's statistic U over the number of
    pairs.
    """
    yes, no = scores[labels > 0], np.sort(scores[labels < 0])
    if not len(yes) or not len(no):
        return None
    lower_or_equal, lower = (np.searchsorted(no, yes, side).sum() for side in ("right", "left"))
    return float((lower + lower_or_equal) / (2 * len(yes) * len(no)))


class GraphRegression(GraphProperties):
    """T measurements of each graph: labels (B, T), NaN where one is not known.

    The network sees standardised labels, (y - mean) / std with mean and standard deviation (of the population) of the
    known labels of the training split; the record keeps both (`label_scale`). The loss is the squared error, a mean
    over the known labels. The measure is the root of the mean squared error in the labels' own unit, a mean over the
    properties with known labels in a split.
    """

    name = "graph_regression"
    chosen_by = "rmse"
    measures = ("rmse",)
    loss_name = "squared_error"
    outputs = ("values", VALUES)

    def open_loader(self, config: "RunConfig", dataset: Dataset, device: torch.device) -> BatchSource:
        assert isinstance(dataset, GraphDataset)
        mean, std = self._scale(dataset)
        standardised = ((dataset.labels - mean) / std).astype(np.float32)
        return super().open_loader(config, replace(dataset, labels=standardised), device)

    @staticmethod
    def _scale(dataset: Dataset) -> np.ndarray:
        assert isinstance(dataset, GraphDataset) and dataset.scale is not None, "measured_molecules gives it"
        return dataset.scale

    def of_labels(self, dataset: Dataset) -> dict[str, Any]:
        mean, std = self._scale(dataset).tolist()
        return {"label_scale": {"mean": mean, "std": std}}

    @staticmethod
    def sample_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """mean: over all known labels. none: for each graph the mean over its known labels, (B,); sum: their sum."""
        known = labels.isfinite()
        return mean_over_known((logits - labels.nan_to_num()).square() * known, known, reduction)

    def example(self, config: "RunConfig", count: int, classes: int, device: torch.device) -> tuple[Graphs, Tensor]:
        return chains(count, device=device), torch.ones(count, classes, device=device)

    def correct(self, logits: Tensor, labels: Tensor) -> None:
        return None

    def answers(self, logits: Tensor, record: Mapping[str, Any]) -> np.ndarray:
        """Values in the labels' unit."""
        mean, std = (np.array(record["label_scale"][name]) for name in ("mean", "std"))
        found: np.ndarray = mean + std * logits.double().numpy()
        return found

    def measure(
        self, network: Network, loader: BatchSource, dataset: Dataset, split: str, indices: np.ndarray
    ) -> dict[str, Any]:
        logits, labels = outputs_of(network, loader, indices, "logits")
        predicted, wanted = self.answers(logits, self.of_labels(dataset)), dataset.labels[indices]
        known = np.isfinite(wanted)
        if not known.any():
            raise UserError(f"{dataset.name}: no label is known in the {split} split, so that there is no error.")
        squares = np.where(known, predicted - wanted, 0.0) ** 2
        errors = np.sqrt(squares.sum(axis=0)[known.any(axis=0)] / known.sum(axis=0)[known.any(axis=0)])
        return {
            "predicted": predicted,
            "labels": wanted,
            "index": indices,
            "rmse": float(errors.mean()),
            "scored_properties": float(len(errors)),
            "loss": self.sample_loss(logits, labels).item(),
        }


def mean_over_known(losses: Tensor, known: Tensor, reduction: str) -> Tensor:
    """The mean of losses (B, T), which are 0 where a label is not known, over all known labels or for each graph."""
    if reduction == "mean":
        return losses.sum() / known.sum().clamp(min=1)
    each = losses.sum(dim=1) / known.sum(dim=1).clamp(min=1)
    return each.sum() if reduction == "sum" else each


TASKS |= {task.name: task for task in (GraphClassification(), GraphProperties(), GraphRegression())}
