"""The metrics of a cell's runs, averaged by step, for learning curves and for the pairs of taps that L2T-ww matched."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..common.console import QUIET, Display, Warn, shorten_list
from ..records.metrics import TASK_LOSSES, is_loss
from ..records.reading import Damaged, Record, metrics, names_of_sources, run_id
from .comparison import Cell, Comparison, Row
from .statistics import half_width

DECADES = 100  # curves whose largest value is so many times their smallest one get a logarithmic axis

# The amount of a pair of taps that L2T-ww matched; `term` is the name of a term of a sum.
PAIR = re.compile(r"attention_(?:(?P<term>[^>]*)\.)?(?P<source>[^.>]+)>(?P<target>[^.>]+)")


@dataclass(frozen=True)
class Curves:
    """The logs of the runs of a cell: mean by step and half its 95 % t interval, a column for each quantity.

    Both are NaN at steps where a run has no value, so that n is the same along a curve. A single run has no interval.
    """

    method: str
    row: Row
    n: int  # runs
    mean: pd.DataFrame
    half: pd.DataFrame
    each: list[tuple[Record, pd.DataFrame]]  # its runs and their logs

    @property
    def columns(self) -> list[str]:
        return list(map(str, self.mean.columns))

    def of(self, column: str) -> tuple[pd.Series, pd.Series]:
        """Mean and half interval of one quantity, without steps that any run lacks."""
        mean = self.mean[column].dropna()
        return mean, self.half[column].reindex(mean.index)


def limits(
    lines: Sequence[tuple[Sequence[float], Sequence[float] | None]], largest: float = math.inf
) -> tuple[float, float]:
    """The ends of an axis for lines and half the heights of their bands: all lines, and bands up to a third beyond.

    The interval of two runs is so wide that it would flatten every line. A band of values that are not negative ends at
    0, and no band goes above `largest`.
    """
    means = [np.asarray(mean, float) for mean, _ in lines]
    halves = [np.zeros(1) if half is None else np.asarray(half, float) for _, half in lines]
    low, high = min(mean.min() for mean in means), max(mean.max() for mean in means)
    least = min((mean - half).min() for mean, half in zip(means, halves, strict=True))
    most = max((mean + half).max() for mean, half in zip(means, halves, strict=True))
    room = (high - low) / 3 or max(most - high, 0.5)
    margin = 0.05 * (high - low or abs(high) or 1)
    least, most = max(least, low - room, 0.0 if low >= 0 else -math.inf), min(most, high + room, largest)
    return float(least - margin), float(most + margin)


def curves_of(comparison: Comparison, warn: Warn) -> list[list[Curves]]:
    """The curves of each group of comparable rows, in the order of the methods.

    warn: called with a line about each damaged file, and one about all runs without metrics.
    """
    without: list[str] = []
    display = Display("reading the metrics of runs", len(comparison.results), "result", quiet_seconds=QUIET)
    groups: list[list[Curves | None]] = []
    for _, results in comparison.places:
        display.update(sum(len(group) for group in groups))
        groups.append([read_curves(*one, warn, without) for one in results])
    if without:
        warn(f"no learning curves of {len(without)} runs without metrics: {shorten_list(without)}")
    return [found for curves in groups if (found := [one for one in curves if one])]


def read_curves(method: str, row: Row, cell: Cell, warn: Warn, without: list[str]) -> Curves | None:
    """The curves of one cell; None without any metrics. Adds the names of its runs without metrics to `without`."""
    each = []
    for run in cell.runs:
        try:
            frame = metrics(run)
        except Damaged as error:
            warn(f"not in the learning curves: {error}")
            continue
        if frame is None:
            without.append(run_id(run))
        else:
            each.append((run, frame))
    if not each:
        return None
    n, steps = len(each), pd.concat([frame for _, frame in each]).groupby("step")
    complete = steps.count() == n
    half = steps.std().where(complete) * (half_width(1, n) if n > 1 else 1)
    return Curves(method, row, n, steps.mean().where(complete), half, each)


@dataclass(frozen=True)
class Matched:
    """The taps of one source with the target's. A pair that was not matched is in neither dictionary."""

    source: str
    mean: dict[tuple[str, str], pd.Series]  # by (source tap, target tap): lambda by step
    half: dict[tuple[str, str], pd.Series]  # half its interval; NaN for a single run

    @property
    def source_taps(self) -> list[str]:
        return list(dict.fromkeys(m for m, _ in self.mean))

    @property
    def target_taps(self) -> list[str]:
        return list(dict.fromkeys(n for _, n in self.mean))

    def at_the_end(self) -> np.ndarray:
        """(source taps, target taps); NaN for a pair that was not matched."""
        found = [[self.mean.get((m, n)) for n in self.target_taps] for m in self.source_taps]
        return np.array([[np.nan if curve is None else curve.iloc[-1] for curve in row] for row in found])


def matched_curves(groups: list[list[Curves]]) -> Iterator[tuple[Curves, list[Matched]]]:
    """Each cell whose runs logged the amounts of matched pairs (L2T-ww), with the amounts by source network."""
    for curves in (one for group in groups for one in group):
        columns = curves.mean.columns[curves.mean.notna().any()]
        found = []
        for source, pairs in matched_pairs(columns, names_of_sources(curves.each[0][0])).items():
            both = {pair: curves.of(column) for pair, column in pairs.items()}
            mean, half = ({pair: one[i] for pair, one in both.items()} for i in (0, 1))
            found.append(Matched(source, mean, half))
        if found:
            yield curves, found


def penalty_terms(columns: Iterable[str]) -> list[str]:
    """The columns of loss terms beside the task's, including Inception's auxiliary one."""
    return [name for name in columns if is_loss(name) and name not in TASK_LOSSES]


def matched_pairs(columns: Iterable[str], sources: Iterable[str]) -> dict[str, dict[tuple[str, str], str]]:
    """The columns with the amounts of matched pairs: by source network, then by (source tap, target tap).

    sources: names of the networks that the run learned from, without the one that its target started from.
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
