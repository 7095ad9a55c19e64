"""Tables and histograms of the channel weights of DELTA."""

from itertools import combinations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ..common.console import log
from ..common.tables import MISSING, Entry, Table, entries
from ..records.reading import is_number, run_id
from .attention import Attention, heaviest, mass, names_of, normalised_entropy, overlap, why_not_comparable


def weight_table(attentions: list[Attention]) -> Table:
    rows = [
        row_of(name, attention, tap)
        for name, attention in zip(names_of(attentions), attentions, strict=True)
        for tap in attention.weights
    ]
    header = ["attention of", "layer", "channels", "smallest", "median", "largest", "sd", "importance < 0"]
    header += ["entropy", "mass of top 10 %", "split-half", "images"]
    notes = [
        "C*w: weight of a channel times the number of channels, mean 1; w: softmax of the standardised importances; "
        "smallest, median, largest, sd: of C*w over the channels of the layer",
        "Importance: rise of the probe's cross-entropy without the channel; entropy: of w over log C, 1 is uniform",
        "Split-half: rank correlation of the importances on the even and on the odd images; near 0, other images would "
        "rank the channels otherwise",
    ]
    temperatures = sorted({attention.options["temperature"] for attention in attentions})
    notes.append(f"Temperature of the softmax: {' and '.join(f'{t:g}' for t in temperatures)}")
    return Table("Channel weights C*w of DELTA", header, rows, 2, runs_behind(attentions), notes)


def row_of(name: str, attention: Attention, tap: str) -> list[Entry]:
    weights, importance = attention.weights[tap], attention.found.importance[tap]
    fit = attention.record.get("fit")
    agreement = fit.get(f"{tap}/split_half") if isinstance(fit, dict) else None
    images, method = attention.options.get("images"), attention.options.get("method", "exact")
    return entries(
        name,
        tap,
        number(len(weights), "d"),
        number(weights.min(), ".3f"),
        number(np.median(weights), ".3f"),
        number(weights.max(), ".3f"),
        number(weights.std(), ".3f"),  # the population's: these are all the channels
        number(100 * np.mean(importance < 0), ".0f", " %"),
        number(normalised_entropy(weights), ".4f"),
        number(100 * mass(weights, heaviest(weights)), ".1f", " %"),
        number(agreement if is_number(agreement) else None, ".2f"),
        number(images if isinstance(images, int) else None, "d", "" if method == "exact" else f" ({method})"),
    )


def number(value: float | np.floating | None, form: str, unit: str = "") -> Entry:
    return Entry(MISSING) if value is None else Entry(f"{value:{form}}{unit}", float(value))


def runs_behind(attentions: list[Attention]) -> list[str]:
    """Which runs each name stands for, where the name alone does not tell."""
    lines = []
    for name, attention in zip(names_of(attentions), attentions, strict=True):
        first = run_id(attention.record)
        if attention.alike:
            lines.append(f"{name}: identical weights, counted once, in {', '.join([first, *attention.alike])}")
        elif name != first:
            lines.append(f"{name}: {first}")
    return lines


def overlap_table(attentions: list[Attention]) -> Table | None:
    """A row for each pair of runs with the same channels; None without such a pair. Messages name the other pairs."""
    rows = []
    for (name, one), (other_name, other) in combinations(zip(names_of(attentions), attentions, strict=True), 2):
        reason = why_not_comparable(one, other)
        if reason:
            log.info(f"not compared: {run_id(one.record)} and {run_id(other.record)} have {reason}")
            continue
        for tap, weights in one.weights.items():
            found = overlap(weights, other.weights[tap])
            cells = [Entry(MISSING)] * 3
            if found:
                share = 100 * found.common / found.top
                cells = [
                    Entry(f"{share:.0f} % ({found.common} of {found.top})", share),
                    number(100 * found.by_chance, ".0f", " %"),
                    number(found.correlation, ".2f"),
                ]
            rows.append(entries(f"{name} and {other_name}", tap, *cells, number(len(weights), "d")))
    header = ["pair", "layer", "common of top 10 %", "by chance", "rank correlation", "n"]
    notes = [
        "Top 10 %: the channels with the largest weights; by chance: expected if one said nothing about the other",
        "Rank correlation: Spearman's, over all n channels; of independent weights it lies within 1.96 / sqrt(n - 1) "
        "of 0 in 95 % of cases",
    ]
    return Table("Do they weight the same channels?", header, rows, 2, [], notes) if rows else None


def histograms(attentions: list[Attention]) -> Figure:
    """A row for each attention and a panel for each tap; all panels have the same axes."""
    columns = max(len(attention.weights) for attention in attentions)
    figure = Figure(figsize=(0.6 + 2.6 * columns, 0.6 + 2.1 * len(attentions)), layout="constrained")
    axes = figure.subplots(len(attentions), columns, sharex=True, sharey=True, squeeze=False)
    every = np.concatenate([w for attention in attentions for w in attention.weights.values()])
    lowest = max(min(every.min(), 0.5), 0.001)  # a low temperature makes weights of 0
    bins = np.geomspace(lowest, max(every.max(), 2), 41)
    for row, name, attention in zip(axes, names_of(attentions), attentions, strict=True):
        for axis, (tap, weights) in zip(row, attention.weights.items(), strict=False):
            axis.hist(np.maximum(weights, lowest), bins, color="0.55", edgecolor="0.25", linewidth=0.4)
            axis.axvline(1, color="black", linestyle="--", linewidth=0.8)
            axis.set_title(f"{tap}, C = {len(weights)}", fontsize=9)
            words = f"top 10 % hold\n{100 * mass(weights, heaviest(weights)):.0f} % of the weight"
            axis.text(0.97, 0.95, words, transform=axis.transAxes, ha="right", va="top", fontsize=7.5)
        for axis in row[len(attention.weights) :]:
            axis.set_axis_off()
        row[0].set_ylabel("\n".join([*name.split(" "), "channels"]), fontsize=9)
    axes[0, 0].set(xscale="log", yscale="log", ylim=(0.7, None))  # for all of them
    axes[0, 0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    for column in axes.T:  # the lowest panel of a column need not be in the last row
        [axis for axis in column if axis.axison][-1].tick_params(labelbottom=True)
    below = f"; the first bar also holds all smaller weights than {lowest:g}" if every.min() < lowest else ""
    figure.supxlabel(f"weight of a channel C*w (1, dashed: all channels alike){below}", fontsize=9)
    return figure
