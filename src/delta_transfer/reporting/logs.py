"""The metrics of a cell's runs, averaged by step, for learning curves and for the pairs of taps that L2T-ww matched."""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from ..common.console import shorten_list
from ..records.reading import Damaged, metrics, run_id
from .comparison import Cell

if TYPE_CHECKING:
    import pandas as pd

Warn = Callable[[str], None]

NOT_TERMS = re.compile(
    "step|stage|lr|attention_.*|cross_entropy|loss|gradient_norm|train_top1|images_per_second|(test|val)_.*"
)

# The amount of a pair of taps that L2T-ww matched; `term` is the name of a term of a sum.
PAIR = re.compile(r"attention_(?:(?P<term>[^>]*)\.)?(?P<source>[^.>]+)>(?P<target>[^.>]+)")


def frames_of(cell: Cell, warn: Warn, without: list[str]) -> "list[pd.DataFrame]":
    """The metrics of each run of a cell, indexed by step.

    `warn` gets a line for each damaged file; `without` gets the name of each run that has no metrics.
    """
    frames = []
    for run in cell.runs:
        try:
            frame = metrics(run)
        except Damaged as error:
            warn(f"not in the learning curves: {error}")
            continue
        if frame is None:
            without.append(run_id(run))
        else:
            frames.append(frame.set_index("step"))
    return frames


def name_missing(without: list[str], warn: Warn) -> None:
    if without:
        warn(f"no learning curves of {len(without)} runs without metrics: {shorten_list(without)}")


def over_runs(frames: "list[pd.DataFrame]") -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Mean and sample std by step, a column for each quantity.

    Both are NaN where a run has no value, so that n is the same along a curve; the std of a single run is NaN too.
    """
    import pandas as pd

    steps = pd.concat(frames).groupby("step")
    complete = steps.count() == len(frames)
    return steps.mean().where(complete), steps.std().where(complete)


def penalty_terms(columns: Iterable[str]) -> list[str]:
    """The columns that are loss terms beside the cross-entropy, Inception's auxiliary one among them."""
    return [name for name in columns if not NOT_TERMS.fullmatch(name)]


def matched_pairs(columns: Iterable[str], sources: Iterable[str]) -> dict[str, dict[tuple[str, str], str]]:
    """The columns with the amounts of matched pairs: by source network, then by (source tap, target tap).

    `sources`: names of the networks that the run learned from, without the one that its target started from.
    """
    longest_first = sorted(sources, key=len, reverse=True)
    found: dict[str, dict[tuple[str, str], str]] = {}
    for column in columns:
        if pair := PAIR.fullmatch(column):
            key = pair["source"]
            name = next((name for name in longest_first if key.startswith(f"{name}/")), None)
            tap = key.removeprefix(f"{name}/") if name else key
            title = ", ".join(filter(None, [pair["term"], name or "source network"]))
            found.setdefault(title, {})[tap.replace("/", "."), pair["target"].replace("/", ".")] = column
    return found
