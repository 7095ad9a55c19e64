"""What a method computes once before training, kept for the next run that needs exactly the same."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..common.console import log
from ..common.options import require
from ..methods import Regularizer
from ..methods.base import Batches
from ..models import Network
from ..records.checked import load_with_checksum, save_with_checksum
from ..records.files import remove_unfinished, write_atomically
from ..records.locks import wait_for_lock
from ..records.run_directory import RunDirectory


def fit_or_reuse(
    regularizer: Regularizer,
    source: Network,
    batches: Batches,
    num_classes: int,
    fitted_to: dict[str, Any],
    directory: RunDirectory,
    cache_dir: Path,
) -> None:
    """Call `fit`, unless the same was computed before: every entry of `fitted_to` has to match."""
    metadata = _metadata(fitted_to)
    name = f"{regularizer.fitted_name}.safetensors"
    shared = fitted_path(regularizer, fitted_to, cache_dir)
    fitted = _read_fitted(directory.path / name, metadata)
    if fitted is None:
        shared.parent.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(shared.with_name(f".{shared.name}.lock"), f"computes {shared.name}"):
            remove_unfinished(shared.parent, shared.name)
            fitted = _read_fitted(shared, metadata)
            if fitted is None:
                log.info(f"{directory.path.name}: computing {regularizer.fitted_name} ...")
                fitted = {k: v.cpu() for k, v in regularizer.fit(source, batches, num_classes).items()}
                for tensor_name, values in fitted.items():
                    require(
                        bool(values.isfinite().all()),
                        f"{regularizer.fitted_name} of {tensor_name} is not finite: look at the source weights and at "
                        f"the options of {regularizer.fit_key}"
                        + (f".{regularizer.fitted_name}." if regularizer.fit_options() else "."),
                    )
                write_atomically(shared, save_with_checksum(fitted, metadata))
    regularizer.load_fitted(_to(fitted, source))
    directory.write(name, save_with_checksum(fitted, metadata))


def fitted_path(regularizer: Regularizer, fitted_to: dict[str, Any], cache_dir: Path) -> Path:
    """Where the result of `fit` is kept for other runs."""
    key = sha256(json.dumps(_metadata(fitted_to), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / "fitted" / f"{regularizer.fitted_name}-{key}.safetensors"


def _metadata(fitted_to: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in fitted_to.items()}


def _read_fitted(path: Path, metadata: dict[str, str]) -> dict[str, Tensor] | None:
    """Tensors of a file whose metadata is exactly `metadata`, else None; a damaged one is named."""
    if not path.exists():
        return None
    try:
        fitted, made_for = load_with_checksum(path)
    except ValueError as error:
        log.info(f"{path} is damaged ({error}): it is computed again")
        return None
    return fitted if made_for == metadata else None


def _to(tensors: dict[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
    device = next(like.parameters()).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}
