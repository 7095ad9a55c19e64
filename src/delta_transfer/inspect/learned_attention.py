"""The attention that a method (AFA) learned with its own modules, in single images: positions or channels by tap."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from ..common.errors import UserError
from ..engine.config import new_target
from ..methods.afa import LearnedAttention
from ..models import Network
from ..records.checked import load_with_checksum
from .finished import not_of_this_run
from .image_maps import COLOURS, enlarged, in_own_range, overlaid
from .replay import Replay

MODULES = "method.safetensors"
CHANNELS = 2  # number of channels shown of each tap, the strongest ones


@dataclass(frozen=True)
class Attended:
    """The attention of one stage to N images, as panels from left to right. Every tap has one or more."""

    stage: int  # counted from 1
    over: str  # positions | channels
    reads: str  # the network whose feature maps the attention reads
    titles: list[str]  # of the panels
    maps: np.ndarray  # (N, panels, H, W): P a over positions; or |F| of a channel, scaled to 0..1 in each panel
    texts: list[list[str]]  # (N, panels): the text below each panel


def has_modules(run: Replay) -> bool:
    return Path(run.record["folder"], MODULES).is_file()


def attended(run: Replay, images: Tensor) -> list[Attended]:
    """The attention of every stage with such modules to images (N, 3, H, W).

    Raises UserError if a file of the run is missing, damaged or of another run.
    """
    tensors = _read(run, MODULES)
    shapes = run.source.map_shapes(2, run.config.backbone.image_size, training=False)
    found = []
    for index, stage in enumerate(run.config.reg.build().stages(), 1):
        method, prefix = stage.method, f"stage{index}."
        if not isinstance(method, LearnedAttention):
            continue
        method.setup(run.source, shapes)
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        _load(run, MODULES, method, own)
        reads, words = run.source, "the source network"
        if stage.alignment_target == "previous":
            name, words = f"stage{index - 1}.safetensors", f"the network at the end of stage {index - 1}"
            reads = new_target(run.source, run.config, len(run.dataset.classes))
            _load(run, name, reads.traced, _read(run, name))
        found.append(_of_stage(index, words, method.to(run.device), reads.freeze(), images))
    return found


def _read(run: Replay, name: str) -> dict[str, Tensor]:
    path = run.record["folder"] / name
    try:
        return load_with_checksum(path)[0]
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _load(run: Replay, name: str, module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise not_of_this_run(run.record, error, name) from None


@torch.no_grad()
def _of_stage(index: int, words: str, method: LearnedAttention, reads: Network, images: Tensor) -> Attended:
    maps = reads(images)
    titles: list[str] = []
    panels: list[np.ndarray] = []
    texts: list[list[str]] = []
    for tap in reads.taps:
        feature_map, weights = maps[tap].float(), method.weights(tap, maps[tap])
        if method.over == "positions":
            relative = (weights * weights.shape[1]).view(-1, *feature_map.shape[2:])
            titles.append(tap)
            panels.append(enlarged(relative, images))
            texts.append([f"{image.min():.2g} to {image.max():.2g}" for image in relative])
            continue
        strongest = weights.topk(min(CHANNELS, weights.shape[1]), dim=1).indices  # (N, CHANNELS)
        for place in range(strongest.shape[1]):
            channel = strongest[:, place]
            row = torch.arange(len(images), device=channel.device)
            titles.append(f"{tap}, {('strongest', 'second')[place]}")
            panels.append(in_own_range(enlarged(feature_map[row, channel].abs(), images)))
            relative = weights[row, channel] * weights.shape[1]
            texts.append([f"channel {c}: {w:.3g}" for c, w in zip(channel.tolist(), relative.tolist(), strict=True)])
    by_image = [list(column) for column in zip(*texts, strict=True)]
    return Attended(index, method.over, words, titles, np.stack(panels, axis=1), by_image)


def figure_of(pixels: np.ndarray, left: list[str], attended: Attended) -> Figure:
    """A row for each image: the image, then a panel for each tap, or for each of its strongest channels.

    pixels: (N, H, W, 3) in 0..1. left: the text below each image.
    """
    rows, columns = len(pixels), 1 + len(attended.titles)
    figure = Figure(figsize=(1.35 * columns, 1.65 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    # Positions share one scale, from 0: brightness means the same in all panels.
    largest = attended.maps.max() if attended.over == "positions" else 1.0
    for row in range(rows):
        heat = overlaid(pixels[row], attended.maps[row] / largest)
        shown = [(pixels[row], left[row]), *zip(heat, attended.texts[row], strict=True)]
        for panel, (image, below) in zip(axes[row], shown, strict=True):
            panel.imshow(image, interpolation="nearest")
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)
            panel.set_xlabel(below, fontsize=7.5, parse_math=False)
    for panel, title in zip(axes[0], ["test image\nand its class", *attended.titles], strict=True):
        panel.set_title(title.replace(", ", ",\n"), fontsize=8.5, parse_math=False)
    if attended.over == "positions":
        bar = figure.colorbar(ScalarMappable(Normalize(0, largest), COLOURS), ax=axes, fraction=0.02, pad=0.01)
        bar.set_label("P · a (1: uniform)", fontsize=7.5)
        bar.ax.tick_params(labelsize=7)
    return figure


def caption(attended: Attended, picked: str) -> str:
    if attended.over == "positions":
        what = (
            "Over the image in grey: the attention to positions, P a, of each tap, enlarged from the resolution of its "
            "map; 1 is uniform, and all panels share one scale. Below, its range in that image."
        )
    else:
        what = (
            f"Over the image in grey: |F| of the {CHANNELS} channels of each tap with the most attention, each panel "
            "on a scale of its own. Below, the channel and its attention C a, of which 1 is uniform."
        )
    return (
        f"{picked} Stage {attended.stage}. {what} The attention is a function of the feature maps of {attended.reads}, "
        "computed here in fp32 by the modules as training left them. Training rewards attention to positions or "
        "channels where both networks agree: bright parts need not matter for the class."
    )
