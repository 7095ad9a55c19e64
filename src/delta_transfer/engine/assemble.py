"""What the configuration of a run describes, built: its loader, its target and the frozen source beside it."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..common.console import Display
from ..data.dataset import Dataset
from ..data.loader import Loader
from ..data.store import Store, open_store
from ..methods.base import MapShapes, OutputShapes, Regularizer, Stage
from ..models import CosineHead, Network, frozen_maps
from ..models.sources import SourceNetwork, frozen, shapes_of
from . import devices
from .config import RunConfig


def open_loader(config: RunConfig, dataset: Dataset, device: torch.device) -> Loader:
    """Batches of `dataset`. Its images are decoded first, unless they were before."""
    title = f"{dataset.name}: decoding images"
    with devices.rank0_first(), Display(title, len(dataset.labels), "image") as display:
        store = open_store(
            dataset, config.backbone.resize, config.schedule.aspect, Path(config.cache_dir), display.update
        )
    return loader_of(config, store, dataset.labels, device)


def loader_of(config: RunConfig, store: Store, labels: np.ndarray, device: torch.device) -> Loader:
    """Batches of decoded images with labels (N,)."""
    schedule = config.schedule
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
        share=devices.share(),
    )


def new_target(source: Network, config: RunConfig, classes: int) -> Network:
    """The network that a run trains, before the first step: the source with a new head."""
    head = partial(CosineHead, scale=config.arcface.scale) if config.task == "verification" else None
    return source.with_new_head(classes, config.seed, head)


def frozen_source(
    config: RunConfig,
    stage: Stage,
    source: Network,
    sources: list[SourceNetwork] | None,
    previous: Network | None,
    device: torch.device,
) -> nn.Module:
    """The frozen network that a stage learns from, at the least cost: its maps, and its logits where they are needed.

    source: the network that the target starts from. sources: networks to learn from in its place. previous: the target
    that the stage before left.
    """
    with_logits, precision = stage.method.needs.source_logits, config.precision
    if previous is not None and stage.alignment_target == "previous":
        return frozen_maps(previous, with_logits, precision)
    if sources is None:
        return frozen_maps(source, with_logits, precision)
    return frozen(sources, config.backbone, with_logits, precision).to(device)


def source_shapes(
    config: RunConfig, method: Regularizer, source: Network, sources: list[SourceNetwork] | None, shapes: MapShapes
) -> OutputShapes | None:
    """Shapes of what the frozen source returns; None if they are those of the target's maps, `shapes`."""
    with_logits = method.needs.source_logits
    if sources is None:
        return {**shapes, "logits": (source.classes,)} if with_logits else None
    return shapes_of(sources, 1, config.backbone.image_size, with_logits)


def seed_of_modules(seed: int, stage: int) -> int:
    """Seed of the modules that a method makes. Those of a later stage do not begin like those of the first."""
    return int(np.random.default_rng((seed, stage)).integers(2**32)) if stage else seed


def cpu_weights(network: Network) -> dict[str, Tensor]:
    """The state dict under the model's own parameter names, for a file."""
    return {key: value.cpu().contiguous() for key, value in network.weights().items()}
