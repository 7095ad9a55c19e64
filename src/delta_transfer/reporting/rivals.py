"""Is the best choice on held-out images better by more than noise? If not, which of its equals is the simplest?

Differences are paired over the images that the folds held out: one network of each candidate did not see them. If a run
kept no predictions, differences are paired over folds. Test images take no part in this.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..common.style import method_order
from ..records.arrays import VALIDATION, Predictions, pooled, predictions
from ..records.reading import Record, method_of, section
from .comparison import Cell, grouped, mean_of_all, recorded
from .record_views import dataset_and_backbone, settings
from .selection import Choice
from .statistics import Difference, by_image, image_differences, paired, paired_values

RULES = ("simple", "best")  # simple: the simplest within one standard error of the best
CHEAPEST = ("l2_fe", "l2")  # L2-FE costs a third of L2, which has only weight decay; others follow as in tables


@dataclass(frozen=True)
class Rival:
    choice: Choice
    difference: Difference  # the best minus this one
    error: float | None  # the standard error of the difference; None for a single value
    over: str  # images | folds | seeds

    @property
    def standing(self) -> str:
        """near: the 95 % interval contains zero, or hardly any image differs; far: it does not; open: no interval."""
        if self.difference.low is None:
            return "near" if self.over == "images" or self.difference.mean == 0 else "open"
        return "far" if self.difference.excludes_zero else "near"

    @property
    def equal(self) -> bool:
        """Whether it is within one standard error of the best."""
        return self.difference.merit <= (self.error or 0.0) + 1e-9

    def __str__(self) -> str:
        points = " points" * self.difference.kind.percent
        return f"{self.choice.what} ({self.difference.signed(-self.difference.mean)}{points})"


def rivals_of(best: Choice, choices: Iterable[Choice], metric: str = "val_top1") -> list[Rival]:
    """The other choices with the same folds and seeds as the best one, the nearest first. Raises Damaged."""
    keys = best.best.cell.values.keys()
    others = [one for one in choices if one is not best and one.best.cell.values.keys() == keys]
    found = [compared(best, one, "balanced" in metric) for one in others]
    return sorted(found, key=lambda rival: rival.difference.merit)


def compared(best: Choice, other: Choice, balanced: bool) -> Rival:
    ours, theirs = best.best.cell, other.best.cell
    if pairs := pairs_of(ours, theirs):
        of_images = image_differences(pairs, balanced)
        return Rival(
            other, by_image(pairs, balanced), float(of_images.std(ddof=1)) / math.sqrt(len(of_images)), "images"
        )
    difference, each = paired(ours, theirs), paired_values(ours, theirs)
    assert difference is not None, "both have the same folds"
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    return Rival(other, difference, error, f"{difference.over}s")


def pairs_of(ours: Cell, theirs: Cell) -> list[tuple[Predictions, Predictions]]:
    """For each seed, both predictions for the same held-out images; [] if some are missing or differ."""
    pairs = list(zip(held_out(ours), held_out(theirs), strict=False))
    same = all(np.array_equal(one.index, pairs[0][0].index) for pair in pairs for one in pair)
    return pairs if pairs and same and len(pairs[0][0].index) > 1 else []


def held_out(cell: Cell) -> list[Predictions]:
    """For each seed, the predictions for the images of all folds, in data set order; [] if a run has none."""
    found = [
        (seed, predictions(run, VALIDATION) if run.get("folder") else None)
        for (seed, _), run in zip(cell.values, cell.runs, strict=True)
    ]
    parts = [(seed, made) for seed, made in found if made]
    by_seed = grouped(parts, lambda one: one[0]) if len(parts) == len(found) else []
    return [pooled([made for _, made in own]) for _, own in sorted(by_seed, key=lambda one: one[0])]


# ---- the rule --------------------------------------------------------------------------------------------


def simplest(best: Choice, rivals: Sequence[Rival]) -> Choice:
    """The one-standard-error rule: the choice with the cheapest network, then method, among the best and its equals."""
    equals = [best, *(rival.choice for rival in rivals if rival.equal)]
    costs = cost_of_networks([best, *(rival.choice for rival in rivals)])
    return min(equals, key=lambda one: (costs[network_of(one)], *simplicity(method_of(one.best.cell.runs[0]))))


def simplicity(method: str) -> tuple[int, tuple[int, str]]:
    return CHEAPEST.index(method) if method in CHEAPEST else len(CHEAPEST), method_order(method)


def network_of(choice: Choice) -> str:
    return str(section(choice.best.cell.runs[0], "backbone")["name"])


def cost_of_networks(choices: Sequence[Choice]) -> dict[str, int]:
    """The rank of each network by the seconds of a run, with one method for all of them if possible."""
    seconds: dict[str, dict[str, float]] = {}
    processor = "train_processor_seconds"  # other programs do not lengthen it; not recorded on a GPU
    all_have_it = mean_of_all([run for one in choices for run in one.best.cell.runs], processor) is not None
    for one in choices:
        times = recorded(one.best.cell.runs, processor if all_have_it else "train_seconds")
        seconds.setdefault(network_of(one), {})[method_of(one.best.cell.runs[0])] = min(times, default=0.0)
    shared = set.intersection(*({*found} for found in seconds.values()))
    method = min(shared, key=method_order, default=None)

    def cost(network: str) -> float:
        found = seconds[network]
        return found[method] if method else min(found.values())

    return {network: rank for rank, network in enumerate(sorted(seconds, key=lambda one: (cost(one), one)))}


# ---- words -----------------------------------------------------------------------------------------------


def in_words(best: Choice, rivals: Sequence[Rival]) -> list[str]:
    """Sentences about the choices within noise of the best, and those behind it by more than noise."""
    counts = {rival.over: rival.difference.n for rival in rivals}
    over = " and ".join(f"{n} {'held-out images' if kind == 'images' else kind}" for kind, n in counts.items())
    said = {
        "near": f"within noise of {best.what}, paired over {over}",
        "far": f"behind {best.what} by more than noise, paired over {over}",
        "open": f"behind {best.what} by as much every time, which has no interval",
    }
    found = {kind: [str(rival) for rival in rivals if rival.standing == kind] for kind in said}
    return [f"{said[kind]}: {', '.join(names)}" for kind, names in found.items() if names]


def between_methods(choices: Sequence[Choice], prefer: str, metric: str = "val_top1") -> list[str]:
    """Sentences that compare the methods of each data set, network and setting outside reg. prefer: one of RULES."""
    lines = []
    for _, alike in grouped(choices, place_of):
        most = max(one.best.cell.n for one in alike)
        whole = [one for one in alike if one.best.cell.n == most]  # a missing fold may be the hardest one
        if len(whole) > 1:
            best = max(whole, key=lambda one: one.best.cell.merit)
            rivals = rivals_of(best, whole, metric)
            lines += in_words(best, rivals)
            chosen = simplest(best, rivals) if prefer == "simple" else best
            how = "the simplest within one standard error of the best" if prefer == "simple" else "the best mean"
            lines.append(f"between methods: {chosen.what}, {how}")
    return lines


def place_of(choice: Choice) -> str:
    run = choice.best.cell.runs[0]
    return repr((dataset_and_backbone(run), sorted(settings(run, "val_top1").items())))


def files_of(runs: Iterable[Record]) -> list[str]:
    """The files with predictions for the held-out images, which not every task keeps."""
    files = [run["folder"] / f"{VALIDATION}.npz" for run in runs if run.get("folder")]
    return [str(file) for file in files if file.is_file()]
