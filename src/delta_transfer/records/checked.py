"""safetensors files with a checksum in their metadata."""

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8

CHECKSUM = "sha256"


def save_with_checksum(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of `tensors` (on the CPU, contiguous), whose metadata has their checksum beside `metadata`."""
    return save(tensors, (metadata or {}) | {CHECKSUM: _checksum(tensors)})


def load_with_checksum(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, the checksum left out. A file without a checksum, as other programs write it, is read too.

    Raises ValueError for a damaged file, OSError for one that cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    if metadata.pop(CHECKSUM, None) not in (None, _checksum(tensors)):
        raise ValueError("its checksum is wrong")
    return tensors, metadata


def _checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, kinds, shapes and values."""
    kinds = "".join(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n" for name in sorted(tensors))
    return hashlib.sha256((kinds + fingerprint(tensors)).encode()).hexdigest()


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(uint8).numpy().data)
    return digest.hexdigest()
