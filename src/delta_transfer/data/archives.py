"""Publishers' archives, unpacked beside themselves. They are not trusted: no member may end up outside the folder."""

import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from ..errors import UserError
from .files import few

# What a damaged archive can raise. RuntimeError: encrypted, or compressed in an unknown way; ValueError: impossible
# numbers and names; OSError: also a full disk.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError, OSError, RuntimeError, ValueError)
# What macOS adds to archives: no part of any data set.
CLUTTER = re.compile(r"(^|/)(__MACOSX(/|$)|\.DS_Store$|\._)")


class AlreadyThere(UserError):
    """An archive holds an entry that lies in its folder already."""


def unpack(archive: Path) -> list[Path]:
    """Unpacks a .tar, .tar.gz, .tgz or .zip into the folder that it lies in. Returns the top-level entries it made.

    They get their place when all of them are complete: until then they are in a hidden folder. Raises UserError for
    an archive that is damaged, larger than the free disk space, holds what lies there already (AlreadyThere), or has
    members that leave the folder or are neither files, folders nor links.
    """
    hidden = archive.parent / f".unpacking-{archive.name}"
    name = archive.name.lower()
    try:
        if name.endswith(".zip"):
            entries = _unpack_zip(archive, hidden)
        elif name.endswith((".tar", ".tar.gz", ".tgz")):
            entries = _unpack_tar(archive, hidden)
        else:
            raise UserError(f"{archive} cannot be unpacked: only .tar, .tar.gz, .tgz and .zip are known.")
        for entry in entries:
            (hidden / entry).rename(archive.parent / entry)
    except DAMAGED as error:
        raise UserError(
            f"{archive} cannot be unpacked ({type(error).__name__}: {error}). If the file is damaged or incomplete, "
            "fetch it again."
        ) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return [archive.parent / entry for entry in entries]


def unpack_archives(needs: Sequence[str], archives: Sequence[str], root: Path) -> list[Path]:
    """Unpacks those of `archives` that lie in `root` or in its parent, until `needs` is there. Returns those unpacked.

    An archive whose entries are there already was unpacked before: that is an error only if something is still
    missing when the others are done.
    """
    done, refused = [], None
    for name in archives:
        if not _missing(needs, root):
            break
        found = [folder / name for folder in (root, root.absolute().parent) if (folder / name).is_file()]
        if not found:
            continue
        try:
            unpack(found[0])
            done.append(found[0])
        except AlreadyThere as error:
            refused = refused or error
    if refused and (missing := _missing(needs, root)):
        raise UserError(f"{root} lacks {few(missing)}. {refused}") from refused
    return done


def _missing(needs: Sequence[str], root: Path) -> list[str]:
    return [name for name in needs if not (root / name).exists()]


def _unpack_zip(archive: Path, into: Path) -> list[str]:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            _check_stays_inside(archive, member.orig_filename, member.orig_filename)
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 in archives that were not made on Unix
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise UserError(f"{archive} is refused: its member {member.filename!r} is neither a file nor a folder.")
        members = [member for member in members if not CLUTTER.search(member.filename)]
        entries = _check_fits(archive, [member.filename for member in members], (m.file_size for m in members))
        _make_empty(into)
        file.extractall(into, members)
    return entries


def _unpack_tar(archive: Path, into: Path) -> list[str]:
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"{archive} is not unpacked: tar archives need Python 3.11.4 or later to be unpacked safely.")
    with tarfile.open(archive) as file:
        members = file.getmembers()
        _check_read_to_the_end(file)
        for member in members:
            _check_stays_inside(archive, member.name, member.name)
            if member.issym() or member.islnk():
                # Stricter than the filter below, which chains of links can lead outside in Python before 3.11.13,
                # 3.12.11 and 3.13.4 (CVE-2025-4517): a target without ".." only leads down.
                _check_stays_inside(archive, member.name, member.linkname)
            elif not (member.isreg() or member.isdir()):
                raise UserError(f"{archive} is refused: its member {member.name!r} is neither a file nor a folder.")
        members = [member for member in members if not CLUTTER.search(member.name)]
        entries = _check_fits(archive, [member.name for member in members], (m.size for m in members))
        _make_empty(into)
        file.extractall(into, members, filter="data")
    return entries


def _check_stays_inside(archive: Path, member: str, path: str) -> None:
    """`path`: the name of `member` or the target of its link. Backslash and C: mean something only on Windows."""
    parts = re.split(r"[/\\]", path)
    if "\\" in path or ".." in parts or parts[0] == "" or re.match("[A-Za-z]:", path):
        target = "" if path == member else f", a link to {path!r},"
        raise UserError(f"{archive} is refused: its member {member!r}{target} could end up outside {archive.parent}.")


def _check_read_to_the_end(file: tarfile.TarFile) -> None:
    """tarfile takes a header that is damaged or cut off for the end of the list, and says nothing."""
    file.fileobj.seek(file.offset)
    if file.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("its list of members is damaged or ends without an end mark")
    while file.fileobj.read(1 << 20):  # up to gzip's checksum
        pass


def _check_fits(archive: Path, names: Sequence[str], sizes: Iterable[int]) -> list[str]:
    """The top-level entries of members called `names`, sorted. UserError if there is no place or no room for them."""
    entries = sorted({parts[0] for name in names if (parts := PurePosixPath(name).parts)})
    if not entries:
        raise UserError(f"{archive} holds no file.")
    there = [entry for entry in entries if os.path.lexists(archive.parent / entry)]
    if there:
        raise AlreadyThere(
            f"{archive} is not unpacked: {archive.parent} already has {few(there)}. Remove it if it is incomplete."
        )
    size, free = sum(sizes), shutil.disk_usage(archive.parent).free
    if size > free:
        raise UserError(
            f"{archive} is not unpacked: it would take {size / 1e9:,.1f} GB, and {archive.parent} has "
            f"{free / 1e9:,.1f} GB free."
        )
    return entries


def _make_empty(folder: Path) -> None:
    if folder.exists():  # left by a process that was killed
        shutil.rmtree(folder)
    folder.mkdir()
