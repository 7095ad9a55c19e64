"""What a run or a whole sweep needs and costs, without carrying it out: `dry_run=true`.

Times come from a few measured steps on synthetic images. On a CPU fewer images go into a step than in the run (time is
proportional to them there), and GPU memory is estimated from what a step keeps for its backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from .config import DatasetConfig, RunConfig
from .console import say
from .data import load_dataset
from .data.dataset import Dataset, Parts, split_parts
from .data.store import store_bytes, store_path
from .embedded import trained_glyphs_weights
from .environment import device_name, pick_device, pick_precision, reset_peak_memory, seconds_of
from .errors import UserError
from .models import frozen_maps
from .models.zoo import build_source, fingerprint, not_downloaded
from .records import RunDirectory
from .regularizers import Regularizer, build_regularizer
from .reporting.comparison import duration
from .run import name_of
from .training import Learner, make_optimizer

FEW = 4  # images of a step in which something is only counted


@dataclass(frozen=True)
class Cost:
    step_seconds: float  # of a training step
    view_seconds: float  # of one test crop
    fit_seconds: tuple[float, float]  # of what is computed before training: per training image, and beside that
    memory_bytes: int  # GPU memory of a step
    weights_bytes: int  # of the model.safetensors that a run leaves


@dataclass
class Job:
    config: RunConfig
    state: str  # finished | interrupted | failed | missing
    n_train: int
    n_test: int
    cost: Cost

    @property
    def seconds(self) -> float:
        """Training and evaluation; without what is computed once for several runs."""
        schedule = self.config.schedule
        iterations = schedule.length(self.n_train)
        evaluations = 1 + ((iterations - 1) // schedule.eval_every if schedule.eval_every else 0)
        views = self.n_test * schedule.test_crops * evaluations
        return iterations * self.cost.step_seconds + views * self.cost.view_seconds


@dataclass
class Plan:
    """The jobs of a sweep. What they share (data sets, networks, measurements) is looked at once."""

    jobs: list[Job] = field(default_factory=list)
    not_ready: dict[str, str] = field(default_factory=dict)  # what is missing -> why
    stores: dict[Path, int] = field(default_factory=dict)  # image stores that will be built, bytes
    fits: dict[str, float] = field(default_factory=dict)  # seconds of computations that several runs share
    _known: dict[tuple, Any] = field(default_factory=dict)

    def add(self, config: RunConfig) -> None:
        device = pick_device(config.device)
        config.precision = pick_precision(config.precision, device)
        regularizer = build_regularizer(config.reg)
        dataset = self._dataset(config.dataset)
        parts = split_parts(dataset, config.dataset, config.split) if dataset else None
        if config.backbone.weights == "glyphs":
            config.backbone.weights = trained_glyphs_weights(config) or "glyphs"
        weights = self._weights(config)
        state = self._state(config, dataset, weights)
        n_train, n_test = sizes(config, parts)
        classes = len(dataset.classes) if dataset else _official(config.dataset).classes
        cost = self._once(("cost", *_decides_cost(config)), lambda: measure(config, regularizer, classes, device))
        self.jobs.append(Job(config, state, n_train, n_test, cost))
        if state == "finished":
            return
        if regularizer.fitted_name:
            shared = (config.dataset, config.split, config.backbone, regularizer.fit_options(), regularizer.fit_seed)
            self.fits[repr(shared)] = cost.fit_seconds[0] * n_train + cost.fit_seconds[1]
        if dataset:
            size, aspect = config.backbone.resize, config.schedule.aspect
            path = store_path(dataset, size, aspect, Path(config.cache_dir))
            if not path.exists():
                self.stores[path] = store_bytes(len(dataset.labels), size, aspect)

    def _dataset(self, config: DatasetConfig) -> Dataset | None:
        def load() -> Dataset | None:
            try:
                if config.download:
                    raise UserError("dataset.download=true will fetch it; a dry run does not.")
                return load_dataset(config)
            except UserError as error:
                self.not_ready[f"data set {config.name}"] = str(error)
                return None

        return self._once(("dataset", repr(config)), load)

    def _weights(self, config: RunConfig) -> str | None:
        """Fingerprint of the source weights; None if they are not here."""

        def read() -> str | None:
            try:
                if config.backbone.weights == "glyphs":
                    raise UserError("delta-run trains this network first (the recipe of delta-pretrain)")
                missing = not_downloaded(config.backbone)
                if missing:
                    raise UserError(missing)
                return fingerprint(build_source(config.backbone, config.seed, tapped=False).weights())
            except UserError as error:
                self.not_ready[f"weights of {config.backbone.name}"] = str(error)
                return None

        seed = config.seed if config.backbone.weights == "none" else None
        return self._once(("weights", repr(config.backbone), seed), read)

    def _state(self, config: RunConfig, dataset: Dataset | None, weights: str | None) -> str:
        if dataset is None or weights is None:
            return "missing"
        directory = RunDirectory(Path(config.results_dir) / "runs" / name_of(config, dataset, weights))
        summary = directory.summary()
        if summary is not None:
            return "failed" if summary.get("error") else "finished"
        return "interrupted" if directory.checkpoint_path.exists() else "missing"

    def _once(self, key: tuple, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    # --- what a person sees ---

    def show(self) -> None:
        console = Console(highlight=False, width=None if Console().is_terminal else 120)
        console.print(self.table())
        left = [job for job in self.jobs if job.state != "finished"]
        states = {
            state: sum(job.state == state for job in self.jobs) for state in ("finished", "interrupted", "failed")
        }
        counted = ", ".join(f"{n} {state}" for state, n in states.items() if n or state == "finished")
        say(f"{len(self.jobs)} run{'s' * (len(self.jobs) != 1)}: {counted}, {len(left)} to do")
        if left:
            device = pick_device(left[0].config.device)
            once = sum(self.fits.values())
            shared = f", of which {duration(once)} for what runs share (channel attention)" if once else ""
            total = sum(job.seconds for job in left) + once
            say(f"Time: about {duration(total)} one after the other on {device_name(device)}{shared}")
            kept = sum(job.cost.weights_bytes for job in left)
            stores = sum(self.stores.values())
            say(f"Disk: about {in_bytes(kept)} of trained weights, {in_bytes(stores)} of image stores to build")
            how = "measured" if device.type == "cuda" else f"estimated, {left[0].config.precision}"
            say(f"GPU memory: {how}; the image store goes there too where it leaves half of it free")
        for what, reason in self.not_ready.items():
            say(f"Not ready: {what}: {reason}")

    def table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("dataset, backbone, reg")
        for title in ("runs", "finished", "to do", "each", "GPU memory"):
            table.add_column(title, justify="right")
        groups: dict[tuple[str, str, str], list[Job]] = {}
        for job in self.jobs:
            key = (job.config.dataset.name, job.config.backbone.name, job.config.reg.name)
            groups.setdefault(key, []).append(job)
        for names, jobs in groups.items():
            finished = sum(job.state == "finished" for job in jobs)
            each = [job.seconds for job in jobs]
            span = (
                duration(min(each))
                if max(each) < 1.05 * min(each)
                else f"{duration(min(each))} - {duration(max(each))}"
            )
            memory = max(job.cost.memory_bytes for job in jobs)
            cells = (len(jobs), finished, len(jobs) - finished, span, in_bytes(memory))
            table.add_row(", ".join(names), *map(str, cells))
        return table


def sizes(config: RunConfig, parts: Parts | None) -> tuple[int, int]:
    """Images trained on and images evaluated; from the official counts where the data set is not here."""
    if parts:
        return len(parts.train), len(parts.val) + config.split.measures_test * len(parts.test)
    official = _official(config.dataset)
    drawn = (config.dataset.images_per_class or 0) * official.classes or config.dataset.sample_rate * official.train
    held_out = 1 / config.split.folds if config.split.folds else config.split.val_fraction
    return round(drawn * (1 - held_out)), round(drawn * held_out) + config.split.measures_test * official.test


def _official(config: DatasetConfig):
    if config.official is None:
        raise UserError(f"dataset={config.name} is not here, and nothing says how large it is: set dataset.root.")
    return config.official


def _decides_cost(config: RunConfig) -> tuple[str, ...]:
    """Of a step: the networks, the method but not its strength, the batch."""
    reg = {key: value for key, value in vars(config.reg).items() if key not in ("alpha", "beta", "weight_decay")}
    backbone = {key: value for key, value in vars(config.backbone).items() if key != "weights"}
    return repr(reg), repr(backbone), repr(config.schedule.batch_size), config.precision, config.device


def measure(config: RunConfig, regularizer: Regularizer, num_classes: int, device: torch.device) -> Cost:
    """Times a few steps on random images with random weights, which cost the same as any others."""
    say(f"measuring {config.backbone.name}, {config.reg.name} ...")
    backbone, batch = replace(config.backbone, weights="none"), config.schedule.batch_size
    source = build_source(backbone, 0, tapped=regularizer.needs_taps)
    source = source.to(device, memory_format=torch.channels_last).freeze()
    target = source.with_new_head(num_classes, 0).requires_grad_(True).train(not regularizer.freezes_backbone)

    def random_images(count: int) -> Tensor:
        images = torch.rand(count, 3, backbone.image_size, backbone.image_size, device=device)
        return images.contiguous(memory_format=torch.channels_last)

    fit_seconds = (0.0, 0.0)
    if regularizer.fitted_name:
        fitted, *fit_seconds = regularizer.rehearse(source, random_images(FEW))
        regularizer.load_fitted(fitted)
    reset_peak_memory(device)
    regularizer.to(device).start(target)
    optimizer = make_optimizer(target, regularizer, config.schedule)
    source = frozen_maps(source, regularizer.needs_source_logits) if regularizer.needs_source else None
    learner = Learner(target, source, optimizer, config.precision, backbone.aux_weight)

    def step(count: int) -> Callable[[], object]:
        images, labels = random_images(count), torch.zeros(count, dtype=torch.int64, device=device)
        return lambda: regularizer.update(learner, images, labels)

    kept = {}
    for count in (FEW // 2, FEW):  # also warms up
        saved = _Saved()
        with saved:
            step(count)()
        kept[count] = saved.bytes
    count = batch
    if device.type != "cuda":  # as many images as take about a second
        count = min(batch, max(FEW, round(FEW / seconds_of(step(FEW), device, at_least=0.1))))
    step_seconds = seconds_of(step(count), device) * batch / count
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        per_image = (kept[FEW] - kept[FEW // 2]) / (FEW - FEW // 2)
        gradient_and_momentum = 2 * sum(p.nbytes for p in target.parameters() if p.requires_grad)
        networks = sum(v.nbytes for network in (target, source) if network for v in network.state_dict().values())
        memory = kept[FEW] + per_image * (batch - FEW) + networks + gradient_and_momentum
    target.eval()
    images = random_images(count)
    with torch.inference_mode():
        view_seconds = seconds_of(lambda: learner.forward(images), device) / count
    weights_bytes = sum(v.nbytes for v in target.weights().values())
    return Cost(step_seconds, view_seconds, tuple(fit_seconds), int(memory), weights_bytes)


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that a forward pass keeps for the backward pass, parameters left out."""

    def __init__(self):
        self.bytes, self.seen = 0, set()
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def in_bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
