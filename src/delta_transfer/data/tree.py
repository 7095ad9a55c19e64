"""The contents of a folder of images. Every file in it is used, is known junk, or is named with a reason.

`dataset=folder`, `delta-data` and `delta-predict` all ask `list_images`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from ..common.console import shorten_list
from ..records.files import OUTPUT_MARK
from .images import BACKUP, NO_IMAGE, SUFFIXES, why_no_image

# Folders and files of other programs, in lower case. No file in such a folder is a user's image.
JUNK_FOLDERS = {
    *("__macosx", ".git", ".svn", ".hg", ".appledouble", ".spotlight-v100", ".fseventsd", ".temporaryitems"),
    *("@eadir", "@tmp", "@recycle", "#recycle", "#snapshot", ".@__thumb", "@sanposnapshot"),  # disk stations
    *("$recycle.bin", "recycler", "system volume information", "lost+found", ".trash", ".trashes", ".trash-1000"),
    *(".thumbnails", ".thumb", ".cache", ".ipynb_checkpoints", "__pycache__", ".picasaoriginals", ".dtrash"),
}
JUNK_FILES = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "picasa.ini", ".picasa.ini"),
    *(".ds_store", ".localized", ".directory", ".nomedia", ".gitkeep", ".gitignore", ".gitattributes", ".keep"),
    *("zbthumbnail.info", "photothumb.db", ".dropbox"),
}
# A folder that this program made holds all names of one of these lines.
OUTPUT_HOLDS = (
    (OUTPUT_MARK,),
    ("runs/*/config.yaml",),
    ("config.yaml", "metrics.jsonl"),
    ("config.yaml", "summary.json"),
    ("cache/stores",),
    ("cache/digests",),
    ("stores/*/store.json",),
    ("store.json", "pixels"),
    ("records.jsonl",),
)
TRUSTED = SUFFIXES - {".avif"}  # not every build of Pillow reads it
IGNORED, HIDDEN, OUTPUT = "dataset.ignore matches it", "hidden", "output of this program"
NO_FAULT = {IGNORED, HIDDEN, OUTPUT, NO_IMAGE, BACKUP}  # what nobody expects to be read as an image
DANGLING = "a link that leads nowhere"


@dataclass
class Listing:
    """The files below one folder."""

    images: list[str] = field(default_factory=list)  # paths relative to the folder, with slashes, sorted
    left_out: dict[str, str] = field(default_factory=dict)  # path: why, in a few words
    nested: list[str] = field(default_factory=list)  # folders below the folder that images were read from


def list_images(folder: Path, ignore: Sequence[str] = (), name: str = "") -> Listing:
    """The images at any depth of `folder`, and what is left out. Links are followed.

    Args:
        ignore: patterns such as `*_mask.png`, for names and for paths below the data set's folder.
        name: the path of `folder` below the data set's folder.
    """
    listing = Listing()
    around = {_identity(path) for start in (folder.absolute(), folder.resolve()) for path in (start, *start.parents)}
    _walk(folder, "", f"{name}/" if name else "", ignore, around, listing)
    listing.images.sort()
    listing.nested = sorted({image.rpartition("/")[0] for image in listing.images} - {""})
    return listing


def _identity(path: Path | str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _walk(
    folder: Path, below: str, prefix: str, ignore: Sequence[str], seen: set[tuple[int, int]], into: Listing
) -> None:
    """Adds the contents of `folder`/`below` to `into`. below: "" or a path that ends with a slash."""
    try:
        entries = sorted(os.scandir(os.path.join(folder, below)), key=lambda entry: entry.name)
    except OSError:
        into.left_out[below] = "a folder that cannot be read"
        return
    for entry in entries:
        name = below + entry.name
        if is_junk(entry):
            continue
        if matches(prefix + name, ignore):
            into.left_out[name] = IGNORED
        elif is_folder(entry):
            if why := why_no_data(entry):
                into.left_out[f"{name}/"] = why
            elif (identity := _identity(entry.path)) in seen:
                into.left_out[f"{name}/"] = "a link to a folder that is read already, or that is around it"
            else:
                seen.add(identity)
                _walk(folder, f"{name}/", prefix, ignore, seen, into)
        elif why := HIDDEN if entry.name.startswith(".") else _why_left_out(entry):
            into.left_out[name] = why
        else:
            into.images.append(name)


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern fits the path, or the name of its last part."""
    name = path.rpartition("/")[2]
    return any(fnmatchcase(path, pattern.rstrip("/")) or fnmatchcase(name, pattern.rstrip("/")) for pattern in patterns)


def is_junk(entry: "os.DirEntry[str]") -> bool:
    """Whether it belongs to another program. Nobody misses it, so no message names it."""
    name = entry.name.lower()
    return name in (JUNK_FOLDERS if is_folder(entry) else JUNK_FILES) or name.startswith(("._", ".trash-"))


def is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def why_no_data(folder: "os.DirEntry[str]") -> str | None:
    """Why a folder holds no data; None if it may hold some."""
    if folder.name.startswith("."):
        return HIDDEN
    return OUTPUT if is_output(Path(folder.path)) else None


def is_output(folder: Path) -> bool:
    """Whether this program made the folder, by a mark in it or by its contents."""
    return any(all(next(folder.glob(name), None) for name in names) for names in OUTPUT_HOLDS)


def _why_left_out(entry: "os.DirEntry[str]") -> str | None:
    try:
        is_file = entry.is_file()
    except OSError:
        is_file = False
    if not is_file:
        return DANGLING if entry.is_symlink() else "no regular file"
    return None if os.path.splitext(entry.name)[1].lower() in TRUSTED else why_no_image(Path(entry.path))


def remarks(where: object, left_out: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each reason, with the number of files and the names of the first ones."""
    for why in dict.fromkeys(left_out.values()):
        names = [name for name, reason in left_out.items() if reason == why]
        yield f"{where}: left out, {why}: {len(names):,} ({shorten_list(names)})"


def subfolders(parent: Path, ignore: Sequence[str] = (), name: str = "") -> tuple[list[str], dict[str, str]]:
    """The names of the folders in `parent` that may hold data, sorted; and what is left out, with the reason.

    ignore, name: as for `list_images`. Hidden folders are left out; those that hold images are named.
    """
    names, left_out = [], {}
    for entry in sorted(os.scandir(parent), key=lambda entry: entry.name):
        if is_junk(entry):
            continue
        if entry.name.startswith("."):
            with suppress(OSError):
                if is_folder(entry) and any(loose_images(Path(entry.path))):
                    left_out[f"{entry.name}/"] = HIDDEN
        elif not is_folder(entry):
            if entry.is_symlink() and not os.path.exists(entry.path):
                left_out[entry.name] = DANGLING
        elif matches(f"{name}/{entry.name}" if name else entry.name, ignore):
            left_out[f"{entry.name}/"] = IGNORED
        elif why := why_no_data(entry):
            left_out[f"{entry.name}/"] = why
        else:
            names.append(entry.name)
    return names, left_out


def loose_images(parent: Path) -> Iterator[str]:
    """Yields the names of the images directly in `parent`. A caller that needs one name stops early."""
    with os.scandir(parent) as entries:
        for entry in entries:
            if not (is_folder(entry) or is_junk(entry) or entry.name.startswith(".") or _why_left_out(entry)):
                yield entry.name
