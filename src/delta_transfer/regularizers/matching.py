"""Pairs of feature maps of two networks, which need not be of one architecture, and feature matching (FitNets)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..models import Network
from .base import NO_SHAPES, MapShapes, Outputs, OutputShapes, Regularizer, module_name
from .distances import full_precision


class Pair(NamedTuple):
    """What the source calls a feature map, and the target tap that is to learn from it."""

    source: str
    target: str

    @property
    def key(self) -> str:
        return module_name(f"{self.source}>{self.target}")


def choose_pairs(which: str, source_shapes: OutputShapes, target_shapes: MapShapes) -> list[Pair]:
    """all_to_all: every source tap with every target tap; one_to_one: each source tap with a target tap whose map has
    its height and width, in order, each tap once; single: the last of those.

    Of several sources, whose taps are named `<source>/<tap>`, each has pairs of its own.
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
                f"target ({next(sizes)}): reg.pairs=all_to_all does without."
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


class Matchers(nn.ModuleDict):
    """r_mn(T_n) of every pair, {pair.key: (B, C_m, g, g')}."""

    def __init__(self, pairs: list[Pair], source_shapes: OutputShapes, target_shapes: MapShapes):
        super().__init__(
            {pair.key: nn.Conv2d(target_shapes[pair.target][0], source_shapes[pair.source][0], 1) for pair in pairs}
        )
        self.target_taps = {pair.key: pair.target for pair in pairs}

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        return {key: matcher(full_precision(outputs[self.target_taps[key]])) for key, matcher in self.items()}


class PairedMaps(Regularizer):
    """Compares feature maps S_m of the source with T_n of the target, for the pairs (m, n) of `choose_pairs`."""

    needs_source = True
    needs_taps = True
    any_source = True

    def __init__(self, alpha: float, beta: float = 0.0, weight_decay: float = 1e-4, pairs: str = "one_to_one"):
        super().__init__(beta=beta, weight_decay=weight_decay)
        self.alpha = alpha
        self.which_pairs = pairs
        self.pairs: list[Pair] = []
        self.sizes: dict[str, tuple[int, int]] = {}  # of the target's maps

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        self.pairs = choose_pairs(self.which_pairs, source_shapes or map_shapes, map_shapes)
        self.sizes = {pair.target: map_shapes[pair.target][1:] for pair in self.pairs}

    @torch.no_grad()
    def references(self, source_outputs: Outputs) -> dict[str, Tensor]:
        """S_m of every pair in full precision, resized bilinearly to T_n's size."""
        resized: dict[tuple, Tensor] = {}  # pairs share them
        for pair in self.pairs:
            source_map, size = source_outputs[pair.source].detach(), self.sizes[pair.target]
            if (pair.source, size) not in resized:
                source_map = full_precision(source_map)
                if source_map.shape[2:] != size:
                    source_map = F.interpolate(source_map, size, mode="bilinear")
                resized[pair.source, size] = source_map
        return {pair.key: resized[pair.source, self.sizes[pair.target]] for pair in self.pairs}


class FM(PairedMaps):
    """M = sum_mn alpha * mean (S_m - r_mn(T_n))^2 over all elements, loss = CE + M + beta/2 * ||head||^2.

    Feature matching as in FitNets (Romero et al., ICLR 2015), which match one layer. r_mn is a 1x1 convolution with
    bias, C_n -> C_m, trained with the target; S_m is resized bilinearly to T_n's size. This is L2T-ww without its
    meta-networks. Alpha of that paper's baseline was not found: tune it on validation data.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.0, weight_decay: float = 1e-4, pairs: str = "one_to_one"):
        super().__init__(alpha, beta, weight_decay, pairs)
        self.matchers: nn.ModuleDict = nn.ModuleDict()

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        super().start(target, map_shapes, source_shapes)
        self.matchers = Matchers(self.pairs, source_shapes or map_shapes, map_shapes)

    def matching(
        self, matched: dict[str, Tensor], references: dict[str, Tensor], weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """M, a scalar. `weights` (B, C_m) of every pair: of each image's channels, whose sum then is taken."""
        total = 0.0
        for key, values in matched.items():
            squares = (references[key] - values).square()
            if weights is None:
                total = total + squares.mean()
            else:
                total = total + (weights[key] * squares.mean(dim=(2, 3))).sum(dim=1).mean()
        return self.alpha * total

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs) -> dict[str, Tensor]:
        matched = self.matchers(outputs)
        return {"matching": self.matching(matched, self.references(source_outputs))} | self.head_penalty(target)
