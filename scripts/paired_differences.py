"""Difference of two sets of runs, paired by seed, with a 95 % t interval.

python scripts/paired_differences.py results/published/cub50/final delta l2
python scripts/paired_differences.py results/published/cub50/final delta results/published/cub50/beta_only l2_sp
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats


def by_seed(folder: str, method: str) -> dict[int, float]:
    """Test top-1 accuracies in percent of the finished runs of `method`; refuses two runs of one seed."""
    records = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*/summary.json"))]
    chosen = [r for r in records if r["config"]["reg"]["name"] == method and r["error"] is None]
    seeds = [r["seed"] for r in chosen]
    if len(set(seeds)) < len(seeds):
        raise SystemExit(f"{folder} holds several runs of {method} with one seed: the pairing is not defined.")
    return {r["seed"]: r["test_top1"] for r in chosen}


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[list[float], float, tuple[float, float]]:
    """Differences over the common seeds, their mean, and its 95 % t interval (n - 1 degrees of freedom)."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        raise SystemExit("An interval needs at least two common seeds.")
    differences = np.array([ours[seed] - theirs[seed] for seed in seeds])
    low, high = stats.t.interval(0.95, len(seeds) - 1, differences.mean(), stats.sem(differences))
    return differences.tolist(), differences.mean(), (low, high)


def main() -> None:
    arguments = sys.argv[1:]
    if len(arguments) not in (3, 4):
        raise SystemExit(__doc__)
    folder, method, *other = arguments
    other = other if len(other) == 2 else [folder, *other]
    differences, mean, (low, high) = paired(by_seed(folder, method), by_seed(*other))
    each = ", ".join(f"{d:+.1f}" for d in differences)
    print(
        f"{method} - {other[1]}: {mean:+.1f} ({each}; n={len(differences)}, 95 % t interval {low:+.1f} to {high:+.1f})"
    )


if __name__ == "__main__":
    main()
