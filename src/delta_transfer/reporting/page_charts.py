"""Records -> what the HTML page draws: learning curves of each cell, channel attention, the pairs that L2T-ww matched.

A chart holds Plotly's traces; how charts look (fonts, axes, bands) is in page.js. pandas and numpy are imported where
they are used, torch only if a run has channel attention.
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from ..common.style import DASHES, style_of
from ..records import reading as runs
from ..records.reading import Damaged
from .comparison import Cell, Comparison, grouped, label_of, names_of_sources, run_id, show
from .statistics import place_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

Warn = Callable[[str], None]

POINTS = 400  # of a line; a screen has not many more
BINS = 40
TAPS = ["#332288", "#cc6677", "#117733", "#ddcc77", "#88ccee", "#aa4499", "#999933", "#882255"]  # Tol's, of target taps
TITLES = {
    "loss": "Training loss, all terms",
    "cross_entropy": "Training cross-entropy",
    "train_top1": "Training accuracy (%)",
    "val_top1": "Validation accuracy (%)",
    "test_top1": "Test accuracy (%)",
    "test_pair_accuracy": "Test pair accuracy (%)",
}

ACCURACIES = [name for name in TITLES if name.endswith(("_top1", "_accuracy"))]


@dataclass(frozen=True)
class Chart:
    title: str
    x: str  # what the horizontal axis shows
    traces: list[dict]  # plotly's; `customdata` of a line is the sample std at each point
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


@dataclass(frozen=True)
class Line:
    """The curves of one cell."""

    key: Key
    mean: "pd.DataFrame"  # by step, a column for each quantity; NaN where not all runs have a value
    std: "pd.DataFrame"  # sample std, likewise; NaN for a single run


def learning_curves(comparison: Comparison, warn: Warn) -> list[Group]:
    """A group of charts for each data set, backbone and setting outside reg, a line for each method and setting of it.

    A line is the mean over the seeds of a cell. Runs whose metrics.jsonl is missing or damaged are named through `warn`
    and left out.
    """
    groups = []
    for (dataset, backbone, shared), rows in grouped(comparison.rows, place_of):
        lines = []
        for method in comparison.methods:
            cells = [(row.reg, row.cells[method]) for row in rows if method in row.cells]
            style = style_of(method, comparison.methods)
            for number, (reg, cell) in enumerate(cells):
                if frames := logs_of(cell, warn):
                    # Several settings of a method: from strong to faint.
                    opacity = round(1 - 0.65 * number / max(1, len(cells) - 1), 2)
                    key = Key(label_of(method, reg), len(frames), style.colour, DASHES[style.line], opacity)
                    lines.append(Line(key, *over_seeds(frames)))
        if charts := [chart for name in quantities(lines) if (chart := chart_of(name, lines))]:
            title = ", ".join(filter(None, [dataset, backbone, show(shared)]))
            groups.append(Group(title, charts, [line.key for line in lines], []))
    return groups


def logs_of(cell: Cell, warn: Warn) -> "list[pd.DataFrame]":
    found = []
    for run in cell.runs:
        try:
            frame = runs.metrics(run)
        except Damaged as error:
            warn(f"not in the learning curves: {error}")
            continue
        if frame is None:
            warn(f"not in the learning curves: {run_id(run)} has no metrics.jsonl, or an empty one")
        else:
            found.append(frame)
    return found


def over_seeds(frames: "list[pd.DataFrame]") -> "tuple[pd.DataFrame, pd.DataFrame]":
    """Mean and sample std by step; missing where a run has no finite value, so that n is the same all along."""
    import pandas as pd

    steps = pd.concat(frames).select_dtypes("number").groupby("step")
    complete = steps.count() == len(frames)
    return steps.mean().where(complete), steps.std().where(complete)


def quantities(lines: list[Line]) -> list[str]:
    """What was logged, in the order in which it is drawn: loss, its terms, accuracies."""
    names = dict.fromkeys(name for line in lines for name in line.mean.columns)
    return [name for name in ("loss", "cross_entropy", *runs.penalty_terms(names), *ACCURACIES) if name in names]


def chart_of(name: str, lines: list[Line]) -> Chart | None:
    """None where no line has two points: a single one is in the tables."""
    curves = [(line, line.mean[name].dropna()) for line in lines if name in line.mean.columns]
    if not any(len(curve) > 1 for _, curve in curves):
        return None
    traces = []
    for line, curve in curves:
        if not curve.empty:
            traces.append(trace_of(line.key, curve, line.std[name]))
    return Chart(TITLES.get(name, f"Penalty: {name}"), "iteration", traces)


def trace_of(key: Key, curve: "pd.Series", std: "pd.Series") -> dict:
    """A line, with its band where `std` is known at all of its points."""
    points = thinned(curve)
    trace = {
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


def thinned(curve: "pd.Series") -> "pd.Series":
    """At most POINTS of its points, evenly chosen, first and last among them."""
    import numpy as np

    if len(curve) <= POINTS:
        return curve
    return curve.iloc[np.linspace(0, len(curve) - 1, POINTS).round().astype(int)]


def rounded(values: list[float]) -> list[float]:
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
            title = ", ".join(filter(None, [label_of(method, row.reg), row.dataset, row.backbone, show(row.shared)]))
            remarks = [f"{len(weights)} different sets of weights, pooled."] if len(weights) > 1 else []
            groups.append(Group(title, charts, [], remarks))
    return groups


def distinct_weights(cell: Cell, warn: Warn) -> "list[dict[str, np.ndarray]]":
    found = {}
    for run in cell.runs:
        if (run["folder"] / "attention.safetensors").exists():
            from ..inspect.attention import weights_of  # imports torch when it reads a file

            if weights := weights_of(run, warn):
                found.setdefault(tuple((tap, values.tobytes()) for tap, values in weights.items()), weights)
    return list(found.values())


def histogram(tap: str, weights: "list[np.ndarray]", colour: str) -> Chart:
    import numpy as np

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
    """A group for each cell that logged the amounts of pairs of taps (L2T-ww): what `matching_figures` draws.

    For each source a map of the amounts at the end; for each of its taps a chart with a line for each target tap.
    """
    groups = []
    for row in comparison.rows:
        for method, cell in row.cells.items():
            frames = logs_of(cell, lambda _: None)  # what is missing was named with the learning curves
            if frames and (drawn := amounts_of(frames, names_of_sources(cell.runs[0]))):
                label = label_of(method, row.reg)
                title = ", ".join(filter(None, [label, row.dataset, row.backbone, show(row.shared)]))
                groups.append(Group(title, *drawn, []))
    return groups


def amounts_of(frames: "list[pd.DataFrame]", sources: list[str]) -> tuple[list[Chart], list[Key]] | None:
    """Charts and the key of each target tap; None without any pair."""
    mean, std = over_seeds(frames)
    found = runs.matched_pairs(mean.columns[mean.notna().any()], sources)
    curves = {column: mean[column].dropna() for pairs in found.values() for column in pairs.values()}
    if not curves:
        return None
    highest = max(curve.iloc[-1] for curve in curves.values())
    targets = dict.fromkeys(target for pairs in found.values() for _, target in pairs)
    keys = {tap: Key(tap, len(frames), TAPS[i % len(TAPS)], "solid", 1.0) for i, tap in enumerate(targets)}
    charts = []
    for source, pairs in found.items():
        at_the_end = {pair: curves[column].iloc[-1] for pair, column in pairs.items()}
        charts.append(amounts_map(source, at_the_end, highest))
        for tap, own in grouped(pairs, lambda pair: pair[0]):
            lines = [trace_of(keys[pair[1]], curves[pairs[pair]], std[pairs[pair]]) for pair in own]
            charts.append(Chart(f"Amounts of {tap} of {source}", "iteration", lines))
    return charts, list(keys.values())


def amounts_map(source: str, amounts: dict[tuple[str, str], float], highest: float) -> Chart:
    """By (source tap, target tap); a place without a pair stays empty. `highest`: where the colours end."""
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
