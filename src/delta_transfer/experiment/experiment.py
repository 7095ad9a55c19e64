"""One run: build, train, record."""

import io
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from ..common.console import Display, log, shorten_list
from ..common.errors import RunFailed, UserError
from ..common.hardware import device_name, peak_memory, versions
from ..common.options import require
from ..config import RunConfig, ScheduleConfig
from ..data import load_dataset
from ..data.dataset import Counts, Dataset, Splits, expected_counts, make_splits
from ..data.loader import Loader
from ..data.store import Store, open_store
from ..engine import processes as distributed
from ..engine.devices import set_up
from ..engine.live import require_live_view
from ..engine.loop import NotFinite
from ..methods import build_regularizer
from ..models.zoo import build_source
from ..records.cards import in_words, make_card, metadata_of
from ..records.checked import fingerprint, save_with_checksum
from ..records.identity import run_id, run_identity
from ..records.locks import InUse
from ..records.run_directory import CLASSES, SCHEMA, RunDirectory, git_commit, timestamp
from .failures import explain
from .sources import Loaded, check_sources, load_sources
from .stages import StageRunner, cpu_weights


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    summary: dict[str, Any]
    skipped: bool  # it was finished before

    def __str__(self) -> str:
        names = {"val_top1": "val top-1", "test_top1": "test top-1", "test_pair_accuracy": "test pairs"}
        found = [(name, self.summary.get(key)) for key, name in names.items()]
        return ", ".join(f"{name} {value:.1f} %" for name, value in found if value is not None)


def run(config: RunConfig, overrides: Sequence[str] = ()) -> RunResult:
    """Carry out the run that `config` describes, or find it finished.

    `overrides`: what Hydra composed `config` from, for the record.

    Raises UserError, InUse and OSError before there is a run, or where the same command can go on with it; whatever
    else ends a run is recorded in its summary, and raised.
    """
    device = set_up(config)
    require_live_view(config.logging)
    stages = build_regularizer(config.reg).stages()
    needs_taps = any(stage.regularizer.needs_taps for stage in stages)
    require(
        bool(config.backbone.taps) or not needs_taps,
        f"reg={config.reg.name} compares feature maps, but backbone.taps is empty.",
    )
    check_sources(config, stages)
    shares = distributed.processes() * config.schedule.accumulate
    for stage in stages:
        stage.regularizer.parts = shares
    require_shares(config.schedule, shares)
    with distributed.rank0_first():  # either may download
        dataset = load_dataset(config.dataset, Path(config.cache_dir))
        source = build_source(config.backbone, config.seed, tapped=needs_taps)
        sources = load_sources(config, tapped=needs_taps)
        Path(config.cache_dir).mkdir(parents=True, exist_ok=True)
        dataset.fingerprint  # noqa: B018 - reads all images, and remembers for the other processes and runs
    parts = make_splits(dataset, config.dataset, config.split)
    config.schedule = config.schedule.fitted_to(parts.for_training)
    require_shares(config.schedule, shares)
    weights = fingerprint(source.weights())
    name = name_of(config, dataset.fingerprint, weights, sources)
    runs = Path(config.results_dir) / "runs"
    directory = RunDirectory(runs / name, writes=distributed.rank() == 0)
    before = distributed.broadcast_from_rank0(
        lambda: directory.summary() or older_record(runs, config, dataset, weights)
    )
    if (ended := ended_before(name, before, config.retry_failed)) is not None:
        return ended
    trains_backbone = any(not stage.regularizer.freezes_backbone for stage in stages)
    batch = config.schedule.batch_size // shares
    shapes = source.map_shapes(batch, config.backbone.image_size, training=trains_backbone)
    say_if_incomplete(config, dataset)
    say_what_it_trains(name, config, dataset, parts)
    say_what_accumulation_changes(config.schedule)
    for other in sources or ():  # what does not fit is found here, and is no failed run
        other.network.map_shapes(1, config.backbone.image_size, training=False)
    loader = make_loader(config, dataset, device)
    with directory:
        meanwhile = distributed.broadcast_from_rank0(directory.summary)
        if meanwhile is not None and meanwhile != before:  # made by another process
            return ended_before(name, meanwhile, retry_failed=False)
        directory.start_anew(OmegaConf.to_yaml(OmegaConf.structured(config)))
        summary = describe_run(config, name, dataset, parts, weights, device) | {
            "overrides": list(overrides),
        }
        if sources is not None:
            summary["sources"] = [other.record for other in sources]
        training = StageRunner(config, stages, source, sources, shapes, dataset, parts, weights, loader, directory)
        summary["iterations"] = training.iterations
        if len(stages) > 1:
            log.info(f"{name}: {len(stages)} stages of {training.length:,} iterations")
        try:
            results = training.carry_out()
            test_outputs = results.pop("test_outputs")
            summary |= results | training.so_far() | {"peak_memory_bytes": peak_memory(device), "finished": timestamp()}
            write_outputs(directory, training, test_outputs, parts, summary)
            directory.write_summary(summary)
        except (OSError, InUse):  # nothing is wrong with the run: what it has done is kept
            raise
        except Exception as error:
            # Of several processes one may fail alone, or because another was killed: only what all see is recorded.
            if distributed.processes() > 1 and not isinstance(error, NotFinite):
                raise
            failure, message = explain(error, config, training.learner, training.regularizer, loader, parts.train)
            if failure is not None:
                with distributed.rank0_first():  # it has written before another ends, and with it all
                    summary |= training.so_far() | {"error": message, "failure": failure, "finished": timestamp()}
                    directory.write_summary(summary)
                    if failure in ("diverged", "input"):  # which going on would not mend
                        directory.remove_checkpoint()
            if failure == "program":  # where in it is what helps
                raise
            if failure is None:
                raise UserError(f"{name}: {message}") from error
            raise RunFailed(f"{name}: {message}", summary) from error
        directory.remove_checkpoint()
        ended = RunResult(summary, skipped=False)
        log.info(f"{name}: {ended}, {summary['train_seconds']:.0f} s")
        return ended


def require_shares(schedule: ScheduleConfig, shares: int) -> None:
    require(
        schedule.batch_size % shares == 0,
        f"schedule.batch_size={schedule.batch_size} cannot be divided by {distributed.processes()} processes"
        + (f" and schedule.accumulate={schedule.accumulate}." if schedule.accumulate > 1 else "."),
    )


def older_record(runs: Path, config: RunConfig, dataset: Dataset, weights: str) -> dict[str, Any] | None:
    """The record of the same run by a version whose fingerprints did not cover the images' bytes (schema 1)."""
    summary = RunDirectory(runs / name_of(config, dataset.listing, weights)).summary()
    return summary if summary and summary.get("schema") == 1 else None


def ended_before(name: str, summary: dict[str, Any] | None, retry_failed: bool) -> RunResult | None:
    """The run if it is finished; None if it is to be made. Raises RunFailed if it failed and is not to be retried."""
    if summary is None:
        return None
    if summary.get("error") is not None:
        if retry_failed:
            return None
        reason = str(summary["error"]).splitlines()[0]
        raise RunFailed(f"{name} failed before: {reason} retry_failed=true tries it again.", summary)
    ended = RunResult(summary, skipped=True)
    log.info(f"{name}: done, skipped ({ended})")
    return ended


def say_if_incomplete(config: RunConfig, dataset: Dataset) -> None:
    """A subset is a legitimate data set, but nobody should take it for the whole one."""
    counts, official = Counts.of(dataset), expected_counts(config.dataset)
    if counts.against(official) != "ready":
        log.info(
            f"{dataset.name}: {counts.classes:,} classes, {counts.train:,} training and {counts.test:,} test images; "
            f"officially {official.classes:,}, {official.train:,}, {official.test:,}"
        )


def say_what_it_trains(name: str, config: RunConfig, dataset: Dataset, parts: Splits) -> None:
    counts = f"{len(parts.train):,} training" + (f", {len(parts.val):,} validation" if len(parts.val) else "")
    if config.split.folds is None:
        counts += f", {len(parts.test):,} test"
    iterations, side = config.schedule.length(len(parts.train)), config.backbone.image_size
    log.info(
        f"{name}: {counts} images of {len(dataset.classes):,} classes ({shorten_list(dataset.classes, 3)}); "
        f"{iterations:,} iterations of {config.schedule.batch_size} images of {side} x {side} pixels"
    )


def say_what_accumulation_changes(schedule: ScheduleConfig) -> None:
    if schedule.accumulate > 1:
        part = schedule.batch_size // schedule.accumulate
        log.info(
            f"schedule.accumulate={schedule.accumulate}: {part} images at a time, the gradient of all "
            f"{schedule.batch_size}. BatchNorm in training, whose statistics are those of {part} images now, and "
            "dropout make another run of it than the whole batch would; nothing else does."
        )


def weights_name(config: RunConfig, weights: str) -> str:
    """What stands for the source weights: their fingerprint. Random ones differ with the seed, but are one choice."""
    return "none" if config.backbone.weights == "none" else weights


def name_of(config: RunConfig, fingerprint: str, weights: str, sources: list[Loaded] | None = None) -> str:
    """The run's name, in which the hash stands for all that decides its result; `fingerprint`: of the data set."""
    named = None if sources is None else [source.identity for source in sources]
    return run_id(config, run_identity(config, fingerprint, weights_name(config, weights), named))


def make_loader(config: RunConfig, dataset: Dataset, device: torch.device) -> Loader:
    title = f"{dataset.name}: decoding images"
    with distributed.rank0_first(), Display(title, len(dataset.labels), "image") as display:
        store = open_store(
            dataset, config.backbone.resize, config.schedule.aspect, Path(config.cache_dir), display.update
        )
    return loader_of(config, store, dataset.labels, device)


def loader_of(config: RunConfig, store: Store, labels: np.ndarray, device: torch.device) -> Loader:
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
        share=distributed.share(),
    )


def describe_run(
    config: RunConfig, name: str, dataset: Dataset, parts: Splits, weights: str, device: torch.device
) -> dict[str, Any]:
    """What the summary says before anything is measured."""
    return {
        "schema": SCHEMA,
        "run_id": name,
        "config": asdict(config),
        "seed": config.seed,
        "n_train": len(parts.train),
        "n_val": len(parts.val),
        "n_test": len(parts.test),
        "num_classes": len(dataset.classes),
        "dataset_fingerprint": dataset.fingerprint,
        "weights_fingerprint": weights_name(config, weights),
        "selection": "last iteration",
        "versions": versions(),
        "device": device_name(device),
        "processes": distributed.processes(),
        "git_commit": git_commit(Path(__file__).parent),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "test_top1": None,
        "val_top1": None,
        "error": None,
        "failure": None,  # diverged | input | out of memory | program
    }


def write_outputs(
    directory: RunDirectory, training: StageRunner, test: dict[str, Any] | None, parts: Splits, summary: dict[str, Any]
) -> None:
    """Test predictions, for paired tests, class names, the trained weights, and what the method learned beside them.

    With them the model card, where one is asked for.
    """
    if not directory.writes:
        return
    if test is not None:
        buffer = io.BytesIO()
        arrays = {name: value for name, value in test.items() if isinstance(value, np.ndarray)}
        if training.dataset.pairs is None:
            arrays["index"] = parts.test
        np.savez_compressed(buffer, **arrays)
        directory.write("pairs.npz" if training.dataset.pairs else "predictions.npz", buffer.getvalue())
    directory.write(CLASSES, json.dumps(training.dataset.classes).encode())
    if training.modules:
        directory.write("method.safetensors", save_with_checksum(training.modules))
    weights, metadata = cpu_weights(training.learner.target), {}
    if training.config.model_card:
        card = make_card(summary, training.dataset.classes, fingerprint(weights))
        metadata = metadata_of(card)
        directory.write("MODEL_CARD.md", in_words(card).encode())
    directory.write("model.safetensors", save_with_checksum(weights, metadata))
