"""A finished run, rebuilt from its folder: its networks and its images, by the code that made it.

    run = replay(run_folder("results/runs/cub-resnet18-delta-s0-0123abcd"))
    for images in run.images(run.splits.test[:8]):
        maps = run.target(images)          # {"logits": (B, K), each tap: (B, C, h, w)}; run.source likewise

Fingerprints, not paths, tell whether data and source weights are those of the record.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UserError
from ..data import load_dataset
from ..data.dataset import Dataset, Splits, make_splits
from ..data.loader import BatchSource
from ..engine.config import RunConfig, new_target
from ..engine.devices import pick_device
from ..engine.tasks import TASKS
from ..models import Network
from ..models.sources import SourceNetwork, load_sources
from ..models.zoo import build_source
from ..records.checked import fingerprint
from ..records.reading import recorded_sources
from .finished import config_of, not_of_this_run, record_of, trained_weights

CACHE = Path("results/cache")  # delta-run puts image stores there by default


@dataclass(frozen=True)
class Replay:
    """Networks are frozen (evaluation mode, no gradients), channels_last, on `device`."""

    record: dict[str, Any]  # summary.json, with its `folder`
    config: RunConfig
    dataset: Dataset
    splits: Splits
    device: torch.device
    source: Network  # with the head of its weights file, and with backbone.taps for every method

    @property
    def run_id(self) -> str:
        return str(self.record["run_id"])

    @cached_property
    def target(self) -> Network:
        """The fine-tuned network. Raises UserError if model.safetensors is missing or not of this run."""
        weights = trained_weights(self.record)
        network = new_target(self.source, self.config, len(self.dataset.classes))
        try:
            network.traced.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise not_of_this_run(self.record, error) from None
        return network.freeze()

    @cached_property
    def sources(self) -> list[SourceNetwork]:
        """The networks that `source=` named. Raises UserError if they are not here, or not those of the run."""
        found, known = load_sources(self.config.source or [], tapped=True), recorded_sources(self.record)
        if len(found) != len(known):
            raise UserError(f"{self.run_id}: its record describes {len(known)} source networks, not {len(found)}.")
        for source, recorded in zip(found, known, strict=True):
            where = f"weights of source={source.name} ({source.backbone.weights})"
            check({**recorded, "run_id": self.run_id}, "weights_fingerprint", source.fingerprint, where)
            source.network.to(self.device).to(memory_format=torch.channels_last).freeze()
        return found

    @cached_property
    def loader(self) -> BatchSource:
        """The run's loader. It decodes the images if no store of them is there."""
        return TASKS[self.config.task].open_loader(self.config, self.dataset, self.device)

    def images(self, indices: np.ndarray) -> Iterator[Tensor]:
        """Centre crops, normalised, of images of the data set in the order of `indices`: batches (B, 3, H, W)."""
        loader = copy(self.loader)
        loader.ten_crops = False
        for images, _ in loader.test_batches(indices):
            yield images

    def pixels(self, images: Tensor) -> np.ndarray:
        """Normalised images (N, 3, H, W) as pictures (N, H, W, 3) in 0..1."""
        backbone = self.config.backbone
        mean, std = (np.array(values, dtype=np.float32) for values in (backbone.mean, backbone.std))
        return (images.permute(0, 2, 3, 1).cpu().numpy() * std + mean).clip(0, 1)


def replay(folder: Path, *, data_dir: Path | None = None, weights: Path | None = None) -> Replay:
    """The run in `folder`. Its target network is read, and its images are decoded, at their first use.

    Args:
        data_dir: the folder of its data set here, or the one around it. None: as recorded. Embedded data need none.
        weights: the file of the source weights here. None: as recorded.

    Raises UserError if the record is of a failed run or cannot be read, and if data set or source weights are missing
    or are not those of the run.
    """
    record = record_of(folder)
    config = config_of(record)
    if data_dir is not None and config.dataset.root is not None:
        inside = data_dir / Path(config.dataset.root).name
        config.dataset.root = str(inside if inside.is_dir() else data_dir)
    config.dataset.download = False
    if weights is not None:
        config.backbone.weights = str(weights)
    # The run's image store: a relative path may be seen from another folder now, or come from another machine.
    caches = [Path(config.cache_dir), folder.parent.parent / "cache"]
    config.cache_dir = str(next((cache for cache in caches if cache.is_dir()), CACHE))

    device = pick_device("auto")
    with hint("--data-dir DIR"):
        dataset = load_dataset(config.dataset, Path(config.cache_dir))
    where = f"images, labels or split of {config.dataset.root}"
    check(record, "dataset_fingerprint", dataset.fingerprint, where)
    with hint("--weights FILE"):
        source = build_source(config.backbone, config.seed)
    # Random weights differ between seeds, but are one choice.
    actual = "none" if config.backbone.weights == "none" else fingerprint(source.weights())
    check(record, "weights_fingerprint", actual, f"source weights {config.backbone.weights}")
    splits = make_splits(dataset, config.dataset, config.split, config.seed)
    source = source.to(device).to(memory_format=torch.channels_last).freeze()
    return Replay(record, config, dataset, splits, device, source)


def check(record: dict[str, Any], key: str, actual: str, what: str) -> None:
    if record.get(key) != actual:
        raise UserError(
            f"{record['run_id']}: {what} are not those that the run was made with ({key} "
            f"{str(record.get(key))[:8]} in its record, {actual[:8]} here)."
        )


@contextmanager
def hint(option: str) -> Iterator[None]:
    """Adds the option that names the missing place to the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error} For a report: {option}.") from None
