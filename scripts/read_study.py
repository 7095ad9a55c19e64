"""Evaluates the study of when regularised fine-tuning helps: its records become tables in Markdown.

    python scripts/read_study.py results/published/when_does_it_help

Each folder below the first one holds the runs, or the published records, of one data set (when_does_it_help.py). The
tables have test accuracy, the differences to L2 paired by seed with 95 % t intervals, their mean over data sets with a
t interval over data sets, forgetting, mean ranks with Nemenyi's critical difference, and the line of least squares of
each method's difference against how well frozen features do (L2-FE - L2). A dash stands for unfinished runs.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from scipy import stats

from delta_transfer.records.reading import Record, folds, method_of, method_title, read_all, section
from delta_transfer.reporting.comparison import Cell
from delta_transfer.reporting.record_views import problem, replicate
from delta_transfer.reporting.statistics import Difference, half_width, paired, ranks

METRIC = "test_top1"
KEPT = "kept_agreement"  # on how many test images the source's own head still says the same
BASELINE, FROZEN = "l2", "l2_fe"
FEWEST_SETS = 3  # for an interval over data sets; a line needs one more


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


def line_through(x: Sequence[float], y: Sequence[float]) -> str:
    """The slope of least squares with its 95 % interval; a dash for fewer points than an interval needs."""
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
    found = {
        name: {m: d for m in rivals if m in cells and BASELINE in cells and (d := paired(cells[m], cells[BASELINE]))}
        for name, cells in sets.items()
    }
    means = {m: [found[name][m].mean for name in sets if m in found[name]] for m in rivals}
    accuracies = table(["data set", *names], ([name, *map(cells.get, methods)] for name, cells in sets.items()))
    differences = table(
        ["data set", *(titles[m] for m in rivals)],
        [
            *([name, *map(found[name].get, rivals)] for name in sets),
            ["**mean over data sets**", *(over_sets(means[m]) for m in rivals)],
        ],
    )
    parts = [
        f"Test top-1 %, mean ± sample std over seeds (n):\n\n{accuracies}",
        f"Difference to L2 in points, paired by seed, 95 % t intervals (n); the last row is over data sets:\n\n"
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
        words = ", ".join(f"{titles[m]} {rank:.1f}" for m, rank in sorted(ranked.mean.items(), key=lambda one: one[1]))
        parts.append(
            f"Mean ranks over {ranked.rows} data sets (1 is the most accurate): {words}. "
            + (
                f"Friedman's test: p = {ranked.friedman_p:.2g}; ranks further apart than "
                f"{ranked.critical_difference:.1f} differ (Nemenyi, 95 %)."
                if ranked.critical_difference is not None
                else "Too few data sets for a critical difference."
            )
        )
    lines = []
    for method in rivals:
        pairs = [
            (found[name][FROZEN].mean, found[name][method].mean)
            for name in sets
            if method != FROZEN and {method, FROZEN} <= found[name].keys()
        ]
        ahead = [name for name, ours in found.items() if method in ours and ours[method].excludes_zero]
        better = [name for name in ahead if found[name][method].mean > 0]
        slope = line_through([x for x, _ in pairs], [y for _, y in pairs])
        count = f"{len(better)}, {len(ahead) - len(better)} of {len(means[method])}"
        lines.append([titles[method], count, slope])
    parts.append(
        "How often the interval of a data set leaves out zero, and how a method's difference to L2 grows with that of "
        "frozen features (points per point of L2-FE - L2, 95 % interval, number of data sets):\n\n"
        + table(["method", "ahead of L2, behind L2", "slope"], lines)
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds one folder for each data set")
    folder = parser.parse_args().folder
    sets: dict[str, dict[str, Cell]] = {}
    kept: dict[str, dict[str, Cell]] = {}
    titles: dict[str, str] = {}
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        records = read_all([below])[0]
        if cells := cells_of(records):
            sets[below.name], kept[below.name] = cells, cells_of(records, KEPT)
            titles |= {method: method_title(cell.runs[0]) for method, cell in cells.items()}
    if not sets:
        raise SystemExit(f"{folder}: no finished run below it.")
    print(reading(sets, titles, kept))
    versions = {str(cell.runs[0].get("versions")) for cells in sets.values() for cell in cells.values()}
    cards = {str(section(cell.runs[0], "backbone").get("name")) for cells in sets.values() for cell in cells.values()}
    print(f"\nBackbones: {', '.join(sorted(cards))}. Versions: {'; '.join(sorted(versions))}")


if __name__ == "__main__":
    main()
