"""Functions of all readers, which make a checked Dataset of a publisher's lists."""

import csv
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from ..common.console import shorten_list
from ..common.errors import UserError
from .dataset import Dataset
from .images import read_image


def from_files(
    name: str,
    folder: Path,
    classes: Sequence[str],
    files: Sequence[str],
    labels: ArrayLike,
    is_test: ArrayLike,
    listed_in: str,
    digest_of: str | None = None,
) -> Dataset:
    """The Dataset of image files below `folder`.

    Args:
        files: paths relative to `folder`, with forward slashes.
        labels: (N,) integers, the class of each file, 0 .. len(classes)-1.
        is_test: (N,) bool.
        listed_in: the list that names them, for messages, e.g. "TrainImages.txt and TestImages.txt".
        digest_of: replaces `name` in the fingerprint.

    Raises UserError naming files that are missing, lie outside `folder` or are in both splits, and labels out of range.
    """
    label, test = np.asarray(labels, dtype=np.int64), np.asarray(is_test, dtype=bool)
    if len(files) == 0:
        raise UserError(f"{listed_in} of {name} names no image.")
    outside = [file for file in files if file.startswith("/") or ".." in file.split("/")]
    if outside:
        raise UserError(f"{listed_in} of {name} names files outside {folder}: {shorten_list(outside)}.")
    out_of_range = np.flatnonzero((label < 0) | (label >= len(classes))).tolist()
    wrong = [f"{files[index]} has label {label[index]}" for index in out_of_range]
    if wrong:
        raise UserError(f"{listed_in} of {name}: labels must be in 0..{len(classes) - 1}, but {shorten_list(wrong)}.")
    tested = {files[index] for index in np.flatnonzero(test).tolist()}
    both = [files[index] for index in np.flatnonzero(~test).tolist() if files[index] in tested]
    if both:
        raise UserError(f"{listed_in} of {name}: {len(both)} images are in train and test: {shorten_list(both)}.")

    digest, missing = hashlib.sha256((digest_of or name).encode()), []
    paths = tuple(folder / file for file in files)
    for file, path, number, tests in zip(files, paths, label, test, strict=True):
        try:
            size = path.stat().st_size
        except (OSError, ValueError):  # ValueError: an impossible name, such as a NUL in a damaged list
            missing.append(file)
        else:
            digest.update(f"{file}\0{size}\0{number}\0{int(tests)}\n".encode(errors="surrogateescape"))
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} images of {name} that {listed_in} names are not in {folder}: "
            f"{shorten_list(missing)}."
        )

    def load(index: int) -> Image.Image:
        return read_image(paths[index])

    return Dataset(name, tuple(classes), label, test, tuple(files), load, digest.hexdigest(), paths)


def from_arrays(name: str, classes: Sequence[str], images: np.ndarray, labels: ArrayLike, n_train: int) -> Dataset:
    """The Dataset of images in memory, (N, H, W, 3) uint8, training images first; `labels`: (N,) integers."""
    label = np.asarray(labels, dtype=np.int64)
    if len(label) and not 0 <= label.min() <= label.max() < len(classes):
        raise UserError(f"{name}: labels must be in 0..{len(classes) - 1}, found {label.min()}..{label.max()}.")
    test = np.arange(len(label)) >= n_train
    digest = hashlib.sha256(name.encode())
    for array in (np.ascontiguousarray(images), label, test):
        digest.update(array.tobytes())
    names = (*(f"train/{n:05d}" for n in range(n_train)), *(f"test/{n:05d}" for n in range(len(label) - n_train)))
    return Dataset(name, tuple(classes), label, test, names, lambda i: Image.fromarray(images[i]), digest.hexdigest())


def read_lines(path: Path) -> list[str]:
    """Lines of a text file without surrounding space and without empty lines; any line ends, with or without a BOM."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an impossible name
        raise UserError(f"{path} cannot be read: {error}.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_table_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of a CSV file's columns, and the number and cells of each other line that is not empty.

    The first line tells whether commas, semicolons or tabs separate cells. Raises UserError for a file that cannot be
    read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: save it as CSV with UTF-8 (in Excel: CSV UTF-8).") from None
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from None
    separator = ","
    if text.lower().startswith("sep="):  # a line that Excel writes and reads
        separator, text = text[4:5], "\n" + text.partition("\n")[2]
    else:
        first = next((line for line in text.splitlines() if line.strip()), "")
        separator = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}, is not a line of a table: {error}.") from None
    return ([name.strip() for name in lines[0][1]], lines[1:]) if lines else ([], [])
