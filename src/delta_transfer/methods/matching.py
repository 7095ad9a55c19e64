"""Pairs of feature maps of two networks, which need not be of one architecture, and feature matching (FitNets)."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.options import option
from ..models import Network
from .base import (
    DECAY,
    METHODS,
    NO_SHAPES,
    MapShapes,
    Needs,
    Outputs,
    OutputShapes,
    Penalty,
    SourceShapes,
    added,
    full_precision,
    module_name,
    of_source,
    of_tap,
)
from .fast.double_backward import mean_squares

PAIRS = ("all_to_all", "one_to_one", "single")


class Pair(NamedTuple):
    """The source's name of a feature map, and the target tap that learns from it."""

    source: str
    target: str

    @property
    def key(self) -> str:
        return module_name(f"{self.source}>{self.target}")


def choose_pairs(which: str, source_shapes: OutputShapes, target_shapes: MapShapes) -> list[Pair]:
    """all_to_all: every source tap with every target tap; one_to_one: each source tap with a target tap whose map has
    its height and width, in order, each tap once; single: the last of those.

    Each of several sources, whose taps are named `<source>/<tap>`, has pairs of its own.
    """
    sources: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in source_shapes.items():
        if len(shape) == 3:  # logits are no feature map
            sources.setdefault(key.rpartition("/")[0], {})[key] = shape
    if which == "all_to_all":
        return [Pair(m, n) for maps in sources.values() for m in maps for n in target_shapes]
    pairs = []
    for name, maps in sources.items():
        found = _of_one_size(maps, target_shapes)
        if not found:
            sizes = (", ".join(f"{h} x {w}" for _, h, w in shapes.values()) for shapes in (maps, target_shapes))
            raise UserError(
                f"reg.pairs={which} needs feature maps of one size in source{name and ' ' + name} ({next(sizes)}) and "
                f"target ({next(sizes)}): reg.pairs=all_to_all needs no common size."
            )
        pairs += found if which == "one_to_one" else found[-1:]
    return pairs


def _of_one_size(source_shapes: OutputShapes, target_shapes: MapShapes) -> list[Pair]:
    pairs, free = [], list(target_shapes)
    for m, (_, *size) in source_shapes.items():
        n = next((n for n in free if list(target_shapes[n][1:]) == size), None)
        if n is not None:
            free.remove(n)
            pairs.append(Pair(m, n))
    return pairs


class Adapters(nn.ModuleDict):
    """r_mn of every pair, by the pair's key: a 1x1 convolution with bias, from C_n to C_m channels.

    For each target tap it returns r_mn(T_n) of the tap's pairs, concatenated along the channels.
    """

    def __init__(self, pairs: Sequence[Pair], source_shapes: OutputShapes, target_shapes: MapShapes):
        super().__init__(
            {pair.key: nn.Conv2d(target_shapes[pair.target][0], source_shapes[pair.source][0], 1) for pair in pairs}
        )
        self.pairs = pairs
        self.channels: dict[str, list[int]] = {}  # C_m of each pair, by target tap
        for pair in pairs:
            self.channels.setdefault(pair.target, []).append(source_shapes[pair.source][0])

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        layers = {key: layer for key, layer in self.items() if isinstance(layer, nn.Conv2d)}
        weights = joined(self.pairs, {key: layer.weight for key, layer in layers.items()}, dim=0)
        biases = joined(self.pairs, {key: cast(Tensor, layer.bias) for key, layer in layers.items()}, dim=0)
        return {tap: F.conv2d(full_precision(outputs[tap]), weights[tap], biases[tap]) for tap in weights}


def joined(pairs: Sequence[Pair], values: Mapping[str, Tensor], dim: int = 1) -> dict[str, Tensor]:
    """Concatenates the values of all pairs of a target tap, so that one operation works on all of them."""
    taps: dict[str, list[Tensor]] = {}
    for pair in pairs:
        taps.setdefault(pair.target, []).append(values[pair.key])
    return {tap: torch.cat(of_pairs, dim) for tap, of_pairs in taps.items()}


class PairedMaps(Penalty):
    """Compares feature maps S_m of the source with T_n of the target, for the pairs (m, n) of `choose_pairs`."""

    weight_decay: float = option(1e-4, DECAY, at_least=0)
    pairs: str = option(
        "one_to_one",
        "which maps are compared: one_to_one, taps of one size; all_to_all; or single, the last of one_to_one",
        choices=PAIRS,
    )

    needs = Needs(source=True, taps=True, other_sources=True, images=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.matched: list[Pair] = []
        self.sizes: dict[str, tuple[int, int]] = {}  # of the target's maps

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        self.matched = choose_pairs(self.pairs, source_shapes or map_shapes, map_shapes)
        self.sizes = {pair.target: map_shapes[pair.target][1:] for pair in self.matched}

    @torch.no_grad()
    def source_maps(self, source_outputs: Outputs | None) -> dict[str, Tensor]:
        """S_m of every pair in full precision, resized bilinearly to T_n's size."""
        if not self.matched:
            raise RuntimeError(f"{type(self).__name__} has no pairs of feature maps: call setup() before penalty().")
        resized: dict[tuple[str, tuple[int, int]], Tensor] = {}  # pairs share them
        source_outputs = of_source(source_outputs)
        for pair in self.matched:
            source_map, size = of_tap(source_outputs, pair.source).detach(), self.sizes[pair.target]
            if (pair.source, size) not in resized:
                source_map = full_precision(source_map)
                if source_map.shape[2:] != size:
                    source_map = F.interpolate(source_map, size, mode="bilinear")
                resized[pair.source, size] = source_map
        return {pair.key: resized[pair.source, self.sizes[pair.target]] for pair in self.matched}


@METHODS.register("fm", "FM")
class FM(PairedMaps):
    """M = sum_mn alpha * mean (S_m - r_mn(T_n))^2 over all elements, loss = CE + M + beta/2 * ||head||^2.

    Feature matching as in FitNets (Romero et al., ICLR 2015), which match one layer. r_mn is a 1x1 convolution with
    bias, C_n -> C_m, trained with the target; S_m is resized bilinearly to T_n's size. This is L2T-ww without its
    meta-networks (alinlab/L2T-ww at 023c642, train_l2t_ww.py). Alpha of that paper's baseline was not found: tune it on
    validation data. `penalty` returns the terms "matching" and "head", and raises RuntimeError before `setup`. `setup`
    raises UserError if no maps fit `pairs`.
    """

    alpha: float = option(0.5, "strength of the matching; not published for this comparison", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapters = Adapters([], {}, {})

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        super().setup(target, map_shapes, source_shapes)
        self.adapters = Adapters(self.matched, source_shapes or map_shapes, map_shapes)

    def matching(
        self, adapted: dict[str, Tensor], source_maps: dict[str, Tensor], weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """M, a scalar, from maps that are `joined` by target taps.

        `weights` (B, sum of C_m) weigh each image's channels. With them a pair's term is a sum over channels.
        """
        terms = []
        for tap, values in adapted.items():
            squares = mean_squares(values - source_maps[tap])
            if weights is not None:
                terms.append((weights[tap] * squares).sum(dim=1).mean())
            else:
                terms.append(added([of_pair.mean() for of_pair in squares.split(self.adapters.channels[tap], dim=1)]))
        return self.alpha * added(terms)

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        source_maps = joined(self.matched, self.source_maps(source_outputs))
        return {"matching": self.matching(self.adapters(outputs), source_maps)} | self.head_penalty(target)
