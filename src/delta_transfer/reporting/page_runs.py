"""The table of all runs of the HTML page, and the data from which page.js draws, compares and shows them."""

import json
from typing import Any

import pandas as pd

from ..common.tables import Table, entries, number, time_entry
from ..records.reading import Record, config_of, is_number, one_line, run_id
from .comparison import Comparison, Result
from .logs import Curves
from .page_charts import TITLES, thinned
from .record_views import NOT_SETTINGS, flatten, within

# Points of a run's curve, and of the curves of all runs, so that a page of thousands of runs stays below 1.5 MB.
FEWEST_POINTS, MOST_POINTS, ALL_POINTS = 8, 60, 35_000
NAMES = {"seed", "dataset.name", "backbone.name"}
HOW_MADE = ["run", "command", "overrides", "versions", "device", "commit", "finished"]


def table_of_runs(comparison: Comparison) -> tuple[Table, list[Record]]:
    """A line for each run, and the runs in that order."""
    rows, runs = [], []
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
            runs.append(run)
    header = ["data set", "backbone", "method", "settings", "seed", comparison.kind.axis, "time"]
    return Table("Runs", header, rows, 5), runs


def best_first(comparison: Comparison) -> list[Result]:
    """The first results of all leaderboards, then the second ones, and so on."""
    leaders = [sorted(results, key=lambda one: -one.cell.merit) for _, results in comparison.places]
    ranked = sorted(((i, one) for results in leaders for i, one in enumerate(results)), key=lambda pair: pair[0])
    return [one for _, one in ranked]


def drawn_runs(comparison: Comparison, groups: list[list[Curves]]) -> tuple[dict[int, pd.DataFrame], int]:
    """The logs whose curves are in the page, by the id of a run's configuration, and the number of logs left out.

    If the page has no room for all, it has those of the results at the top of each leaderboard.
    """
    logs = {id(config_of(run)): frame for group in groups for one in group for run, frame in one.each}
    runs = [run for one in best_first(comparison) for run in one.cell.runs]
    found = {key: logs[key] for run in runs if (key := id(config_of(run))) in logs}
    room = ALL_POINTS // (FEWEST_POINTS * max(1, quantities_in(found)))
    return dict(list(found.items())[:room]), max(0, len(found) - room)


def quantities_in(logs: dict[int, pd.DataFrame]) -> int:
    """The number of drawn quantities of the run that logged most."""
    return max((sum(name in frame for name in TITLES) for frame in logs.values()), default=0)


def curves_and_settings(runs: list[Record], frames: dict[int, pd.DataFrame]) -> dict[str, Any]:
    """The data that page.js draws and compares, by the place of a run in the table.

    titles: of quantities. curves: for each run by quantity (number of its steps in `steps`, values). keys: settings in
    which any runs differ, with all their values. settings: for each run the numbers of its values; -1: it has none.
    """
    most = max(FEWEST_POINTS, min(MOST_POINTS, ALL_POINTS // max(1, len(frames) * quantities_in(frames))))
    steps: dict[tuple[int, ...], int] = {}
    curves = []
    for run in runs:
        frame, found = frames.get(id(config_of(run)), pd.DataFrame({"step": []})).set_index("step"), {}
        for name in [name for name in TITLES if name in frame]:
            curve = thinned(frame[name].dropna(), most)
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


def how_made(runs: list[Record]) -> dict[str, Any]:
    """The texts that page.js shows for a run: for each of `about` the place in `texts`, or a list of places.

    Runs of a sweep share most texts, so that each text is there once. None: it is not recorded.
    """
    texts: dict[str, int] = {}

    def place(value: object) -> int | None:
        return None if value in (None, "") else texts.setdefault(one_line(value), len(texts))

    made = []
    for run in runs:
        versions, overrides = run.get("versions"), run.get("overrides")
        made.append(
            [
                place(run_id(run)),
                place(run.get("command")),
                list(map(place, overrides)) if overrides and isinstance(overrides, list) else None,
                place(", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else None),
                *(place(run.get(key)) for key in ("device", "git_commit", "finished")),
            ]
        )
    return {"about": HOW_MADE, "texts": list(texts), "made": made}
