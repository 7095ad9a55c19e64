"""delta-report attention: the channel weights of DELTA, and what the heaviest channels look at.

    delta-report attention results/runs/cub-resnet18-delta-s0-0123abcd
    delta-report attention RUN_ON_CUB RUN_ON_DOGS              # also how far two data sets agree on the channels
    delta-report attention RUN --patches --data-dir /data      # also the test patches that excite the heaviest channels

Per run and tap: how far the weights are from uniform (table, histogram); per pair of runs: what their heaviest channels
have in common. The tables go to stdout and to attention.md, figures are PNG and PDF, what was left out goes to stderr.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common import tables
from ..common.console import log
from ..common.errors import UserError
from ..common.tables import MISSING, Entry, Table, entries
from ..records.reading import read
from ..reporting.comparison import is_number, run_id, section

if TYPE_CHECKING:  # torch and matplotlib are slow to import, and weights_of is used by reports that need neither
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from .replay import Replay

Warn = Callable[[str], None]

COLUMNS = 5  # patches of a channel, from distinct images


@dataclass(frozen=True)
class Attention:
    """The attention of one run; `alike`: ids of further runs with the very same weights, as other seeds have."""

    record: dict
    source: str | None  # fingerprint of the source weights, as the file has it
    importance: dict[str, np.ndarray]  # tap -> (C_l,): rise of the probe's loss without the channel
    weights: dict[str, np.ndarray]  # tap -> (C_l,): C_l * w_l, mean 1
    alike: list[str] = field(default_factory=list)

    @property
    def backbone(self) -> object:
        return section(self.record, "backbone").get("name")

    @property
    def options(self) -> dict:
        return attention_options(self.record)


# ---- what a run recorded ---------------------------------------------------------------------------------


def weights_of(record: dict, warn: Warn) -> dict[str, np.ndarray] | None:
    """C_l * w_l of a run, {tap: (C_l,)}, mean 1, in the order of backbone.taps; formula: regularizers/delta.py.

    None if the run has no attention.safetensors, and for a damaged one, which is named through `warn`.
    """
    attention = attention_of(record, warn)
    return attention and attention.weights


def attention_options(record: dict) -> dict | None:
    """reg.attention, or that of a term of a sum."""
    reg = section(record, "reg")
    terms = reg.get("terms")
    methods = [reg, *(terms.values() if isinstance(terms, dict) else ())]
    found = (method.get("attention") for method in methods if isinstance(method, dict))
    return next((options for options in found if isinstance(options, dict)), None)


def attention_of(record: dict, warn: Warn) -> Attention | None:
    """What the run in `record["folder"]` computed before training; None and `warn` as in `weights_of`."""
    from ..config import AttentionConfig
    from ..methods import DELTA
    from ..records.checked import load_with_checksum

    path = record["folder"] / "attention.safetensors"
    if not path.exists():
        return None
    options, taps = attention_options(record), section(record, "backbone").get("taps")
    temperature = options.get("temperature") if options else None
    if (
        not is_number(temperature)
        or temperature <= 0
        or not isinstance(taps, list)
        or not taps
        or not all(isinstance(tap, str) for tap in taps)
    ):
        warn(f"{run_id(record)}: its record has no reg.attention.temperature or no backbone.taps")
        return None
    try:
        fitted, metadata = load_with_checksum(path)
    except (ValueError, OSError) as error:
        warn(f"{path} cannot be read: {error}")
        return None
    for tap in taps:
        values = fitted.get(tap)
        usable = values is not None and values.dim() == 1 and len(values) and values.is_floating_point()
        if not usable or values.element_size() < 4 or not values.isfinite().all():
            warn(f"{path} has no finite importances of the channels of {tap}")
            return None
    delta = DELTA(attention=AttentionConfig(temperature=temperature))
    delta.load_fitted({tap: fitted[tap] for tap in taps})
    weights = {tap: delta.relative_weights(tap).double().numpy() for tap in taps}
    return Attention(record, metadata.get("weights"), {tap: fitted[tap].double().numpy() for tap in taps}, weights)


def distinct(attentions: Iterable[Attention]) -> list[Attention]:
    """Each weights once, in the order given; the other runs that have them are in `alike`."""
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
    """Why channel i of one is not channel i of the other, or None."""
    if one.backbone != other.backbone or list(one.weights) != list(other.weights):
        return "other backbone or taps"
    if one.source != other.source:
        return "other source weights, whose channels have another order"
    return None


def names_of(attentions: list[Attention]) -> list[str]:
    """data set/backbone; with the last part of the run's id, or else the folder, where several share that."""
    chosen = [f"{section(a.record, 'dataset').get('name')}/{a.backbone}" for a in attentions]
    hashes = [f"{name} {run_id(a.record).rpartition('-')[2]}" for name, a in zip(chosen, attentions, strict=True)]
    folders = [str(a.record["folder"]) for a in attentions]
    for longer in (hashes, folders):
        chosen = [long if chosen.count(name) > 1 else name for name, long in zip(chosen, longer, strict=True)]
    return chosen


# ---- numbers about weights -------------------------------------------------------------------------------


def heaviest(weights: np.ndarray, count: int | None = None) -> np.ndarray:
    """Channels with the largest weights, largest first, the lower index first among equals; default: 10 % of them."""
    return np.argsort(-weights, kind="stable")[: count or max(1, round(len(weights) / 10))]


def normalised_entropy(weights: np.ndarray) -> float | None:
    """-sum_c w_c log w_c / log C, 1 where all weights are equal; None for a single channel."""
    from scipy.special import entr

    return float(entr(weights / weights.sum()).sum() / np.log(len(weights))) if len(weights) > 1 else None


def mass(weights: np.ndarray, channels: np.ndarray) -> float:
    """Share of the sum of all weights that `channels` hold."""
    return float(weights[channels].sum() / weights.sum())


@dataclass(frozen=True)
class Overlap:
    top: int  # how many channels are the heaviest 10 %
    common: int  # how many of those are among the heaviest 10 % of the other
    by_chance: float  # expected share if the one said nothing about the other
    correlation: float  # Spearman's rank correlation of all weights


def overlap(one: np.ndarray, other: np.ndarray) -> Overlap | None:
    """Of two weights (C,) of the same channels; None where one of them ranks nothing, as all its weights are equal."""
    from scipy.stats import spearmanr

    if one.min() == one.max() or other.min() == other.max():
        return None
    top = heaviest(one)
    common = len(np.intersect1d(top, heaviest(other)))
    return Overlap(len(top), common, len(top) / len(one), float(spearmanr(one, other).statistic))


# ---- tables ----------------------------------------------------------------------------------------------


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
    return Table("Channel weights C*w of DELTA", header, rows, 2, whose(attentions), notes)


def row_of(name: str, attention: Attention, tap: str) -> list[Entry]:
    weights, importance = attention.weights[tap], attention.importance[tap]
    fit = attention.record.get("fit")
    agreement = fit.get(f"{tap}/split_half") if isinstance(fit, dict) else None
    images = attention.options.get("images")
    method = "" if attention.options.get("method", "exact") == "exact" else f" ({attention.options['method']})"
    return entries(
        name,
        tap,
        number(len(weights), "d"),
        number(weights.min(), ".3f"),
        number(np.median(weights), ".3f"),
        number(weights.max(), ".3f"),
        number(weights.std(), ".3f"),  # divided by C: these are all the channels
        number(100 * np.mean(importance < 0), ".0f", " %"),
        number(normalised_entropy(weights), ".4f"),
        number(100 * mass(weights, heaviest(weights)), ".1f", " %"),
        number(agreement if is_number(agreement) else None, ".2f"),
        number(images if isinstance(images, int) else None, "d", method),
    )


def number(value: float | None, form: str, unit: str = "") -> Entry:
    return Entry(MISSING) if value is None else Entry(f"{value:{form}}{unit}", float(value))


def whose(attentions: list[Attention]) -> list[str]:
    """Which runs each name stands for, where the name does not say it."""
    lines = []
    for name, attention in zip(names_of(attentions), attentions, strict=True):
        first = run_id(attention.record)
        if attention.alike:
            lines.append(f"{name}: identical weights, counted once, in {', '.join([first, *attention.alike])}")
        elif name != first:
            lines.append(f"{name}: {first}")
    return lines


def overlap_table(attentions: list[Attention], warn: Warn) -> Table | None:
    """Pairs of runs whose channels are the same; the others are named. None without such a pair."""
    rows = []
    for (name, one), (other_name, other) in combinations(zip(names_of(attentions), attentions, strict=True), 2):
        reason = why_not_comparable(one, other)
        if reason:
            warn(f"not compared: {run_id(one.record)} and {run_id(other.record)} have {reason}")
            continue
        for tap, weights in one.weights.items():
            found = overlap(weights, other.weights[tap])
            cells = [MISSING] * 3
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


# ---- figure of the weights -------------------------------------------------------------------------------


def histograms(attentions: list[Attention]) -> "Figure":
    """A row for each attention, a panel for each tap; all panels have the same axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

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
            top = heaviest(weights)
            said = f"top 10 % hold\n{100 * mass(weights, top):.0f} % of the weight"
            axis.text(0.97, 0.95, said, transform=axis.transAxes, ha="right", va="top", fontsize=7.5)
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
    below = f"; what is below {lowest:g} is in the first bar" if every.min() < lowest else ""
    figure.supxlabel(f"weight of a channel C*w (1, dashed: all channels alike){below}", fontsize=9)
    return figure


# ---- what the heaviest channels look at ------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a channel of a tapped map is largest in one image."""

    value: float
    image: int  # index into the data set
    row: int  # of the map
    column: int


def strongest(
    maps: "Callable[[Tensor], dict[str, Tensor]]",
    batches: "Iterable[Tensor]",
    indices: np.ndarray,
    channels: dict[str, np.ndarray],
    keep: int = COLUMNS,
) -> dict[str, list[list[Place]]]:
    """For each tap and each of its `channels` the `keep` images in which it is largest, largest first.

    Args:
        maps: images (B, 3, H, W) -> {tap: (B, C, h, w)}.
        batches: the images of `indices`, in their order; one batch at a time is held.

    Of equal values the earlier image and the upper left position counts.
    """
    best: dict[str, list[list[Place]]] = {tap: [[] for _ in wanted] for tap, wanted in channels.items()}
    done = 0
    for images in batches:
        numbers = indices[done : done + len(images)]
        done += len(images)
        outputs = maps(images)
        for tap, wanted in channels.items():
            values, places = outputs[tap][:, wanted].flatten(2).max(dim=2)  # (B, channels)
            width = outputs[tap].shape[3]
            for rank, (column, where) in enumerate(zip(values.T.tolist(), places.T.tolist(), strict=True)):
                new = [
                    Place(value, int(image), *divmod(place, width))
                    for value, image, place in zip(column, numbers, where, strict=True)
                ]
                best[tap][rank] = sorted(best[tap][rank] + new, key=lambda place: -place.value)[:keep]
    return best


class ReceptiveFields:
    """Which pixels of a square image of `size` pixels a position of a tapped map depends on.

    Those where the gradient of the sum over channels at that position is not 0, on random images. On a CPU and in fp64:
    fast algorithms for fp32 convolutions (Winograd, FFT) leave rounding errors where the gradient is exactly 0.
    """

    def __init__(self, maps: "nn.Module", size: int):
        import torch

        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).requires_grad_(True)
        self.maps = deepcopy(maps).cpu().double()(self.images)
        self.size = size
        self.known: dict[tuple[str, int], tuple[int, int, int, int]] = {}

    def side(self, tap: str) -> int:
        """Of the tapped map."""
        return self.maps[tap].shape[3]

    def box(self, tap: str, row: int, column: int) -> tuple[int, int, int, int]:
        """First row, row behind the last, first column, column behind the last."""
        return self._on_diagonal(tap, row)[:2] + self._on_diagonal(tap, column)[2:]

    def _on_diagonal(self, tap: str, at: int) -> tuple[int, int, int, int]:
        """The box of (at, at): its rows are those of every position in this row of the map, columns alike."""
        import torch

        if (tap, at) not in self.known:
            (gradient,) = torch.autograd.grad(self.maps[tap][:, :, at, at].sum(), self.images, retain_graph=True)
            seen = (gradient != 0).any(dim=0).any(dim=0)
            bounds = [seen.any(dim=dim).nonzero().flatten() for dim in (1, 0)]
            self.known[tap, at] = tuple(int(bound) for along in bounds for bound in (along[0], along[-1] + 1))
        return self.known[tap, at]


def patch_figures(attention: Attention, name: str, run: "Replay", top: int) -> "Iterable[tuple[str, Figure]]":
    """(tap, figure) for each tap: a row for each of its `top` heaviest channels, its strongest patches in columns."""
    import torch

    from ..models.frozen import frozen_maps

    # A run on folds does not look at the test part, nor does a report about it.
    test = run.config.split.measures_test
    indices, part = (run.parts.test, "test") if test else (run.parts.val, "validation")
    channels = {tap: heaviest(weights, top) for tap, weights in attention.weights.items()}
    maps = frozen_maps(run.source)
    log.info(f"{name}: {len(indices)} {part} images through the source network ...")
    with torch.no_grad():
        best = strongest(maps, run.images(indices), indices, channels)
    wanted = np.unique([place.image for rows in best.values() for row in rows for place in row])
    pictures = dict(zip(wanted.tolist(), pictures_of(run, wanted), strict=True))
    captions = {index: short(run.dataset.class_of(index)) for index in pictures}
    fields = ReceptiveFields(maps, run.config.backbone.image_size)
    for tap, rows in best.items():
        weights = attention.weights[tap]
        labels = [f"rank {i}\nchannel {c}\nC*w = {weights[c]:.2f}" for i, c in enumerate(channels[tap], 1)]
        title = f"{name}, {tap}: where in {len(indices)} {part} images the {len(rows)} heaviest channels are largest"
        yield tap, patch_figure(title, labels, rows, pictures, captions, fields, tap)


def pictures_of(run: "Replay", indices: np.ndarray) -> "Iterable[np.ndarray]":
    """(H, W, 3) uint8: what the network saw of each image, before normalisation."""
    mean, std = np.array(run.config.backbone.mean), np.array(run.config.backbone.std)
    for images in run.images(indices):
        for image in images.permute(0, 2, 3, 1).cpu().numpy():
            yield (255 * (image * std + mean)).round().clip(0, 255).astype(np.uint8)


def patch_figure(
    title: str,
    labels: list[str],
    rows: list[list[Place]],
    pictures: dict[int, np.ndarray],
    captions: dict[int, str],
    fields: ReceptiveFields,
    tap: str,
) -> "Figure":
    """A row with its label for each of `rows`; pictures (H, W, 3) and captions by index of the image."""
    from matplotlib.figure import Figure

    size, side = fields.size, fields.side(tap)
    top, bottom, left, right = fields.box(tap, side // 2, side // 2)
    high, wide = bottom - top, right - left
    whole = high == wide == size
    figure = Figure(figsize=(1.5 + 1.35 * COLUMNS, 0.8 + 1.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), COLUMNS, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, label, places in zip(axes, labels, rows, strict=True):
        row[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        for axis, place in zip(row, places, strict=False):
            top, bottom, left, right = fields.box(tap, place.row, place.column)
            axis.imshow(pictures[place.image][top:bottom, left:right], extent=(left, right, bottom, top))
            axis.set_title(f"{captions[place.image]}\n{place.value:.2f}", fontsize=6)
            # All patches at one scale, with grey where there is no image, or where a field does not reach all of it.
            y, x = (0, 0) if whole else (top or bottom - high, left or right - wide)
            axis.set(xlim=(x, x + wide), ylim=(y + high, y), facecolor="0.9")
            if whole:
                centre = [(place.column + 0.5) * size / side], [(place.row + 0.5) * size / side]
                for colour, thickness in (("black", 2.4), ("white", 1.2)):
                    axis.plot(*centre, "o", ms=9, mfc="none", mec=colour, mew=thickness)
    shown = (
        "whole images, grey where the receptive field does not reach; ring: where the channel is largest"
        if whole
        else f"the patch is the receptive field, {high} x {wide} of {size} x {size} pixels, grey beyond the image"
    )
    figure.suptitle(f"{title}\n{shown}\nabove each: its class and the value in the source network's map", fontsize=8)
    return figure


def short(name: str, length: int = 20) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


# ---- the command -----------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    args = arguments(argv)
    attentions = distinct(read_all(args.runs, log.info))
    if not attentions:
        log.info("delta-report attention: none of these runs has channel weights. Make some with delta-run reg=delta")
        return 1
    made = [weight_table(attentions)]
    if len(attentions) > 1 and (table := overlap_table(attentions, log.info)):
        made.append(table)
    show(made)
    write(args.output / "attention.md", lambda path: path.write_text(tables.as_markdown(made), encoding="utf-8"))
    save(histograms(attentions), args.output / "histograms")
    for name, attention in zip(names_of(attentions), attentions, strict=True) if args.patches else []:
        for tap, figure in patches(attention, name, args):
            save(figure, args.output / re.sub(r"[^\w.-]+", "-", f"patches-{name}-{tap}"))
    return 0


def read_all(runs: list[str], warn: Warn) -> list[Attention]:
    from .finished import run_folder

    found = []
    for name in dict.fromkeys(runs):
        try:
            record = read(run_folder(name))
        except UserError as error:
            warn(str(error))
            continue
        if record.get("unreadable"):
            warn(f"{name}: summary.json is unreadable: {record['unreadable']}")
            continue
        if not (record["folder"] / "attention.safetensors").exists():
            method = section(record, "reg").get("name")
            warn(f"{name}: no attention.safetensors (reg={method}); runs of reg=delta have one")
        elif attention := attention_of(record, warn):
            found.append(attention)
    return found


def patches(attention: Attention, name: str, args: argparse.Namespace) -> "Iterable[tuple[str, Figure]]":
    """As patch_figures; nothing for a run whose data or source weights are not here, which is said."""
    from .replay import replay

    try:
        run = replay(attention.record["folder"], data_dir=args.data_dir, weights=args.weights)
        yield from patch_figures(attention, name, run, args.top)
    except UserError as error:
        log.info(f"no patches of {name}: {error}")


def show(made: list[Table]) -> None:
    sys.stdout.write(tables.on_screen(made, sys.stdout.isatty()))


def save(figure: "Figure", stem: Path) -> None:
    write(stem.with_name(f"{stem.name}.png"), lambda path: figure.savefig(path, dpi=150))
    # Without the time: the same runs make the same file.
    write(stem.with_name(f"{stem.name}.pdf"), lambda path: figure.savefig(path, metadata={"CreationDate": None}))


def write(path: Path, how: Callable[[Path], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        how(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from None
    log.info(f"written: {path}")


def arguments(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="delta-report attention",
        description="The channel weights of DELTA: how uneven they are, and what two data sets have in common.",
    )
    p.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run of reg=delta, or its id below results/runs")
    p.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("results/attention"),
        help="for attention.md and the figures (default: results/attention)",
    )
    p.add_argument(
        "--patches",
        action="store_true",
        help="also the test patches that excite the heaviest channels; needs the data and the source weights",
    )
    p.add_argument("--top", type=int, metavar="N", default=8, help="how many channels of each layer (default: 8)")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="where the data lie here (default: as recorded)")
    p.add_argument("--weights", type=Path, metavar="FILE", help="source weights here (default: as recorded)")
    args = p.parse_args(argv)
    if args.top < 1:
        p.error("--top must be at least 1")
    return args
