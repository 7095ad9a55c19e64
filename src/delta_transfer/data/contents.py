"""What lies in image files: a digest of each file's bytes, computed once and remembered with its size and time."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.console import log, shorten_list
from ..common.errors import UserError
from ..records.files import whole_file

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Contents:
    stamps: np.ndarray  # (N, 2) int64: size and time of the last change of each file, when it was looked at
    digests: np.ndarray  # (N, 16) uint8: of its bytes


def contents_of(name: str, files: Sequence[Path], cache_dir: Path | None) -> Contents:
    """Of all files of the data set `name`. Those are read that changed since they were last read, by size and time.

    What is known of them is in `cache_dir`/digests. Says which files hold something else than they did. Raises
    UserError that names all files that cannot be read.
    """
    now = stamps_of(files)
    key = hashlib.sha256("\n".join(map(os.path.abspath, files)).encode(errors="surrogateescape")).hexdigest()[:16]
    cache = cache_dir / "digests" / f"{name}-{key}.npz" if cache_dir else None
    stamps, known = _remembered(cache, len(files))
    stale = np.flatnonzero((stamps != now).any(axis=1) | ~now.any(axis=1))
    if len(stale) == 0:
        return Contents(now, known)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        new = list(pool.map(_digest, [files[index] for index in stale]))
    unreadable = [f"{files[i]} ({error})" for i, error in zip(stale, new, strict=True) if isinstance(error, OSError)]
    if unreadable:
        raise UserError(f"{len(unreadable)} images of {name} cannot be read: {'; '.join(unreadable)}.")
    found = known.copy()
    found[stale] = np.frombuffer(b"".join(new), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    changed = [files[i].name for i in stale if stamps[i].any() and (found[i] != known[i]).any()]
    if changed:
        log.info(
            f"{name}: {len(changed)} images are not what they were ({shorten_list(changed)}): it is another "
            "data set now. Runs and stores made before keep the old one's names."
        )
    _remember(cache, now, found)
    return Contents(now, found)


def stamps_of(files: Sequence[Path]) -> np.ndarray:
    """(N, 2) int64: size in bytes and time of the last change in ns. While both stay the bytes do, it is assumed.

    Zeros for a file that is not there.
    """
    return np.array([_stamp(path) for path in files], dtype=np.int64).reshape(-1, 2)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _digest(path: Path) -> bytes | OSError:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()
    except OSError as error:
        return error


def _remembered(cache: Path | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Stamps (N, 2) and digests (N, 16); zeros where nothing is known."""
    if cache is not None:
        with suppress(Exception):  # damaged: everything is read again
            with np.load(cache, allow_pickle=False) as arrays:
                stamps, known = arrays["stamps"], arrays["digests"]
            if stamps.shape == (count, 2) and known.shape == (count, DIGEST_BYTES) and known.dtype == np.uint8:
                return stamps, known
    return np.zeros((count, 2), dtype=np.int64), np.zeros((count, DIGEST_BYTES), dtype=np.uint8)


def _remember(cache: Path | None, stamps: np.ndarray, known: np.ndarray) -> None:
    if cache is None or not cache.parent.parent.is_dir():  # a dry run makes no folder
        return
    with suppress(OSError):  # a cache_dir that cannot be written: they are read again next time
        cache.parent.mkdir(exist_ok=True)
        with whole_file(cache) as file:
            np.savez(file, stamps=stamps, digests=known)
