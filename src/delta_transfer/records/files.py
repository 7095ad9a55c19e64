"""Reads files of others with care, and writes files that appear complete or not at all."""

import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from ..common.errors import UserError
from .locks import Check

OUTPUT_MARK = ".delta-transfer"  # a file in folders that this program made, so that they are never read as data
OF_RUNS = ("summary.json", "classes.json", "*.jsonl", "*.npz", "*.yaml", "*.safetensors", "*.pt")
MIB, GIB = 2**20, 2**30
LONGEST_HEADER = 4 * MIB  # of a safetensors file: room for ten thousand tensors and the names of as many classes


# --- Files of others ---


def open_regular(path: Path, most: int = GIB) -> IO[bytes]:
    """Opens a file that belongs to its folder: a regular one of at most `most` bytes.

    A FIFO or a device may never end, and a link that leads out of the folder may expose another file. Raises ValueError
    for them, and OSError for a file that cannot be opened.
    """
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError("it is a link that leads out of its folder")
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 - the caller closes it
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > most:
            raise ValueError(f"it has {status.st_size / MIB:,.0f} MiB, and at most {most / MIB:,.0f} are read")
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: Path, most: int = GIB) -> bytes:
    """The content of a file that `open_regular` opens."""
    with open_regular(path, most) as file:
        return file.read(most)


@contextmanager
def open_safetensors(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file. framework: np or pt, which makes its tensors.

    Raises ValueError for a damaged file and for a header so long that reading it would take minutes, and OSError for a
    file that cannot be opened.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header claims {length:,} bytes, and at most {LONGEST_HEADER:,} are read")
    try:
        with safe_open(path, framework=framework) as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def read_safetensors(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata of a file that `open_safetensors` opens."""
    with open_safetensors(path, framework) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def most_unpacked(packed: int) -> int:
    """The most bytes that `packed` bytes may unpack to. A file that unpacks to more is a decompression bomb.

    Photographs hardly shrink, lists of text shrink by a factor of ten, and zeros by a thousand.
    """
    return max(GIB, 200 * packed)


# --- Files of ours ---


def make_output_folder(folder: Path) -> None:
    """Makes the folder and its parents. The outermost new folder gets OUTPUT_MARK.

    Raises UserError if it cannot be made.
    """
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file has this name" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"{folder} cannot be made a folder ({why}): choose another one.") from None
    if absent and not any((parent / OUTPUT_MARK).exists() for parent in absent[-1].parents):
        with suppress(OSError):
            (absent[-1] / OUTPUT_MARK).write_text("Written by delta-transfer. It is never read as data.\n")


def write_figure(figure: Any, stem: Path, **options: Any) -> list[Path]:
    """Writes a figure of matplotlib as <stem>.png and <stem>.pdf. The same figure gives the same bytes."""
    paths = [Path(f"{stem}.{kind}") for kind in ("png", "pdf")]
    for path, metadata in zip(paths, ({}, {"CreationDate": None}), strict=True):
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:], dpi=150, metadata=metadata, **options)
        write_atomically(path, content.getvalue())
    return paths


def check_output(path: Path) -> None:
    """Raises UserError for a file of a run, which a table must not replace."""
    if path.is_file() and any(map(path.match, OF_RUNS)):
        raise UserError(f"{path} is a file of a run, which a table must not replace: choose another --output.")


def write_output(path: Path, text: str) -> None:
    """Writes a command's output to a file. Raises UserError if it cannot be written, and for a file of a run.

    A reader, such as a browser that reloads a page, gets the old text or the new one.
    """
    check_output(path)
    try:
        make_output_folder(path.parent)
        if path.exists() and not path.is_file():  # a pipe or a device
            path.write_text(text, encoding="utf-8")
        else:
            write_atomically(path.resolve(), text.encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


@contextmanager
def whole_file(path: Path, check: Check = lambda: None) -> Iterator[IO[bytes]]:
    """A file to write that appears as `path` when it is complete and on disk; if anything fails, nothing changes.

    check: called just before the file appears.
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
    """Removes the unfinished files `name` of a killed process. Only the holder of the lock may call it."""
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
        with suppress(OSError):  # some file systems cannot do it, and do not need it
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
