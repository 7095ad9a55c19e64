"""Do regularised methods learn faster, and on smoother curves? Test accuracy during training, compared with L2.

    python scripts/read_curves.py results/published/table_quick/five_seeds

The records need measurements during training (schedule.eval_every). Each table has a row for each method and 95 % t
intervals of differences to L2 that are paired by seed, in points:

- accuracy at each measured iteration. A method that learns faster is ahead by more in the beginning than at the end.
- what is still missing there: accuracy at the end minus accuracy at that iteration. Where the difference is below zero,
  the method has come closer to its own end.
- roughness: the mean of |a(t+1) - 2 a(t) + a(t-1)| over the measured iterations, with four or more of them.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean

from delta_transfer.records.reading import Record, method_title, read_all
from delta_transfer.reporting.comparison import Cell
from delta_transfer.reporting.statistics import Difference, mean_of
from read_study import BASELINE, METRIC, cells_of, table

Curve = dict[int, float]  # accuracy by iteration
FEWEST_POINTS = 4  # for the roughness of a curve


def curve_of(record: Record) -> Curve:
    return {line["step"]: line[METRIC] for line in record.get("metrics") or [] if METRIC in line}


def curves_of(cell: Cell) -> list[Curve]:
    """By seed, in the order of the seeds."""
    return [curve_of(run) for _, run in sorted(zip(cell.values, cell.runs, strict=True), key=lambda one: one[0])]


def roughness(curve: Curve) -> float:
    values = [curve[step] for step in sorted(curve)]
    triples = zip(values, values[1:], values[2:], strict=False)
    return fmean(abs(after - 2 * here + before) for before, here, after in triples)


def compared(ours: Iterable[Curve], theirs: Iterable[Curve], value: Callable[[Curve], float]) -> Difference:
    return mean_of([value(one) - value(other) for one, other in zip(ours, theirs, strict=True)])


def reading(cells: dict[str, Cell]) -> str:
    """The tables. Raises SystemExit without a baseline, without curves, and for runs of other seeds than L2's."""
    if BASELINE not in cells:
        raise SystemExit("no finished run of L2")
    curves = {method: curves_of(cell) for method, cell in cells.items()}
    steps = sorted(set.intersection(*(set(curve) for found in curves.values() for curve in found)))
    if len(steps) < 2:
        raise SystemExit("The runs have no two common iterations with a measurement: set schedule.eval_every.")
    for method, cell in cells.items():
        if cell.values.keys() != cells[BASELINE].values.keys():
            raise SystemExit(f"{method} has other seeds than L2.")
    rivals = {method_title(cells[method].runs[0]): found for method, found in curves.items() if method != BASELINE}

    def rows(values: Sequence[Callable[[Curve], float]]) -> list[list[object]]:
        return [[title, *(compared(found, curves[BASELINE], one) for one in values)] for title, found in rivals.items()]

    at = [lambda curve, step=step: curve[step] for step in steps]
    missing = [lambda curve, step=step: curve[steps[-1]] - curve[step] for step in steps[:-1]]
    parts = [
        "Difference to L2 at each measured iteration:\n\n" + table(["method", *map(str, steps)], rows(at)),
        "What is still missing, minus what L2 misses:\n\n" + table(["method", *map(str, steps[:-1])], rows(missing)),
    ]
    if len(steps) >= FEWEST_POINTS:
        l2 = fmean(map(roughness, curves[BASELINE]))
        header = ["method", f"roughness minus that of L2, which is {l2:.2f} points"]
        parts.append("Roughness:\n\n" + table(header, rows([roughness])))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="runs or published records of one data set")
    print(reading(cells_of(read_all([parser.parse_args().folder])[0])))


if __name__ == "__main__":
    main()
