"""A finished run, rebuilt from its folder: its networks and its images, by the code that made it.

    run = replay(run_folder("results/runs/cub-resnet18-delta-s0-0123abcd"))
    for images in run.images(run.parts.test[:8]):
        maps = run.target(images)          # {"logits": (B, K), each tap: (B, C, h, w)}; run.source likewise

What the record says of data and source weights is checked by their fingerprints, not by their paths.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.errors import UserError
from ..config import RunConfig
from ..data import load_dataset
from ..data.dataset import Dataset, Splits, make_splits
from ..data.loader import Loader
from ..engine.devices import pick_device
from ..experiment.experiment import make_loader, weights_name
from ..experiment.sources import Loaded, load_sources
from ..experiment.stages import new_target
from ..models import Network
from ..models.zoo import build_source
from ..records.checked import fingerprint
from ..reporting.comparison import recorded_sources
from .finished import config_of, not_of_this_run, record_of, trained_weights

CACHE = Path("results/cache")  # where delta-run puts image stores, unless told otherwise


@dataclass(frozen=True)
class Replay:
    """Networks are frozen (evaluation mode, no gradients), channels_last, on `device`."""

    record: dict[str, Any]  # summary.json, with its `folder`
    config: RunConfig
    dataset: Dataset
    parts: Splits
    device: torch.device
    source: Network  # with the head that its weights came with, and backbone.taps whatever the method

    @property
    def run_id(self) -> str:
        return self.record["run_id"]

    @cached_property
    def target(self) -> Network:
        """The fine-tuned network. Raises UserError if the run's folder has no model.safetensors, or another one's."""
        weights = trained_weights(self.record)
        network = new_target(self.source, self.config, len(self.dataset.classes))
        try:
            network.traced.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise not_of_this_run(self.record, error) from None
        return network.freeze()

    @cached_property
    def sources(self) -> list[Loaded]:
        """The networks that `source=` named. Raises UserError if they are not here, or not those of the run."""
        found, known = load_sources(self.config, tapped=True) or [], recorded_sources(self.record)
        if len(found) != len(known):
            raise UserError(f"{self.run_id}: its record describes {len(known)} source networks, not {len(found)}.")
        for source, recorded in zip(found, known, strict=True):
            where = f"weights of source={source.name} ({source.backbone.weights})"
            check({**recorded, "run_id": self.run_id}, "weights_fingerprint", source.fingerprint, where)
            source.network.to(self.device, memory_format=torch.channels_last).freeze()
        return found

    @cached_property
    def loader(self) -> Loader:
        """As the run had it; decodes the images if no store of them is there."""
        return make_loader(self.config, self.dataset, self.device)

    def images(self, indices: np.ndarray) -> Iterator[Tensor]:
        """Centre crops, normalised, of images of the data set in the order of `indices`: batches (B, 3, H, W)."""
        loader = copy(self.loader)
        loader.ten_crops = False
        for images, _ in loader.test_batches(indices):
            yield images


def replay(folder: Path, *, data_dir: Path | None = None, weights: Path | None = None) -> Replay:
    """The run in `folder`. Its target network is read, and its images are decoded, when they are first asked for.

    Args:
        data_dir: where its data set lies here: the data set's own folder, or the one around it. None: where the record
            says. Embedded data need none.
        weights: file of the source weights here. None: where the record says.

    Raises UserError if the record is of a failed run or cannot be read, and if data set or source weights are not there
    or not the ones that the run was made with.
    """
    record = record_of(folder)
    config = config_of(record)
    if data_dir is not None and config.dataset.root is not None:
        inside = data_dir / Path(config.dataset.root).name
        config.dataset.root = str(inside if inside.is_dir() else data_dir)
    config.dataset.download = False
    if weights is not None:
        config.backbone.weights = str(weights)
    # Where the run's image store is: a relative path may be seen from another folder now, or be of another machine.
    caches = [Path(config.cache_dir), folder.parent.parent / "cache"]
    config.cache_dir = str(next((cache for cache in caches if cache.is_dir()), CACHE))

    device = pick_device("auto")
    dataset = told(lambda: load_dataset(config.dataset, Path(config.cache_dir)), "--data-dir DIR")
    found = (
        dataset.listing if record.get("schema", 1) == 1 else dataset.fingerprint
    )  # 1: did not cover the images' bytes
    check(record, "dataset_fingerprint", found, f"images, labels or split of {config.dataset.root}")
    source = told(lambda: build_source(config.backbone, config.seed), "--weights FILE")
    actual = weights_name(config, fingerprint(source.weights()))
    check(record, "weights_fingerprint", actual, f"source weights {config.backbone.weights}")
    parts = make_splits(dataset, config.dataset, config.split)
    source = source.to(device, memory_format=torch.channels_last).freeze()
    return Replay(record, config, dataset, parts, device, source)


def check(record: dict[str, Any], key: str, actual: str, what: str) -> None:
    if record.get(key) != actual:
        raise UserError(
            f"{record['run_id']}: {what} are not those that the run was made with ({key} "
            f"{str(record.get(key))[:8]} in its record, {actual[:8]} here)."
        )


def told(read_it, option: str):
    """The result of `read_it`; where it fails, the message also says which option of this command tells the place."""
    try:
        return read_it()
    except UserError as error:
        raise UserError(f"{error} For a report: {option}.") from None
