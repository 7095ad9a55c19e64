"""What a method computes once before training, kept for the next run that needs exactly the same."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from .console import say
from .data.locks import held
from .models import Network
from .records import RunDirectory, write_atomically
from .regularizers import Regularizer
from .regularizers.base import Batches


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
        with held(shared.with_name(f".{shared.name}.lock"), f"computes {shared.name}"):
            fitted = _read_fitted(shared, metadata)
            if fitted is None:
                say(f"{directory.path.name}: computing {regularizer.fitted_name} ...")
                fitted = {k: v.cpu() for k, v in regularizer.fit(source, batches, num_classes).items()}
                write_atomically(shared, safetensors_bytes(fitted, metadata))
    regularizer.load_fitted(_to(fitted, source))
    directory.write(name, safetensors_bytes(fitted, metadata))


def fitted_path(regularizer: Regularizer, fitted_to: dict[str, Any], cache_dir: Path) -> Path:
    """Where the result of `fit` is kept for other runs."""
    key = sha256(json.dumps(_metadata(fitted_to), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir / "fitted" / f"{regularizer.fitted_name}-{key}.safetensors"


def _metadata(fitted_to: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, sort_keys=True) for key, value in fitted_to.items()}


def _read_fitted(path: Path, metadata: dict[str, str]) -> dict[str, Tensor] | None:
    """Tensors of a file whose metadata is exactly `metadata`, else None."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != metadata:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError:  # damaged: compute it again
        return None


def _to(tensors: dict[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
    device = next(like.parameters()).device
    return {name: tensor.to(device) for name, tensor in tensors.items()}
