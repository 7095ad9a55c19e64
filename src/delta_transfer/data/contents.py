"""The digest of each image file, computed once and remembered with the file's size and times.

It is also remembered whether a file holds several pictures.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..common import cores
from ..common.console import log, shorten_list
from ..common.errors import UserError
from ..records.files import whole_file
from .images import holds_several_pictures

DIGEST_BYTES = 16


@dataclass(frozen=True)
class Contents:
    stamps: np.ndarray  # (N, 3) int64: `stamps_of` the files, when they were looked at
    digests: np.ndarray  # (N, 16) uint8: of each file's bytes
    several: np.ndarray  # (N,) bool: the file holds more pictures than the one that is read


def contents_of(name: str, files: Sequence[Path], cache_dir: Path | None) -> Contents:
    """The contents of all files of the data set `name`. Reads the files whose size or time changed since the last read.

    `cache_dir`/digests remembers the digests. A message names the files whose bytes changed. Raises UserError that
    names all files that cannot be read.
    """
    now = stamps_of(files)
    key = hashlib.sha256("\n".join(map(os.path.abspath, files)).encode(errors="surrogateescape")).hexdigest()[:16]
    cache = cache_dir / "digests" / f"{name}-{key}.npz" if cache_dir else None
    stamps, known, several = _remembered(cache, len(files))
    stale = np.flatnonzero((stamps != now).any(axis=1) | ~now.any(axis=1)).tolist()
    if not stale:
        return Contents(now, known, several)
    with ThreadPoolExecutor(cores.USABLE) as pool:
        new = list(pool.map(_read, [files[index] for index in stale]))
    unreadable = [f"{files[i]} ({error})" for i, error in zip(stale, new, strict=True) if isinstance(error, OSError)]
    if unreadable:
        raise cannot_be_read(name, unreadable)
    found, several = known.copy(), several.copy()
    several[stale] = [outcome.several for outcome in new if isinstance(outcome, _Content)]
    read = b"".join(outcome.digest for outcome in new if isinstance(outcome, _Content))
    found[stale] = np.frombuffer(read, dtype=np.uint8).reshape(-1, DIGEST_BYTES)
    changed = [files[i].name for i in stale if stamps[i].any() and (found[i] != known[i]).any()]
    if changed:
        log.info(
            f"{name}: {len(changed)} images changed ({shorten_list(changed)}). It is another data set now: "
            "its runs and stores get new names."
        )
    _remember(cache, now, found, several)
    return Contents(now, found, several)


def stamps_of(files: Sequence[Path]) -> np.ndarray:
    """(N, 3) int64: size in bytes, times of the last change of content and of status in ns; zeros for a missing file.

    The bytes of a file are assumed to stay the same while all three do. Unpacked and copied files may share size and
    time of content, but a file that takes another's name has another time of status.
    """
    return np.array([_stamp(path) for path in files], dtype=np.int64).reshape(-1, 3)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


class _Content(NamedTuple):
    digest: bytes
    several: bool


def _read(path: Path) -> _Content | OSError:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()
        return _Content(digest, holds_several_pictures(path))
    except OSError as error:
        return error


def _remembered(cache: Path | None, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stamps (N, 3), digests (N, 16) and which hold several pictures (N,); zeros where nothing is known."""
    if cache is not None:
        with suppress(Exception):  # a damaged cache: all files are read again
            with np.load(cache, allow_pickle=False) as arrays:
                stamps, known, several = arrays["stamps"], arrays["digests"], arrays["several"]
            shapes = stamps.shape, known.shape, several.shape
            if shapes == ((count, 3), (count, DIGEST_BYTES), (count,)) and known.dtype == np.uint8:
                return stamps, known, several
    return np.zeros((count, 3), np.int64), np.zeros((count, DIGEST_BYTES), np.uint8), np.zeros(count, bool)


def _remember(cache: Path | None, stamps: np.ndarray, known: np.ndarray, several: np.ndarray) -> None:
    if cache is None or not cache.parent.parent.is_dir():  # a dry run makes no folder
        return
    with suppress(OSError):  # cache_dir cannot be written: the files are read again next time
        cache.parent.mkdir(exist_ok=True)
        with whole_file(cache) as file:
            np.savez(file, stamps=stamps, digests=known, several=several)


def cannot_be_read(name: str, unreadable: Sequence[str]) -> UserError:
    """The error of the data set `name`. unreadable: its images that cannot be read, each with the reason."""
    count = f"{len(unreadable)} image{'s' * (len(unreadable) != 1)}"
    remedy = "Mend or remove them, or leave them out with dataset.unreadable=skip."
    return UserError(f"{count} of {name} cannot be read: {'; '.join(unreadable)}. {remedy}")
