"""Learning curves: training loss, penalty terms and accuracy against the iteration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..common.console import Warn
from ..records.metrics import METRICS
from .comparison import Comparison, averaged_over, grouped
from .drawing import COLUMN, MOST, Named, averages, look, our_look, sheet, stem_of, wide, with_interval
from .logs import DECADES, Curves, limits, penalty_terms


@dataclass(frozen=True)
class Line:
    """The curve of one method with one setting, in one panel or, without values, in the legend."""

    label: str
    look: dict[str, Any]  # keyword arguments of Line2D
    curves: Curves

    def of(self, column: str) -> tuple["Line", pd.Series, pd.Series]:
        return self, *self.curves.of(column)


Averaged = tuple[Line, pd.Series, pd.Series]  # one quantity: mean by step and half its interval; NaN for a single run


@our_look()
def learning_curves(comparison: Comparison, groups: list[list[Curves]], warn: Warn) -> list[Named]:
    """One figure for each group of comparable rows; `warn` gets a line for what is left out."""
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
    """A panel for each quantity. `over`: what the means are taken over, such as "seeds"."""
    columns = dict.fromkeys(str(column) for line in lines for column in line.curves.mean.columns)
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
        # A band may reach down to 0, which this axis cannot show: the curves decide where it begins.
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
