"""The needs and costs of a run or a sweep, without carrying it out: `dry_run=true`."""

import json
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..common.console import duration, log
from ..common.cores import NOTABLE
from ..common.errors import UserError
from ..common.tables import Entry, Table, entries, on_screen
from ..data.dataset import Splits
from ..data.options import Counts, DatasetConfig
from ..engine.config import RunConfig, check_choices
from ..engine.devices import device_name, pick_device
from ..engine.kept import FurtherSets, further_sets
from ..engine.tasks import TASKS
from ..records.run_directory import RunDirectory
from .costs import Cost, decides_cost, measure
from .fitting import describe_fit, fitted_path
from .lookup import Lookup


@dataclass
class Job:
    config: RunConfig
    state: str  # finished | interrupted | failed | missing
    n_train: int
    n_test: int
    cost: Cost
    stages: int = 1  # of the method, each with the whole schedule
    record: dict[str, Any] | None = None  # if the run ended

    @property
    def to_do(self) -> bool:
        return self.state != "finished" and (self.state != "failed" or self.config.retry_failed)

    @property
    def seconds(self) -> float:
        """Training and evaluation, without computations that several runs share; on a CPU processor seconds."""
        schedule = self.config.schedule
        iterations = schedule.length(self.n_train)
        every = schedule.evaluation_interval(self.n_train)
        evaluations = 1 + ((iterations - 1) // every if every else 0)
        crops = (
            schedule.test_crops if self.config.dataset.mirror or schedule.test_crops == 1 else schedule.test_crops // 2
        )
        views = self.n_test * crops * evaluations
        return self.stages * (iterations * self.cost.step_seconds + views * self.cost.view_seconds)


@dataclass
class Plan:
    """The jobs of a sweep. Data sets, networks and measurements that they share are looked at once."""

    jobs: list[Job] = field(default_factory=list)
    runs: int = 0  # that the sweeps so far have, whose jobs are added one by one
    stores: dict[tuple[str, Any], int] = field(default_factory=dict)  # bytes of image stores to build, by cache_dir too
    lengths: dict[tuple[str, int], str] = field(default_factory=dict)  # what schedule.iterations=auto comes to
    fits: dict[Any, float] = field(default_factory=dict)  # seconds of computations that several runs share
    lookup: Lookup = field(default_factory=Lookup)

    @property
    def not_ready(self) -> dict[str, str]:
        """What is missing -> why."""
        return self.lookup.missing

    def name_missing(self, configs: Sequence[RunConfig]) -> None:
        """Logs what these runs need and is not here. It measures nothing."""
        named = len(self.not_ready)
        for config in {repr(config.dataset): config for config in configs}.values():
            with suppress(UserError):  # the run raises it again
                self.lookup.dataset(config)
        for config in {repr(config.backbone): config for config in configs}.values():
            self.lookup.weights(config)
        self.show_missing(named)

    def add(self, config: RunConfig) -> None:
        device = pick_device(config.device)
        stages = config.reg.build().stages()
        check_choices(config, stages)
        method, automatic = stages[0].method, config.schedule.iterations == "auto"
        found = self.lookup.find(config)
        dataset, splits = found.dataset, found.splits
        also, probe = further_sets(config)
        with_images = [
            config.replace(dataset=one) for one in (config.dataset, *also.values(), *([probe] if probe else []))
        ]
        read = [self.lookup.dataset(one) for one in with_images]  # before anything is measured: one may not be here
        if automatic:
            images = splits.for_training if splits else drawn_of_official(config.dataset)
            config.schedule = config.schedule.fitted_to(round(images))
            length = f"{config.schedule.iterations:,} iterations of {config.schedule.batch_size} images"
            self.lengths[config.dataset.name, round(images)] = f"{images:,} training images: {length}"
        state, record = state_of(found.directory)
        if config.evaluate.asked and dataset and None not in read:
            further = FurtherSets(config, dataset, None, self.lookup.datasets)
            if record and state == "finished":
                further.require_in(record, record["run_id"])
        n_train, n_test = sizes(config, splits)
        classes = len(dataset.classes) if dataset else official_counts(config.dataset).classes
        cost = self.lookup.once(("cost", *decides_cost(config)), lambda: measure(config, stages, classes, device))
        self.jobs.append(Job(config, state, n_train, n_test, cost, len(stages), record))
        if not self.jobs[-1].to_do:
            return
        data = splits.fingerprint(dataset) if splits and dataset else ""
        to_fit = {part: describe_fit(config, part, found.weights or "", data) for part in method.parts_to_fit()}
        if not all(fitted_path(part, to, Path(config.cache_dir)).exists() for part, to in to_fit.items()):
            # Without the data set its configuration stands for it.
            shared = (json.dumps([*to_fit.values()]), None if splits else repr((config.dataset, config.split)))
            self.fits[shared] = cost.seconds_to_fit(n_train)
        for one, images_of in zip(with_images, read, strict=True):
            stores = TASKS[config.task].stores_to_build(one, images_of)
            self.stores |= {(config.cache_dir, store): count for store, count in stores.items()}

    @property
    def waiting(self) -> float:
        """Elapsed seconds per processor second, with the other programs that ran during the measurements.

        It is one number for all runs: between two measurements other programs come and go.
        """
        return median([1.0] if not self.jobs else [cost.waiting for cost in {job.cost for job in self.jobs}])

    # --- what a person sees ---

    def show(self, stopped: bool = False) -> None:
        if stopped:
            counted = f"the first {len(self.jobs)} of at least {self.runs} runs"
            log.info(f"Stopped: the plan is incomplete, its table and totals count {counted}")
        sys.stdout.write(on_screen([self.table()], sys.stdout.isatty()))
        left = [job for job in self.jobs if job.to_do]
        states = {
            state: sum(job.state == state for job in self.jobs) for state in ("finished", "interrupted", "failed")
        }
        counted = ", ".join(f"{n} {state}" for state, n in states.items() if n or state == "finished")
        retry = (
            " (retry_failed=true repeats those)" if states["failed"] and not self.jobs[0].config.retry_failed else ""
        )
        log.info(f"{len(self.jobs)} run{'s' * (len(self.jobs) != 1)}: {counted}{retry}, {len(left)} to do")
        for (name, _), words in self.lengths.items():
            log.info(f"{name}, {words} (schedule.iterations=auto)")
        if left:
            self.show_needs(left)
        self.show_missing()

    def show_missing(self, after: int = 0) -> None:
        """Logs what is missing, without the first `after` things, which were logged before."""
        for what, reason in [*self.not_ready.items()][after:]:
            log.info(f"Not ready: {what}: {reason}")

    def show_needs(self, left: list[Job]) -> None:
        """Logs the time, disk and memory that the runs `left` need."""
        device = pick_device(left[0].config.device)
        once, on_folds = sum(self.fits.values()), sum(job.seconds for job in left if job.config.split.folds)
        total = sum(job.seconds for job in left) + once

        def now(seconds: float) -> str:
            return duration(seconds * self.waiting)

        parts = [f"{now(once)} for what runs share (such as channel attention)"] if once else []
        parts += [f"{now(on_folds)} for runs on folds"] if on_folds and self.both_kinds else []
        shared = f", of which {' and '.join(parts)}" if parts else ""
        log.info(
            f"Time: about {now(total)} one after the other on {device_name(device)}{shared}; "
            "without decoding, and without what a run does beside steps and evaluations"
        )
        if once > total / 2:
            log.info(
                f"What runs share takes {100 * once / total:.0f} % of the time: of channel attention, "
                "reg.attention.head_images bounds the probe's training, reg.attention.images the rest"
            )
        if self.waiting >= NOTABLE:
            log.info(f"Other programs are running: without them it takes about {duration(total)}")
        kept = [(job.config.results_dir, job.stages * job.cost.weights_bytes) for job in left]
        stores = [(cache_dir, count) for (cache_dir, _), count in self.stores.items()]
        weights, images = (in_bytes(sum(count for _, count in needed)) for needed in (kept, stores))
        log.info(f"Disk: about {weights} of trained weights, {images} of image stores to build")
        self.compare_with_disk(kept + stores)
        how = "measured" if device.type == "cuda" else f"estimated, {left[0].config.precision}"
        log.info(f"GPU memory: {how}; the image store is kept there too, if it leaves half of it free")

    def compare_with_disk(self, needed: list[tuple[str, int]]) -> None:
        """Notes disks that lack room. needed: bytes that will be written below each folder."""
        disks: dict[int, tuple[Path, int]] = {}
        for name, count in needed:
            folder = next(one for one in (Path(name).absolute(), *Path(name).absolute().parents) if one.is_dir())
            _, before = disks.get(folder.stat().st_dev, (folder, 0))
            disks[folder.stat().st_dev] = folder, before + count
        for folder, count in disks.values():
            if count > (free := shutil.disk_usage(folder).free):
                self.not_ready[f"disk of {folder}"] = (
                    f"{in_bytes(count)} will be written, and {in_bytes(free)} are free: make room, or set cache_dir= "
                    "(image stores) or results_dir= (trained weights) to a folder on another disk"
                )

    @property
    def both_kinds(self) -> bool:
        """Whether there are both runs on folds, for a choice, and final runs."""
        return len({job.config.split.folds is None for job in self.jobs}) > 1

    def table(self) -> Table:
        rows = []
        groups: dict[tuple[str, ...], list[Job]] = {}
        for job in self.jobs:
            key = [job.config.dataset.name, job.config.backbone.name, job.config.reg.name]
            if self.both_kinds:
                key.append(f"on {folds} folds" if (folds := job.config.split.folds) else "final")
            groups.setdefault(tuple(key), []).append(job)
        for names, jobs in groups.items():
            finished = sum(job.state == "finished" for job in jobs)
            alone = [job.seconds for job in jobs]
            memory = max(job.cost.memory_bytes for job in jobs)
            counts = [len(jobs), finished, sum(job.to_do for job in jobs)]
            cells = [span([self.waiting * one for one in alone]), span(alone), Entry(in_bytes(memory), memory)]
            rows.append(entries(", ".join(names), *(Entry(str(count), count) for count in counts), *cells))
        header = ["dataset, backbone, reg", "runs", "finished", "to do", "each", "alone", "GPU memory"]
        table = Table("", header, rows, 1)
        return table if self.waiting >= NOTABLE else table.columns([0, 1, 2, 3, 4, 6])


def span(seconds: list[float]) -> Entry:
    """From the shortest to the longest time."""
    least, most = min(seconds), max(seconds)
    return Entry(duration(least) if most < 1.05 * least else f"{duration(least)} - {duration(most)}", least)


def state_of(directory: RunDirectory | None) -> tuple[str, dict[str, Any] | None]:
    """The state of a run in a word, and its record if it ended. None: it has no name yet."""
    summary = directory.summary() if directory else None
    if summary is not None:
        return "failed" if summary.get("error") else "finished", summary
    return "interrupted" if directory and directory.checkpoint_path.exists() else "missing", None


def sizes(config: RunConfig, splits: Splits | None) -> tuple[int, int]:
    """The numbers of training and evaluated images; from the official counts if the data set is not here."""
    if splits:
        return len(splits.train), len(splits.val) + config.split.measures_test * len(splits.test)
    official, drawn = official_counts(config.dataset), drawn_of_official(config.dataset)
    held_out = 1 / config.split.folds if config.split.folds else config.split.val_fraction
    return round(drawn * (1 - held_out)), round(drawn * held_out) + config.split.measures_test * official.test


def drawn_of_official(config: DatasetConfig) -> float:
    """The number of training images, held-out ones included, of a data set that is not here."""
    official = official_counts(config)
    return (config.images_per_class or 0) * official.classes or config.sample_rate * official.train


def official_counts(config: DatasetConfig) -> Counts:
    """The publisher's counts of a data set that is not here. `Plan` has checked that there are any."""
    assert config.official is not None
    return config.official


def in_bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:.0f} {unit}"
    return f"{count / 2**10:.0f} KiB"
