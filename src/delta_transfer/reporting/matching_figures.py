"""Figures of what L2T-ww matched: which source tap with which target tap, how much at the end and over training.

They come from the records alone: metrics.jsonl has the mean of lambda over images of every pair, `attention_<pair>`.
"""

from dataclasses import dataclass
from functools import cached_property
from textwrap import wrap
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec

from .comparison import Comparison, averaged_over
from .drawing import LINE, PAGE, Named, averages, our_look, sheet, stem_of
from .logs import Curves, matched_curves

COLOURS = "viridis"


@dataclass(frozen=True)
class Matched:
    """The taps of one source with the target's; a pair that was not matched is in neither dictionary."""

    source: str
    mean: dict[tuple[str, str], pd.Series]  # by (source tap, target tap): lambda by step
    half: dict[tuple[str, str], pd.Series]  # half its interval; NaN for a single run

    @cached_property
    def source_taps(self) -> list[str]:
        return list(dict.fromkeys(m for m, _ in self.mean))

    @cached_property
    def target_taps(self) -> list[str]:
        return list(dict.fromkeys(n for _, n in self.mean))

    def at_the_end(self) -> np.ndarray:
        """(source taps, target taps); NaN for a pair that was not matched."""
        found = [[self.mean.get((m, n)) for n in self.target_taps] for m in self.source_taps]
        return np.array([[np.nan if curve is None else curve.iloc[-1] for curve in row] for row in found])


def matching_figures(comparison: Comparison, groups: list[list[Curves]]) -> list[Named]:
    """A figure for each row of the comparison and method whose runs logged amounts."""
    made: list[Named] = []
    for curves, sources in matched_curves(groups):
        found = []
        for source, pairs in sources.items():
            both = {pair: curves.of(column) for pair, column in pairs.items()}
            mean, half = ({pair: one[i] for pair, one in both.items()} for i in (0, 1))
            found.append(Matched(source, mean, half))
        row, method = curves.row, curves.method
        where = f"{comparison.place_title(row.place)}; {comparison.label(method, row.reg)}"
        figure = figure_of(found, where, curves.n, averaged_over([row.cells[method]]))
        made.append((stem_of("matching", row.dataset, row.backbone), figure))
    return made


def figure_of(found: list[Matched], where: str, n: int, over: str) -> Figure:
    """A line for each source: a heat map of the amounts at the end, and the amount of each pair over training."""
    title = f"What is matched, how much: {where}"
    caption = (
        "Mean amount lambda of each pair of taps over the training images since the log line before. Left: at the last "
        f"one (–: no such pair). Right: over training, each panel in its pair's place, all with the same axes. "
        f"{averages([n], over, 'band')} Amounts weigh errors of maps of different scales: they say where the method "
        "pulled, not how much a layer matters."
    )
    longest = max(len(tap) for one in found for tap in one.target_taps)
    slanted = longest > 6
    heights = [0.4 * max(3, len(one.source_taps)) + 0.75 + slanted * 0.05 * longest + LINE for one in found]
    highest = max(1e-9, *(np.nanmax(curve) for one in found for curve in one.mean.values()))
    last = max(curve.index[-1] for one in found for curve in one.mean.values())
    with our_look():
        figure = sheet(PAGE, sum(heights), title, caption, [])
        rows = figure.add_gridspec(len(found), 2, width_ratios=[2, 3], height_ratios=heights)
        for i, one in enumerate(found):
            draw_map(figure.add_subplot(rows[i, 0]), one, highest, slanted)
            draw_panels(figure, rows[i, 1], one, last, 1.08 * highest)
    return figure


def draw_map(axes: Axes, one: Matched, highest: float, slanted: bool) -> None:
    amounts = one.at_the_end()
    colours = matplotlib.colormaps[COLOURS]
    axes.imshow(amounts, cmap=colours, vmin=0, vmax=highest, aspect="auto")
    for (r, c), amount in np.ndenumerate(amounts):
        known = not np.isnan(amount)
        dark = known and amount < 0.6 * highest
        text = f"{amount:.2f}" if known else "–"
        axes.text(c, r, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    slant: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(len(one.target_taps)), one.target_taps, fontsize=7, **slant)
    axes.set_yticks(range(len(one.source_taps)), one.source_taps, fontsize=7)
    axes.set(xlabel="Target tap", ylabel="\n".join(wrap(f"Tap of {one.source}", 22)))
    axes.tick_params(length=0)
    axes.grid(visible=False)


def draw_panels(figure: Figure, place: SubplotSpec, one: Matched, last: int, highest: float) -> None:
    """A panel for each pair; numbers stand beside the first one of each row and below the last one of each column."""
    grid = place.subgridspec(len(one.source_taps), len(one.target_taps))
    first = {m: next(n for n in one.target_taps if (m, n) in one.mean) for m in one.source_taps}
    lowest = {n: [m for m in one.source_taps if (m, n) in one.mean][-1] for n in one.target_taps}
    for m, n in one.mean:
        axes = figure.add_subplot(grid[one.source_taps.index(m), one.target_taps.index(n)])
        axes.set_label(f"{one.source}: {m} > {n}")
        draw_over_training(axes, one.mean[m, n], one.half[m, n])
        is_last = n == one.target_taps[-1]
        # Beside another panel there is no room for two numbers.
        axes.set_xticks([0, last], ["0", str(last) if is_last else ""])
        axes.set(xlim=(0, last), ylim=(0, highest))
        axes.tick_params(labelsize=6, labelbottom=lowest[n] == m, labelleft=first[m] == n)
        if lowest[n] == m:
            left, right = axes.get_xticklabels()
            left.set_horizontalalignment("left")
            right.set_horizontalalignment("right")
            if is_last:
                axes.set_xlabel("Iteration")


def draw_over_training(axes: Axes, mean: pd.Series, half: pd.Series) -> None:
    single = len(mean) == 1  # a line would not show it
    axes.plot(mean.index, mean, color="#332288", marker="o" if single else "", markersize=2, linewidth=1)
    if half.notna().any():
        axes.fill_between(mean.index, mean - half, mean + half, color="#332288", alpha=0.2, linewidth=0)
