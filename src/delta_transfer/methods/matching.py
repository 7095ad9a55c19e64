"""Pairs of feature maps of two networks, which need not be of one architecture, and feature matching (FitNets)."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..models import Network
from .base import NO_SHAPES, MapShapes, Outputs, OutputShapes, Regularizer, module_name, not_negative, of_source, one_of
from .distances import full_precision
from .fast.double_backward import mean_squares


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
    """r_mn of every pair, by its key. Of each target tap, r_mn(T_n) of its pairs, one after the other as channels."""

    def __init__(self, pairs: list[Pair], source_shapes: OutputShapes, target_shapes: MapShapes):
        super().__init__(
            {pair.key: nn.Conv2d(target_shapes[pair.target][0], source_shapes[pair.source][0], 1) for pair in pairs}
        )
        self.pairs = pairs

    def forward(self, outputs: Outputs) -> dict[str, Tensor]:
        weights = joined(self.pairs, {key: matcher.weight for key, matcher in self.items()}, dim=0)
        biases = joined(self.pairs, {key: matcher.bias for key, matcher in self.items()}, dim=0)
        return {tap: F.conv2d(full_precision(outputs[tap]), weights[tap], biases[tap]) for tap in weights}


def joined(pairs: list[Pair], values: Mapping[str, Tensor], dim: int = 1) -> dict[str, Tensor]:
    """By target tap, the values of its pairs, by `pair.key`, concatenated: few operations where each pair made one."""
    taps: dict[str, list[Tensor]] = {}
    for pair in pairs:
        taps.setdefault(pair.target, []).append(values[pair.key])
    return {tap: torch.cat(parts, dim) for tap, parts in taps.items()}


class PairedMaps(Regularizer):
    """Compares feature maps S_m of the source with T_n of the target, for the pairs (m, n) of `choose_pairs`."""

    needs_source = True
    needs_taps = True
    any_source = True

    def __init__(self, alpha: float, beta: float = 0.0, weight_decay: float = 1e-4, pairs: str = "one_to_one"):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha)
        self.alpha = alpha
        self.which_pairs = one_of("pairs", pairs, "all_to_all", "one_to_one", "single")
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
        source_outputs = of_source(source_outputs)
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
        """M, a scalar, of what is `joined` by target taps.

        `weights` (B, sum of C_m): of each image's channels, whose sum then is taken.
        """
        total = 0.0
        for tap, values in matched.items():
            squares = mean_squares(values - references[tap])
            if weights is not None:
                total = total + (weights[tap] * squares).sum(dim=1).mean()
            else:
                channels = [self.matchers[pair.key].out_channels for pair in self.pairs if pair.target == tap]
                total = total + sum(part.mean() for part in squares.split(channels, dim=1))
        return self.alpha * total

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs) -> dict[str, Tensor]:
        matched, references = self.matchers(outputs), joined(self.pairs, self.references(source_outputs))
        return {"matching": self.matching(matched, references)} | self.head_penalty(target)
