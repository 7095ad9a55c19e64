"""The tables of the page: those of the report, and one of all runs with their curves and what differs between them.

page.js sorts and filters them, and draws the curves of the runs that are ticked.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd

from ..common.tables import Bar, Entry, Table, entries, number, time_entry
from ..records.reading import Record, config_of, is_number, one_line, run_id
from .comparison import Comparison
from .logs import Curves
from .page_charts import TITLES, thinned
from .record_views import NOT_SETTINGS, flatten, within

LONG = 40  # characters, from which on the words of a cell get a wide column of small print
MOST_POINTS, ALL_POINTS = 60, 60_000  # of a run's curve, and of all of them, so that a page of many runs stays small
NAMES = {"seed", "dataset.name", "backbone.name"}


def table_html(table: Table) -> str:
    return "\n".join(
        [
            f"<h3>{escape(table.title)}</h3>",
            *([f'<p class="verdict">{escape(table.verdict)}</p>'] if table.verdict else []),
            grid_html(table),
            *list_html("remarks", table.remarks),
            *list_html("notes", table.notes),
        ]
    )


def grid_html(table: Table, kind: str = "sortable", details: Sequence[str] = ()) -> str:
    """The rows of a table; `details`: HTML for a last cell of each."""
    # A column of words among the numbers, such as what differs from a published number, is set like names.
    kinds = [
        "number"
        if i >= table.names and any(row[i].value is not None for row in table.rows)
        else "long"
        if i and any(len(row[i].text) > LONG for row in table.rows)
        else ""
        for i in range(len(table.header))
    ]

    def head(title: str, kind: str) -> str:
        button = f'<button type="button">{escape(title)}</button>' if title else ""
        return f'<th scope="col"{css_class(kind.removeprefix("long"))}>{button}</th>'

    def cell(entry: Entry, title: str, kind: str) -> str:
        value = f' data-value="{entry.value!r}"' if entry.value is not None and math.isfinite(entry.value) else ""
        text = bar_html(entry.bar) if entry.bar else escape(entry.text)
        name = f' data-title="{escape(title)}"' if title else ""
        return f"<td{css_class(kind)}{name}{value}>{f'<strong>{text}</strong>' if entry.bold else text}</td>"

    lines = ["".join(map(cell, row, table.header, kinds)) for row in table.rows]
    if details:
        lines = [f"{line}<td>{more}</td>" for line, more in zip(lines, details, strict=True)]
    last = '<th scope="col">how it was made</th>' if details else ""
    return "\n".join(
        [
            '<div class="scroll" tabindex="0">',
            f'<table class="{kind}" aria-label="{escape(table.title)}">',
            f"<thead><tr>{''.join(map(head, table.header, kinds))}{last}</tr></thead>",
            "<tbody>",
            *(f"<tr>{line}</tr>" for line in lines),
            "</tbody>",
            "</table>",
            "</div>",
        ]
    )


def bar_html(bar: Bar) -> str:
    """A small drawing in the colour of the text. An arrow stands for what is beyond the end of the axis."""
    zero, low, mean, high = bar.places(4, 112, 1)
    mark = f'<circle cx="{mean}" cy="8" r="3.5"/>'
    if not 0 <= bar.mean <= 1:
        mark = f'<path d="{"M0 8L8 3V13Z" if bar.mean < 0 else "M120 8L112 3V13Z"}"/>'
    return (
        f'<svg class="bar" viewBox="0 0 120 16" width="120" height="16" aria-hidden="true">'
        f'<path d="M{zero} 0V16" class="zero"/><path d="M{low} 8H{high}" class="interval"/>{mark}</svg>'
    )


def css_class(name: str) -> str:
    return f' class="{name}"' if name else ""


def list_html(name: str, lines: list[str]) -> list[str]:
    return [f'<ul class="{name}">', *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"] if lines else []


# ---- runs ------------------------------------------------------------------------------------------------


def runs_html(comparison: Comparison, groups: list[list[Curves]]) -> str:
    """A table with a line for each run, which page.js filters, and the data of what it draws and compares."""
    rows, made, runs = [], [], []
    for method, row, cell in comparison.results:
        for (seed, fold), run in zip(cell.values, cell.runs, strict=True):
            seconds: Any = run.get("train_seconds")
            rows.append(
                entries(
                    comparison.dataset_title(row.dataset),
                    row.backbone,
                    comparison.display(method),
                    row.settings.replace("reg.", ""),
                    f"{seed}" + ("" if fold is None else f", fold {fold}"),
                    number(run[comparison.metric], ".2f"),
                    time_entry(seconds if is_number(seconds) else None),
                )
            )
            made.append(f"<details><summary>show</summary>{run_html(run)}</details>")
            runs.append(run)
    header = ["data set", "backbone", "method", "settings", "seed", comparison.kind.axis, "time"]
    frames = {id(config_of(run)): frame for group in groups for one in group for run, frame in one.each}
    data = json.dumps(curves_and_settings(runs, frames), separators=(",", ":"), ensure_ascii=False)
    data = data.replace("<", r"\u003c")  # a text of a record ends no script
    return "\n".join(
        [
            grid_html(Table("Runs", header, rows, 5), "sortable filtered", made),
            f'<script type="application/json" id="logs">{data}</script>',
        ]
    )


def curves_and_settings(runs: list[Record], frames: dict[int, pd.DataFrame]) -> dict[str, Any]:
    """What page.js draws and compares, by the place of a run in the table.

    titles: of quantities; curves: for each run by quantity (number of its steps in `steps`, values); keys: settings in
    which any runs differ, with all their values; settings: for each run the numbers of its values, -1: it has none.
    """
    most = max(8, min(MOST_POINTS, ALL_POINTS // max(1, len(runs) * len(TITLES))))
    steps: dict[tuple[int, ...], int] = {}
    curves = []
    for run in runs:
        frame, found = frames.get(id(config_of(run)), pd.DataFrame()), {}
        for name in [name for name in TITLES if name in frame]:
            curve = thinned(frame.set_index("step")[name].dropna(), most)
            if len(curve) > 1:
                number = steps.setdefault(tuple(curve.index.tolist()), len(steps))
                found[name] = [number, [float(f"{value:.4g}") for value in curve]]
        curves.append(found)
    table = pd.DataFrame([{key: as_text(value) for key, value in flatten(config_of(run)).items()} for run in runs])
    wanted = [key for key in sorted(table) if key in NAMES or not within(key, NOT_SETTINGS)]
    coded = {key: pd.factorize(table[key]) for key in wanted if table[key].nunique(dropna=False) > 1}
    return {
        "titles": TITLES,
        "steps": list(steps),
        "curves": curves,
        "keys": [[key, values.tolist()] for key, (_, values) in coded.items()],
        "settings": list(zip(*(codes.tolist() for codes, _ in coded.values()), strict=True)),
    }


def as_text(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else one_line(value)


def run_html(record: Record) -> str:
    versions, overrides = record.get("versions"), record.get("overrides")
    found = {
        "run": run_id(record),
        "command": record.get("command"),
        "overrides": " ".join(map(one_line, overrides)) if isinstance(overrides, list) else None,
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None,
        "device": record.get("device"),
        "commit": record.get("git_commit"),
        "finished": record.get("finished"),
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value_html(name, value)}</dd>' for name, value in found.items())}</dl>"


def value_html(name: str, value: object) -> str:
    if value in (None, ""):
        return "not recorded"
    text = escape(str(value))
    return f"<code>{text}</code>" if name in ("run", "command", "overrides") else text
