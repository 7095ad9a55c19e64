"""MoleculeNet's layout: one CSV file with a SMILES and the properties of a molecule in each line."""

import csv
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from ...common.console import shorten_list
from ...common.errors import UserError
from ...common.options import option
from ..molecules import graph_of, random_scaffold_split, random_split, read_molecule, scaffold_of, scaffold_split
from ..options import DatasetConfig, Publication
from ..packed_graphs import GraphDataset, PackedGraphs, no_picture
from ..registry import reader


@dataclass
class MoleculesConfig(DatasetConfig):
    """Molecules with yes/no properties, some of which may not be known."""

    task: ClassVar[str] = "graph_properties"
    own_validation: ClassVar[bool] = True

    title: str | None = option(None, "what people call the data set; null means its name", identity=False)
    file: str = option(help="name of the CSV file below root")
    smiles: str = option("smiles", "column with the molecule")
    properties: list[str] = option([], "columns with 1, 0 or nothing; []: every column that has nothing else")
    cut: str = option(
        "scaffold",
        "how training, validation and test molecules are told apart, 8:1:1; the random ones follow from subset_seed",
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

    properties: list[str] = option(help="columns with a number or nothing")


@reader(
    "molecules",
    title="Molecules",
    options=MoleculesConfig,
    source="the CSV file of https://moleculenet.org/datasets-1",
)
def molecules(root: Path, config: MoleculesConfig) -> GraphDataset:
    """Reads `file`. Molecules that cannot be read are counted and named; a run does without them.

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
    """The same for numbers. Raises UserError for a property that is alike in all training molecules."""
    dataset = _molecules(root, config, number, "a number or empty", np.float64)
    training = dataset.labels[~dataset.is_test & ~dataset.is_val]  # type: ignore[operator]
    for name, column in zip(dataset.classes, training.T, strict=True):
        if len(np.unique(column[np.isfinite(column)])) < 2:
            raise UserError(f"{config.name}: the training molecules have no two different values of {name}.")
    return replace(dataset, scale=np.stack([np.nanmean(training, axis=0), np.nanstd(training, axis=0)]))


def _molecules(
    root: Path, config: MoleculesConfig, value: Callable[[str], float], wanted: str, kind: type[np.number]
) -> GraphDataset:
    """value: a cell as a label, raises ValueError; wanted: what a cell must be; kind: of the labels."""
    path = root / config.file
    names, rows = _read(path, config, value, wanted)
    graphs, scaffolds, smiles, labels = [], [], [], []
    unreadable: dict[str, str] = {}  # place and SMILES: why
    for line, (text, values) in enumerate(rows, 2):
        try:
            molecule = read_molecule(text)
            graphs.append(graph_of(molecule))
        except ValueError as error:
            unreadable[f"line {line}, {text}"] = str(error)
            continue
        scaffolds.append(scaffold_of(molecule))
        smiles.append(text)
        labels.append(values)
    if not graphs:
        raise UserError(f"{path} has no molecule that can be read.")
    named = shorten_list([f"{name} ({why})" for name, why in unreadable.items()])
    remarks = (f"{config.name}: left out {len(unreadable)} of {len(rows):,} molecules: {named}",) if unreadable else ()
    if config.cut == "scaffold":
        val, test = scaffold_split(scaffolds)
    elif config.cut == "random_scaffold":
        val, test = random_scaffold_split(scaffolds, config.subset_seed)
    else:
        val, test = random_split(len(scaffolds), config.subset_seed)
    packed, known = PackedGraphs.of(graphs), np.array(labels, dtype=kind)
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
        remarks=remarks,
        left_out=unreadable,
        graphs=packed,
    )


def yes_or_no(cell: str) -> int:
    """1 yes, -1 no, 0 not known."""
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
) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """The names of the properties, and SMILES and values of each line."""
    columns, rows = read_csv(path)
    if lacking := [name for name in (config.smiles, *config.properties) if name not in columns]:
        raise UserError(f"{path} has no column {', '.join(lacking)}: it has {shorten_list(columns)}.")

    def taken(row: dict[str, str], name: str) -> float | None:
        try:
            return value(row[name])
        except ValueError:
            return None

    names = config.properties or [name for name in columns if name != config.smiles]
    labels = {name: [taken(row, name) for row in rows] for name in names}
    names = config.properties or [name for name in names if None not in labels[name]]
    if not names:
        raise UserError(f"{path} has no column of 1 and 0: name those with the properties, dataset.properties=[...].")
    wrong = [
        f"line {line} {name}={row[name]!r}"
        for line, row in enumerate(rows, 2)
        for name in names
        if labels[name][line - 2] is None
    ]
    if wrong:
        raise UserError(f"{path}: properties must be {wanted}, but {shorten_list(wrong)}.")
    each = zip(*(labels[name] for name in names), strict=True)
    return list(names), [(row[config.smiles].strip(), list(values)) for row, values in zip(rows, each, strict=True)]


def read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The names of the columns, and the lines. Raises UserError for a file that cannot be read or is ragged."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            columns, rows = list(lines.fieldnames or ()), list(lines)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if ragged := [line for line, row in enumerate(rows, 2) if None in row or None in row.values()]:
        raise UserError(
            f"{path}: lines with more or fewer cells than the first: {shorten_list(list(map(str, ragged)))}."
        )
    return columns, rows
