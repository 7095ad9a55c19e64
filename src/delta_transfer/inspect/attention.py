"""The channel weights of DELTA in finished runs: how uneven they are, and how far two runs agree on them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from scipy.special import entr
from scipy.stats import spearmanr

from ..common.console import log
from ..common.tables import MISSING, Entry, Table, entries, number
from ..records.arrays import ChannelAttention, channel_attention
from ..records.reading import Record, attention_options, is_number, run_id, section


@dataclass(frozen=True)
class Attention:
    """The attention of one run, and the ids of other runs with the same weights, such as other seeds."""

    record: Record
    found: ChannelAttention
    alike: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """C_l * w_l of each tap, (C_l,), mean 1."""
        return self.found.weights

    @property
    def backbone(self) -> object:
        return section(self.record, "backbone").get("name")

    @property
    def options(self) -> Record:
        return attention_options(self.record) or {}


def attention_of(record: Record) -> Attention | None:
    """The attention that the run computed before training; None if it has none. Raises Damaged."""
    found = channel_attention(record)
    return None if found is None else Attention(record, found)


def distinct(attentions: Iterable[Attention]) -> list[Attention]:
    """The first run with each set of weights, in the order given; `alike` has the other runs with the same weights."""
    kept: list[Attention] = []
    for attention in attentions:
        same = next((other for other in kept if identical(other, attention)), None)
        if same is None:
            kept.append(attention)
        else:
            same.alike.append(run_id(attention.record))
    return kept


def identical(one: Attention, other: Attention) -> bool:
    return why_not_comparable(one, other) is None and all(
        np.array_equal(one.weights[tap], other.weights[tap]) for tap in one.weights
    )


def why_not_comparable(one: Attention, other: Attention) -> str | None:
    """Why channel i of one run is not channel i of the other; None if it is the same."""
    if one.backbone != other.backbone or list(one.weights) != list(other.weights):
        return "other backbone or taps"
    if one.found.source != other.found.source:
        return "other source weights, whose channels have another order"
    return None


def names_of(attentions: list[Attention]) -> list[str]:
    """data set/backbone; if several share that, with the last part of the run's id, or else with the folder."""
    chosen = [f"{section(a.record, 'dataset').get('name')}/{a.backbone}" for a in attentions]
    hashes = [f"{name} {run_id(a.record).rpartition('-')[2]}" for name, a in zip(chosen, attentions, strict=True)]
    folders = [str(a.record["folder"]) for a in attentions]
    for longer in (hashes, folders):
        chosen = [long if chosen.count(name) > 1 else name for name, long in zip(chosen, longer, strict=True)]
    return chosen


# --- Numbers about weights (C,) of one tap --------------------------------------------------------------------------


def heaviest(weights: np.ndarray, count: int | None = None) -> np.ndarray:
    """The channels with the largest weights, largest first, the lower index first among equals; default: 10 %."""
    return np.argsort(-weights, kind="stable")[: count or max(1, round(len(weights) / 10))]


def normalised_entropy(weights: np.ndarray) -> float | None:
    """-sum_c w_c log w_c / log C, which is 1 if all weights are equal; None for a single channel."""
    return float(entr(weights / weights.sum()).sum() / np.log(len(weights))) if len(weights) > 1 else None


def mass(weights: np.ndarray, channels: np.ndarray) -> float:
    """The share of the sum of all weights that `channels` hold."""
    return float(weights[channels].sum() / weights.sum())


@dataclass(frozen=True)
class Overlap:
    top: int  # number of channels in the heaviest 10 %
    common: int  # how many of them are among the heaviest 10 % of the other
    by_chance: float  # expected share if the weights were independent
    correlation: float  # Spearman's rank correlation of all weights


def overlap(one: np.ndarray, other: np.ndarray) -> Overlap | None:
    """Compares two weightings (C,) of the same channels; None if all weights of one are equal, without a ranking."""
    if one.min() == one.max() or other.min() == other.max():
        return None
    top = heaviest(one)
    common = len(np.intersect1d(top, heaviest(other)))
    return Overlap(len(top), common, len(top) / len(one), float(spearmanr(one, other).statistic))


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
        number(float(np.median(weights)), ".3f"),
        number(weights.max(), ".3f"),
        number(weights.std(), ".3f"),  # the population's: these are all the channels
        number(100 * float(np.mean(importance < 0)), ".0f", " %"),
        number(normalised_entropy(weights), ".4f"),
        number(100 * mass(weights, heaviest(weights)), ".1f", " %"),
        number(agreement if is_number(agreement) else None, ".2f"),
        number(images if isinstance(images, int) else None, "d", "" if method == "exact" else f" ({method})"),
    )


def runs_behind(attentions: list[Attention]) -> list[str]:
    """The runs of each name that does not tell them itself."""
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
                cells = [
                    number(100 * found.common / found.top, ".0f", f" % ({found.common} of {found.top})"),
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
    lowest = max(min(every.min(), 0.5), 0.001)  # a low temperature gives weights of 0
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
    for column in axes.T:  # a column's lowest panel may not be in the last row
        [axis for axis in column if axis.axison][-1].tick_params(labelbottom=True)
    below = f"; the first bar also holds all smaller weights than {lowest:g}" if every.min() < lowest else ""
    figure.supxlabel(f"weight of a channel C*w (1, dashed: all channels alike){below}", fontsize=9)
    return figure
