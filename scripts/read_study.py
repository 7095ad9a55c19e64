"""Evaluates the study of when regularised fine-tuning helps: its records become tables in Markdown.

    python scripts/read_study.py results/published/when_does_it_help/* [--confidence FILE.json] [--figures FOLDER]

Each folder holds the runs, or the published records, of one data set and network, which is a row. The tables have test
accuracy, the differences to L2 and what attention adds to DELTA, paired by seed with 95 % t intervals, their means with
a t interval over data sets (first the mean of each one's rows), forgetting, mean ranks with Nemenyi's critical
difference, and the lines of least squares of each method's difference against how well frozen features do (L2-FE - L2),
against images per class, and against the source's confidence, which distance_from_source.py writes. A dash stands for
unfinished runs. The figures draw the differences against each of the three.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from scipy import stats

from delta_transfer.common.style import method_order, style_of
from delta_transfer.records.files import write_figure
from delta_transfer.records.reading import Record, folds, method_of, method_title, read_all, section
from delta_transfer.reporting.comparison import Cell
from delta_transfer.reporting.drawing import PAGE, our_look
from delta_transfer.reporting.record_views import problem, replicate
from delta_transfer.reporting.statistics import Difference, half_width, paired, ranks

METRIC = "test_top1"
KEPT = "kept_agreement"  # on how many test images the source's own head still says the same
BASELINE, FROZEN = "l2", "l2_fe"
WITH, WITHOUT = "delta", "delta_noatt"  # attention
FEWEST_SETS = 3  # for an interval over data sets; a line needs one row more


@dataclass(frozen=True)
class Predictor:
    """What may predict a method's difference to L2. value: of a row; None where it is not known."""

    name: str
    title: str  # of the column of slopes
    axis: str
    value: Callable[[dict[str, Cell]], float | None]
    log: bool = False  # its axis; slopes are per doubling
    per: float = 1  # the step of a slope
    of_itself: str | None = None  # the method whose difference it is


def predictors(confidence: dict[str, float] | None = None) -> list[Predictor]:
    """confidence: of the source, in percent, by data set."""

    def frozen(cells: dict[str, Cell]) -> float | None:
        return found.mean if (found := differences_of(cells).get(FROZEN)) else None

    def confident(cells: dict[str, Cell]) -> float | None:
        return (confidence or {}).get(dataset_of(cells) or "")

    images = "training images per class"
    found = [
        Predictor("frozen_features", "per point of L2-FE - L2", "L2-FE - L2, points", frozen, of_itself=FROZEN),
        Predictor("images_per_class", "per doubling of images", images, images_per_class, log=True),
        Predictor("confidence", "per 10 % of confidence", "confidence of the source, %", confident, per=10),
    ]
    return found if confidence is not None else found[:-1]


def cells_of(records: Iterable[Record], metric: str = METRIC) -> dict[str, Cell]:
    """The final runs by method. Raises SystemExit if one method has two runs of one seed."""
    final = [record for record in records if problem(record, metric) is None and not folds(record)]
    found: dict[str, Cell] = {}
    for record in final:
        cell = found.setdefault(method_of(record), Cell({}))
        if (key := replicate(record, metric)) in cell.values:
            raise SystemExit(f"{record['folder']}: {method_of(record)} has two runs of seed {key[0]}.")
        cell.values[key] = record[metric]
        cell.runs.append(record)
    return found


def differences_of(cells: dict[str, Cell]) -> dict[str, Difference]:
    """To L2, by method."""
    rivals = [method for method in cells if method != BASELINE and BASELINE in cells]
    return {method: found for method in rivals if (found := paired(cells[method], cells[BASELINE]))}


def dataset_of(cells: dict[str, Cell]) -> str | None:
    return next((str(section(run, "dataset")["name"]) for cell in cells.values() for run in cell.runs), None)


def images_per_class(cells: dict[str, Cell]) -> float | None:
    run = next((run for cell in cells.values() for run in cell.runs), None)
    return float(run["n_train"] / run["num_classes"]) if run else None


def over_sets(differences: Sequence[float]) -> Difference | None:
    """The mean difference with a t interval over data sets, each counted once."""
    n = len(differences)
    if not n:
        return None
    mean = math.fsum(differences) / n
    if n < FEWEST_SETS:
        return Difference(mean, None, None, n)
    half = half_width(float(stats.tstd(differences)), n)
    return Difference(mean, mean - half, mean + half, n)


def means_of(column: dict[str, Difference], sets: dict[str, dict[str, Cell]]) -> list[float]:
    """The mean difference of each data set over its rows."""
    by_dataset: dict[str, list[float]] = {}
    for name, difference in column.items():
        by_dataset.setdefault(dataset_of(sets[name]) or name, []).append(difference.mean)
    return [math.fsum(values) / len(values) for values in by_dataset.values()]


def line_through(points: Sequence[tuple[float, float]]) -> str:
    """The slope of least squares with its 95 % interval; a dash for fewer points than an interval needs."""
    x, y = [one for one, _ in points], [other for _, other in points]
    if len(x) <= FEWEST_SETS or min(x) == max(x):
        return "-"
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, len(x) - 2)) * fit.stderr
    return f"{fit.slope:+.2f} [{fit.slope - half:+.2f}, {fit.slope + half:+.2f}] ({len(x)})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is a dash."""
    lines = [header, ["---"] * len(header), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reading(
    sets: dict[str, dict[str, Cell]],
    titles: dict[str, str],
    kept: dict[str, dict[str, Cell]] | None = None,
    confidence: dict[str, float] | None = None,
) -> str:
    """All tables, for the cells by method of each data set. kept: the same cells with KEPT instead of accuracy."""
    methods = list(dict.fromkeys(method for cells in sets.values() for method in cells))
    rivals = [method for method in methods if method != BASELINE]
    names = [titles[method] for method in methods]
    found = {name: differences_of(cells) for name, cells in sets.items()}
    columns = {titles[m]: {name: ours[m] for name, ours in found.items() if m in ours} for m in rivals}
    both = {name: cells for name, cells in sets.items() if {WITH, WITHOUT} <= cells.keys()}
    if attention := {name: d for name, cells in both.items() if (d := paired(cells[WITH], cells[WITHOUT]))}:
        columns[f"{titles[WITH]} - {titles[WITHOUT]}"] = attention
    accuracies = table(["data set", *names], ([name, *map(cells.get, methods)] for name, cells in sets.items()))
    differences = table(
        ["data set", *columns],
        [
            *([name, *(column.get(name) for column in columns.values())] for name in sets),
            ["**mean over data sets**", *(over_sets(means_of(column, sets)) for column in columns.values())],
        ],
    )
    parts = [
        f"Test top-1 %, mean ± sample std over seeds (n):\n\n{accuracies}",
        f"Difference to L2 in points, paired by seed, 95 % t intervals (n); the last row is over data sets, "
        f"of which each counts once:\n\n"
        f"{differences}",
    ]
    if kept and any(kept.values()):
        agreements = table(["data set", *names], ([name, *map(cells.get, methods)] for name, cells in kept.items()))
        parts.append(
            "Forgetting: % of the test images on which the source's own head names the class that it named before "
            f"fine-tuning, mean ± sample std (n):\n\n{agreements}"
        )
    complete = [m for m in methods if all(m in cells for cells in sets.values())]
    if ranked := ranks([{m: cells[m].mean for m in complete} for cells in sets.values()]):
        words = ", ".join(f"{titles[m]} {rank:.2f}" for m, rank in sorted(ranked.mean.items(), key=lambda one: one[1]))
        parts.append(
            f"Mean ranks over {ranked.rows} rows (1 is the most accurate): {words}. "
            + (
                f"Friedman's test: p = {ranked.friedman_p:.2g}; ranks further apart than "
                f"{ranked.critical_difference:.2f} differ (Nemenyi, 95 %)."
                if ranked.critical_difference is not None
                else "Too few rows for a critical difference."
            )
        )
    lines = []
    known = predictors(confidence)
    for method in rivals:
        ours = {name: differences[method] for name, differences in found.items() if method in differences}
        ahead = [one for one in ours.values() if one.excludes_zero]
        better = sum(one.mean > 0 for one in ahead)
        slopes = [None if one.of_itself == method else line_through(points_of(one, sets, ours)) for one in known]
        lines.append([titles[method], f"{better}, {len(ahead) - better} of {len(ours)}", *slopes])
    parts.append(
        "How often the interval of a row leaves out zero, and how many points a method's difference to L2 grows with "
        "what may predict it, with 95 % intervals and the number of rows:\n\n"
        + table(["method", "ahead of L2, behind L2", *(one.title for one in known)], lines)
    )
    return "\n\n".join(parts)


def points_of(
    predictor: Predictor, sets: dict[str, dict[str, Cell]], column: dict[str, Difference]
) -> list[tuple[float, float]]:
    """The predictor, in steps of its slope, and the difference of each row."""
    values = {name: predictor.value(sets[name]) for name in column}
    return [
        (math.log2(value) if predictor.log else value / predictor.per, column[name].mean)
        for name, value in values.items()
        if value is not None
    ]


def figure_of(
    predictor: Predictor, sets: dict[str, dict[str, Cell]], titles: dict[str, str], methods: Sequence[str]
) -> Figure:
    """A panel for each method: its difference to L2 against the predictor, with intervals, and a point for each row."""
    values = {name: value for name, cells in sets.items() if (value := predictor.value(cells)) is not None}
    found = {name: differences_of(sets[name]) for name in values}
    methods = [method for method in methods if sum(method in ours for ours in found.values()) > 1]
    with our_look():
        figure = Figure(figsize=(PAGE, 2.4), layout="constrained")
        panels = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            style = style_of(method, list(methods))
            both = [(values[name], ours[method]) for name, ours in found.items() if method in ours]
            means = [difference.mean for _, difference in both]
            ends = [
                ((d.low, d.high) if d.low is not None and d.high is not None else (d.mean, d.mean)) for _, d in both
            ]
            around = [
                [mean - low for mean, (low, _) in zip(means, ends, strict=True)],
                [high - mean for mean, (_, high) in zip(means, ends, strict=True)],
            ]
            axes.axhline(0, color="black", linewidth=0.6)
            axes.errorbar([x for x, _ in both], means, around, fmt=style.marker, color=style.colour, capsize=2)
            axes.set_title(titles[method])
            if predictor.log:
                ticks = sorted({round(value) for value in values.values()})
                axes.set_xscale("log", base=2)
                axes.set_xticks(ticks, [str(tick) for tick in ticks])
        panels[0].set_ylabel("difference to L2, points")
        figure.supxlabel(predictor.axis, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="one for each data set and network; files are skipped")
    parser.add_argument("--confidence", type=Path, help="the file of distance_from_source.py")
    parser.add_argument("--figures", type=Path, help="draw the differences, too: writes PNG and PDF into this folder")
    arguments = parser.parse_args()
    sets: dict[str, dict[str, Cell]] = {}
    kept: dict[str, dict[str, Cell]] = {}
    titles: dict[str, str] = {}
    for folder in filter(Path.is_dir, arguments.folders):
        records = read_all([folder])[0]
        if cells := cells_of(records):
            name = f"{folder.parent.name}/{folder.name}"
            sets[name], kept[name] = cells, cells_of(records, KEPT)
            titles |= {method: method_title(cell.runs[0]) for method, cell in cells.items()}
    if not sets:
        raise SystemExit("These folders have no finished run.")
    confidence = json.loads(arguments.confidence.read_text()) if arguments.confidence else None
    print(reading(sets, titles, kept, confidence))
    versions = {str(cell.runs[0].get("versions")) for cells in sets.values() for cell in cells.values()}
    cards = {str(section(cell.runs[0], "backbone").get("name")) for cells in sets.values() for cell in cells.values()}
    print(f"\nBackbones: {', '.join(sorted(cards))}. Versions: {'; '.join(sorted(versions))}")
    if arguments.figures:
        rivals = [method for method in sorted(titles, key=method_order) if method != BASELINE]
        for predictor in predictors(confidence):
            methods = [method for method in rivals if method != predictor.of_itself]
            write_figure(figure_of(predictor, sets, titles, methods), arguments.figures / predictor.name)


if __name__ == "__main__":
    main()
