"""Every image decoded once, into one memory-mapped uint8 array."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from .dataset import Dataset

# Raise when the decoded pixels change, so that older stores are not used.
VERSION = 1


def open_store(
    dataset: Dataset, size: int, cache_dir: Path, progress: Callable[[int], None] = lambda done: None
) -> np.ndarray:
    """Decoded images of `dataset`, (N, size, size, 3) uint8, squashed to a square with bilinear resampling.

    Built on first use under `cache_dir`/stores, then read-only and memory-mapped. Unreadable images are all named in
    one UserError, and no store is left behind.
    """
    key = hashlib.sha256(f"{VERSION} squash {size} {dataset.fingerprint}".encode()).hexdigest()[:16]
    path = cache_dir / "stores" / f"{dataset.name}-{size}px-{key}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Named by process: two processes may build the same store, and the later rename wins with equal bytes.
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            _build(dataset, size, unfinished, progress)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def _build(dataset: Dataset, size: int, path: Path, progress: Callable[[int], None]) -> None:
    count = len(dataset.labels)
    store = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
    unreadable: list[str] = []

    def decode(index: int) -> None:
        try:
            image = dataset.load(index)
            store[index] = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            unreadable.append(f"{dataset.names[index]} ({error})")

    # Threads: Pillow decodes and resizes outside Python's global lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(decode, range(count)), start=1):
            progress(done)
    if unreadable:
        raise UserError(f"{len(unreadable)} images of {dataset.name} cannot be read: " + "; ".join(sorted(unreadable)))
    store.flush()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
