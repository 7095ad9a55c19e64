"""AFA: attentive feature alignment (Xie, Wen, Wang, Wu, Tan, Neural Networks 138, 2021).

S_l is the source's feature map at tap l, (B, C_l, H_l, W_l), with P_l = H_l W_l positions. D_l = T_l - S_l is the
target's map minus the source's. The attention a_l is a function of S_l, one for each image, and is learned with the
target. Loss = CE + alpha * Omega + beta/2 * ||head||^2. Omega is a mean over the batch without a division by H W, so
that alpha does not mean what it means for DELTA: with equal weights, DELTA's term of a layer is B / (H W) times AFA's.

Source: the paper and the authors' code (xiezheng-cs/AFA at bb42a53: models/regularizer.py, framework.py, and the
strengths of hocon_config/).

The attention modules minimise the same Omega, so that attention moves to where source and target agree anyway. The log
therefore shows the attention's entropy, and what the penalty would be with uniform weights.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..common.options import option
from ..models import Network
from .attention import relative_entropy
from .base import (
    METHODS,
    NO_SHAPES,
    MapShapes,
    Needs,
    Outputs,
    Penalty,
    SourceShapes,
    Stage,
    added,
    full_precision,
    module_name,
    of_source,
    of_tap,
    taps_of,
)


class SpatialAttention(nn.Module):
    """a = softmax_P(A2 relu(A1 u) + c2), where u is the mean of S over its channels, (B, P).

    A1 is (N, P) without bias, A2 is (P, N) with bias, N = sqrt(P), with PyTorch's default initialisation.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        positions = height * width
        hidden = round(positions**0.5)  # the side of a square map, as published
        self.layers = nn.Sequential(nn.Linear(positions, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, positions))

    def forward(self, source_map: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P), which sums to 1 over the positions."""
        scores: Tensor = self.layers(source_map.mean(dim=1).flatten(1))
        return scores.softmax(dim=1)


class ChannelAttention(nn.Module):
    """a = softmax_C(q + d), q[b, c] = v relu(A1 S[b, c, :]), with the same A1 and v for every channel.

    A1 is (N, P), v is (1, N), both without bias, N = sqrt(P), with PyTorch's default initialisation. d is (C,), and
    begins with 0.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        positions = height * width
        hidden = round(positions**0.5)
        self.layers = nn.Sequential(
            nn.Linear(positions, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, 1, bias=False)
        )
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, source_map: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C), which sums to 1 over the channels."""
        scores: Tensor = self.layers(source_map.flatten(2)).squeeze(2) + self.bias
        return scores.softmax(dim=1)


class LearnedAttention(Penalty):
    """The penalty of both stages of AFA."""

    beta: float = option(0.01, "strength of the L2 penalty on the new head", at_least=0)

    needs = Needs(source=True, taps=True, images=True)
    attention: ClassVar[type[SpatialAttention] | type[ChannelAttention]]
    over: ClassVar[str]  # positions | channels: what the weights of an image sum to 1 over

    def __post_init__(self) -> None:
        super().__post_init__()
        self.modules_by_tap = nn.ModuleDict()
        self.positions: dict[str, int] = {}  # of each tap's map

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        if missing := [tap for tap in target.taps if tap not in map_shapes]:
            raise ValueError(
                f"AFA needs the shape of the maps at {', '.join(missing)}: setup(target, target.map_shapes_on(images))."
            )
        self.modules_by_tap = nn.ModuleDict({module_name(tap): self.attention(*map_shapes[tap]) for tap in target.taps})
        self.positions = {tap: map_shapes[tap][1] * map_shapes[tap][2] for tap in target.taps}

    def weights(self, tap: str, source_map: Tensor) -> Tensor:
        """a_l of each image: (B, P_l) or (B, C_l), in full precision. Raises ValueError for maps of another size."""
        if tap not in self.positions:
            raise RuntimeError(f"AFA has no attention for {tap!r}: call setup() before penalty().")
        expected, found = self.positions[tap], source_map.shape[2] * source_map.shape[3]
        if found != expected:
            raise ValueError(f"The attention at {tap} is for maps of {expected} positions; this one has {found}.")
        with torch.autocast(source_map.device.type, enabled=False):
            weights: Tensor = self.modules_by_tap[module_name(tap)](full_precision(source_map.detach()))
            return weights

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        omegas, uniform, entropies = [], [], []
        source_outputs = of_source(source_outputs)
        for tap in taps_of(target):
            source_map = of_tap(source_outputs, tap, like=outputs[tap])
            difference = full_precision(outputs[tap]) - full_precision(source_map)
            squares, weights = self.squares(difference), self.weights(tap, source_map)
            omegas.append(self.distance(squares, weights))
            with torch.no_grad():
                uniform.append(0.5 * squares.sum(dim=1).mean())
                entropies.append(relative_entropy(weights))
        self.extra_metrics = {
            # 1: all alike; 0: all on one position or channel.
            "attention_entropy": added(entropies) / len(entropies),
            # The penalty with a = 1/P or 1/C. Attention removes the share 1 - feature_maps / attention_uniform of it.
            "attention_uniform": self.alpha * added(uniform),
        }
        return {"feature_maps": self.alpha * added(omegas)} | self.head_penalty(target)

    @staticmethod
    def squares(difference: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P) or (B, C): the squares, summed over the axis that has no weights."""
        raise NotImplementedError

    @staticmethod
    def distance(squares: Tensor, weights: Tensor) -> Tensor:
        """Omega of one tap, a scalar."""
        raise NotImplementedError


@METHODS.register("afa_spatial", "AFA spatial")
class AFASpatial(LearnedAttention):
    """Omega = sum_l 1/(2B) sum_{b,c,p} (P_l a_l[b,p] D_l[b,c,p])^2, a_l = SpatialAttention(S_l).

    The weight stands inside the square, as in the authors' code. This is stage I of AFA; alpha is 0.1 for Stanford Dogs
    and ResNet-101.

    `setup(target, shapes)`, with shapes {tap: (C, H, W)}, makes the attention modules, whose parameters (`trained`)
    must be given to the optimizer. It raises ValueError for a tap without a shape. `penalty` returns the terms
    "feature_maps" and "head"; it raises RuntimeError before `setup`, and ValueError for maps of another size.
    """

    alpha: float = option(0.1, "strength of the penalty weighted over positions, a mean over the batch", at_least=0)

    attention, over = SpatialAttention, "positions"

    @staticmethod
    def squares(difference: Tensor) -> Tensor:
        return difference.square().sum(dim=1).flatten(1)

    @staticmethod
    def distance(squares: Tensor, weights: Tensor) -> Tensor:
        return 0.5 * ((weights.shape[1] * weights).square() * squares).sum(dim=1).mean()


@METHODS.register("afa_channel", "AFA channel")
class AFAChannel(LearnedAttention):
    """Omega = sum_l 1/(2B) sum_{b,c} C_l a_l[b,c] sum_p D_l[b,c,p]^2, a_l = ChannelAttention(S_l).

    The weight stands outside the square. This is stage II of AFA; alpha is 0.15 for Stanford Dogs and ResNet-101.
    `setup`, `penalty` and their errors are those of AFASpatial.
    """

    alpha: float = option(0.15, "strength of the penalty weighted over channels, a mean over the batch", at_least=0)

    attention, over = ChannelAttention, "channels"

    @staticmethod
    def squares(difference: Tensor) -> Tensor:
        return difference.square().sum(dim=(2, 3))

    @staticmethod
    def distance(squares: Tensor, weights: Tensor) -> Tensor:
        return 0.5 * weights.shape[1] * (weights * squares).sum(dim=1).mean()


@METHODS.register("afa", "AFA")
class AFA(Penalty):
    """The published sequence: a stage of AFASpatial, then a stage of AFAChannel that starts from its weights.

    The channel stage has a tenth of the learning rate. It aligns to the network of the spatial stage as in the authors'
    code (alignment_target="previous"), or to the source as in the paper's text ("source"). Deviation: the published
    procedure goes on from the best epoch on the test images, this one from the last iteration, since nothing is
    selected on test data.
    Each stage takes the whole schedule: schedule.iterations=4500 gives each its published 4,500 iterations.
    """

    alpha: float = option(0.1, "strength of the penalty in the spatial stage, a mean over the batch", at_least=0)
    beta: float = option(0.01, "strength of the L2 penalty on the new head", at_least=0)
    channel_alpha: float = option(0.15, "strength of the penalty in the channel stage", at_least=0)
    channel_lr_factor: float = option(0.1, "learning rate of the channel stage as a multiple of schedule.lr", above=0)
    alignment_target: str = option(
        "previous",
        "whose maps the channel stage aligns to: previous, the network of the spatial stage, or source",
        choices=("previous", "source"),
    )

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        raise RuntimeError("AFA is two stages: in a loop of your own use AFASpatial, then AFAChannel.")

    def stages(self) -> list[Stage]:
        spatial = AFASpatial(self.alpha, self.beta, self.weight_decay)
        channel = AFAChannel(self.channel_alpha, self.beta, self.weight_decay)
        return [Stage(spatial), Stage(channel, self.channel_lr_factor, self.alignment_target)]
