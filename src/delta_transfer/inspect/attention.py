"""The channel weights of DELTA in finished runs: how uneven they are, and how far two runs agree on the channels."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from scipy.special import entr
from scipy.stats import spearmanr

from ..records.arrays import ChannelAttention, channel_attention
from ..records.reading import Record, attention_options, run_id, section


@dataclass(frozen=True)
class Attention:
    """The attention of one run, and the ids of the other runs with the same weights, as other seeds have."""

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
    """What the run computed before training; None if it has no attention. Raises Damaged."""
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
    """Why channel i of one run is not channel i of the other; None if it is."""
    if one.backbone != other.backbone or list(one.weights) != list(other.weights):
        return "other backbone or taps"
    if one.found.source != other.found.source:
        return "other source weights, whose channels have another order"
    return None


def names_of(attentions: list[Attention]) -> list[str]:
    """data set/backbone. Where several share that, the last part of the run's id follows, or else the folder."""
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
    """-sum_c w_c log w_c / log C, which is 1 where all weights are equal; None for a single channel."""
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
    """Compares two weights of the same channels; None if all weights of one are equal, so that it ranks nothing."""
    if one.min() == one.max() or other.min() == other.max():
        return None
    top = heaviest(one)
    common = len(np.intersect1d(top, heaviest(other)))
    return Overlap(len(top), common, len(top) / len(one), float(spearmanr(one, other).statistic))
