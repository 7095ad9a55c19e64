"""Atomic writes: a file appears complete or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .locks import Check

OUTPUT_MARK = ".delta-transfer"  # a file in folders that this program made, so that they are never taken for data


def make_output_folder(folder: Path) -> None:
    """Makes the folder with its parents. The outermost folder that was not there before gets the mark of our output."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if absent and not any((parent / OUTPUT_MARK).exists() for parent in absent[-1].parents):
        with suppress(OSError):
            (absent[-1] / OUTPUT_MARK).write_text("Written by delta-transfer. It is never read as data.\n")


@contextmanager
def whole_file(path: Path, check: Check = lambda: None) -> Iterator[IO[bytes]]:
    """A file to write that appears as `path` when it is complete and on disk; if anything fails, nothing changes.

    `check` is called just before.
    """
    # Two processes, on one machine or two, may write the same cache file.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            with open(unfinished, "wb") as file:
                yield file
                sync(file)
            check()
            os.replace(unfinished, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Removes what a killed process left of the file `name`. Only the holder of the lock may call it."""
    for left in folder.glob(f".{name}.*.tmp"):
        left.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name `path` to an OSError that names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, data: bytes) -> None:
    with whole_file(path) as file:
        file.write(data)


def sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on disk: a rename survives a power failure only with it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot, and do not need to
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
