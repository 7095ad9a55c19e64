"""Figures of the accuracy against one setting, such as alpha or the number of training images."""

import math
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from ..common.console import Warn
from ..records.reading import is_number
from .comparison import Comparison, averaged_over, grouped
from .drawing import COLUMN, LONG, MOST, Named, averages, half_of, look, our_look, sheet, stem_of, wide, with_interval
from .record_views import validates
from .sweeps import ENOUGH_SIZES, LABELS, LabelCurve, Swept, swept, value_of, varying

SWEEPS = {
    "alpha": ("reg.alpha", "alpha (reg.alpha)"),
    "beta": ("reg.beta", "beta (reg.beta)"),
    "labels": (LABELS, "Training images per class"),
}


@our_look()
def against_setting(comparison: Comparison, sweep: str, warn: Warn) -> list[Named]:
    """Accuracy against one of SWEEPS, for each data set and backbone where a method was run with several values."""
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
    caption += " Curves: accuracy = 100 − a · n^−b, fitted, to twice as many labels." if any(fitted) else ""
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
        for artist in drawn.get_children():  # moved only now, after the limits of the axes are set
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
