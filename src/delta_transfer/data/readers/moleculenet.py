"""MoleculeNet's layout: one CSV file with a SMILES and the properties of a molecule in each line."""

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ...common.console import shorten_list
from ...common.errors import UserError
from ...common.options import option
from ..dataset import Dataset
from ..molecules import graph_of, random_scaffold_split, random_split, read_molecule, scaffold_of, scaffold_split
from ..options import DatasetConfig, Publication
from ..packed_graphs import GraphDataset, PackedGraphs
from ..registry import reader

VALUES = {"1": 1, "1.0": 1, "0": -1, "0.0": -1, "": 0}  # of a cell: yes, no, not known


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


@reader(
    "molecules",
    title="Molecules",
    options=MoleculesConfig,
    source="the CSV file of https://moleculenet.org/datasets-1",
)
def molecules(root: Path, config: MoleculesConfig) -> Dataset:
    """Reads `file`. Molecules that cannot be read are counted and named; a run does without them.

    Raises UserError for a missing column, a value that is neither 1, 0 nor empty, and a file without molecules.
    """
    path = root / config.file
    names, rows = _read(path, config)
    graphs, scaffolds, smiles, labels = [], [], [], []
    unreadable: dict[str, str] = {}  # place and SMILES: why
    for number, (text, values) in enumerate(rows, 2):
        try:
            molecule = read_molecule(text)
            graphs.append(graph_of(molecule))
        except ValueError as error:
            unreadable[f"line {number}, {text}"] = str(error)
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
    packed, known = PackedGraphs.of(graphs), np.array(labels, dtype=np.int64)
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


def no_picture(index: int) -> Image.Image:
    raise UserError("Graphs have no pictures.")


def _read(path: Path, config: MoleculesConfig) -> tuple[list[str], list[tuple[str, list[int]]]]:
    """The names of the properties, and SMILES and values of each line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file)
            columns, rows = list(lines.fieldnames or ()), list(lines)
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if lacking := [name for name in (config.smiles, *config.properties) if name not in columns]:
        raise UserError(f"{path} has no column {', '.join(lacking)}: it has {shorten_list(columns)}.")
    if ragged := [number for number, row in enumerate(rows, 2) if None in row or None in row.values()]:
        raise UserError(
            f"{path}: lines with more or fewer cells than the first: {shorten_list(list(map(str, ragged)))}."
        )
    names = config.properties or _yes_or_no([name for name in columns if name != config.smiles], rows)
    if not names:
        raise UserError(f"{path} has no column of 1 and 0: name those with the properties, dataset.properties=[...].")
    wrong = [
        f"line {n} {name}={row[name]!r}" for n, row in enumerate(rows, 2) for name in names if row[name] not in VALUES
    ]
    if wrong:
        raise UserError(f"{path}: properties must be 1, 0 or empty, but {shorten_list(wrong)}.")
    return list(names), [(row[config.smiles].strip(), [VALUES[row[name]] for name in names]) for row in rows]


def _yes_or_no(columns: Sequence[str], rows: list[dict[str, str]]) -> list[str]:
    return [name for name in columns if {row[name] for row in rows} <= VALUES.keys()]
