"""Records -> what the HTML page draws: learning curves, channel attention, the pairs that L2T-ww matched."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..common.console import Warn
from ..common.style import style_of
from ..records.arrays import channel_weights
from ..records.metrics import METRICS, TASK_LOSSES
from ..records.reading import Damaged
from . import svg
from .comparison import Cell, Comparison, Row, grouped
from .logs import Curves, matched_curves, penalty_terms

POINTS = 80  # per line; a small chart hardly shows more
BINS = 40
# Tol's colours, for target taps.
TAPS = ["#332288", "#cc6677", "#117733", "#ddcc77", "#88ccee", "#aa4499", "#999933", "#882255"]
TITLES = {  # of what is drawn, in that order: test first
    **{key: METRICS[key].axis.replace(" top-1", "") for key in sorted(METRICS) if METRICS[key].short},
    "train_top1": "Training accuracy (%)",
    "loss": "Training loss, all terms",
    **{name: f"Training {words}" for name, words in TASK_LOSSES.items()},
}


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


# ---- learning curves -------------------------------------------------------------------------------------


def learning_curves(comparison: Comparison, of_places: list[list[Curves]]) -> list[Group]:
    """A group of charts for each data set, backbone and setting outside reg, a line for each method and setting of it.

    A line is the mean over the runs of a cell.
    """
    groups = []
    for curves in of_places:
        lines = []
        for method, own in grouped(curves, lambda one: one.method):
            style = style_of(method, comparison.methods)
            for number, one in enumerate(own):
                # Several settings of a method: from strong to faint.
                opacity = round(1 - 0.65 * number / max(1, len(own) - 1), 2)
                label = comparison.label(method, one.row.reg)
                lines.append((Key(label, one.n, style.colour, svg.attributes(style.line, opacity)), one))
        if charts := [chart for name in quantities(curves) if (chart := chart_of(name, lines))]:
            groups.append(Group(comparison.place_title(curves[0].row.place), charts, [key for key, _ in lines], []))
    return groups


def title_of(comparison: Comparison, method: str, row: Row) -> str:
    return f"{comparison.label(method, row.reg)}, {comparison.place_title(row.place)}"


def quantities(curves: list[Curves]) -> list[str]:
    """The logged quantities in the order in which they are drawn: accuracies, loss, its terms."""
    names = dict.fromkeys(name for one in curves for name in one.columns)
    return [name for name in (*TITLES, *penalty_terms(names)) if name in names]


def chart_of(name: str, lines: list[tuple[Key, Curves]]) -> tuple[str, str] | None:
    """The chart of one quantity; None if no line has two points, because the tables have single ones."""
    drawn = [(i, key, *curves.of(name)) for i, (key, curves) in enumerate(lines) if name in curves.mean]
    if not any(len(mean) > 1 for _, _, mean, _ in drawn):
        return None
    title = TITLES.get(name, f"Penalty: {name.replace('_', ' ').replace('.', ': ')}")
    return title, svg.lines_chart(title, "iteration", [line_of(*line) for line in drawn if len(line[2])])


def line_of(i: int, key: Key, curve: pd.Series, half: pd.Series) -> svg.Line:
    """A line, with its band where `half` is known at all of its points."""
    shown = thinned(curve)
    half = half.reindex(shown.index)
    spread = half.tolist() if half.notna().all() else None
    title = f"{key.label} at the end: {shown.iloc[-1]:.4g}" + (f" ± {spread[-1]:.2g} (95 % interval)" if spread else "")
    return svg.Line(i, title, key.look, key.colour, shown.index.tolist(), shown.tolist(), spread)


def thinned(curve: pd.Series, most: int = POINTS) -> pd.Series:
    """At most so many of its points, evenly chosen, first and last among them."""
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
    """The different channel weights of the runs of a cell; `warn` names a damaged file."""
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
    return title, svg.bars_chart(title, "channel weight, mean 1", edges, counts, colour, reference=1.0)


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
            charts.append((title, svg.numbers_map(title, *taps, one.at_the_end(), highest)))
            for tap, pairs in grouped(one.mean, lambda pair: pair[0]):
                lines = []
                for pair in pairs:
                    i = targets.index(pair[1])
                    lines.append(line_of(i, keys[i], one.mean[pair], one.half[pair]))
                title = f"Amounts of {tap} of {one.source}"
                charts.append((title, svg.lines_chart(title, "iteration", lines)))
        groups.append(Group(title_of(comparison, curves.method, curves.row), charts, keys, []))
    return groups
