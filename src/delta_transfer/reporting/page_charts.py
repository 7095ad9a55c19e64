"""Records -> what the HTML page draws: learning curves of each cell, channel attention, the pairs that L2T-ww matched.

A chart holds Plotly's traces; how charts look (fonts, axes, bands) is in page.js.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from ..common.style import DASHES, style_of
from ..records.arrays import channel_weights
from ..records.reading import Damaged
from .comparison import Cell, Comparison, Row, grouped
from .logs import Curves, Warn, curves_of, matched_curves, penalty_terms
from .record_views import show

POINTS = 400  # per line; a screen hardly has more
BINS = 40
# Tol's colours, for target taps.
TAPS = ["#332288", "#cc6677", "#117733", "#ddcc77", "#88ccee", "#aa4499", "#999933", "#882255"]
TITLES = {
    "loss": "Training loss, all terms",
    "cross_entropy": "Training cross-entropy",
    "train_top1": "Training accuracy (%)",
    "val_top1": "Validation accuracy (%)",
    "test_top1": "Test accuracy (%)",
    "test_pair_accuracy": "Test pair accuracy (%)",
    "val_roc_auc": "Validation ROC-AUC (%)",
    "test_roc_auc": "Test ROC-AUC (%)",
}

ACCURACIES = [name for name in TITLES if name.endswith(("_top1", "_accuracy", "_auc"))]


@dataclass(frozen=True)
class Chart:
    title: str
    x: str  # title of the horizontal axis
    traces: list[dict[str, Any]]  # plotly's; `customdata` of a line is the sample std at each point
    reference: float | None = None  # a vertical line there


@dataclass(frozen=True)
class Key:
    """A line of the legend, which all charts of a group share: a click on it hides the traces of that `legendgroup`."""

    label: str
    n: int  # runs
    colour: str
    dash: str  # plotly's
    opacity: float


@dataclass(frozen=True)
class Group:
    title: str
    charts: list[Chart]
    keys: list[Key]
    remarks: list[str]


# ---- learning curves -------------------------------------------------------------------------------------


def learning_curves(comparison: Comparison, warn: Warn) -> list[Group]:
    """A group of charts for each data set, backbone and setting outside reg, a line for each method and setting of it.

    A line is the mean over the runs of a cell. `warn` names runs whose metrics are missing or damaged.
    """
    groups = []
    for curves in curves_of(comparison, warn):
        lines = []
        for method, own in grouped(curves, lambda one: one.method):
            style = style_of(method, comparison.methods)
            for number, one in enumerate(own):
                # Several settings of a method: from strong to faint.
                opacity = round(1 - 0.65 * number / max(1, len(own) - 1), 2)
                label = comparison.label(method, one.row.reg)
                lines.append((Key(label, one.n, style.colour, DASHES[style.line], opacity), one))
        if charts := [chart for name in quantities(curves) if (chart := chart_of(name, lines))]:
            row = curves[0].row
            title = ", ".join(filter(None, [row.dataset, row.backbone, show(row.shared)]))
            groups.append(Group(title, charts, [key for key, _ in lines], []))
    return groups


def title_of(comparison: Comparison, method: str, row: Row) -> str:
    parts = [comparison.label(method, row.reg), row.dataset, row.backbone, show(row.shared)]
    return ", ".join(filter(None, parts))


def quantities(curves: list[Curves]) -> list[str]:
    """The logged quantities in the order in which they are drawn: loss, its terms, accuracies."""
    names = dict.fromkeys(str(name) for one in curves for name in one.mean.columns)
    return [name for name in ("loss", "cross_entropy", *penalty_terms(names), *ACCURACIES) if name in names]


def chart_of(name: str, lines: list[tuple[Key, Curves]]) -> Chart | None:
    """The chart of one quantity; None if no line has two points, because the tables have single ones."""
    drawn = [(key, *curves.of(name)) for key, curves in lines if name in curves.mean]
    if not any(len(mean) > 1 for _, mean, _ in drawn):
        return None
    traces = [trace_of(*line) for line in drawn if len(line[1])]
    return Chart(TITLES.get(name, f"Penalty: {name}"), "iteration", traces)


def trace_of(key: Key, curve: pd.Series, std: pd.Series) -> dict[str, Any]:
    """A line, with its band where `std` is known at all of its points."""
    points = thinned(curve)
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": escape(key.label, quote=False),  # plotly reads a few tags
        "legendgroup": key.label,
        "x": points.index.tolist(),
        "y": rounded(points.tolist()),
        "mode": "lines" if len(points) > 20 else "lines+markers",
        "line": {"color": key.colour, "dash": key.dash, "width": 1.8},
        "marker": {"size": 4},
        "opacity": key.opacity,
        "hovertemplate": "%{y:.4g}",
    }
    std = std.reindex(points.index)
    if std.notna().all():
        trace |= {"customdata": rounded(std.tolist()), "hovertemplate": "%{y:.4g} ± %{customdata:.2g}"}
    return trace


def thinned(curve: pd.Series) -> pd.Series:
    """At most POINTS of its points, evenly chosen, first and last among them."""
    if len(curve) <= POINTS:
        return curve
    return curve.iloc[np.linspace(0, len(curve) - 1, POINTS).round().astype(int)]


def rounded(values: Sequence[float]) -> list[float]:
    """To 5 significant digits: the page holds them as text."""
    return [float(f"{value:.5g}") for value in values]


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


def histogram(tap: str, weights: list[np.ndarray], colour: str) -> Chart:
    values = np.concatenate(weights)
    counts, edges = np.histogram(values, bins=BINS)
    trace = {
        "type": "bar",
        "x": rounded(((edges[1:] + edges[:-1]) / 2).tolist()),
        "y": counts.tolist(),
        "width": rounded(np.diff(edges).tolist()),
        "marker": {"color": colour},
        "hovertext": [f"{low:.3g} to {high:.3g}" for low, high in zip(edges, edges[1:], strict=False)],
        "hovertemplate": "weight %{hovertext}: %{y} channels<extra></extra>",
    }
    title = f"{tap}: {len(weights[0])} channels, largest weight {values.max():.2f}"
    return Chart(title, "channel weight, mean 1", [trace], reference=1.0)


# ---- matched pairs ---------------------------------------------------------------------------------------


def matched_amounts(comparison: Comparison) -> list[Group]:
    """A group for each cell that logged the amounts of pairs of taps (L2T-ww), as `matching_figures` draws them.

    For each source a map of the amounts at the end; for each of its taps a chart with a line for each target tap.
    """
    groups = []
    for curves, sources in matched_curves(comparison):
        targets = dict.fromkeys(target for pairs in sources.values() for _, target in pairs)
        keys = {tap: Key(tap, curves.n, TAPS[i % len(TAPS)], "solid", 1.0) for i, tap in enumerate(targets)}
        columns = [column for pairs in sources.values() for column in pairs.values()]
        highest = max(curves.of(column)[0].iloc[-1] for column in columns)
        charts = []
        for source, pairs in sources.items():
            at_the_end = {pair: curves.of(column)[0].iloc[-1] for pair, column in pairs.items()}
            charts.append(amounts_map(source, at_the_end, highest))
            for tap, own in grouped(pairs, lambda pair: pair[0]):
                lines = [trace_of(keys[pair[1]], *curves.of(pairs[pair])) for pair in own]
                charts.append(Chart(f"Amounts of {tap} of {source}", "iteration", lines))
        groups.append(Group(title_of(comparison, curves.method, curves.row), charts, list(keys.values()), []))
    return groups


def amounts_map(source: str, amounts: dict[tuple[str, str], float], highest: float) -> Chart:
    """A heat map by (source tap, target tap), empty where there is no pair. `highest`: where the colours end."""
    rows, columns = (list(dict.fromkeys(pair[side] for pair in amounts)) for side in (0, 1))
    trace = {
        "type": "heatmap",
        "x": [escape(tap, quote=False) for tap in columns],
        "y": [escape(tap, quote=False) for tap in rows],
        "z": [[rounded([amounts[m, n]])[0] if (m, n) in amounts else None for n in columns] for m in rows],
        "zmin": 0,
        "zmax": float(highest) or 1.0,
        "colorscale": "Viridis",
        "showscale": False,
        "texttemplate": "%{z:.2f}",
        "hovertemplate": "%{y} > %{x}: %{z:.4g}<extra></extra>",
    }
    return Chart(f"Amounts at the end, by tap of {source}", "target tap", [trace])
