"""delta-predict for a run on molecules: CSV files have a column of SMILES, like the run's own file."""

import argparse
import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.console import log, no_formula, shorten_list, spelled_out
from ..common.errors import UserError
from ..common.tables import Entry, Table, entries, on_screen

if TYPE_CHECKING:
    from ..inspect.finished import Finished


@dataclass(frozen=True)
class FoundMolecules:
    """The outcome for all molecules, in the order of their lines."""

    run_id: str
    unit: str  # probability | value
    properties: tuple[str, ...]
    molecules: list[dict[str, Any]]  # file, line, smiles; properties: the number of each by name
    refused: dict[str, str]  # file, line and SMILES: why


def predict_molecules(run: "Finished", args: argparse.Namespace) -> FoundMolecules:
    """Predicts the molecules of all files. Reports on stderr which ones were refused, and why.

    Raises UserError for a run on other graphs, for an option of images, and for a file without the column of SMILES.
    """
    from ..data.readers.moleculenet import MoleculesConfig, read_csv
    from ..engine.devices import pick_device  # imports torch
    from ..inspect.predict import answers_for_molecules

    dataset = run.config.dataset
    if not isinstance(dataset, MoleculesConfig):
        raise UserError(f"{run.run_id}: dataset={dataset.name} has graphs without SMILES, which no CSV file can name.")
    if given := [name for name in ("top", "scale", "max_pixels") if getattr(args, name) is not None]:
        raise UserError(
            f"--{given[0].replace('_', '-')} is for images, and {run.run_id} reads molecules: leave it out."
        )
    lines: list[dict[str, Any]] = []
    for file in map(Path, args.images):
        columns, rows = read_csv(file)
        if dataset.smiles not in columns:
            raise UserError(f"{file} has no column {dataset.smiles}: it has {shorten_list(columns)}.")
        lines += [
            {"file": spelled_out(str(file)), "line": number, "smiles": row[dataset.smiles].strip()}
            for number, row in rows.items()
        ]
    found = answers_for_molecules(run, [line["smiles"] for line in lines], pick_device(args.device), args.batch_size)
    molecules, refused = [], {}
    for line, outcome in zip(lines, found, strict=True):
        if isinstance(outcome, ValueError):
            refused[f"{line['file']}, line {line['line']}, {spelled_out(line['smiles'])}"] = str(outcome)
        else:
            numbers = {name: round(float(value), 6) for name, value in zip(run.class_names, outcome, strict=True)}
            molecules.append(line | {"properties": numbers})
    for molecule, why in refused.items():
        log.error(f"{molecule}: {why}")
    unit = "value" if run.config.task == "graph_regression" else "probability"
    return FoundMolecules(run.run_id, unit, run.class_names, molecules, refused)


def as_table(found: FoundMolecules, terminal: bool, exact: bool) -> str:
    if not found.molecules:
        return ""

    def shown(value: float) -> Entry:
        return Entry(f"{value:.3f}" if found.unit == "value" else f"{100 * value:.1f} %", value)

    rows = [
        entries(spelled_out(one["smiles"]), *(shown(value) for value in one["properties"].values()))
        for one in found.molecules
    ]
    return on_screen([Table("", ["smiles", *found.properties], rows, 1)], terminal)


def as_csv(found: FoundMolecules, terminal: bool, exact: bool) -> str:
    """One line for each molecule, a column for each property."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    safe = str if exact else no_formula
    out.writerow(["smiles", *map(safe, found.properties)])
    for one in found.molecules:
        out.writerow([safe(one["smiles"]), *one["properties"].values()])
    return text.getvalue()


def as_json(found: FoundMolecules, terminal: bool, exact: bool) -> str:
    refused = [{"molecule": name, "reason": why} for name, why in found.refused.items()]
    made = {"run_id": found.run_id, "unit": found.unit, "molecules": found.molecules, "refused": refused}
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


FORMATS = {"table": as_table, "csv": as_csv, "json": as_json}
