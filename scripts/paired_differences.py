"""Difference of two sets of runs without a common table, paired by seed, with a 95 % t interval.

python scripts/paired_differences.py results/published/cub50/final delta results/published/cub50/beta_only l2_sp
python scripts/paired_differences.py results/published/cub50/final delta l2

For the methods of one table delta-report prints the differences itself.
"""

import sys
from pathlib import Path

from delta_transfer.records.reading import method_of, read_all
from delta_transfer.reporting.comparison import Cell
from delta_transfer.reporting.record_views import problem, replicate
from delta_transfer.reporting.statistics import paired


def cell(folder: str, method: str) -> Cell:
    """Test top-1 accuracies in percent of the finished runs of `method`; refuses two runs of one seed."""
    records, _ = read_all([Path(folder)])
    usable = [record for record in records if problem(record) is None and method_of(record) == method]
    values = {replicate(record, "test_top1"): record["test_top1"] for record in usable}
    if len(values) < len(usable):
        raise SystemExit(f"{folder} holds several runs of {method} with one seed: the pairing is not defined.")
    return Cell(values)


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) not in (3, 4):
        raise SystemExit(__doc__)
    folder, method, *other = arguments
    other = other if len(other) == 2 else [folder, *other]
    ours, theirs = cell(folder, method), cell(*other)
    difference = paired(ours, theirs)
    if difference is None or difference.n < 2:
        raise SystemExit("An interval needs at least two common seeds.")
    each = ", ".join(
        f"{ours.values[key] - theirs.values[key]:+.1f}" for key in sorted(ours.values) if key in theirs.values
    )
    print(f"{method} - {other[1]}: {difference} of {each}; 95 % t interval")


if __name__ == "__main__":
    main()
