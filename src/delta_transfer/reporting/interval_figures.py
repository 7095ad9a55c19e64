"""Figures of results, all with 95 % t intervals: differences to a baseline, accuracies, ROC curves of test pairs, and
accuracy against one setting, such as alpha or the number of training images.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from ..common.console import Warn
from ..common.pair_metrics import roc
from ..common.style import style_of
from ..common.tables import usual_ends
from ..records.arrays import pair_similarities
from ..records.reading import Damaged, Record, is_number, run_id
from .comparison import Comparison, averaged_over, grouped
from .drawing import (
    COLUMN,
    LINE,
    LONG,
    MOST,
    Named,
    averages,
    half_of,
    look,
    our_look,
    sheet,
    side_labels,
    stem_of,
    wide,
    with_interval,
)
from .record_views import validates
from .statistics import contests
from .sweeps import ENOUGH_SIZES, LABELS, LabelCurve, Swept, swept, value_of, varying

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
        caption = f"Marker: mean of the differences paired by {comparison.paired_by}; bar: its {OF_MEAN}"
        if any(one.low is None for one in found.values()):
            caption += " (none for one seed or equal differences)"
        caption += ". Filled: the interval leaves out 0. Right: mean (n)."
        marks = []
        for method, one in sorted(found.items(), key=lambda item: -item[1].merit):
            text = f"{one.signed(one.mean)} ({one.n})"
            marks.append(Mark(method, comparison.display(method), one.span, text, hollow=not one.excludes_zero))
        label = with_interval(
            f"Difference to {comparison.display(baseline)} {comparison.kind.of_differences}",
            [one.n for one in found.values()],
        )
        figure = marks_figure(title, caption, label, marks, comparison, centre=0.0)
        figure.axes[0].axvline(0, color="black", linewidth=0.8)
        made.append((stem_of("differences", contest.dataset, contest.backbone), figure))
    return made


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
    """A line for each mark. A mark much further from the centre than the others is an arrow at the edge of the axis.

    ends: limits of the axis.
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
        cells = [one.cell for one in results]
        counts, over = [cell.n for cell in cells], averaged_over(cells)
        if max(counts) == 1:
            caption = "Single runs: no intervals. Right: value (n)."
        else:
            caption = f"Large: mean; bar: its {OF_MEAN} over {over}"
            caption += " (none for n = 1)" if min(counts) == 1 else ""
            caption += "; small: each run. Right: mean (n)."
            if "folds" in over:
                caption += " Folds share training images, so that intervals tend to be too short."
        marks = []
        for method, row, cell in results:
            half, runs = (half_of(cell), list(cell.values.values())) if cell.n > 1 else (0.0, [])
            span, text = (cell.mean - half, cell.mean, cell.mean + half), f"{cell.mean:.{cell.kind.digits}f} ({cell.n})"
            marks.append(Mark(method, comparison.label(method, row.reg), span, text, runs=runs))
        ends = (0, 101) if comparison.kind.percent else (0, math.inf)
        label, centre = with_interval(comparison.kind.axis, counts), median(cell.mean for cell in cells)
        figure = marks_figure(title, caption, label, marks, comparison, centre, ends)
        made.append((stem_of("intervals", *place[:2]), figure))
    return made


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
                    lines.append((Line2D([], [], label=comparison.label(method, one.reg), **style), style, curves))
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


SWEEPS = {
    "alpha": ("reg.alpha", "alpha (reg.alpha)"),
    "beta": ("reg.beta", "beta (reg.beta)"),
    "labels": (LABELS, "Training images per class"),
}


@our_look()
def against_setting(comparison: Comparison, sweep: str, warn: Warn) -> list[Named]:
    """Accuracy against one of SWEEPS, for each data set and backbone with several values for a method."""
    made: list[Named] = []
    key = SWEEPS[sweep][0]
    for (dataset, backbone), rows in grouped(comparison.rows, lambda row: (row.dataset, row.backbone)):
        title = f"Accuracy against {sweep}: {comparison.place_title((dataset, backbone, ()))}"
        lines: list[Swept] = []
        for method in comparison.methods:
            cells = [row.cells[method] for row in rows if method in row.cells]
            values = {value_of(cell, key, comparison.metric) for cell in cells} - {"absent"}
            own = swept(method, cells, key, comparison.metric)
            if len(values) > 1 and not own:
                warn(f"{title}: no two settings of {comparison.display(method)} differ in {key} alone")
            elif own and not all(map(is_number, values)):
                warn(f"{title}: runs of {comparison.display(method)} without a number as {key} are not drawn")
            if len(own) > MOST:
                warn(f"{title}: only the first {MOST} of {len(own)} settings of {comparison.display(method)}")
            lines += own[:MOST]
        if lines:
            figure = sweep_figure(title, lines, sweep, comparison)
            made.append((stem_of(sweep, dataset, backbone), figure))
    return made


def sweep_figure(title: str, lines: list[Swept], sweep: str, comparison: Comparison) -> Figure:
    cells = [cell for line in lines for cell in line.cells.values()]
    values = sorted({value for line in lines for value in line.cells})
    handles: list[Line2D] = []
    looks = []
    for method, own in grouped(lines, lambda line: line.method):
        for i, differing in enumerate(varying(own)):
            looks.append(look(method, comparison.methods, i, len(own)))
            handles.append(Line2D([], [], label=comparison.label(method, differing), **looks[-1]))

    caption = averages([cell.n for cell in cells], averaged_over(cells), "bar")
    caption += " Points at one value are drawn side by side." if len(lines) > 1 else ""
    fitted = [sweep == "labels" and len(line.cells) >= ENOUGH_SIZES for line in lines]
    caption += " Curves: accuracy = 100 - a · n^-b, fitted, to twice as many labels." if any(fitted) else ""
    if not validates(comparison.metric) and sweep != "labels":
        caption += " On test data, so not for choosing settings."

    width = wide() if max(len(str(handle.get_label())) for handle in handles) > LONG else COLUMN
    figure = sheet(width, 2.1, title, caption, handles)
    label = with_interval(comparison.kind.axis, [cell.n for cell in cells])
    axes = figure.add_subplot(xlabel=SWEEPS[sweep][1], ylabel="\n".join(wrap(label, 26)))
    at = horizontal_axis(axes, values)
    for i, (line, handle, style) in enumerate(zip(lines, handles, looks, strict=True)):
        aside = ScaledTranslation((i - (len(lines) - 1) / 2) * 1.5 / 72, 0, figure.dpi_scale_trans)
        drawn = axes.errorbar(
            [at[value] for value in line.cells],
            [cell.mean for cell in line.cells.values()],
            [half_of(cell) for cell in line.cells.values()],
            label=handle.get_label(),
            capsize=2,
            elinewidth=0.8,
            **style | ({"linestyle": "none"} if fitted[i] else {}),
        )
        for artist in drawn.get_children():  # moved after the limits of the axes are set
            artist.set_transform(axes.transData + aside)
        if fitted[i]:
            n = np.geomspace(values[0], 2 * values[-1])
            axes.plot(n, [100 - LabelCurve(line).errors(x).mean() for x in n], **style | {"marker": ""}, linewidth=1)
    return figure


def horizontal_axis(axes: Axes, values: list[float]) -> dict[float, float]:
    """Sets logarithmic ticks at the ascending `values` and returns their places; 0 lies left of a break."""
    at = {value: value for value in values}
    axes.set_xscale("log")
    if values[0] == 0:
        at[0] = values[1] / 10
        between = axes.get_xaxis_transform()
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.text(values[1] / 10**0.5, 0, "//", transform=between, ha="center", va="center", bbox=box)
    scaled = {value: math.log(x) for value, x in at.items()}
    length, labels, last = scaled[values[-1]] - scaled[values[0]], [], -math.inf
    for value in values:
        room = scaled[value] - last >= 0.13 * length
        labels.append(f"{value:.4g}" if room else "")
        last = scaled[value] if room else last
    axes.set_xticks([at[value] for value in values], labels)
    axes.set_xticks([], minor=True)
    return at
