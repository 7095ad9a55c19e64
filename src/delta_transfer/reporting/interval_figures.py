"""Figures of differences to a baseline and of accuracies, both with 95 % t intervals, and ROC curves of test pairs."""

import math
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..common.pair_metrics import roc
from ..common.style import style_of
from ..records.arrays import pair_similarities
from ..records.reading import Damaged, Record, run_id
from .comparison import Cell, Comparison, averaged_over, grouped
from .drawing import COLUMN, LINE, MOST, Named, half_of, look, our_look, sheet, side_labels, stem_of, with_interval
from .logs import Warn
from .record_views import METRICS
from .statistics import CONFIDENCE, Difference, contests, paired, signed


@our_look()
def differences(comparison: Comparison, baseline: str) -> list[Named]:
    """The difference of each method to the baseline, paired by seed, with its t interval; a figure for each contest."""
    made: list[Named] = []
    for contest in contests(comparison):
        base = contest.cells.get(baseline)
        found = {m: d for m, cell in contest.cells.items() if base and m != baseline and (d := paired(cell, base))}
        if not found:
            continue
        title = f"Difference to {comparison.display(baseline)}: "
        title += comparison.place_title((contest.dataset, contest.backbone, contest.shared))
        figure = differences_figure(title, dict(sorted(found.items(), key=lambda item: -item[1].mean)), comparison)
        made.append((stem_of("differences", contest.dataset, contest.backbone), figure))
    return made


def differences_figure(title: str, found: dict[str, Difference], comparison: Comparison) -> Figure:
    labels, width = side_labels(map(comparison.display, found))
    caption = f"Marker: mean of the differences paired by seed; bar: its {CONFIDENCE:.0%} t interval".replace("%", " %")
    caption += " (none for one seed or equal differences)" if any(one.low is None for one in found.values()) else ""
    caption += ". Filled: the interval leaves out 0. Right: mean (n)."
    # One method that fails would press all others against each other: it is drawn at the edge, as an arrow.
    limit = 3 * median(max(abs(one.low or one.mean), abs(one.high or one.mean)) for one in found.values()) or 1.0
    beyond = [method for method, one in found.items() if abs(one.mean) > limit]
    caption += " Arrow: beyond the axis." if beyond else ""
    figure = sheet(width, 0.6 + 0.25 * len(found), title, caption, [])
    axes = figure.add_subplot(xlabel=with_interval("Difference in points", [one.n for one in found.values()]))
    axes.axvline(0, color="black", linewidth=0.8)
    inside = [one for method, one in found.items() if method not in beyond]
    least = min([0.0, *(max(-limit, one.mean if one.low is None else one.low) for one in inside)])
    most = max([0.0, *(min(limit, one.mean if one.high is None else one.high) for one in inside)])
    margin = 0.06 * (most - least) or 1.0
    axes.set_xlim(least - margin, most + margin)
    for y, (method, one) in enumerate(found.items()):
        style = style_of(method, comparison.methods)
        half = None if one.high is None else [one.high - one.mean]
        if method in beyond:
            axes.plot([least if one.mean < 0 else most], [y], "<" if one.mean < 0 else ">", color=style.colour)
        else:
            fill = style.colour if one.excludes_zero else "white"
            axes.errorbar([one.mean], [y], xerr=half, fmt=style.marker, color=style.colour, mfc=fill, capsize=2)
        axes.text(1.02, y, f"{signed(one.mean)} ({one.n})", transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(found)), labels)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


@our_look()
def intervals(comparison: Comparison) -> list[Named]:
    """Accuracy of each method and setting with the 95 % t interval of its mean, a figure for each group of rows."""
    made: list[Named] = []
    for place, rows in grouped(comparison.rows, lambda row: row.place):
        lines = [
            (method, comparison.label(method, row.reg), row.cells[method])
            for method in comparison.methods
            for row in rows
            if method in row.cells
        ]
        title = f"{METRICS[comparison.metric].replace(' top-1', '')}: {comparison.place_title(place)}"
        made.append((stem_of("intervals", *place[:2]), intervals_figure(title, lines, comparison)))
    return made


def intervals_figure(title: str, lines: list[tuple[str, str, Cell]], comparison: Comparison) -> Figure:
    cells = [cell for _, _, cell in lines]
    counts = [cell.n for cell in cells]
    over = averaged_over(cells)
    caption = f"Large: mean; bar: its {CONFIDENCE:.0%} t interval over {over}".replace("%", " %")
    caption += " (none for n = 1)" if min(counts) == 1 else ""
    if max(counts) == 1:
        caption = "Single runs: no intervals"
    caption += "; small: each run. Right: mean (n)." if max(counts) > 1 else ". Right: accuracy (n)."
    if "folds" in over and max(counts) > 1:
        caption += " Folds share training images, so that intervals tend to be too short."

    labels, width = side_labels(label for _, label, _ in lines)
    apart = max(0.23, LINE * (1 + max(label.count("\n") for label in labels)))
    lowest, highest = limits(cells)
    caption += " The axis does not start at 0." if lowest > 0 else ""
    figure = sheet(width, 0.55 + apart * len(lines), title, caption, [])
    axes = figure.add_subplot(xlabel=with_interval(f"{METRICS[comparison.metric]} (%)", counts), xlim=(lowest, highest))
    for y, (method, label, cell) in enumerate(lines):
        style = style_of(method, comparison.methods)
        if cell.n > 1:
            runs_at = [y + 0.27] * cell.n
            axes.plot(list(cell.values.values()), runs_at, "o", markersize=2, color=style.colour, alpha=0.5, mew=0)
        half = half_of(cell)
        bar = None if math.isnan(half) else [half]
        axes.errorbar([cell.mean], [y], xerr=bar, fmt=style.marker, color=style.colour, capsize=2, label=label)
        text = f"{cell.mean:.1f} ({cell.n})"
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), ha="left", va="center")
    axes.set_yticks(range(len(lines)), labels)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


def limits(cells: list[Cell]) -> tuple[float, float]:
    """The limits of the accuracy axis: all runs and intervals with a margin, within 0 to 100 %."""
    halves = [0 if math.isnan(half) else half for half in map(half_of, cells)]
    lows = [min(cell.mean - half, *cell.values.values()) for cell, half in zip(cells, halves, strict=True)]
    highs = [max(cell.mean + half, *cell.values.values()) for cell, half in zip(cells, halves, strict=True)]
    margin = max(0.05 * (max(highs) - min(lows)), 0.5)
    return max(0, min(lows) - margin), min(101, max(highs) + margin)


@our_look()
def roc_curves(comparison: Comparison, warn: Warn) -> list[Named]:
    """True against false accept rate of the test pairs, a curve for each run, a figure for each group of rows."""
    made: list[Named] = []
    for place, rows in grouped(comparison.rows, lambda row: row.place):
        lines = []
        for method in comparison.methods:
            cells = [(row, row.cells[method]) for row in rows if method in row.cells][:MOST]
            for i, (row, cell) in enumerate(cells):
                style = look(method, comparison.methods, i, len(cells)) | {"marker": ""}
                curves = [curve for run in cell.runs if (curve := roc_of(run, warn)) is not None]
                if curves:
                    lines.append((Line2D([], [], label=comparison.label(method, row.reg), **style), style, curves))
        if not lines:
            continue
        title = f"ROC of test pairs: {comparison.place_title(place)}"
        caption = "A curve for each run. The axis of false accepts is logarithmic, from one pair on."
        figure = sheet(COLUMN, 2.4, title, caption, [handle for handle, _, _ in lines])
        axes = figure.add_subplot(xlabel="False accept rate", ylabel="True accept rate", xscale="log", ylim=(0, 1.02))
        for _, style, curves in lines:
            for false_accepts, true_accepts in curves:
                axes.step(false_accepts, true_accepts, where="post", alpha=0.8, **style)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(min(curve[0][curve[0] > 0].min() for _, _, curves in lines for curve in curves), 1)
        made.append((stem_of("roc", *place[:2]), figure))
    return made


def roc_of(run: Record, warn: Warn) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        pairs = pair_similarities(run)
    except Damaged as error:
        warn(str(error))
        return None
    if pairs is None:
        warn(f"no ROC of {run_id(run)}, which has no similarities of pairs")
        return None
    return roc(pairs.similarities, pairs.same)
