"""Unpacks publishers' archives. They are not trusted: no member may leave the folder, and no bomb is unpacked."""

import gzip
import os
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import IO, cast

from ..common.console import shorten_list
from ..common.errors import UserError
from ..records.files import most_unpacked
from ..records.locks import wait_for_lock

# Errors that a damaged archive can raise. RuntimeError: it is encrypted, or compressed in an unknown way. ValueError,
# ArithmeticError, LookupError, MemoryError: it has impossible numbers or names. OSError: also when the disk is full.
DAMAGED = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, struct.error, EOFError, OSError),
    *(RuntimeError, ValueError, ArithmeticError, LookupError, MemoryError),
)
GZIP = b"\x1f\x8b"
ZIP_HEADER_BYTES = 30  # of each member of a zip archive, before its name
# Files that macOS adds to archives. They belong to no data set.
CLUTTER = re.compile(r"(^|/)(__MACOSX(/|$)|\.DS_Store$|\._)")


class AlreadyThere(UserError):
    """The folder already has an entry of the archive."""


def unpack(archive: Path, root: Path | None = None) -> list[Path]:
    """Unpacks a .tar, .tar.gz, .tgz or .zip into the folder that it lies in. Returns the top-level entries it made.

    With `root`, a folder that is or will be beside the archive, it is unpacked into `root`, unless the archive itself
    has a top-level entry of that name.

    The entries are written into a hidden folder and moved to their places when all of them are complete. No other
    process may unpack the archive at the same time. Raises UserError for an archive that is damaged, too large for the
    disk or a decompression bomb, that has an entry which the folder has already (AlreadyThere), or whose members leave
    the folder or are neither files, folders nor links.
    """
    name = archive.name.lower()
    try:
        if name.endswith(".zip"):
            return _unpack_zip(archive, root)
        if name.endswith((".tar", ".tar.gz", ".tgz")):
            return _unpack_tar(archive, root)
    except DAMAGED as error:
        raise UserError(
            f"{archive} cannot be unpacked ({type(error).__name__}: {error}). If the file is damaged or incomplete, "
            "fetch it again."
        ) from error
    raise UserError(f"{archive} cannot be unpacked: only .tar, .tar.gz, .tgz and .zip are known.")


def unpack_archives(needs: Sequence[str], archives: Sequence[str], root: Path) -> list[Path]:
    """Unpacks the `archives` that lie in `root` or in its parent, until `needs` is there. Returns those it unpacked.

    An archive is unpacked into `root`; beside `root`, if it holds that folder itself; or into the folder in its name
    ("cars/train.tgz"). An archive whose entries are there was unpacked before: this is an error only if something is
    still missing after the others.
    """
    done, refused, parent = [], None, root.absolute().parent
    for name in archives:
        if not _missing(needs, root):
            break
        found = [folder / name for folder in (root, parent) if (folder / name).is_file()]
        if not found:
            continue
        archive = found[0]
        with wait_for_lock(archive.parent / f".{archive.name}.lock", f"unpacks {archive}"):
            if not _missing(needs, root):  # another process unpacked it
                break
            try:
                unpack(archive, root if archive.parent == parent else None)
                done.append(archive)
            except AlreadyThere as error:
                refused = refused or error
    if refused and (missing := _missing(needs, root)):
        raise UserError(f"{root} lacks {shorten_list(missing)}. {refused}") from refused
    return done


def _missing(needs: Sequence[str], root: Path) -> list[str]:
    return [name for name in needs if not (root / name).exists()]


def _unpack_zip(archive: Path, root: Path | None) -> list[Path]:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            _check_stays_inside(archive, member.orig_filename, member.orig_filename)
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 in archives that were not made on Unix
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{archive} is refused: its member {member.filename!r} is neither a file nor a folder.")
        _check_apart(archive, file)
        members = [member for member in members if not CLUTTER.search(member.filename)]
        sizes = [(member.filename, member.file_size) for member in members]
        return _extract(archive, root, sizes, lambda into: file.extractall(into, members))


def _unpack_tar(archive: Path, root: Path | None) -> list[Path]:
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"{archive} is not unpacked: tar archives need Python 3.11.4 or later to be unpacked safely.")
    with _opened(archive) as stream, tarfile.open(fileobj=cast(IO[bytes], stream), mode="r:") as file:
        members = file.getmembers()
        _check_read_to_the_end(stream, file.offset)
        for member in members:
            _check_stays_inside(archive, member.name, member.name)
            if member.issym() or member.islnk():
                # Stricter than the filter below, which chains of links can lead outside in Python before 3.11.13,
                # 3.12.11 and 3.13.4 (CVE-2025-4517): a target without ".." only leads down.
                _check_stays_inside(archive, member.name, member.linkname)
            elif not (member.isreg() or member.isdir()):
                raise UserError(f"{archive} is refused: its member {member.name!r} is neither a file nor a folder.")
        members = [member for member in members if not CLUTTER.search(member.name)]
        sizes = [(member.name, member.size) for member in members]
        return _extract(archive, root, sizes, lambda into: file.extractall(into, members, filter="data"))


def _check_stays_inside(archive: Path, member: str, path: str) -> None:
    """path: the name of `member` or the target of its link. Windows also takes a backslash and C: for a place."""
    parts = re.split(r"[/\\]", path)
    if "\\" in path or ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", path):
        target = "" if path == member else f", a link to {path!r},"
        raise UserError(
            f"{archive} is refused: its member {member!r}{target} could end up outside the folder it is unpacked into."
        )


def _check_apart(archive: Path, file: zipfile.ZipFile) -> None:
    """Refuses members that share compressed data. Python before 3.11.8 and 3.12.2 would unpack it for each of them."""
    starts = sorted((member.header_offset, member.compress_size) for member in file.infolist())
    ends = [*(start for start, _ in starts[1:]), file.start_dir]
    if any(start + ZIP_HEADER_BYTES + size > end for (start, size), end in zip(starts, ends, strict=False)):
        raise UserError(f"{archive} is refused: its members overlap, as those of decompression bombs do.")


class _Bounded:
    """A stream of an archive. It raises UserError when too much comes out, even while tarfile lists the members."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, archive: Path):
        self.stream, self.archive = stream, archive
        self.most = most_unpacked(archive.stat().st_size)

    def read(self, size: int) -> bytes:
        # A header may announce any size, and `read` allocates it first: ask for no more than is allowed.
        return self.stream.read(min(size, self.most + 1 - self.seek(self.tell())))

    def seek(self, place: int) -> int:
        if place > self.most:
            raise UserError(_bomb(self.archive, place))
        return self.stream.seek(place)

    def tell(self) -> int:
        return self.stream.tell()


@contextmanager
def _opened(archive: Path) -> Iterator[_Bounded]:
    """The uncompressed archive. The first bytes tell whether a file is compressed, since a .tar may be."""
    with open(archive, "rb") as file:
        packed = file.read(len(GZIP)) == GZIP
    with gzip.open(archive) if packed else open(archive, "rb") as stream:
        yield _Bounded(stream, archive)


def _bomb(archive: Path, size: int) -> str:
    return (
        f"{archive} is refused as a decompression bomb: {archive.stat().st_size / 1e6:,.1f} MB would become "
        f"{size / 1e9:,.1f} GB or more."
    )


def _check_read_to_the_end(stream: _Bounded, end: int) -> None:
    """Raises ReadError for a damaged list of members: tarfile takes a damaged header for the end of the list."""
    stream.seek(end)
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its list of members is damaged or ends without an end mark")
    while stream.read(1 << 20):  # up to gzip's checksum
        pass


def _extract(
    archive: Path, root: Path | None, sizes: Sequence[tuple[str, int]], extract: Callable[[Path], None]
) -> list[Path]:
    """Checks that members of these names and sizes fit, extracts them to a hidden folder, and moves them into place."""
    entries = sorted({parts[0] for name, _ in sizes if (parts := PurePosixPath(name).parts)})
    if not entries:
        raise UserError(f"{archive} holds no file.")
    folder = archive.parent if root is None or root.absolute().name in entries else root
    there = [entry for entry in entries if os.path.lexists(folder / entry)]
    if there:
        raise AlreadyThere(
            f"{archive} is not unpacked: {folder} already has {shorten_list(there)}. Remove it if it is incomplete."
        )
    made = not folder.exists()
    size = sum(size for _, size in sizes)
    if size > most_unpacked(archive.stat().st_size):
        raise UserError(_bomb(archive, size))
    free = shutil.disk_usage(archive.parent if made else folder).free
    if size > free:
        raise UserError(
            f"{archive} is not unpacked: it would take {size / 1e9:,.1f} GB, and {folder} has "
            f"{free / 1e9:,.1f} GB free."
        )
    hidden = folder / f".unpacking-{archive.name}"
    try:
        _make_empty(hidden)
        extract(hidden)
        for entry in entries:
            (hidden / entry).rename(folder / entry)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if made:
            with suppress(OSError):  # it is not empty, unless the extraction failed
                folder.rmdir()
    return [folder / entry for entry in entries]


def _make_empty(folder: Path) -> None:
    if folder.exists():  # a process that was killed left it
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
