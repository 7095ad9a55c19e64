"""Does fine-tuning with DELTA bring unused channels of the source network to life, as its paper says?

    python scripts/read_channels.py RESULTS [--images 128] [--silent 0.1 0.25] [--methods l2,delta_noatt,delta]

RESULTS holds one folder of finished runs for each data set (backbones_table.py, when_does_it_help.py), with their
weights. inspect/unused_channels.py defines activations and silence: a source channel is silent below a fraction of its
tap's median channel, and comes to life if it reaches that limit after fine-tuning. The table has the percentage of
silent channels that come to life, over all taps, and differences to L2 that are paired by seed, with 95 % t intervals.
Activations are averaged over test images without their labels.
"""

import argparse
from pathlib import Path

from delta_transfer.common.console import show_messages
from delta_transfer.inspect.replay import replay
from delta_transfer.inspect.unused_channels import Change, changes_of, count
from delta_transfer.methods import METHODS
from delta_transfer.records.reading import read_all
from delta_transfer.reporting.comparison import Cell
from delta_transfer.reporting.statistics import paired
from read_study import BASELINE, cells_of, table


def silent_and_woken(change: Change, fraction: float) -> tuple[int, int]:
    """The number of channels that are silent in the source, over all taps, and how many of them come to life."""
    found = [count(change.source[tap], change.target[tap], fraction) for tap in change.source]
    return sum(one.silent for one in found), sum(one.woken for one in found)


def rows_of(folder: Path, methods: list[str], fractions: list[float], images: int) -> list[list[object]]:
    """A row for each fraction and method."""
    cells = {method: cell for method, cell in cells_of(read_all([folder])[0]).items() if method in methods}
    runs = {method: [replay(Path(run["folder"])) for run in cell.runs] for method, cell in cells.items()}
    everything = [run for of_method in runs.values() for run in of_method]
    changes, _ = changes_of(everything, [run.run_id for run in everything], images)
    rows: list[list[object]] = []
    for fraction in fractions:
        counts = {change.label: silent_and_woken(change, fraction) for change in changes}
        silent = counts[changes[0].label][0]
        shares = {run: 100 * woken / silent for run, (_, woken) in counts.items()} if silent else {}
        woken = {
            method: Cell(dict(zip(cell.values, (shares[run.run_id] for run in runs[method]), strict=True)))
            for method, cell in cells.items()
            if silent
        }
        for method in methods:
            cell = woken.get(method)
            difference = paired(cell, woken[BASELINE]) if cell and method != BASELINE and BASELINE in woken else None
            rows.append([folder.name, fraction, silent, METHODS[method].title, cell, difference])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="holds one folder for each data set")
    parser.add_argument("--images", type=int, default=128, help="test images of each data set (default: 128)")
    parser.add_argument("--silent", type=float, nargs="+", default=[0.1], help="fractions of the median channel")
    parser.add_argument("--methods", default="l2,delta_noatt,delta", help="(default: l2,delta_noatt,delta)")
    parser.add_argument("--only", help="names of data sets (default: all)")
    arguments = parser.parse_args()
    show_messages(information_on_stderr=True)
    folders = sorted(path for path in arguments.results.iterdir() if path.is_dir())
    wanted = arguments.only.split(",") if arguments.only else [folder.name for folder in folders]
    rows = [
        row
        for folder in folders
        if folder.name in wanted
        for row in rows_of(folder, arguments.methods.split(","), arguments.silent, arguments.images)
    ]
    print(table(["data set", "limit", "silent channels", "method", "come to life, %", "difference to L2"], rows))


if __name__ == "__main__":
    main()
