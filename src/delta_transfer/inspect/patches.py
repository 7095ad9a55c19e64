"""The image patches that excite the channels to which DELTA gives the largest weights."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..common.console import log
from ..models.frozen import frozen_maps
from .attention import Attention, heaviest
from .replay import Replay

COLUMNS = 5  # patches of a channel, from distinct images


@dataclass(frozen=True)
class Place:
    """The position at which a channel of a tapped map is largest in one image."""

    value: float
    image: int  # index into the data set
    row: int  # of the map
    column: int


def strongest(
    maps: Callable[[Tensor], dict[str, Tensor]],
    batches: Iterable[Tensor],
    indices: np.ndarray,
    channels: dict[str, np.ndarray],
    keep: int = COLUMNS,
) -> dict[str, list[list[Place]]]:
    """For each of the `channels` of each tap, the `keep` images in which it is largest, largest first.

    Args:
        maps: images (B, 3, H, W) -> {tap: (B, C, h, w)}.
        batches: the images of `indices`, in their order. Only one batch at a time is in memory.

    Among equal values the earlier image and the upper left position win.
    """
    best: dict[str, list[list[Place]]] = {tap: [[] for _ in wanted] for tap, wanted in channels.items()}
    done = 0
    for images in batches:
        batch_indices = indices[done : done + len(images)]
        done += len(images)
        outputs = maps(images)
        for tap, wanted in channels.items():
            values, places = outputs[tap][:, wanted].flatten(2).max(dim=2)  # (B, channels)
            width = outputs[tap].shape[3]
            for rank, (column, where) in enumerate(zip(values.T.tolist(), places.T.tolist(), strict=True)):
                new = [
                    Place(value, int(image), *divmod(place, width))
                    for value, image, place in zip(column, batch_indices, where, strict=True)
                ]
                best[tap][rank] = sorted(best[tap][rank] + new, key=lambda place: -place.value)[:keep]
    return best


class ReceptiveFields:
    """The pixels of a square image of `size` pixels on which a position of a tapped map depends.

    The gradient of the sum over channels at that position, on random images, is not 0 at these pixels. It is computed
    on a CPU and in fp64: fast algorithms for fp32 convolutions (Winograd, FFT) leave rounding errors where the gradient
    is exactly 0.
    """

    def __init__(self, maps: nn.Module, size: int):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64).requires_grad_(True)
        self.maps: dict[str, Tensor] = deepcopy(maps).cpu().double()(self.images)
        self.size = size
        self.known: dict[tuple[str, int], tuple[int, ...]] = {}

    def side(self, tap: str) -> int:
        """Height and width of the tapped map."""
        return self.maps[tap].shape[3]

    def box(self, tap: str, row: int, column: int) -> tuple[int, ...]:
        """First row, end of rows, first column, end of columns; ends are exclusive."""
        return self._on_diagonal(tap, row)[:2] + self._on_diagonal(tap, column)[2:]

    def _on_diagonal(self, tap: str, at: int) -> tuple[int, ...]:
        """The box of (at, at). Positions in one row of the map share its rows, those in one column its columns."""
        if (tap, at) not in self.known:
            (gradient,) = torch.autograd.grad(self.maps[tap][:, :, at, at].sum(), self.images, retain_graph=True)
            seen = (gradient != 0).any(dim=0).any(dim=0)
            bounds = [seen.any(dim=dim).nonzero().flatten() for dim in (1, 0)]
            self.known[tap, at] = tuple(int(bound) for along in bounds for bound in (along[0], along[-1] + 1))
        return self.known[tap, at]


def patch_figures(attention: Attention, name: str, run: Replay, top: int) -> Iterator[tuple[str, Figure]]:
    """(tap, figure) for each tap: a row for each of its `top` heaviest channels, its strongest patches in columns."""
    # A report about a run on folds does not look at the test images, like the run itself.
    test = run.config.split.measures_test
    indices, split = (run.splits.test, "test") if test else (run.splits.val, "validation")
    channels = {tap: heaviest(weights, top) for tap, weights in attention.weights.items()}
    maps = frozen_maps(run.source)
    log.info(f"{name}: {len(indices)} {split} images through the source network ...")
    with torch.no_grad():
        best = strongest(maps, run.images(indices), indices, channels)
    wanted = np.unique([place.image for rows in best.values() for row in rows for place in row])
    pixels = np.concatenate([run.pixels(images) for images in run.images(wanted)])
    pictures = dict(zip(wanted.tolist(), pixels, strict=True))
    captions = {index: short(run.dataset.class_of(index)) for index in pictures}
    fields = ReceptiveFields(maps, run.config.backbone.image_size)
    for tap, rows in best.items():
        weights = attention.weights[tap]
        labels = [f"rank {i}\nchannel {c}\nC*w = {weights[c]:.2f}" for i, c in enumerate(channels[tap], 1)]
        title = f"{name}, {tap}: where in {len(indices)} {split} images the {len(rows)} heaviest channels are largest"
        yield tap, patch_figure(title, labels, rows, pictures, captions, fields, tap)


def patch_figure(
    title: str,
    labels: list[str],
    rows: list[list[Place]],
    pictures: dict[int, np.ndarray],
    captions: dict[int, str],
    fields: ReceptiveFields,
    tap: str,
) -> Figure:
    """Draws each of `rows` beside its label. pictures (H, W, 3) and captions are by index of the image."""
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
            # All patches have one scale. Grey fills places beyond the image or outside of the receptive field.
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
