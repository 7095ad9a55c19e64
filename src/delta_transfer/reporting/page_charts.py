"""Records -> the charts of the HTML page, as SVG: learning curves, channel attention, the pairs that L2T-ww matched.

Ink has the colour of the text around it. page.css inverts deep colours in dark mode. A <title> shows under the mouse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd

from ..common.console import Warn
from ..common.style import style_of
from ..records.arrays import channel_weights
from ..records.metrics import METRICS, TASK_LOSSES
from ..records.reading import Damaged
from .comparison import Cell, Comparison, Row, grouped
from .logs import DECADES, Curves, limits, matched_curves, penalty_terms

POINTS, ALL_POINTS = 80, 4_000  # per line, and for all lines of a quantity; a small chart hardly shows more than 80
MAX_LINES = 10  # of a chart; more cannot be distinguished
BINS = 40
# Tol's colours, for target taps.
TAPS = ["#332288", "#cc6677", "#117733", "#ddcc77", "#88ccee", "#aa4499", "#999933", "#882255"]
TITLES = {  # of the drawn quantities, in that order: test first
    **{key: METRICS[key].axis.replace(" top-1", "") for key in sorted(METRICS) if METRICS[key].short},
    "train_top1": "Training accuracy (%)",
    "loss": "Training loss, all terms",
    **{name: f"Training {words}" for name, words in TASK_LOSSES.items()},
}

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 8, 36  # margins, in units of the drawing
DASHES = {"-": "", "--": "8 4", "-.": "8 3 2 3", ":": "2 3"}  # by matplotlib's name of a line style


@dataclass(frozen=True)
class Key:
    """A line of the legend, which all charts of a group share."""

    label: str
    n: int  # runs
    colour: str
    look: str  # attributes of its strokes


@dataclass(frozen=True)
class Group:
    title: str
    charts: list[tuple[str, str]]  # title, SVG
    keys: list[Key]
    remarks: list[str]


# ---- drawing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    number: int  # place in the legend: a click there hides the line
    key: Key
    title: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None  # half the height of the band at each point


@dataclass(frozen=True)
class Axis:
    """Maps values to units of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, values: "np.ndarray | Sequence[float]") -> np.ndarray:
        low, high, found = (np.log10(v) if self.log else np.asarray(v) for v in (self.low, self.high, values))
        return np.round(self.start + (self.end - self.start) * (found - low) / ((high - low) or 1.0), 1)

    def ticks(self) -> list[tuple[str, float]]:
        from matplotlib.ticker import LogLocator, MaxNLocator

        locator = LogLocator() if self.log else MaxNLocator(5)
        found = [v for v in locator.tick_values(self.low, self.high) if self.low <= v <= self.high]
        return [(f"{v:g}", float(at)) for v, at in zip(found, self.at(found), strict=True)]


def painted(colour: str) -> str:
    """The attributes of a colour "#rrggbb". A deep one has a class, since a dark page would hide it."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    deep = ' class="deep"' if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else ""
    return f'stroke="{colour}" fill="{colour}"{deep}'


def attributes(line: str, opacity: float = 1.0) -> str:
    """The attributes of a stroke. line: matplotlib's name of its style."""
    dashes = f' stroke-dasharray="{DASHES[line]}"' if DASHES[line] else ""
    return dashes + (f' opacity="{opacity:g}"' if opacity < 1 else "")


def drawing(parts: list[str], title: str, height: float = HEIGHT) -> str:
    label = escape(title)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def text(x: float, y: float, words: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def grid(x: Axis, y: Axis, x_title: str) -> list[str]:
    parts = [f'<path class="grid" d="M{LEFT} {at:g}H{WIDTH - RIGHT}"/>' for _, at in y.ticks()]
    parts += [text(LEFT - 5, at + 4, words, "end") for words, at in y.ticks()]
    parts += [text(at, HEIGHT - BOTTOM + 15, words) for words, at in x.ticks()]
    return [*parts, text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_title)]


def axes(x: tuple[float, float], y: tuple[float, float], log: bool = False) -> tuple[Axis, Axis]:
    return Axis(*x, LEFT, WIDTH - RIGHT), Axis(*y, HEIGHT - BOTTOM, TOP, log)


def lines_chart(title: str, x_title: str, lines: list[Line]) -> str:
    steps = [step for line in lines for step in (line.x[0], line.x[-1])]
    values = np.concatenate([line.y for line in lines])
    lowest, highest = float(values.min()), float(values.max())
    log, largest = lowest > 0 and highest >= DECADES * lowest, 100 if "(%)" in title else math.inf
    ends = (lowest / 1.2, highest * 1.2) if log else limits([(line.y, line.spread) for line in lines], largest)
    x, y = axes((min(steps), max(steps)), ends, log)
    parts = grid(x, y, x_title)
    for line in lines:
        across, mean = x.at(line.x), np.asarray(line.y)
        parts.append(f'<g data-key="{line.number}" {painted(line.key.colour)}{line.key.look}>')
        parts.append(f"<title>{escape(line.title)}</title>")
        if line.spread is not None:  # a band may leave the chart
            edges = [y.at(np.clip(mean + sign * np.asarray(line.spread), *ends)) for sign in (1, -1)]
            outline = [*zip(across, edges[0], strict=True), *zip(across[::-1], edges[1][::-1], strict=True)]
            parts.append(f'<polygon class="band" points="{points(outline)}"/>')
        at = list(zip(across, y.at(mean), strict=True))
        parts.append(f'<polyline points="{points(at)}"/>')
        if len(at) <= 20:
            parts += [f'<circle cx="{a:g}" cy="{b:g}" r="2.2"/>' for a, b in at]
        parts.append("</g>")
    return drawing(parts, title)


def points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:g},{b:g}" for a, b in pairs)


def bars_chart(title: str, x_title: str, edges: np.ndarray, counts: np.ndarray, colour: str, reference: float) -> str:
    """A histogram with a dashed line at `reference`."""
    ends = min(edges[0], reference), max(edges[-1], reference)
    x, y = axes(ends, (0, float(counts.max()) * 1.05))
    at, tops = x.at(edges), y.at(counts)
    parts = grid(x, y, x_title)
    for i, count in enumerate(counts.tolist()):
        if count:
            size = f'x="{at[i]:g}" y="{tops[i]:g}" width="{at[i + 1] - at[i]:.1f}" height="{y.start - tops[i]:.1f}"'
            words = f"{edges[i]:.3g} to {edges[i + 1]:.3g}: {count}"
            parts.append(f"<rect {size} {painted(colour)}><title>{words}</title></rect>")
    return drawing([*parts, f'<path class="reference" d="M{x.at([reference])[0]:g} {TOP}V{HEIGHT - BOTTOM}"/>'], title)


def numbers_map(title: str, rows: list[str], columns: list[str], values: np.ndarray, most: float) -> str:
    """A cell for each row and column, empty for NaN. most: the value of the strongest colour."""
    left, wide, high = 80, (WIDTH - 80 - RIGHT) / len(columns), 26
    parts = []
    for j, name in enumerate(columns):
        parts.append(text(left + (j + 0.5) * wide, 12, shortened(name, wide)))
    for i, name in enumerate(rows):
        parts.append(text(left - 5, 36 + i * high, shortened(name, left), "end"))
        for j, value in enumerate(values[i]):
            if not np.isnan(value):
                part = min(1.0, value / most)
                size = f'x="{left + j * wide:.1f}" y="{18 + i * high}" width="{wide - 1:.1f}" height="{high - 1}"'
                label = f"<title>{escape(name)} > {escape(columns[j])}: {value:.4g}</title>"
                parts.append(f'<rect {size} fill="#0072b2" fill-opacity="{0.7 * part:.2f}">{label}</rect>')
                parts.append(text(left + (j + 0.5) * wide, 36 + i * high, f"{value:.2f}"))
    return drawing(parts, title, 20 + high * len(rows))


def shortened(name: str, room: float) -> str:
    most = max(3, int(room / 6))
    return name if len(name) <= most else f"{name[: most - 1]}…"


# ---- learning curves -------------------------------------------------------------------------------------


def learning_curves(comparison: Comparison, of_places: list[list[Curves]]) -> list[Group]:
    """A group of charts for each data set, backbone and setting outside reg, a line for each method and setting of it.

    A line is the mean over the runs of a cell. If there are many cells, those with the best results are drawn.
    """
    groups = []
    most = max(10, min(POINTS, ALL_POINTS // max(1, sum(min(len(curves), MAX_LINES) for curves in of_places))))
    for found in of_places:
        leaders = sorted(found, key=lambda one: -one.row.cells[one.method].merit)[:MAX_LINES]
        kept = set(map(id, leaders))
        curves = [one for one in found if id(one) in kept]
        remarks = []
        if left_out := len(found) - len(curves):
            remarks.append(
                f"The charts show the {MAX_LINES} best results of the leaderboard and leave out {left_out} others. The "
                "table of runs, which can be filtered, shows the curves of single runs."
            )
        lines = []
        for method, own in grouped(curves, lambda one: one.method):
            style = style_of(method, comparison.methods)
            for number, one in enumerate(own):
                # Several settings of a method: from strong to faint.
                opacity = round(1 - 0.65 * number / max(1, len(own) - 1), 2)
                label = comparison.label(method, one.row.reg)
                lines.append((Key(label, one.n, style.colour, attributes(style.line, opacity)), one))
        if charts := [chart for name in quantities(curves) if (chart := chart_of(name, lines, most))]:
            title = comparison.place_title(curves[0].row.place)
            groups.append(Group(title, charts, [key for key, _ in lines], remarks))
    return groups


def title_of(comparison: Comparison, method: str, row: Row) -> str:
    return f"{comparison.label(method, row.reg)}, {comparison.place_title(row.place)}"


def quantities(curves: list[Curves]) -> list[str]:
    """The logged quantities in the order in which they are drawn: accuracies, loss, its terms."""
    names = dict.fromkeys(name for one in curves for name in one.columns)
    return [name for name in (*TITLES, *penalty_terms(names)) if name in names]


def chart_of(name: str, lines: list[tuple[Key, Curves]], most: int) -> tuple[str, str] | None:
    """The chart of one quantity; None if no line has two points, since tables have single points.

    most: the largest number of points of a line.
    """
    drawn = [(i, key, *curves.of(name)) for i, (key, curves) in enumerate(lines) if name in curves.mean]
    if not any(len(mean) > 1 for _, _, mean, _ in drawn):
        return None
    title = TITLES.get(name, f"Penalty: {name.replace('_', ' ').replace('.', ': ')}")
    return title, lines_chart(title, "iteration", [line_of(*line, most) for line in drawn if len(line[2])])


def line_of(i: int, key: Key, curve: pd.Series, half: pd.Series, most: int = POINTS) -> Line:
    """A line, with its band where `half` is known at all of its points."""
    shown = thinned(curve, most)
    half = half.reindex(shown.index)
    spread = half.tolist() if half.notna().all() else None
    title = f"{key.label} at the end: {shown.iloc[-1]:.4g}" + (f" ± {spread[-1]:.2g} (95 % interval)" if spread else "")
    return Line(i, key, title, shown.index.tolist(), shown.tolist(), spread)


def thinned(curve: pd.Series, most: int) -> pd.Series:
    """At most `most` of its points, evenly chosen, with the first and the last."""
    if len(curve) <= most:
        return curve
    return curve.iloc[np.linspace(0, len(curve) - 1, most).round().astype(int)]


# ---- channel attention -----------------------------------------------------------------------------------


def attention_histograms(comparison: Comparison, warn: Warn) -> list[Group]:
    """A group for each cell with channel attention, a histogram of the normalised weights C_l * w_l for each tap.

    Seeds of a cell normally share their weights, which are then counted once; different ones are pooled.
    """
    groups = []
    for row in comparison.rows:
        for method, cell in row.cells.items():
            weights = distinct_weights(cell, warn)
            if not weights:
                continue
            colour = style_of(method, comparison.methods).colour
            taps = dict.fromkeys(tap for one in weights for tap in one)
            charts = [histogram(tap, [one[tap] for one in weights if tap in one], colour) for tap in taps]
            remarks = [f"{len(weights)} different sets of weights, pooled."] if len(weights) > 1 else []
            groups.append(Group(title_of(comparison, method, row), charts, [], remarks))
    return groups


def distinct_weights(cell: Cell, warn: Warn) -> list[dict[str, np.ndarray]]:
    """The different channel weights of the runs of a cell. warn: called with a line about each damaged file."""
    found: dict[tuple[tuple[str, bytes], ...], dict[str, np.ndarray]] = {}
    for run in cell.runs:
        try:
            weights = channel_weights(run)
        except Damaged as error:
            warn(str(error))
            continue
        if weights:
            found.setdefault(tuple((tap, values.tobytes()) for tap, values in weights.items()), weights)
    return list(found.values())


def histogram(tap: str, weights: list[np.ndarray], colour: str) -> tuple[str, str]:
    values = np.concatenate(weights)
    counts, edges = np.histogram(values, bins=BINS)
    title = f"{tap}: {len(weights[0])} channels, largest weight {values.max():.2f}"
    return title, bars_chart(title, "channel weight, mean 1", edges, counts, colour, reference=1.0)


# ---- matched pairs ---------------------------------------------------------------------------------------


def matched_amounts(comparison: Comparison, of_places: list[list[Curves]]) -> list[Group]:
    """A group for each cell that logged the amounts of pairs of taps (L2T-ww), as `matching_figures` draws them.

    For each source a map of the amounts at the end; for each of its taps a chart with a line for each target tap.
    """
    groups = []
    for curves, sources in matched_curves(of_places):
        targets = list(dict.fromkeys(tap for one in sources for tap in one.target_taps))
        keys = [Key(tap, curves.n, TAPS[i % len(TAPS)], "") for i, tap in enumerate(targets)]
        highest = max(np.nanmax(one.at_the_end()) for one in sources) or 1.0
        charts = []
        for one in sources:
            title = f"Amounts at the end, by tap of {one.source}"
            taps = one.source_taps, one.target_taps
            charts.append((title, numbers_map(title, *taps, one.at_the_end(), highest)))
            for tap, pairs in grouped(one.mean, lambda pair: pair[0]):
                lines = []
                for pair in pairs:
                    i = targets.index(pair[1])
                    lines.append(line_of(i, keys[i], one.mean[pair], one.half[pair]))
                title = f"Amounts of {tap} of {one.source}"
                charts.append((title, lines_chart(title, "iteration", lines)))
        groups.append(Group(title_of(comparison, curves.method, curves.row), charts, keys, []))
    return groups
