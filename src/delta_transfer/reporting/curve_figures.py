"""Learning curves: training loss, penalty terms and accuracy against the iteration."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .comparison import Cell, Comparison, averaged_over, grouped
from .drawing import COLUMN, MOST, PAGE, Named, averages, look, our_look, place_name, sheet, stem_of
from .logs import Warn, frames_of, name_missing, over_runs, penalty_terms
from .record_views import METRICS

DECADES = 100  # a panel whose largest value is so many times its smallest one gets a logarithmic axis
Averaged = tuple["Curves", pd.Series, pd.Series]  # one quantity: mean and sample std by step; std NaN for a single run


@dataclass(frozen=True)
class Curves:
    """One method with one setting of its own."""

    label: str
    look: dict[str, Any]  # keyword arguments of Line2D
    n: int  # runs
    mean: pd.DataFrame  # by step, a column for each quantity, as `over_runs` gives it
    std: pd.DataFrame


@our_look()
def learning_curves(comparison: Comparison, warn: Warn) -> list[Named]:
    """One figure for each group of comparable rows; `warn` gets a line for what is left out."""
    made: list[Named] = []
    without: list[str] = []
    for place, rows in grouped(comparison.rows, lambda row: row.place):
        where = place_name(place)
        curves: list[Curves] = []
        cells: list[Cell] = []
        for method in comparison.methods:
            own = [row for row in rows if method in row.cells]
            if len(own) > MOST:
                many = f"{len(own)} settings of {comparison.display(method)}"
                warn(f"learning curves of {where}: only the first {MOST} of {many}")
            for i, row in enumerate(own[:MOST]):
                if frames := frames_of(row.cells[method], warn, without):
                    style = look(method, comparison.methods, i, len(own[:MOST]))
                    curves.append(Curves(comparison.label(method, row.reg), style, len(frames), *over_runs(frames)))
                    cells.append(row.cells[method])
        if curves:
            figure = curves_figure(f"Learning curves: {where}", curves, comparison.metric, averaged_over(cells), warn)
            made.append((stem_of("curves", *place[:2]), figure))
    name_missing(without, warn)
    return made


def curves_figure(title: str, curves: Sequence[Curves], metric: str, over: str, warn: Warn) -> Figure:
    """A panel for each quantity. `over`: what the means are taken over, such as "seeds"."""
    columns = dict.fromkeys(str(column) for one in curves for column in one.mean.columns)
    panels = {"loss": "Training loss"}
    panels |= {name: f"Penalty: {name.replace('_', ' ')}" for name in penalty_terms(columns) if name != "aux"}
    panels |= {metric: f"{METRICS[metric]} (%)"}

    content: dict[str, list[Averaged]] = {}
    for column in panels:
        for one in curves:
            if column in one.mean:
                mean = one.mean[column].dropna()
                if len(mean):
                    content.setdefault(column, []).append((one, mean, one.std[column].reindex(mean.index)))
                else:
                    warn(f"{title}: no step at which all runs of {one.label} have {column}")

    counts = [one.n for one in curves]
    alike = len(set(counts)) == 1
    handles = [Line2D([], [], label=one.label + ("" if alike else f" (n = {one.n})"), **one.look) for one in curves]
    caption = f"{averages(counts, over, 'band or bar')} Loss and penalties are means since the point before."
    last = max(one.mean.index.max() for one in curves)
    across = len(content) if len(content) < 4 else 2 if len(content) == 4 else 3
    down = -(-len(content) // across)
    figure = sheet(COLUMN if across == 1 else PAGE, 1.75 * down, title, caption, handles)
    for i, (column, averaged) in enumerate(content.items()):
        axes = figure.add_subplot(down, across, i + 1, ylabel="\n".join(wrap(panels[column], 21)))
        if len({step for _, mean, _ in averaged for step in mean.index}) == 1:
            draw_points(axes, averaged)
        else:
            draw_curves(axes, averaged)
            axes.set_xlim(0, 1.03 * last)
        axes.set_xlabel("Iteration")
    return figure


def draw_curves(axes: Axes, averaged: list[Averaged]) -> None:
    for i, (one, mean, std) in enumerate(averaged):
        apart = max(1, len(mean) // 5)  # markers: about five on a curve, not all curves at the same steps
        axes.plot(mean.index, mean, label=one.label, markevery=(i * apart // len(averaged), apart), **one.look)
        if one.n > 1:
            axes.fill_between(mean.index, mean - std, mean + std, color=one.look["color"], alpha=0.15, linewidth=0)
    lowest, highest = (extreme(extreme(mean) for _, mean, _ in averaged) for extreme in (min, max))
    if lowest > 0 and highest >= DECADES * lowest:
        # A band may reach down to 0, which this axis cannot show: the curves decide where it begins.
        axes.set_yscale("log")
        axes.set_ylim(bottom=lowest / 1.5)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def draw_points(axes: Axes, averaged: list[Averaged]) -> None:
    """Draws the values of a single step side by side, since the horizontal axis has nothing else to show."""
    for i, (one, mean, std) in enumerate(averaged):
        bar = [std.iloc[0]] if one.n > 1 else None
        axes.errorbar([i], [mean.iloc[0]], bar, label=one.label, capsize=2, **one.look | {"linestyle": "none"})
    axes.set_xlim(-0.7, len(averaged) - 0.3)
    axes.set_xticks([(len(averaged) - 1) / 2], [f"{averaged[0][1].index[0]}"])
    axes.grid(axis="x", visible=False)
