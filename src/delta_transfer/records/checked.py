"""safetensors files with a checksum in their metadata."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, uint8

from .files import read_safetensors
from .integrity import WHAT_TO_DO, digest_of

CHECKSUM = "sha256"
MODEL = "model.safetensors"  # in a run's folder: the weights that it trained


def save_with_checksum(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of `tensors` (on the CPU, contiguous) with `metadata` and a checksum."""
    return save(tensors, (metadata or {}) | {CHECKSUM: _checksum(tensors)})


def load_with_checksum(path: Path, required: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, without the checksum. Files of other programs have no checksum, and are read unless it is
    `required`.

    Raises ValueError for a damaged file, OSError for one that cannot be opened.
    """
    tensors, metadata = read_safetensors(path, "pt")
    found = metadata.pop(CHECKSUM, None)
    if found is None and required:
        raise ValueError("it has no checksum, which every run writes")
    if found not in (None, _checksum(tensors)):
        raise ValueError("its checksum is wrong")
    return tensors, metadata


def load_trained(folder: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trained weights of the run in `folder`. Raises ValueError for those of another run, and OSError."""
    tensors, _ = load_with_checksum(folder / MODEL, required=True)
    if (expected := digest_of(record, "weights")) is not None and fingerprint(tensors) != expected:
        raise ValueError(f"its weights are not those that the run trained: {WHAT_TO_DO}")
    return tensors


def _checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values."""
    kinds = "".join(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n" for name in sorted(tensors))
    return hashlib.sha256((kinds + fingerprint(tensors)).encode()).hexdigest()


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(uint8).numpy().data)
    return digest.hexdigest()
