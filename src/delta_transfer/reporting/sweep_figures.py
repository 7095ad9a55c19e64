"""Figures of the accuracy against one setting, such as alpha or the number of training images."""

import math
from collections import defaultdict
from dataclasses import dataclass
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from ..records.reading import is_number
from .comparison import Cell, Comparison, averaged_over, grouped
from .drawing import COLUMN, LONG, MOST, Named, averages, half_of, look, our_look, sheet, stem_of, wide, with_interval
from .logs import Warn
from .record_views import METRICS, reg_settings, settings, validates


@dataclass(frozen=True)
class Sweep:
    key: str
    name: str  # in file names and titles
    label: str
    logarithmic: bool
    unit: float = 1  # factor on the values


SWEEPS = [
    Sweep("reg.alpha", "alpha", "alpha (reg.alpha)", True),
    Sweep("reg.beta", "beta", "beta (reg.beta)", True),
    Sweep("dataset.sample_rate", "sample_rate", "Training images used (%)", False, 100),
    Sweep("dataset.images_per_class", "images_per_class", "Training images per class", False),
]


@dataclass(frozen=True)
class Swept:
    """Cells of one method that differ in the swept key alone."""

    method: str
    settings: dict[str, object]  # all others, inside and outside reg
    cells: dict[float, Cell]  # by value of the key, ascending


@our_look()
def against_setting(comparison: Comparison, sweep: Sweep, warn: Warn) -> list[Named]:
    """Accuracy against one key, a figure for each data set and backbone where a method was run with several values."""
    made: list[Named] = []
    for (dataset, backbone), rows in grouped(comparison.rows, lambda row: (row.dataset, row.backbone)):
        title = f"Accuracy against {sweep.name.replace('_', ' ')}: {comparison.place_title((dataset, backbone, ()))}"
        lines: list[Swept] = []
        for method in comparison.methods:
            cells = [row.cells[method] for row in rows if method in row.cells]
            values = {value_of(cell, sweep.key, comparison.metric) for cell in cells} - {"absent"}
            own = swept(method, cells, sweep.key, comparison.metric)
            if len(values) > 1 and not own:
                warn(f"{title}: no two settings of {comparison.display(method)} differ in {sweep.key} alone")
            elif own and not all(map(is_number, values)):
                warn(f"{title}: runs of {comparison.display(method)} without a number as {sweep.key} are not drawn")
            if len(own) > MOST:
                warn(f"{title}: only the first {MOST} of {len(own)} settings of {comparison.display(method)}")
            lines += own[:MOST]
        if lines:
            figure = sweep_figure(title, lines, sweep, comparison)
            made.append((stem_of(sweep.name, dataset, backbone), figure))
    return made


def settings_of(cell: Cell, metric: str) -> dict[str, object]:
    """All settings of a cell, whose runs agree in them.

    The fingerprint of the data set is among them: it is taken before training images are drawn, so that
    dataset.sample_rate and dataset.images_per_class leave it as it is, and data sets that differ stay apart.
    """
    return settings(cell.runs[0], metric) | reg_settings(cell.runs[0])


def value_of(cell: Cell, key: str, metric: str) -> object:
    return settings_of(cell, metric).get(key, "absent")


def swept(method: str, cells: list[Cell], key: str, metric: str) -> list[Swept]:
    """The cells in lines along `key`, without lines of a single value."""
    lines: dict[frozenset[tuple[str, object]], dict[float, Cell]] = defaultdict(dict)
    for cell in cells:
        others = settings_of(cell, metric)
        value = others.pop(key, None)
        if isinstance(value, (int, float)) and is_number(value) and value >= 0:
            lines[frozenset(others.items())][value] = cell
    return [
        Swept(method, dict(others), dict(sorted(found.items()))) for others, found in lines.items() if len(found) > 1
    ]


def sweep_figure(title: str, lines: list[Swept], sweep: Sweep, comparison: Comparison) -> Figure:
    cells = [cell for line in lines for cell in line.cells.values()]
    values = sorted({value for line in lines for value in line.cells})
    handles: list[Line2D] = []
    looks = []
    for method, own in grouped(lines, lambda line: line.method):
        keys = sorted({key for line in own for key in line.settings})
        varying = [key for key in keys if len({line.settings.get(key, "absent") for line in own}) > 1]
        for i, line in enumerate(own):
            label = comparison.label(method, tuple((key, line.settings.get(key, "absent")) for key in varying))
            looks.append(look(method, comparison.methods, i, len(own)))
            handles.append(Line2D([], [], label=label, **looks[-1]))

    caption = averages([cell.n for cell in cells], averaged_over(cells), "bar")
    caption += " Points at one value are drawn side by side." if len(lines) > 1 else ""
    if not validates(comparison.metric) and sweep.key.startswith("reg."):
        caption += " On test data, so not for choosing settings."

    width = wide() if max(len(str(handle.get_label())) for handle in handles) > LONG else COLUMN
    figure = sheet(width, 2.1, title, caption, handles)
    label = with_interval(f"{METRICS[comparison.metric]} (%)", [cell.n for cell in cells])
    axes = figure.add_subplot(xlabel=sweep.label, ylabel="\n".join(wrap(label, 26)))
    at = horizontal_axis(axes, [value * sweep.unit for value in values], sweep.logarithmic)
    for i, (line, handle, style) in enumerate(zip(lines, handles, looks, strict=True)):
        aside = ScaledTranslation((i - (len(lines) - 1) / 2) * 1.5 / 72, 0, figure.dpi_scale_trans)
        drawn = axes.errorbar(
            [at[value * sweep.unit] for value in line.cells],
            [cell.mean for cell in line.cells.values()],
            [half_of(cell) for cell in line.cells.values()],
            label=handle.get_label(),
            capsize=2,
            elinewidth=0.8,
            **style,
        )
        for artist in drawn.get_children():  # moved only now, after the limits of the axes are set
            artist.set_transform(axes.transData + aside)
    return figure


def horizontal_axis(axes: Axes, values: list[float], logarithmic: bool) -> dict[float, float]:
    """Sets ticks at the ascending `values` and returns their places; on a logarithmic axis 0 lies left of a break."""
    at = {value: value for value in values}
    if logarithmic:
        axes.set_xscale("log")
        if values[0] == 0:
            at[0] = values[1] / 10
            between = axes.get_xaxis_transform()
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(values[1] / 10**0.5, 0, "//", transform=between, ha="center", va="center", bbox=box)
    scaled = {value: math.log(x) if logarithmic else x for value, x in at.items()}
    length, labels, last = scaled[values[-1]] - scaled[values[0]], [], -math.inf
    for value in values:
        room = scaled[value] - last >= 0.13 * length
        labels.append(f"{value:.5g}" if room else "")
        last = scaled[value] if room else last
    axes.set_xticks([at[value] for value in values], labels)
    axes.set_xticks([], minor=True)
    return at
