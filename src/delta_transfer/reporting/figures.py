"""The figures of delta-report: learning curves, accuracy against a setting, intervals of the mean.

Drawn at the size at which they are meant to be printed, a column (3.4 in) or, with several panels or long names, a page
(6.8 in) wide, in letters of 8 pt. Without pyplot: no state, no window. The same records give the same files, byte for
byte, with one version of matplotlib.
"""

import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation
from scipy import stats

from ..common.errors import UserError
from ..common.pair_metrics import roc
from ..common.style import style_of
from ..records import reading as runs
from ..records.files import write_atomically
from .comparison import (
    METRICS,
    Cell,
    Comparison,
    averaged_over,
    display,
    grouped,
    is_number,
    label_of,
    reg_settings,
    run_id,
    settings,
    show,
)
from .matching_figures import matching_figures
from .statistics import CONFIDENCE, place_of

Warn = Callable[[str], None]
Named = tuple[str, Figure]  # with the stem of its file name; figures of one name are numbered when they are written

COLUMN, PAGE = 3.4, 6.8  # inches
LETTER, LINE = 0.062, 0.15  # inches: mean width of a letter of 8 pt, height of a line
LONG = 44  # letters: a legend that needs the width of a page
MOST = 6  # lines of one method in one figure
DECADES = 100  # a panel whose largest value is so many times its smallest one gets a logarithmic axis
FILLS = [
    "full",
    "none",
    "left",
    "top",
    "right",
    "bottom",
]  # of markers: the lines of one method, told apart in grey too

LOOK = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "text.parse_math": False,  # a name with $ is not a formula
    "pdf.fonttype": 42,  # letters stay letters
}


@contextmanager
def our_look():
    """matplotlib's defaults and LOOK, whatever the person's own matplotlibrc says; it is left as it was."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


@our_look()
def write_figures(comparison: Comparison, folder: Path, warn: Warn) -> list[Path]:
    """All figures that the records have data for, each as PNG (150 dpi) and PDF; the paths written.

    `warn` gets a line for whatever could not be drawn. Raises UserError if `folder` cannot be written to.
    """
    made = learning_curves(comparison, warn)
    for sweep in SWEEPS:
        made += against_setting(comparison, sweep, warn)
    made += intervals(comparison)
    if comparison.metric == "test_pair_accuracy":
        made += roc_curves(comparison, warn)
    made += matching_figures(comparison, warn)

    count, number, paths = Counter(stem for stem, _ in made), Counter(), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stem, figure in made:
            number[stem] += 1
            name = stem if count[stem] == 1 else f"{stem}-{number[stem]}"
            for kind, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
                content = io.BytesIO()
                figure.savefig(content, format=kind, dpi=150, metadata=metadata)
                write_atomically(folder / f"{name}.{kind}", content.getvalue())
                paths.append(folder / f"{name}.{kind}")
    except OSError as error:
        raise UserError(f"Figures cannot be written to {folder}: {error}. Name another folder.") from None
    return paths


# ---- learning curves -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """One method with one setting of its own."""

    label: str
    look: dict  # keyword arguments of Line2D
    frames: list[pd.DataFrame]  # metrics.jsonl of each run that has one, indexed by step


@our_look()
def learning_curves(comparison: Comparison, warn: Warn) -> list[Named]:
    """Training loss, penalty terms and accuracy against iteration, one figure for each group of comparable rows."""
    made, without = [], []
    for (dataset, backbone, shared), rows in grouped(comparison.rows, place_of):
        where = f"{dataset}, {backbone}" + (f", {show(shared)}" if shared else "")
        drawn: list[tuple[Curves, Cell]] = []
        for method in comparison.methods:
            own = [row for row in rows if method in row.cells]
            if len(own) > MOST:
                warn(f"learning curves of {where}: only the first {MOST} of {len(own)} settings of {display(method)}")
            for i, row in enumerate(own[:MOST]):
                cell = row.cells[method]
                frames = frames_of(cell, without, warn)
                if frames:
                    label = label_of(method, row.reg)
                    drawn.append((Curves(label, look(method, comparison.methods, i, len(own[:MOST])), frames), cell))
        if drawn:
            curves, cells = zip(*drawn, strict=True)
            title = f"Learning curves: {where}"
            figure = curves_figure(title, curves, comparison.metric, averaged_over(list(cells)), warn)
            made.append((stem_of("curves", dataset, backbone), figure))
    if without:
        warn(f"no learning curves of {len(without)} runs without metrics.jsonl")
    return made


def frames_of(cell: Cell, without: list[str], warn: Warn) -> list[pd.DataFrame]:
    """metrics.jsonl of the runs of a cell; a damaged one is named, one that is not there is added to `without`."""
    frames = []
    for run in cell.runs:
        try:
            frame = runs.metrics(run)
        except runs.Damaged as error:
            warn(f"left out of the learning curves: {error}")
            continue
        if frame is None:
            without.append(run_id(run))
        else:
            frames.append(frame.set_index("step").select_dtypes("number"))
    return frames


def average(frames: list[pd.DataFrame], column: str) -> tuple[pd.Series, pd.Series | None]:
    """Mean and sample std (None for a single run) over runs, by the steps at which all of them have `column`."""
    series = [frame[column].dropna() if column in frame else pd.Series(dtype=float) for frame in frames]
    table = pd.concat(series, axis=1, join="inner").sort_index()
    return table.mean(axis=1), table.std(axis=1, ddof=1) if len(series) > 1 else None


def curves_figure(title: str, curves: Iterable[Curves], metric: str, over: str, warn: Warn) -> Figure:
    columns = dict.fromkeys(column for one in curves for frame in one.frames for column in frame.columns)
    panels = {"loss": "Training loss"}
    panels |= {name: f"Penalty: {name.replace('_', ' ')}" for name in runs.penalty_terms(columns) if name != "aux"}
    panels |= {metric: f"{METRICS[metric]} (%)"}

    content = {}
    for column in panels:
        averaged = []
        for one in curves:
            if any(column in frame for frame in one.frames):
                mean, std = average(one.frames, column)
                if len(mean):
                    averaged.append((one, mean, std))
                else:
                    warn(f"{title}: no step at which all runs of {one.label} have {column}")
        if averaged:
            content[column] = averaged

    counts = [len(one.frames) for one in curves]
    alike = len(set(counts)) == 1
    handles = [
        Line2D([], [], label=one.label + ("" if alike else f" (n = {len(one.frames)})"), **one.look) for one in curves
    ]
    caption = f"{averages(counts, over, 'band or bar')} Loss and penalties are means since the point before."
    last = max(frame.index.max() for one in curves for frame in one.frames)
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


def draw_curves(axes: Axes, averaged: list[tuple[Curves, pd.Series, pd.Series | None]]) -> None:
    for i, (one, mean, std) in enumerate(averaged):
        apart = max(1, len(mean) // 5)  # markers: about five on a curve, not all curves at the same steps
        axes.plot(mean.index, mean, label=one.label, markevery=(i * apart // len(averaged), apart), **one.look)
        if std is not None:
            axes.fill_between(mean.index, mean - std, mean + std, color=one.look["color"], alpha=0.15, linewidth=0)
    lowest, highest = (extreme(extreme(mean) for _, mean, _ in averaged) for extreme in (min, max))
    if lowest > 0 and highest >= DECADES * lowest:
        # A band may reach down to 0, which is infinitely far on this axis: the curves decide where it begins.
        axes.set_yscale("log")
        axes.set_ylim(bottom=lowest / 1.5)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")


def draw_points(axes: Axes, averaged: list[tuple[Curves, pd.Series, pd.Series | None]]) -> None:
    """Of a single step: side by side, since the horizontal axis has nothing else to show."""
    for i, (one, mean, std) in enumerate(averaged):
        bar = None if std is None else [std.iloc[0]]
        axes.errorbar([i], [mean.iloc[0]], bar, label=one.label, capsize=2, **one.look | {"linestyle": "none"})
    axes.set_xlim(-0.7, len(averaged) - 0.3)
    axes.set_xticks([(len(averaged) - 1) / 2], [f"{averaged[0][1].index[0]}"])
    axes.grid(axis="x", visible=False)


# ---- accuracy against a setting --------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    key: str
    name: str  # in file names and titles
    label: str
    logarithmic: bool
    unit: float = 1  # what the values are multiplied with


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
    made = []
    for (dataset, backbone), rows in grouped(comparison.rows, lambda row: (row.dataset, row.backbone)):
        title = f"Accuracy against {sweep.name.replace('_', ' ')}: {dataset}, {backbone}"
        lines = []
        for method in comparison.methods:
            cells = [row.cells[method] for row in rows if method in row.cells]
            values = {value_of(cell, sweep.key, comparison.metric) for cell in cells} - {"absent"}
            own = swept(method, cells, sweep.key, comparison.metric)
            if len(values) > 1 and not own:
                warn(f"{title}: no two settings of {display(method)} differ in {sweep.key} alone")
            elif own and not all(map(is_number, values)):
                warn(f"{title}: runs of {display(method)} without a number as {sweep.key} are not drawn")
            if len(own) > MOST:
                warn(f"{title}: only the first {MOST} of {len(own)} settings of {display(method)}")
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
    """The cells in lines along `key`, those of at least two values."""
    lines: dict[frozenset, dict[float, Cell]] = defaultdict(dict)
    for cell in cells:
        others = settings_of(cell, metric)
        value = others.pop(key, None)
        if is_number(value) and value >= 0:
            lines[frozenset(others.items())][value] = cell
    return [
        Swept(method, dict(others), dict(sorted(found.items()))) for others, found in lines.items() if len(found) > 1
    ]


def sweep_figure(title: str, lines: list[Swept], sweep: Sweep, comparison: Comparison) -> Figure:
    cells = [cell for line in lines for cell in line.cells.values()]
    values = sorted({value for line in lines for value in line.cells})
    handles = []
    for method, own in grouped(lines, lambda line: line.method):
        keys = sorted({key for line in own for key in line.settings})
        varying = [key for key in keys if len({line.settings.get(key, "absent") for line in own}) > 1]
        for i, line in enumerate(own):
            label = label_of(method, tuple((key, line.settings.get(key, "absent")) for key in varying))
            handles.append(Line2D([], [], label=label, **look(method, comparison.methods, i, len(own))))

    caption = averages([cell.n for cell in cells], averaged_over(cells), "bar")
    caption += " Points at one value are drawn side by side." if len(lines) > 1 else ""
    if comparison.metric != "val_top1" and sweep.key.startswith("reg."):
        caption += " On test data, so not for choosing settings."

    width = PAGE if max(len(handle.get_label()) for handle in handles) > LONG else COLUMN
    figure = sheet(width, 2.1, title, caption, handles)
    axes = figure.add_subplot(xlabel=sweep.label, ylabel=f"{METRICS[comparison.metric]} (%)")
    at = horizontal_axis(axes, [value * sweep.unit for value in values], sweep.logarithmic)
    for i, (line, handle) in enumerate(zip(lines, handles, strict=True)):
        aside = ScaledTranslation((i - (len(lines) - 1) / 2) * 1.5 / 72, 0, figure.dpi_scale_trans)
        method_look = {key: getattr(handle, f"get_{key}")() for key in ("color", "linestyle", "marker", "fillstyle")}
        drawn = axes.errorbar(
            [at[value * sweep.unit] for value in line.cells],
            [cell.mean for cell in line.cells.values()],
            [math.nan if cell.std is None else cell.std for cell in line.cells.values()],
            label=handle.get_label(),
            capsize=2,
            elinewidth=0.8,
            **method_look,
        )
        for artist in drawn.get_children():  # only now: where they are counts for the limits of the axes
            artist.set_transform(axes.transData + aside)
    return figure


def horizontal_axis(axes: Axes, values: list[float], logarithmic: bool) -> dict[float, float]:
    """Ticks at the ascending `values`; where each of them lies. On a logarithmic axis 0 lies at the left of a break."""
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


# ---- verification ----------------------------------------------------------------------------------------


@our_look()
def roc_curves(comparison: Comparison, warn: Warn) -> list[Named]:
    """True against false accept rate of the test pairs, a curve for each run, a figure for each group of rows."""
    made = []
    for (dataset, backbone, shared), rows in grouped(comparison.rows, place_of):
        lines = []
        for method in comparison.methods:
            cells = [(row, row.cells[method]) for row in rows if method in row.cells][:MOST]
            for i, (row, cell) in enumerate(cells):
                style = look(method, comparison.methods, i, len(cells)) | {"marker": ""}
                curves = [curve for run in cell.runs if (curve := roc_of(run, warn)) is not None]
                if curves:
                    lines.append((Line2D([], [], label=label_of(method, row.reg), **style), style, curves))
        if not lines:
            continue
        title = f"ROC of test pairs: {dataset}, {backbone}" + (f", {show(shared)}" if shared else "")
        caption = "A curve for each run. The axis of false accepts is logarithmic, from one pair on."
        figure = sheet(COLUMN, 2.4, title, caption, [handle for handle, _, _ in lines])
        axes = figure.add_subplot(xlabel="False accept rate", ylabel="True accept rate", xscale="log", ylim=(0, 1.02))
        for _, style, curves in lines:
            for false_accepts, true_accepts in curves:
                axes.step(false_accepts, true_accepts, where="post", alpha=0.8, **style)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(min(curve[0][curve[0] > 0].min() for _, _, curves in lines for curve in curves), 1)
        made.append((stem_of("roc", dataset, backbone), figure))
    return made


def roc_of(run: dict, warn: Warn) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        pairs = runs.pair_similarities(run)
    except runs.Damaged as error:
        warn(str(error))
        return None
    if pairs is None:
        warn(f"no ROC of {run_id(run)}, which has no pairs.npz")
        return None
    return roc(pairs.similarities, pairs.same)


# ---- intervals of the mean -------------------------------------------------------------------------------


@our_look()
def intervals(comparison: Comparison) -> list[Named]:
    """Accuracy of each method and setting with the 95 % t interval of its mean, a figure for each group of rows."""
    made = []
    for (dataset, backbone, shared), rows in grouped(comparison.rows, place_of):
        lines = [
            (method, label_of(method, row.reg), row.cells[method])
            for method in comparison.methods
            for row in rows
            if method in row.cells
        ]
        where = f"{dataset}, {backbone}" + (f", {show(shared)}" if shared else "")
        title = f"{METRICS[comparison.metric].replace(' top-1', '')}: {where}"
        made.append((stem_of("intervals", dataset, backbone), intervals_figure(title, lines, comparison)))
    return made


def half_width(cell: Cell) -> float:
    """Of the t interval of the mean, n - 1 degrees of freedom; NaN for a single run."""
    if cell.std is None:
        return math.nan
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, cell.n - 1)) * cell.std / math.sqrt(cell.n)


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

    labels = ["\n".join(wrap(label, 50)) for _, label, _ in lines]
    width = PAGE if max(map(len, labels)) > 24 else COLUMN
    apart = max(0.23, LINE * (1 + max(label.count("\n") for label in labels)))
    lowest, highest = limits(cells)
    caption += " The axis does not start at 0." if lowest > 0 else ""
    figure = sheet(width, 0.55 + apart * len(lines), title, caption, [])
    axes = figure.add_subplot(xlabel=f"{METRICS[comparison.metric]} (%)", xlim=(lowest, highest))
    for y, (method, label, cell) in enumerate(lines):
        style = style_of(method, comparison.methods)
        if cell.n > 1:
            runs_at = [y + 0.27] * cell.n
            axes.plot(list(cell.values.values()), runs_at, "o", markersize=2, color=style.colour, alpha=0.5, mew=0)
        half = half_width(cell)
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
    """Of the accuracy axis: all runs and intervals with a margin, within 0 to 100 %."""
    halves = [0 if math.isnan(half) else half for half in map(half_width, cells)]
    lows = [min(cell.mean - half, *cell.values.values()) for cell, half in zip(cells, halves, strict=True)]
    highs = [max(cell.mean + half, *cell.values.values()) for cell, half in zip(cells, halves, strict=True)]
    margin = max(0.05 * (max(highs) - min(lows)), 0.5)
    return max(0, min(lows) - margin), min(101, max(highs) + margin)


# ---- what they have in common ----------------------------------------------------------------------------


def sheet(width: float, height: float, title: str, caption: str, handles: list[Line2D]) -> Figure:
    """A figure with room for panels of `height` inches: the title above them, legend and caption below."""
    title_lines = wrap(title, int(width / LETTER / 1.12))
    caption_lines = wrap(caption, int(width / LETTER) - 2)
    for handle in handles:
        handle.set_label("\n".join(wrap(handle.get_label(), int((width - 0.9) / LETTER))))
    longest = max((len(handle.get_label()) for handle in handles), default=0)
    columns = max(1, min(len(handles), int(width / (0.5 + longest * LETTER))))
    rows = -(-len(handles) // columns) + sum(handle.get_label().count("\n") for handle in handles)

    above = 0.1 + 1.1 * LINE * len(title_lines)
    legend = 0.04 + LINE * rows if rows else 0
    below = legend + 0.08 + LINE * len(caption_lines)
    total = above + height + below
    figure = Figure(figsize=(width, total), layout="constrained")
    figure.get_layout_engine().set(rect=(0, below / total, 1, height / total))
    figure.text(0.5, 1 - 0.06 / total, "\n".join(title_lines), ha="center", va="top", fontsize=9)
    figure.text(0.08 / width, 0.06 / total, "\n".join(caption_lines), va="bottom")
    if handles:
        figure.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, below / total),
            ncols=columns,
            borderaxespad=0,
            borderpad=0.2,
            labelspacing=0.25,
            columnspacing=1.2,
            handlelength=3,
        )
    return figure


def look(method: str, methods: list[str], i: int, count: int) -> dict:
    """Of line i of `count` of one method: its colour, paler with i, its line style and marker, filled otherwise."""
    style = style_of(method, methods)
    paler = 0.55 * i / max(1, count - 1)
    colour = tuple(part + paler * (1 - part) for part in to_rgb(style.colour))
    return {"color": colour, "linestyle": style.line, "marker": style.marker, "fillstyle": FILLS[i]}


def averages(counts: list[int], over: str, mark: str) -> str:
    """What a caption says of means over so many runs, and of the `mark` that shows their spread."""
    low, high = min(counts), max(counts)
    if high == 1:
        return f"Single runs (n = 1): no {mark}."
    single = "; none for n = 1" if low == 1 else ""
    return f"Mean over {over}; {mark}: ± sample std, n = {low if low == high else f'{low} to {high}'}{single}."


def stem_of(*parts: str) -> str:
    return "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)
