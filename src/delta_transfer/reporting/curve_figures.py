"""Figures of the logs of runs: learning curves, and the taps that L2T-ww matched.

They need only the records: metrics.jsonl has the mean of lambda over images for every pair, `attention_<pair>`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D

from ..common.console import Warn
from ..records.metrics import METRICS
from .comparison import Comparison, averaged_over, grouped
from .drawing import COLUMN, LINE, MOST, PAGE, Named, averages, look, our_look, sheet, stem_of, wide, with_interval
from .logs import DECADES, Curves, Matched, limits, matched_curves, penalty_terms


@dataclass(frozen=True)
class Line:
    """The curve of one method with one setting, in one panel, or without values in the legend."""

    label: str
    look: dict[str, Any]  # keyword arguments of Line2D
    curves: Curves

    def of(self, column: str) -> tuple["Line", pd.Series, pd.Series]:
        return self, *self.curves.of(column)


Averaged = tuple[Line, pd.Series, pd.Series]  # one quantity: mean by step and half its interval; NaN for a single run


@our_look()
def learning_curves(comparison: Comparison, groups: list[list[Curves]], warn: Warn) -> list[Named]:
    """One figure for each group of comparable rows. warn: called with a line about each thing that is left out."""
    made: list[Named] = []
    for group in groups:
        place = group[0].row.place
        lines: list[Line] = []
        for method, own in grouped(group, lambda one: one.method):
            if len(own) > MOST:
                many = f"{len(own)} settings of {comparison.display(method)}"
                warn(f"learning curves of {comparison.place_title(place)}: only the first {MOST} of {many}")
            for i, one in enumerate(own[:MOST]):
                style = look(method, comparison.methods, i, len(own[:MOST]))
                lines.append(Line(comparison.label(method, one.row.reg), style, one))
        over = averaged_over([line.curves.row.cells[line.curves.method] for line in lines])
        figure = curves_figure(
            f"Learning curves: {comparison.place_title(place)}", lines, comparison.metric, over, warn
        )
        made.append((stem_of("curves", *place[:2]), figure))
    return made


def curves_figure(title: str, lines: Sequence[Line], metric: str, over: str, warn: Warn) -> Figure:
    """A panel for each quantity. over: the replicates of the means, such as "seeds"."""
    columns = dict.fromkeys(column for line in lines for column in line.curves.columns)
    panels = {metric: METRICS[metric].axis, "loss": "Training loss"}
    panels |= {name: f"Penalty: {name.replace('_', ' ')}" for name in penalty_terms(columns) if name != "aux"}

    content: dict[str, list[Averaged]] = {}
    for column in panels:
        for line in lines:
            if column in line.curves.mean:
                averaged = line.of(column)
                if len(averaged[1]):
                    content.setdefault(column, []).append(averaged)
                else:
                    warn(f"{title}: no step at which all runs of {line.label} have {column}")

    counts = [line.curves.n for line in lines]
    alike = len(set(counts)) == 1
    labels = [line.label + ("" if alike else f" (n = {line.curves.n})") for line in lines]
    handles = [Line2D([], [], label=label, **line.look) for label, line in zip(labels, lines, strict=True)]
    caption = f"{averages(counts, over, 'band or bar')} Loss and penalties are means since the point before."
    last = max(line.curves.mean.index.max() for line in lines)
    across = len(content) if len(content) < 4 else 2 if len(content) == 4 else 3
    across = min(across, round(wide() / COLUMN) + 1)
    down = -(-len(content) // across)
    figure = sheet(COLUMN if across == 1 else wide(), 1.75 * down, title, caption, handles)
    for i, (column, drawn) in enumerate(content.items()):
        axes = figure.add_subplot(
            down, across, i + 1, ylabel="\n".join(wrap(with_interval(panels[column], counts), 21))
        )
        if len({step for _, mean, _ in drawn for step in mean.index}) == 1:
            draw_points(axes, drawn)
        else:
            draw_curves(axes, drawn, largest=100 if "(%)" in panels[column] else math.inf)
            axes.set_xlim(0, 1.03 * last)
        axes.set_xlabel("Iteration")
    return figure


def draw_curves(axes: Axes, averaged: list[Averaged], largest: float) -> None:
    for i, (one, mean, half) in enumerate(averaged):
        apart = max(1, len(mean) // 5)  # markers: about five on a curve, not all curves at the same steps
        axes.plot(mean.index, mean, label=one.label, markevery=(i * apart // len(averaged), apart), **one.look)
        if one.curves.n > 1:
            axes.fill_between(mean.index, mean - half, mean + half, color=one.look["color"], alpha=0.15, linewidth=0)
    lowest, highest = (extreme(extreme(mean) for _, mean, _ in averaged) for extreme in (min, max))
    if lowest > 0 and highest >= DECADES * lowest:
        # A band may reach down to 0, which this axis cannot show, so that the curves decide where it begins.
        axes.set_yscale("log")
        axes.set_ylim(bottom=lowest / 1.5)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    else:
        axes.set_ylim(limits([(mean, half if half.notna().all() else None) for _, mean, half in averaged], largest))


def draw_points(axes: Axes, averaged: list[Averaged]) -> None:
    """Draws the values of a single step side by side, since the horizontal axis has nothing else to show."""
    for i, (one, mean, half) in enumerate(averaged):
        bar = [half.iloc[0]] if one.curves.n > 1 else None
        axes.errorbar([i], [mean.iloc[0]], bar, label=one.label, capsize=2, **one.look | {"linestyle": "none"})
    axes.set_xlim(-0.7, len(averaged) - 0.3)
    axes.set_xticks([(len(averaged) - 1) / 2], [f"{averaged[0][1].index[0]}"])
    axes.grid(axis="x", visible=False)


COLOURS = "viridis"


def matching_figures(comparison: Comparison, groups: list[list[Curves]]) -> list[Named]:
    """A figure for each row of the comparison and method whose runs logged amounts."""
    made: list[Named] = []
    for curves, found in matched_curves(groups):
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
    """A panel for each pair, with numbers beside the first of each row and below the last of each column."""
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
    single = len(mean) == 1  # a line would not show a single point
    axes.plot(mean.index, mean, color="#332288", marker="o" if single else "", markersize=2, linewidth=1)
    if half.notna().any():
        axes.fill_between(mean.index, mean - half, mean + half, color="#332288", alpha=0.2, linewidth=0)
