"""Finds channels of the source network that the target task leaves unused, and those that fine-tuning brings to life.

The DELTA paper claims that fine-tuning with attention keeps the channels that matter for the task and re-uses the
others. Here a channel's activation is the mean over images and positions of

- relu(BatchNorm(F)) where BatchNorm alone reads the tap F, as in ResNets and MobileNet-v2. A convolution's raw output
  has a scale and an offset that mean nothing before BatchNorm, and is hardly ever near 0, used or not. The residual
  sum that follows is left out, so that the number is the channel's own contribution and not the shortcut's.
- |F| elsewhere (Inception's blocks, which end with a ReLU themselves, and networks that torch.fx cannot trace).

BatchNorm's statistics are part of the network. Fine-tuning re-estimates them on the target's images, and this alone can
wake a channel.

A source channel is silent if its activation in the source is below a fraction of that tap's median channel. It came to
life if its activation in the fine-tuned network reaches that same number. A channel fell silent in the reverse case.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, fx, nn

from ..common.console import log
from ..common.style import style_of
from ..common.tables import Table, entries, number
from ..models import HookedNetwork, Network
from ..records.reading import method_title
from .replay import Replay

SHUFFLE_SEED = 0  # of the test images over which activations are averaged

Activations = dict[str, np.ndarray]  # tap -> (C,)


@dataclass(frozen=True)
class Change:
    """The activations of the source network and of a fine-tuned one."""

    label: str
    method: str  # its name, which decides its colour
    title: str  # its display name
    source: Activations
    target: Activations


class Count(NamedTuple):
    channels: int
    silent: int  # in the source
    woken: int  # silent in the source, not in the target
    fallen: int  # the reverse


def changes_of(runs: list[Replay], labels: list[str], count_images: int) -> tuple[list[Change], int]:
    """The change of each run over `count_images` test images, drawn once for all runs, and their number.

    All runs start from the same source network.
    """
    drawn = np.random.default_rng(SHUFFLE_SEED).permutation(runs[0].splits.test)[:count_images]
    source = mean_activations(runs[0].source, runs[0].images(drawn))
    changes = []
    for run, label in zip(runs, labels, strict=True):
        target = mean_activations(run.target, run.images(drawn))
        changes.append(Change(label, run.config.reg.name, method_title(run.record), source, target))
    return changes, len(drawn)


@torch.inference_mode()
def mean_activations(network: Network, batches: Iterable[Tensor]) -> Activations:
    """The activation of each channel, as the module defines it, over batches of images (B, 3, H, W)."""
    batchnorms = readers(network)
    sums = {tap: torch.zeros((), dtype=torch.float64) for tap in network.taps}
    images = 0
    for batch in batches:
        maps = network(batch)
        for tap in network.taps:
            batchnorm = batchnorms[tap]
            values = maps[tap].abs() if batchnorm is None else batchnorm(maps[tap]).relu()
            sums[tap] = sums[tap] + values.mean(dim=(2, 3)).double().sum(dim=0)
        images += len(batch)
    return {tap: (total / images).cpu().numpy() for tap, total in sums.items()}


def readers(network: Network) -> dict[str, nn.BatchNorm2d | None]:
    """The BatchNorm that alone reads each tap; None if something else reads it, too, or if nobody knows."""
    if isinstance(network, HookedNetwork):  # it has no graph
        return dict.fromkeys(network.taps)
    graph = cast(fx.Graph, network.traced.eval_graph)
    (output,) = (node for node in graph.nodes if node.op == "output")
    returned = cast(dict[str, fx.Node], output.args[0])
    found: dict[str, nn.BatchNorm2d | None] = {}
    for tap in network.taps:
        users = [user for user in returned[tap].users if user is not output]
        modules = [network.traced.get_submodule(str(user.target)) for user in users if user.op == "call_module"]
        batchnorms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        found[tap] = batchnorms[0] if len(users) == len(batchnorms) == 1 else None
    return found


def threshold(source: np.ndarray, fraction: float) -> float:
    return fraction * float(np.median(source))


def count(source: np.ndarray, target: np.ndarray, fraction: float) -> Count:
    """The counts of one tap. source, target: (C,) mean activations."""
    limit = threshold(source, fraction)
    before, after = source < limit, target < limit
    return Count(len(source), int(before.sum()), int((before & ~after).sum()), int((~before & after).sum()))


def table_of(changes: list[Change], fraction: float, images: int) -> Table:
    """A row for each network and tap, and one for all taps of a network. A message names taps that are mostly 0."""
    rows = []
    for change in changes:
        counts = {tap: count(change.source[tap], change.target[tap], fraction) for tap in change.source}
        for tap, found in counts.items():
            rows.append(entries(change.label, tap, *map(number, found)))
            if threshold(change.source[tap], fraction) == 0:
                log.info(f"{tap}: half of the source's channels are 0 everywhere, so that none counts as silent")
        if len(counts) > 1:
            total = Count(*map(sum, zip(*counts.values(), strict=True)))
            rows.append(entries(change.label, "all taps", *map(number, total)))
    return Table(
        title="Unused channels of the source network, after fine-tuning",
        header=["method", "tap", "channels", "silent in the source", "came to life", "fell silent"],
        rows=rows,
        names=2,
        remarks=[
            f"Silent: mean activation below {100 * fraction:g} % of the tap's median channel in the source network.",
            f"Mean over {images:,} test images, without their labels, and over positions, of relu(BatchNorm(F)) where "
            "BatchNorm alone reads the tapped map F, else of |F|.",
        ],
    )


def figure_of(changes: list[Change], fraction: float) -> Figure:
    """A panel for each tap: every channel's activation in the source (across) and after fine-tuning (up)."""
    taps, methods = list(changes[0].source), list(dict.fromkeys(change.method for change in changes))
    figure = Figure(figsize=(3.1 * len(taps) + 0.4, 3.9), layout="constrained")
    panels = figure.subplots(1, len(taps), squeeze=False)[0]
    for panel, tap in zip(panels, taps, strict=True):
        values = np.concatenate([[change.source[tap], change.target[tap]] for change in changes], axis=1)
        positive = values[values > 0]
        low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
        limit = threshold(changes[0].source[tap], fraction) or low
        low, high = max(min(low, limit) / 2, limit / 100), high * 1.5  # a dead channel would squeeze all others
        panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), box_aspect=1)
        panel.set_title(tap, fontsize=10)
        panel.axvspan(low, limit, color="#dddddd", zorder=0)
        panel.axhline(limit, color="#888888", linewidth=0.8, linestyle="--", zorder=1)
        words = {"transform": panel.transAxes, "fontsize": 8, "color": "#444444"}
        panel.text(0.02, 0.98, "came to life", va="top", rotation="vertical", **words)
        panel.text(0.98, 0.02, "fell silent", ha="right", **words)
        panel.plot([low, high], [low, high], color="#888888", linewidth=0.8, zorder=1)
        for change in changes:
            look = style_of(change.method, methods)
            panel.scatter(
                np.maximum(change.source[tap], low),
                np.maximum(change.target[tap], low),
                s=8,
                marker=look.marker,
                facecolors="none",
                edgecolors=look.colour,
                linewidths=0.6,
                alpha=0.6,
                clip_on=False,
                label=change.title,
            )
        panel.set_xlabel("in the source network")
        panel.tick_params(labelsize=8)
    panels[0].set_ylabel("after fine-tuning")
    handles, labels = panels[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(), unique, loc="outside lower center", ncols=len(unique), frameon=False, markerscale=1.6
    )
    figure.suptitle("Mean activation of each channel on the target task's test images", fontsize=11)
    return figure


def caption(changes: list[Change], fraction: float, images: int) -> str:
    return (
        f"Mean activation of every tapped channel over {images:,} test images (labels unused) and over positions: in "
        "the source network (across) and after fine-tuning (up), log scales, a panel for each tap, a mark for each "
        f"channel and network ({', '.join(change.label for change in changes)}). Activation is relu(BatchNorm(F)) "
        "where BatchNorm alone reads the tapped map F, else |F|. Shaded: channels that are silent in the source, below "
        f"{100 * fraction:g} % of the tap's median channel; those of them above the dashed line came to life, those "
        "to the right of the shade and below the line fell silent. On the diagonal nothing changed. Channels below "
        "a panel's range are drawn at its edge."
    )
