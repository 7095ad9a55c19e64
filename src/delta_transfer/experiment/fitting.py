"""What a method computes once before training. The result is kept for the next run that needs exactly the same."""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.console import Display, Report, log
from ..common.options import require
from ..data.dataset import Dataset, Splits
from ..data.loader import BatchSource
from ..engine import devices
from ..engine.config import RunConfig
from ..methods.base import Batches, Regularizer
from ..methods.unfinished import NOTHING_KEPT, State, Unfinished
from ..models import Network
from ..records.checked import load_with_checksum, save_with_checksum
from ..records.checkpoints import read_checkpoint, write_checkpoint
from ..records.files import remove_unfinished, whole_file, write_atomically
from ..records.locks import wait_for_lock
from ..records.run_directory import RunDirectory


def fit_part(
    method: Regularizer,
    source: Network,
    weights: str,
    config: RunConfig,
    dataset: Dataset,
    splits: Splits,
    loader: BatchSource,
    directory: RunDirectory,
) -> None:
    """Fits a method, or a term of a sum, on the training images. weights: fingerprint of the source's weights."""
    fitted_to = describe_fit(config, method, weights, splits.fingerprint(dataset))
    if method.needs.fit_on == "centre crops":
        batches: Batches = loader.centres(splits.train)
    else:
        batches = loader.passes(splits.train, "fit", method.fit_seed, method.fit_batch_size)
    with devices.rank0_first():
        fit_or_reuse(method, source, batches, len(dataset.classes), fitted_to, directory, Path(config.cache_dir))


def fit_or_reuse(
    method: Regularizer,
    source: Network,
    batches: Batches,
    num_classes: int,
    fitted_to: Mapping[str, Any],
    directory: RunDirectory,
    cache_dir: Path,
) -> None:
    """Calls `fit`, unless its result for the same `fitted_to`, in every entry, is kept."""
    metadata = _metadata(fitted_to)
    name = f"{method.needs.fitted}.safetensors"
    shared = fitted_path(method, fitted_to, cache_dir)
    fitted = _read_fitted(directory.path / name, metadata)
    if fitted is None:
        shared.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(shared.with_name(f".{shared.name}.lock"), f"computes {shared.name}"):
            method.unfinished = kept = KeptOnDisk(shared, f"{directory.path.name}: {method.needs.fitted}", source)
            remove_unfinished(shared.parent, shared.name)
            remove_unfinished(shared.parent, kept.path.name)
            fitted = _read_fitted(shared, metadata)
            if fitted is None:
                log.info(f"{directory.path.name}: computing {method.needs.fitted} ...")
                with kept.shown:
                    fitted = {k: v.cpu() for k, v in method.fit(source, batches, num_classes).items()}
                _require_finite(method, fitted)
                write_atomically(shared, save_with_checksum(fitted, metadata))
            kept.path.unlink(missing_ok=True)
            method.unfinished = NOTHING_KEPT
    method.load_fitted(_on_device_of(source, fitted))
    directory.write(name, save_with_checksum(fitted, metadata))


class KeptOnDisk(Unfinished):
    """Keeps the progress of a `fit` in a file beside its result, and logs it."""

    seconds = 60.0  # between two files

    def __init__(self, result: Path, title: str, source: Network):
        self.path, self.title = result.with_suffix(".unfinished"), title
        self.made_with = devices.made_with(next(source.parameters()).device)
        self.state: State = {}
        self.last, self.display, self.shown = time.monotonic(), Display("", 0), ExitStack()

    def load(self) -> State | None:
        found = self.state or read_checkpoint(self.path, self.made_with, lambda state: "done" in state)
        if found and not self.state:
            log.info(f"{self.title}: goes on where it was interrupted")
            self.state = {key: value for key, value in found.items() if key not in ("format", "made_with")}
        return found

    def show(self, what: str, done: int, total: int, within: str = "") -> None:
        title = f"{self.title}: {what.rpartition(', ')[0]}"
        if total and self.display.title != title:
            self.shown.close()
            display = Display(title, total, what.rpartition(", ")[2], quiet_seconds=10, line_seconds=30)
            self.display = self.shown.enter_context(display)
        if total:
            self.display.update(done, Report(within))

    def note(self, what: str, done: int, total: int, state: State) -> None:
        self.show(what, done, total)
        due = time.monotonic() - self.last > self.seconds
        if due or done == total:
            self.state |= state
        if due:
            with whole_file(self.path) as file:
                write_checkpoint(file, self.state, self.made_with)
            self.last = time.monotonic()


def _require_finite(method: Regularizer, fitted: dict[str, Tensor]) -> None:
    key = f"reg.terms.{method.term}" if method.term else "reg"
    options = f"{key}.{method.needs.fitted}" if method.fit_options() else key
    for name, values in fitted.items():
        finite = bool(values.isfinite().all())
        where = f"the source weights and the options of {options}"
        require(finite, f"{method.needs.fitted} of {name} is not finite: look at {where}.")


def fitted_path(method: Regularizer, fitted_to: Mapping[str, Any], cache_dir: Path) -> Path:
    """Where the result of `fit` is kept for other runs."""
    key = sha256(json.dumps(_metadata(fitted_to), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / "fitted" / f"{method.needs.fitted}-{key}.safetensors"


def describe_fit(config: RunConfig, method: Regularizer, weights: str, data: str) -> dict[str, Any]:
    """Everything that decides what `fit` computes. data: fingerprint of data set and splits."""
    backbone, schedule = config.backbone, config.schedule
    return {
        "method": (config.reg if method.term is None else config.reg.terms[method.term]).name,
        "backbone": backbone.name,
        "weights": weights,
        "taps": backbone.taps,
        "data": data,
        "pixels": [backbone.resize, backbone.image_size, backbone.mean, backbone.std, config.dataset.mirror],
        "crops": [config.resizing, schedule.train_crop, schedule.min_crop_area, schedule.pad],
        "batch_size": method.fit_batch_size or schedule.batch_size,
        "options": method.fit_options(),
        "seed": method.fit_seed,
    }


def _metadata(fitted_to: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in fitted_to.items()}


def _read_fitted(path: Path, metadata: dict[str, str]) -> dict[str, Tensor] | None:
    """Tensors of a file whose metadata is exactly `metadata`, else None. A damaged file is logged."""
    if not path.exists():
        return None
    try:
        fitted, made_for = load_with_checksum(path)
    except ValueError as error:
        log.info(f"{path} is damaged ({error}): it is computed again")
        return None
    return fitted if made_for == metadata else None


def _on_device_of(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    device = next(network.parameters()).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}
