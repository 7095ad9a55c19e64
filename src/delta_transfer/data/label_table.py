"""Labels in a table: a CSV file with the columns file, label and perhaps split."""

import posixpath
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.console import shorten_list
from ..common.errors import UserError
from .files import read_table_lines
from .images import why_no_image
from .tree import IGNORED, matches

NAME = "labels.csv"  # in a data set's folder, it is found by itself
COLUMNS = "file, label and perhaps split"


@dataclass
class Table:
    labels: dict[str, str]  # of each file, whose path is below the data set's folder
    split: dict[str, str]  # of each file: train, test or val; empty without a column
    left_out: dict[str, str]  # file: why
    not_read: list[str]  # columns

    @property
    def files(self) -> set[str]:
        """All files that the table names."""
        return {*self.labels, *self.left_out}

    @property
    def splits(self) -> set[str]:
        return set(self.split.values())

    @property
    def classes(self) -> list[str]:
        """Sorted: as numbers if all are."""
        found = set(self.labels.values())
        return sorted(found, key=(lambda one: (int(one), one)) if all(map(str.isdecimal, found)) else None)

    def images(self, split: str | None) -> dict[str, list[str]]:
        """The files of each class that are in a split, sorted. None: all of them."""
        images: dict[str, list[str]] = {name: [] for name in self.classes}
        for file, label in sorted(self.labels.items()):
            if split is None or self.split[file] == split:
                images[label].append(file)
        return images


def find_table(named: str | None, root: Path | None) -> tuple[Path | None, str | None]:
    """The table that `dataset.labels` names, or labels.csv in `root`; else why no table there is one of labels.

    Raises UserError for a file that is not there.
    """
    if named == "none":
        return None, None
    if named is not None:
        places = [place / Path(named).expanduser() for place in (root, Path()) if place is not None]
        if found := next((place for place in places if place.is_file()), None):
            return found, None
        raise UserError(f"dataset.labels={named}: there is no file {' or '.join(map(str, places))}.")
    tables = sorted(path for path in root.iterdir() if path.suffix.lower() in (".csv", ".tsv")) if root else []
    path = next((path for path in tables if path.name.lower() == NAME and path.is_file()), None)
    if path is None:
        names = shorten_list([path.name for path in tables])
        return None, f"not read: {names} (dataset.labels=NAME reads a table of labels)" if tables else None
    header, _ = _table_of(path)
    if missing := {"file", "label"} - set(header):
        columns = ", ".join(header) or "none"
        return (
            None,
            f"{path.name} is not a table of labels: it lacks {', '.join(sorted(missing))} (its columns: {columns})",
        )
    return path, None


def read_table(path: Path, root: Path, split_named: Callable[[str], str | None], ignore: Sequence[str]) -> Table:
    """Reads a table whose files are images below `root`, or below the table's own folder.

    split_named: what a word in the column split stands for. Files that fit a pattern of `ignore` are left out.

    Raises UserError that names the wrong lines: a cell is missing; a file is not there, lies elsewhere, is not an image
    or is named twice; a split is unknown. It also raises UserError for a column of splits that has another name.
    """
    header, lines = _table_of(path)
    for column, least in (("file", 1), ("label", 1), ("split", 0)):
        if not least <= header.count(column) <= 1:
            found = ", ".join(header) or "no line"
            raise UserError(f"{path} needs the columns {COLUMNS}, each once, in its first line; it has {found}.")
    others = [column for column in header if column and column not in ("file", "label", "split")]
    table, wrong = Table({}, {}, {}, others), []
    where: dict[str, int] = {}
    words: dict[str, set[str]] = {column: set() for column in others}
    for number, cells in lines:
        while len(cells) > len(header) and not cells[-1].strip():  # a spreadsheet's empty columns
            cells.pop()
        if len(cells) != len(header):
            wrong.append(f"line {number} has {len(cells)} cells, and the first line {len(header)}")
            continue
        row = dict(zip(header, (unicodedata.normalize("NFC", cell.strip()) for cell in cells), strict=True))
        for column in others:
            words[column].add(row[column])
        raw = cells[header.index("file")].strip().replace("\\", "/")
        if posixpath.isabs(raw) and (Path(raw).is_relative_to(root.absolute()) or Path(raw).is_relative_to(root)):
            raw = str(Path(raw).relative_to(root if root.is_absolute() else root.absolute()))
        file = next((name for name in _names(raw) if (root / name).is_file()), posixpath.normpath(raw))
        label, split = row["label"], row.get("split")
        if not raw or not label or split == "":
            wrong.append(f"line {number} has an empty cell")
        elif posixpath.isabs(file) or file.startswith(".."):
            wrong.append(f"line {number}: {raw} is not below {root}")
        elif file in where:
            labels = f"has two labels, {table.labels.get(file)} and {label}" if table.labels.get(file) != label else ""
            wrong.append(f"line {number}: {file} {labels or 'is there twice'} (line {where[file]})")
        elif split and split_named(split) is None:
            wrong.append(f"line {number}: the split is {split}, and neither train, test nor val")
        elif not (root / file).is_file():
            wrong.append(f"line {number}: there is no file {root / file}")
        elif why := why_no_image(root / file):
            wrong.append(f"line {number}: {file} is left out, {why}")
        elif matches(file, ignore):
            table.left_out[file] = IGNORED
        else:
            where[file], table.labels[file] = number, label
            if split:
                table.split[file] = split_named(split) or ""
    if wrong:
        raise UserError(f"{path} has {len(wrong)} wrong lines: {shorten_list(wrong)}.")
    if "split" not in header:
        for column, its_words in words.items():
            if {*map(split_named, its_words)} >= {"train"} and all(map(split_named, its_words)):
                raise UserError(
                    f"{path}: the column {column} seems to hold splits: {shorten_list(sorted(its_words))}. Call a "
                    "column of splits split, or take it out."
                )
    return table


def _names(file: str) -> list[str]:
    """The spellings of a path that a table and a disk may have: a disk of a Mac has decomposed letters."""
    forms = (file, unicodedata.normalize("NFC", file), unicodedata.normalize("NFD", file))
    return [posixpath.normpath(form) for form in forms if form]


def _table_of(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    header, lines = read_table_lines(path)
    return [name.lower() for name in header], lines
