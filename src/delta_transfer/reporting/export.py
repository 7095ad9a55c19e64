"""A comparison for other programs: CSV (a line per cell) and JSON (the same, with the value of each run)."""

import json

from ..common.console import no_formula
from ..records.reading import run_id
from .comparison import Cell, Comparison
from .further import measures_in
from .published import against
from .statistics import Difference, contests, paired

Line = dict[str, object]


def lines(comparison: Comparison, baseline: str | None, protocol: str | None) -> list[tuple[Line, Cell]]:
    """Each cell and its numbers by column, methods by their names; None stands for a number that does not exist."""
    theirs: dict[int, Cell | None] = {}
    for contest in contests(comparison):
        for cell in contest.cells.values():
            theirs[id(cell)] = contest.cells.get(baseline or "")
    measures = measures_in((cell for _, _, cell in comparison.results), by="key")
    matches = {id(match.cell): match for match in against(comparison, protocol)} if protocol else {}
    made = []
    for method, row, cell in comparison.results:
        line: Line = {"dataset": row.dataset, "backbone": row.backbone, "settings": row.settings, "method": method}
        line |= {"mean": rounded(cell.mean), "std": rounded(cell.std), "n": cell.n}
        other = theirs.get(id(cell)) if method != baseline else None
        if baseline:
            difference = paired(cell, other) if other else None
            line |= {"baseline": difference and baseline} | numbers_of(difference)
        if protocol:
            number, differing = matches[id(cell)].number, matches[id(cell)].differing
            line |= {"published": number and number.mean, "published_std": number and number.std}
            line |= {"published_source": number and number.source, "differs": ", ".join(differing) or None}
        for name, measure in measures.items():
            own, base = measure.of(cell), measure.of(other) if other else None
            line |= {name: rounded(own.mean) if own.values else None}
            line |= numbers_of(paired(own, base) if base else None, f"{name}_") if baseline else {}
        made.append((line, cell))
    return made


def numbers_of(difference: Difference | None, prefix: str = "") -> Line:
    names = {"difference": "mean", "low": "low", "high": "high"}
    return {f"{prefix}{name}": difference and rounded(getattr(difference, key)) for name, key in names.items()}


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def as_csv(comparison: Comparison, baseline: str | None = None, protocol: str | None = None) -> str:
    """A line per cell; a number that does not exist is empty."""
    import pandas as pd

    table = pd.DataFrame([line for line, _ in lines(comparison, baseline, protocol)], dtype=object)
    return str(table.map(no_formula).to_csv(index=False, lineterminator="\n"))


def as_json(comparison: Comparison, baseline: str | None = None, protocol: str | None = None) -> str:
    made = {
        "title": comparison.title,
        "metric": comparison.metric,
        "cells": [line | {"runs": runs_of(cell)} for line, cell in lines(comparison, baseline, protocol)],
        "remarks": comparison.chosen,
        "notes": comparison.notes,
    }
    return json.dumps(made, indent=1, ensure_ascii=False) + "\n"


def runs_of(cell: Cell) -> list[Line]:
    return [
        {"run_id": run_id(run), "seed": seed, "fold": fold, "value": value}
        for ((seed, fold), value), run in zip(cell.values.items(), cell.runs, strict=True)
    ]
