"""Evaluates the study of when regularised fine-tuning helps: its records become tables in Markdown.

    python scripts/read_study.py results/published/when_does_it_help/* [--figure FILE.png]

Each folder holds the runs, or the published records, of one data set and network, which is a row. The tables have test
accuracy, the differences to L2 and what attention adds to DELTA, paired by seed with 95 % t intervals, their means with
a t interval over data sets (first the mean of each one's rows), forgetting, mean ranks with Nemenyi's critical
difference, and the lines of least squares of each method's difference against how well frozen features do (L2-FE - L2)
and against images per class. A dash stands for unfinished runs. The figure draws the differences against L2-FE - L2.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
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


def images_per_class(cells: dict[str, Cell]) -> float:
    run = next(run for cell in cells.values() for run in cell.runs)
    return float(run["n_train"] / run["num_classes"])


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
    sets: dict[str, dict[str, Cell]], titles: dict[str, str], kept: dict[str, dict[str, Cell]] | None = None
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
    for method in rivals:
        pairs = [
            (ours[FROZEN].mean, ours[method].mean)
            for ours in found.values()
            if method != FROZEN and {method, FROZEN} <= ours.keys()
        ]
        sizes = [
            (math.log2(images_per_class(cells)), found[name][method].mean)
            for name, cells in sets.items()
            if method in found[name] and cells[method].runs
        ]
        ahead = [name for name, ours in found.items() if method in ours and ours[method].excludes_zero]
        better = [name for name in ahead if found[name][method].mean > 0]
        count = f"{len(better)}, {len(ahead) - len(better)} of {sum(method in ours for ours in found.values())}"
        lines.append([titles[method], count, line_through(pairs), line_through(sizes)])
    parts.append(
        "How often the interval of a row leaves out zero, and how a method's difference to L2 grows with that of "
        "frozen features (points per point of L2-FE - L2) and with images per class (points per doubling), with 95 % "
        "intervals and the number of rows:\n\n"
        + table(["method", "ahead of L2, behind L2", "with frozen features", "with images per class"], lines)
    )
    return "\n\n".join(parts)


def figure_of(sets: dict[str, dict[str, Cell]], titles: dict[str, str], methods: Sequence[str]) -> Figure:
    """A panel for each method: its difference to L2 against that of L2-FE, with intervals, and a point for each row."""
    found = [ours for cells in sets.values() if FROZEN in (ours := differences_of(cells))]
    with our_look():
        figure = Figure(figsize=(PAGE, 2.4), layout="constrained")
        panels = figure.subplots(1, len(methods), sharex=True, sharey=True, squeeze=False)[0]
        for axes, method in zip(panels, methods, strict=True):
            style = style_of(method, list(methods))
            both = [(ours[FROZEN].mean, ours[method]) for ours in found if method in ours]
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
        panels[0].set_ylabel("difference to L2, points")
        figure.supxlabel("L2-FE - L2, points", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="one for each data set and network; files are skipped")
    parser.add_argument("--figure", type=Path, help="draw the differences, too; writes a PNG and a PDF")
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
    print(reading(sets, titles, kept))
    versions = {str(cell.runs[0].get("versions")) for cells in sets.values() for cell in cells.values()}
    cards = {str(section(cell.runs[0], "backbone").get("name")) for cells in sets.values() for cell in cells.values()}
    print(f"\nBackbones: {', '.join(sorted(cards))}. Versions: {'; '.join(sorted(versions))}")
    if arguments.figure:
        methods = [method for method in sorted(titles, key=method_order) if method not in (BASELINE, FROZEN)]
        write_figure(figure_of(sets, titles, methods), arguments.figure.with_suffix(""))


if __name__ == "__main__":
    main()
