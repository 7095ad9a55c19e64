"""Time and memory of a method on a network, from a few measured steps on random images with random weights.

On a CPU a measured step has fewer images than one of a run, since time is proportional to their number. GPU memory is
estimated from what a step keeps for its backward pass. CPU times are processor seconds, so that two methods can be
compared while other programs come and go.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time

import numpy as np
import torch
from torch import Tensor, nn

from ..common import cores
from ..common.console import log
from ..common.options import Options
from ..common.timing import seconds_in_turn, seconds_of
from ..data import load_dataset
from ..data.dataset import Dataset, make_splits
from ..data.images import UNREADABLE
from ..data.loader import images_at_once
from ..data.store import fit
from ..engine.config import RunConfig, frozen_source, source_shapes
from ..engine.devices import full_precision, reset_peak_memory
from ..engine.loop import TrainState, train_step
from ..engine.optimizers import make_optimizer
from ..engine.tasks import TASKS
from ..methods.base import Batch, Stage
from ..models.sources import SourceNetwork
from ..models.zoo import build_source
from ..records.checked import fingerprint, save_with_checksum

PROBE_BATCH = 4  # images of a step that is measured for its memory or its fixed costs


@dataclass(frozen=True)
class Cost:
    step_seconds: float  # of a training step
    view_seconds: float  # of one test crop
    fit_seconds: tuple[float, float]  # of `fit`: per training image, and a constant
    memory_bytes: int  # GPU memory of a step
    weights_bytes: int  # of the model.safetensors that a run leaves
    waiting: float = 1.0  # elapsed time divided by processor time; above 1 where other programs ran
    fit_images: float = math.inf  # training images at most that count for `fit`

    def seconds_to_fit(self, n_train: int) -> float:
        """Seconds of `fit`, whose result runs with other seeds or alphas share."""
        return self.fit_seconds[0] * min(n_train, self.fit_images) + self.fit_seconds[1]


def decides_cost(config: RunConfig) -> tuple[str, ...]:
    """What decides the cost of a step: the networks, the method without its strengths, and the batch."""
    backbone = {key: value for key, value in vars(config.backbone).items() if key != "weights"}
    batch = config.schedule.batch_size, config.schedule.accumulate
    return repr(_without_strengths(config.reg)), repr((backbone, config.source, batch)), config.precision, config.device


def _without_strengths(options: object) -> object:
    """Options without floating-point numbers: strengths, rates and temperatures cost nothing."""
    if isinstance(options, dict):  # the terms of a sum
        return {name: _without_strengths(term) for name, term in options.items()}
    if isinstance(options, Options):
        return {name: _without_strengths(v) for name, v in vars(options).items() if not isinstance(v, float)}
    return options


def measure(config: RunConfig, stages: Sequence[Stage], num_classes: int, device: torch.device) -> Cost:
    """Times a few steps on random images with random weights, which cost as much as any others.

    The steps are those of the method's first stage. A step of a later stage costs about the same.
    """
    stage, method = stages[0], stages[0].method
    log.info(f"measuring {config.backbone.name}, {config.reg.name} ...")
    began, worked = perf_counter(), thread_time()
    accumulate = config.schedule.accumulate
    backbone, batch = config.backbone.replace(weights="none"), config.schedule.batch_size // accumulate
    source = build_source(backbone, 0, tapped=method.needs.taps)
    source = source.to(device).to(memory_format=torch.channels_last).freeze()
    target = source.with_new_head(num_classes, 0).requires_grad_(True).train(not method.needs.frozen_backbone)
    previous = target.copy() if len(stages) > 1 else None  # a stage's network is kept through the next stage

    task = TASKS[config.task]
    example = partial(task.example, config, classes=num_classes, device=device)
    fit_seconds = (0.0, 0.0)
    for part in method.parts_to_fit():
        fitted, per_image, beside = part.estimate_fit(source, example(PROBE_BATCH)[0], num_classes)
        part.load_fitted(fitted)
        fit_seconds = fit_seconds[0] + per_image, fit_seconds[1] + beside
    reset_peak_memory(device)
    shapes = source.map_shapes(batch, backbone.image_size, training=not method.needs.frozen_backbone)
    others = random_sources(config, method.needs.taps) or None
    method.setup(target, shapes, source_shapes(config, method, source, others, shapes))
    method.to(device)
    optimizer = make_optimizer(target, method, config.optimizer, config.schedule)
    maps = frozen_source(config, stage, source, others, None, device)
    state = TrainState(target, maps, optimizer, config.precision, backbone.aux_weight, loss=task.loss(config))

    def step(count: int) -> Callable[[], object]:
        (images, labels), *views = (example(count) for _ in range(method.needs.views))
        made = Batch(images, labels, tuple(view for view, _ in views))
        return lambda: train_step(state, method, made)

    kept = {}
    for count in (PROBE_BATCH // 2, PROBE_BATCH):  # also warms up
        saved = _Saved()
        with saved:
            step(count)()
        kept[count] = saved.bytes
    step_seconds = accumulate * (seconds_of(step(batch), device) if device.type == "cuda" else _on_a_cpu(step, batch))
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        per_image = (kept[PROBE_BATCH] - kept[PROBE_BATCH // 2]) / (PROBE_BATCH - PROBE_BATCH // 2)
        gradient_and_momentum = 2 * sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        networks = [network for network in (source, previous, target, maps, method) if network is not None]
        weights = sum(v.nbytes for network in networks for v in (*network.parameters(), *network.buffers()))
        memory = int(kept[PROBE_BATCH] + per_image * (batch - PROBE_BATCH)) + weights + gradient_and_momentum
    target.eval()
    images, labels = example(images_at_once(device, (config.backbone.image_size,) * 2))
    with torch.inference_mode(), full_precision(device):
        view_seconds = seconds_of(lambda: target(images), device) / len(labels)
    weights_bytes = sum(v.nbytes for v in target.weights().values())
    waiting = max(1.0, (perf_counter() - began) / (thread_time() - worked)) if device.type == "cpu" else 1.0
    fit_images = max((part.most_fit_images for part in method.parts_to_fit()), default=math.inf)
    return Cost(step_seconds, view_seconds, fit_seconds, memory, weights_bytes, waiting, fit_images)


def _on_a_cpu(step: Callable[[int], Callable[[], object]], batch: int) -> float:
    """Seconds for `batch` images, from alternating steps of a few images and of as many as take about a second.

    The difference is the time of the images. The rest, such as the optimizer's time, does not depend on their number.
    """
    cpu, few = torch.device("cpu"), PROBE_BATCH
    once = seconds_of(step(few), cpu, at_least=0.0)
    more = min(batch, max(2 * few, round(few / once)))
    few_seconds, more_seconds = seconds_in_turn([step(few), step(more)], cpu)
    if more >= batch:
        return more_seconds
    per_image = max(0.0, more_seconds - few_seconds) / (more - few)
    return more_seconds + per_image * (batch - more)


def seconds_beside_steps(config: RunConfig) -> float:
    """The time of a run outside of its steps: it lists the images, builds its networks and writes the trained one."""
    start = perf_counter()
    dataset = load_dataset(config.dataset.replace(download=False), Path(config.cache_dir))
    make_splits(dataset, config.dataset, config.split, config.seed)
    source = build_source(config.backbone.replace(weights="none"), 0, tapped=True)
    fingerprint(source.weights())
    weights = source.with_new_head(len(dataset.classes), 0).cpu_weights()
    fingerprint(weights)
    save_with_checksum(weights)
    return perf_counter() - start


def seconds_of_decoding(dataset: Dataset, size: int, aspect: str) -> float:
    """Seconds per image, from a few images of the whole data set that all cores decode."""

    def decode(index: int) -> None:
        with suppress(UNREADABLE):  # the first run names the file
            fit(dataset.load(index), size, aspect)

    few = np.unique(np.linspace(0, len(dataset.labels) - 1, 8 * PROBE_BATCH).round().astype(int)).tolist()
    start = perf_counter()
    with ThreadPoolExecutor(cores.USABLE) as pool:  # above four cores, processes build the store
        list(pool.map(decode, few))
    return (perf_counter() - start) / len(few)


def random_sources(config: RunConfig, tapped: bool) -> list[SourceNetwork]:
    """The networks of `config.source` with random weights, so that no weights have to be here."""
    random = [build_source(one.backbone.replace(weights="none"), 0, tapped).freeze() for one in config.source or ()]
    named = zip(config.source or (), random, strict=True)
    return [SourceNetwork(one.name, one.backbone, network, fingerprint="") for one, network in named]


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass, without parameters."""

    def __init__(self) -> None:
        self.bytes = 0
        self.seen: set[int] = set()
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
