"""A comparison for other programs: CSV (a line per cell) and JSON (the same, with each run's value)."""

import csv
import io
import json

from ..common.untrusted import no_formula
from .comparison import Cell, Comparison, Row, run_id
from .published import against
from .statistics import contests, paired

COLUMNS = ["dataset", "backbone", "settings", "method", "mean", "std", "n"]
DIFFERENCE = ["baseline", "difference", "low", "high"]
PUBLISHED = ["published", "published_std", "published_source", "differs"]


def lines(comparison: Comparison, baseline: str | None, protocol: str | None) -> list[dict]:
    """A dictionary for each cell, methods by their config names; numbers that do not exist are None."""
    theirs = {}
    for contest in contests(comparison):
        for cell in contest.cells.values():
            theirs[id(cell)] = contest.cells.get(baseline)
    matches = {(id(match.cell)): match for match in against(comparison, protocol)} if protocol else {}
    made = []
    for row in comparison.rows:
        for method in comparison.methods:
            if cell := row.cells.get(method):
                line = described(row, method, cell)
                if baseline:
                    difference = paired(cell, other) if (other := theirs.get(id(cell))) and method != baseline else None
                    values = (difference.mean, difference.low, difference.high) if difference else (None,) * 3
                    line |= dict(
                        zip(DIFFERENCE, [baseline if difference else None, *map(rounded, values)], strict=True)
                    )
                if protocol:
                    match = matches[id(cell)]
                    number = match.number
                    values = (number.mean, number.std, number.source) if number else (None,) * 3
                    line |= dict(zip(PUBLISHED, [*values, ", ".join(match.differing) or None], strict=True))
                made.append(line)
    return made


def described(row: Row, method: str, cell: Cell) -> dict:
    values = [row.dataset, row.backbone, row.settings, method, rounded(cell.mean), rounded(cell.std), cell.n]
    return dict(zip(COLUMNS, values, strict=True))


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def as_csv(comparison: Comparison, baseline: str | None = None, protocol: str | None = None) -> str:
    text = io.StringIO()
    columns = COLUMNS + (DIFFERENCE if baseline else []) + (PUBLISHED if protocol else [])
    out = csv.DictWriter(text, columns, lineterminator="\n")
    out.writeheader()
    for line in lines(comparison, baseline, protocol):
        out.writerow({key: no_formula(value) for key, value in line.items()})
    return text.getvalue()


def as_json(comparison: Comparison, baseline: str | None = None, protocol: str | None = None) -> str:
    cells = lines(comparison, baseline, protocol)
    ours = [row.cells[m] for row in comparison.rows for m in comparison.methods if m in row.cells]
    for line, cell in zip(cells, ours, strict=True):
        line["runs"] = [
            {"run_id": run_id(run), "seed": seed, "fold": fold, "value": value}
            for ((seed, fold), value), run in zip(cell.values.items(), cell.runs, strict=True)
        ]
    made = {
        "title": comparison.title,
        "metric": comparison.metric,
        "cells": cells,
        "remarks": comparison.chosen,
        "notes": comparison.notes,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"
