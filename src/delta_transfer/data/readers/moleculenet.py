"""MoleculeNet's layout: one CSV file with a SMILES and the properties of a molecule in each line."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...common.console import shorten_list
from ...common.errors import UserError
from ...common.options import option
from ..files import read_table_lines
from ..molecules import (
    canonical,
    graph_of,
    random_scaffold_split,
    random_split,
    read_molecule,
    scaffold_of,
    scaffold_split,
)
from ..options import DatasetConfig, Publication
from ..packed_graphs import GraphDataset, PackedGraphs, no_picture
from ..registry import reader


@dataclass
class MoleculesConfig(DatasetConfig):
    """Molecules with yes/no properties, some of which may not be known."""

    task: ClassVar[str] = "graph_properties"
    own_validation: ClassVar[bool] = True

    title: str | None = option(None, "title of the data set in reports; null means its name", identity=False)
    file: str = option(help="name of the CSV file below root")
    smiles: str = option("smiles", "column with the molecule")
    properties: list[str] = option([], "columns of 1, 0 and empty cells; []: every such column")
    cut: str = option(
        "scaffold",
        "how molecules are split into training, validation and test, 8:1:1; subset_seed decides the random ones",
        choices=("scaffold", "random_scaffold", "random"),
    )

    def publication(self, of_reader: Publication) -> Publication:
        return Publication(self.title or self.name, (self.file,), of_reader.source)

    @property
    def as_published(self) -> bool:
        return self.cut == "scaffold"

    def check(self) -> None:
        super().check()
        for name, usual in (("images_per_class", None), ("sample_rate", 1.0), ("redraw", False)):
            self.require(
                getattr(self, name) == usual,
                name,
                f"dataset.{name} draws from classes, which {self.name} does not have.",
            )


@dataclass
class MeasuredMoleculesConfig(MoleculesConfig):
    """Molecules with measured properties, some of which may not be known."""

    task: ClassVar[str] = "graph_regression"

    properties: list[str] = option(help="columns of numbers and empty cells")


@reader(
    "molecules",
    title="Molecules",
    options=MoleculesConfig,
    source="the CSV file of https://moleculenet.org/datasets-1",
)
def molecules(root: Path, config: MoleculesConfig) -> GraphDataset:
    """Reads `file`. Molecules that cannot be read are counted, named and left out.

    Raises UserError for a missing column, a value that is neither 1, 0 nor empty, and a file without molecules.
    """
    return _molecules(root, config, yes_or_no, "1, 0 or empty", np.int64)


@reader(
    "measured_molecules",
    title="Molecules with measurements",
    options=MeasuredMoleculesConfig,
    source="the CSV file of https://moleculenet.org/datasets-1",
)
def measured_molecules(root: Path, config: MeasuredMoleculesConfig) -> GraphDataset:
    """`molecules` for numbers. Raises UserError for a property with one value in all training molecules."""
    dataset = _molecules(root, config, number, "a number or empty", np.float64)
    training = dataset.labels[~dataset.is_test & ~dataset.is_val]  # type: ignore[operator]
    for name, column in zip(dataset.classes, training.T, strict=True):
        if len(np.unique(column[np.isfinite(column)])) < 2:
            raise UserError(f"{config.name}: {name} has no two different values in the training molecules.")
    return replace(dataset, scale=np.stack([np.nanmean(training, axis=0), np.nanstd(training, axis=0)]))


def _molecules(
    root: Path, config: MoleculesConfig, value: Callable[[str], float], wanted: str, kind: type[np.number]
) -> GraphDataset:
    """value: makes a label of a cell, or raises ValueError. wanted: what a cell must be. kind: dtype of the labels."""
    path = root / config.file
    names, rows, others = _read(path, config, value, wanted)
    graphs, scaffolds, labels = [], [], []
    smiles: list[str] = []
    same: dict[str, list[int]] = defaultdict(list)  # the places of each molecule
    unreadable: dict[str, str] = {}  # place and SMILES: why
    for line, (text, values) in rows.items():
        try:
            molecule = read_molecule(text)
            graphs.append(graph_of(molecule))
        except ValueError as error:
            unreadable[f"line {line}, {text}"] = str(error)
            continue
        same[canonical(molecule)].append(len(smiles))
        scaffolds.append(scaffold_of(molecule))
        smiles.append(text)
        labels.append(values)
    if not graphs:
        raise UserError(f"{path} has no molecule that can be read.")
    remarks = []
    if others:
        remarks.append(f"{config.name}: columns that are no properties (not only {wanted}): {shorten_list(others)}")
    if unreadable:
        named = shorten_list([f"{name} ({why})" for name, why in unreadable.items()])
        remarks.append(f"{config.name}: left out {len(unreadable)} of {len(rows):,} molecules: {named}")
    if config.cut == "scaffold":
        val, test = scaffold_split(scaffolds)
    elif config.cut == "random_scaffold":
        val, test = random_scaffold_split(scaffolds, config.subset_seed)
    else:
        val, test = random_split(len(scaffolds), config.subset_seed)
    packed, known = PackedGraphs.of(graphs), np.array(labels, dtype=kind)
    remarks += _copies(config.name, same, known, test)
    digest = hashlib.sha256(config.name.encode())
    for array in (*vars(packed).values(), known, val, test):
        digest.update(np.ascontiguousarray(array).tobytes() + b"|")
    return GraphDataset(
        config.name,
        tuple(names),
        known,
        test,
        tuple(smiles),
        no_picture,
        digest.hexdigest(),
        is_val=val,
        remarks=tuple(remarks),
        left_out=unreadable,
        graphs=packed,
    )


def _copies(name: str, same: Mapping[str, list[int]], known: np.ndarray, test: np.ndarray) -> Iterator[str]:
    """Sentences about molecules that are there more than once. same: the places of each molecule."""
    often = {one: places for one, places in same.items() if len(places) > 1}
    if leaks := [one for one, places in often.items() if 0 < test[places].sum() < len(places)]:
        yield f"{name}: molecules of the test split that are also in the others: {len(leaks):,} ({shorten_list(leaks)})"
    if conflicts := [one for one, places in often.items() if any(map(_differ, known[places].T))]:
        yield f"{name}: molecules that are there with two labels: {len(conflicts):,} ({shorten_list(conflicts)})"


def _differ(labels: np.ndarray) -> bool:
    """Whether two of a property's known labels differ."""
    unknown = ~np.isfinite(labels) if labels.dtype.kind == "f" else labels == 0
    return len(np.unique(labels[~unknown])) > 1


def yes_or_no(cell: str) -> int:
    """1 yes, -1 no, 0 not known."""
    cell = cell.strip()
    values = {"1": 1, "1.0": 1, "0": -1, "0.0": -1, "": 0}
    if cell not in values:
        raise ValueError(cell)
    return values[cell]


def number(cell: str) -> float:
    """NaN: not known."""
    value = float(cell) if cell.strip() else np.nan
    if cell.strip() and not np.isfinite(value):
        raise ValueError(cell)
    return value


def _read(
    path: Path, config: MoleculesConfig, value: Callable[[str], float], wanted: str
) -> tuple[list[str], dict[int, tuple[str, list[float]]], list[str]]:
    """The names of the properties; SMILES and values by line number; and other columns, with the reason."""
    columns, rows = read_csv(path)
    if not rows:
        raise UserError(f"{path} has no molecules: its first line names the columns, each further line is a molecule.")
    if lacking := [name for name in (config.smiles, *config.properties) if name not in columns]:
        raise UserError(f"{path} has no column {', '.join(lacking)}: it has {shorten_list(columns)}.")
    names = config.properties or [name for name in columns if name not in (config.smiles, "")]
    labels: dict[str, list[float]] = {}
    wrong: dict[str, list[str]] = {}
    for name in names:
        labels[name], wrong[name] = [], []
        for number, row in rows.items():
            try:
                labels[name].append(value(row[name]))
            except ValueError:
                wrong[name].append(f"line {number} {name}={row[name]!r}")
    others = []
    if not config.properties:  # every column of 1 and 0 is a property
        others = [
            wrong[name][0] if wrong[name] else f"{name} is empty"
            for name in names
            if wrong[name] or not any(labels[name])
        ]
        names = [name for name in names if any(labels[name]) and not wrong[name]]
    if not names:
        raise UserError(f"{path} has no column of 1 and 0: name those with the properties, dataset.properties=[...].")
    if found := [one for name in names for one in wrong[name]]:
        raise UserError(f"{path}: properties must be {wanted}, but {shorten_list(found)}.")
    each = zip(*(labels[name] for name in names), strict=True)
    lines = {n: (row[config.smiles].strip(), list(values)) for (n, row), values in zip(rows.items(), each, strict=True)}
    return list(names), lines, others


def read_csv(path: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """The names of the columns, and the lines by their numbers. Raises UserError if the table is not clear."""
    columns, lines = read_table_lines(path)
    if twice := [name for name in dict.fromkeys(columns) if name and columns.count(name) > 1]:
        raise UserError(f"{path}: columns that are there more than once: {shorten_list(twice)}.")
    if ragged := [str(number) for number, cells in lines if len(cells) != len(columns)]:
        raise UserError(f"{path}: lines with more or fewer cells than the first: {shorten_list(ragged)}.")
    return columns, {number: dict(zip(columns, cells, strict=True)) for number, cells in lines}
