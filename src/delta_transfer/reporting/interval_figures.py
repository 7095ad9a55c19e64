"""Figures of differences to a baseline and of accuracies, both with 95 % t intervals, and ROC curves of test pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..common.console import Warn
from ..common.pair_metrics import roc
from ..common.style import style_of
from ..common.tables import usual_ends
from ..records.arrays import pair_similarities
from ..records.reading import Damaged, Record, run_id
from .comparison import Comparison, Result, averaged_over, grouped
from .drawing import COLUMN, LINE, MOST, Named, half_of, look, our_look, sheet, side_labels, stem_of, with_interval
from .statistics import Difference, contests

OF_MEAN = "95 % t interval"


@our_look()
def differences(comparison: Comparison, baseline: str) -> list[Named]:
    """The paired difference of each method to the baseline, with its t interval; a figure for each contest."""
    made: list[Named] = []
    for contest in contests(comparison):
        if not (found := contest.differences(baseline)):
            continue
        title = f"Difference to {comparison.display(baseline)}: "
        title += comparison.place_title((contest.dataset, contest.backbone, contest.shared))
        figure = differences_figure(title, dict(sorted(found.items(), key=lambda item: -item[1].merit)), comparison)
        made.append((stem_of("differences", contest.dataset, contest.backbone), figure))
    return made


def differences_figure(title: str, found: dict[str, Difference], comparison: Comparison) -> Figure:
    caption = f"Marker: mean of the differences paired by {comparison.paired_by}; bar: its {OF_MEAN}"
    caption += " (none for one seed or equal differences)" if any(one.low is None for one in found.values()) else ""
    caption += ". Filled: the interval leaves out 0. Right: mean (n)."
    marks = []
    for method, one in found.items():
        text = f"{one.signed(one.mean)} ({one.n})"
        marks.append(Mark(method, comparison.display(method), one.span, text, hollow=not one.excludes_zero))
    label = with_interval(f"Difference {comparison.kind.of_differences}", [one.n for one in found.values()])
    figure = marks_figure(title, caption, label, marks, comparison, centre=0.0)
    figure.axes[0].axvline(0, color="black", linewidth=0.8)
    return figure


@dataclass(frozen=True)
class Mark:
    """A line of a figure: a mean with its interval, and the runs below it."""

    method: str
    label: str
    span: tuple[float, float, float]  # low, mean, high
    text: str  # at the right
    hollow: bool = False
    runs: Sequence[float] = ()


def marks_figure(
    title: str,
    caption: str,
    x_label: str,
    marks: list[Mark],
    comparison: Comparison,
    centre: float,
    ends: tuple[float, float] = (-math.inf, math.inf),
) -> Figure:
    """A line for each mark. One that is far from the centre, beside the others, is an arrow at the edge of the axis.

    ends: what the axis never goes beyond.
    """
    labels, width = side_labels(mark.label for mark in marks)
    apart = max(0.25, LINE * (1 + max(label.count("\n") for label in labels)))
    spans = [(*mark.span, *mark.runs) for mark in marks]
    around = [(min(span) - centre, span[1] - centre, max(span) - centre) for span in spans]
    least, most = (centre + end for end in usual_ends(around))
    margin = max(0.05 * (most - least), 0.5 * comparison.kind.percent)
    lowest, highest = max(ends[0], least - margin), min(ends[1], most + margin)
    beyond = [mark for mark in marks if not least <= mark.span[1] <= most]
    caption += " The axis does not start at 0." if lowest > 0 else ""
    caption += " Arrow: beyond the axis." if beyond else ""
    figure = sheet(width, 0.55 + apart * len(marks), title, caption, [])
    axes = figure.add_subplot(xlabel=x_label, xlim=(lowest, highest))
    for y, mark in enumerate(marks):
        (low, mean, high), style = mark.span, style_of(mark.method, comparison.methods)
        if mark.runs:
            axes.plot(mark.runs, [y + 0.27] * len(mark.runs), "o", markersize=2, color=style.colour, alpha=0.5, mew=0)
        if mark in beyond:
            axes.plot([least if mean < least else most], [y], "<" if mean < least else ">", color=style.colour)
        else:
            bar = [[mean - low], [high - mean]] if low < high else None
            fill = "white" if mark.hollow else style.colour
            drawn = axes.errorbar([mean], [y], None, bar, style.marker, color=style.colour, mfc=fill, capsize=2)
            drawn.set_label(mark.label)
        axes.text(1.02, y, mark.text, transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(marks)), labels)
    axes.set_ylim(len(marks) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure


@our_look()
def intervals(comparison: Comparison) -> list[Named]:
    """Accuracy of each method and setting with the 95 % t interval of its mean, a figure for each group of rows."""
    made: list[Named] = []
    for place, results in comparison.places:
        title = f"{comparison.kind.title.replace(' top-1', '')}: {comparison.place_title(place)}"
        made.append((stem_of("intervals", *place[:2]), intervals_figure(title, results, comparison)))
    return made


def intervals_figure(title: str, results: list[Result], comparison: Comparison) -> Figure:
    cells = [one.cell for one in results]
    counts = [cell.n for cell in cells]
    over = averaged_over(cells)
    caption = f"Large: mean; bar: its {OF_MEAN} over {over}"
    caption += " (none for n = 1)" if min(counts) == 1 else ""
    if max(counts) == 1:
        caption = "Single runs: no intervals"
    caption += "; small: each run. Right: mean (n)." if max(counts) > 1 else ". Right: value (n)."
    if "folds" in over and max(counts) > 1:
        caption += " Folds share training images, so that intervals tend to be too short."
    marks = []
    for method, row, cell in results:
        half, runs = (half_of(cell), list(cell.values.values())) if cell.n > 1 else (0.0, [])
        span, text = (cell.mean - half, cell.mean, cell.mean + half), f"{cell.mean:.{cell.kind.digits}f} ({cell.n})"
        marks.append(Mark(method, comparison.label(method, row.reg), span, text, runs=runs))
    label = with_interval(comparison.kind.axis, counts)
    centre = median(cell.mean for cell in cells)
    ends = (0, 101) if comparison.kind.percent else (0, math.inf)
    return marks_figure(title, caption, label, marks, comparison, centre, ends)


@our_look()
def roc_curves(comparison: Comparison, warn: Warn) -> list[Named]:
    """True against false accept rate of the test pairs, a curve for each run, a figure for each group of rows."""
    made: list[Named] = []
    for place, results in comparison.places:
        lines = []
        for method, own in grouped(results, lambda one: one.method):
            for i, one in enumerate(own[:MOST]):
                style = look(method, comparison.methods, i, min(MOST, len(own))) | {"marker": ""}
                curves = [curve for run in one.cell.runs if (curve := roc_of(run, warn)) is not None]
                if curves:
                    lines.append((Line2D([], [], label=comparison.label(method, one.row.reg), **style), style, curves))
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
