"""What a run leaves: its name, its record, and the files beside it."""

import io
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.console import log, shorten_list
from ..common.errors import RunFailed
from ..common.hardware import device_name, versions
from ..data.dataset import Counts, Dataset, Splits, expected_counts
from ..data.registry import READERS
from ..engine import devices
from ..engine.assemble import cpu_weights
from ..engine.config import RunConfig
from ..methods import title_of
from ..models import Network
from ..models.sources import SourceNetwork
from ..records.cards import in_words, make_card, metadata_of
from ..records.checked import fingerprint, save_with_checksum
from ..records.identity import run_id, run_identity
from ..records.run_directory import CLASSES, SCHEMA, RunDirectory, git_commit, timestamp  # noqa: F401


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    summary: dict[str, Any]
    skipped: bool  # it was finished before

    def __str__(self) -> str:
        names = {"val_top1": "val top-1", "test_top1": "test top-1", "test_pair_accuracy": "test pairs"}
        found = [(name, self.summary.get(key)) for key, name in names.items()]
        return ", ".join(f"{name} {value:.1f} %" for name, value in found if value is not None)


def weights_name(config: RunConfig, weights: str) -> str:
    """What stands for the source weights in an identity: their fingerprint.

    Random weights differ with the seed, but are one choice.
    """
    return "none" if config.backbone.weights == "none" else weights


def name_of(
    config: RunConfig, data: str, weights: str, sources: list[SourceNetwork] | None = None
) -> tuple[str, dict[str, Any]]:
    """The run's name and identity. data, weights: fingerprints of the data set and of the source's weights."""
    identities = None if sources is None else [source.identity for source in sources]
    identity = run_identity(config, data, weights_name(config, weights), identities)
    return run_id(config.dataset.name, config.backbone.name, config.reg.name, config.seed, identity), identity


def finished_before(name: str, summary: dict[str, Any] | None, retry_failed: bool) -> RunResult | None:
    """The run if it is finished, None if it is to be made. Raises RunFailed if it failed and is not to be retried."""
    if summary is None:
        return None
    if summary.get("error") is not None:
        if retry_failed:
            return None
        reason = str(summary["error"]).splitlines()[0]
        raise RunFailed(f"{name} failed before: {reason} retry_failed=true tries it again.", summary)
    result = RunResult(summary, skipped=True)
    log.info(f"{name}: done, skipped ({result})")
    return result


def describe_aloud(name: str, config: RunConfig, dataset: Dataset, splits: Splits) -> None:
    """Says what the run trains, and what makes it another run than a person may expect."""
    counts, official = Counts.of(dataset), expected_counts(config.dataset)
    if official is not None and counts.against(official) != "ready":
        log.info(
            f"{dataset.name}: {counts.classes:,} classes, {counts.train:,} training and {counts.test:,} test images; "
            f"officially {official.classes:,}, {official.train:,}, {official.test:,}"
        )
    schedule, side = config.schedule, config.backbone.image_size
    images = f"{len(splits.train):,} training"
    images += f", {len(splits.val):,} validation" if len(splits.val) else ""
    images += f", {len(splits.test):,} test" if config.split.measures_test else ""
    log.info(
        f"{name}: {images} images of {len(dataset.classes):,} classes ({shorten_list(dataset.classes, 3)}); "
        f"{schedule.length(len(splits.train)):,} iterations of {schedule.batch_size} images of {side} x {side} pixels"
    )
    if schedule.accumulate > 1:
        count = schedule.batch_size // schedule.accumulate
        log.info(
            f"schedule.accumulate={schedule.accumulate}: a micro-batch has {count} images, and a step takes the "
            f"gradient of all {schedule.batch_size}. BatchNorm in training takes its statistics from the {count} "
            "images, and dropout draws anew for each micro-batch; nothing else differs from a run with whole batches."
        )


def describe(
    config: RunConfig,
    name: str,
    identity: dict[str, Any],
    dataset: Dataset,
    splits: Splits,
    weights: str,
    sources: list[SourceNetwork] | None,
    device: torch.device,
) -> dict[str, Any]:
    """What the record says before anything is measured."""
    described = {
        "schema": SCHEMA,
        "run_id": name,
        "identity": identity,
        "titles": {
            "method": title_of(config.reg),
            "dataset": config.dataset.publication(READERS[config.dataset.reader].thing.publication).title,
        },
        "config": asdict(config),
        "seed": config.seed,
        "n_train": len(splits.train),
        "n_val": len(splits.val),
        "n_test": len(splits.test),
        "num_classes": len(dataset.classes),
        "dataset_fingerprint": dataset.fingerprint,
        "weights_fingerprint": weights_name(config, weights),
        "selection": "last iteration",
        "versions": versions(),
        "device": device_name(device),
        "processes": devices.processes(),
        "git_commit": git_commit(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "fit": {},
        "test_top1": None,
        "val_top1": None,
        "error": None,
        "failure": None,  # diverged | input | out of memory | program
    }
    return described if sources is None else described | {"sources": [source.record for source in sources]}


def write_outputs(
    config: RunConfig,
    directory: RunDirectory,
    target: Network,
    modules: dict[str, Tensor],
    dataset: Dataset,
    splits: Splits,
    test: dict[str, Any] | None,
    summary: dict[str, Any],
) -> None:
    """Test predictions, class names, the trained weights, and what the method learned; a model card on request."""
    if not directory.writes:
        return
    if test is not None:
        arrays = {name: value for name, value in test.items() if isinstance(value, np.ndarray)}
        if dataset.pairs is None:
            arrays["index"] = splits.test
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        directory.write("pairs.npz" if dataset.pairs else "predictions.npz", buffer.getvalue())
    directory.write(CLASSES, json.dumps(dataset.classes).encode())
    if modules:
        directory.write("method.safetensors", save_with_checksum(modules))
    weights, metadata = cpu_weights(target), {}
    if config.model_card:
        card = make_card(summary, dataset.classes, fingerprint(weights))
        metadata = metadata_of(card)
        directory.write("MODEL_CARD.md", in_words(card).encode())
    directory.write("model.safetensors", save_with_checksum(weights, metadata))
