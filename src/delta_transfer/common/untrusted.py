"""Rules for all files and names that other people made. This module imports nothing slow."""

import os
import stat
from pathlib import Path
from typing import IO

MIB, GIB = 2**20, 2**30
LONGEST_HEADER = 4 * MIB  # of a safetensors file: room for ten thousand tensors and the names of as many classes


def open_regular(path: Path, most: int = GIB) -> IO[bytes]:
    """Opens a file that belongs to its folder: a regular one of at most `most` bytes.

    A FIFO or a device may never end, and a link that leads out of the folder may show what nobody meant to give away.
    Raises ValueError for them, OSError for what cannot be opened.
    """
    if path.is_symlink() and not path.resolve().is_relative_to(path.parent.resolve()):
        raise ValueError("it is a link that leads out of its folder")
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 - the caller closes it
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no regular file")
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


def check_header(path: Path) -> None:
    """Raises ValueError for a safetensors file whose header is so long that reading it would take minutes."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header claims {length:,} bytes, and at most {LONGEST_HEADER:,} are read")


def most_unpacked(packed: int) -> int:
    """How many bytes may come out of `packed` bytes. A file that unpacks to more is a decompression bomb.

    Photographs hardly shrink, lists of text shrink by a factor of ten, and zeros by a thousand.
    """
    return max(GIB, 200 * packed)


FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # the last four are the full-width forms of the first


def no_formula(value: object) -> object:
    """Puts an apostrophe before a text that a spreadsheet would compute. Numbers, also as texts, stay as they are."""
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
