"""AFA: attentive feature alignment (Xie, Wen, Wang, Wu, Tan, Neural Networks 138, 2021).

S_l is the source's feature map at tap l, (B, C_l, H_l, W_l), with P_l = H_l W_l positions, D_l = T_l - S_l the target's
minus the source's. The attention a_l is a function of S_l, of each image its own, and is learned with the target.
Loss = CE + alpha * Omega + beta/2 * ||head||^2. Omega is a mean over the batch without a division by H W, so that alpha
does not mean what it means for DELTA: with equal weights a layer's term of DELTA is B / (H W) times AFA's.

The modules minimise the same Omega, so that attention drifts to where source and target agree anyway: the log shows its
entropy and what the penalty would be with uniform weights.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..models import Network
from .base import (
    NO_SHAPES,
    MapShapes,
    Outputs,
    OutputShapes,
    Regularizer,
    Stage,
    module_name,
    not_negative,
    of_source,
    one_of,
    relative_entropy,
    taps_of,
)
from .distances import full_precision


class SpatialAttention(nn.Module):
    """a = softmax_P(A2 relu(A1 u) + c2), u = mean of S over its channels, (B, P).

    A1: (N, P) without bias, A2: (P, N) with bias, N = sqrt(P), PyTorch's default initialisation.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        positions = height * width
        hidden = round(positions**0.5)  # the side of a square map, as published
        self.layers = nn.Sequential(nn.Linear(positions, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, positions))

    def forward(self, source_map: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P), which sums to 1 over the positions."""
        return self.layers(source_map.mean(dim=1).flatten(1)).softmax(dim=1)


class ChannelAttention(nn.Module):
    """a = softmax_C(q + d), q[b, c] = v relu(A1 S[b, c, :]), of every channel by the same A1 and v.

    A1: (N, P), v: (1, N), both without bias, N = sqrt(P), PyTorch's default initialisation; d: (C,), from 0.
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
        return (self.layers(source_map.flatten(2)).squeeze(2) + self.bias).softmax(dim=1)


class LearnedAttention(Regularizer):
    needs_source = True
    needs_taps = True
    attention: ClassVar[type[nn.Module]]
    over: ClassVar[str]  # positions | channels: what the weights of an image sum to 1 over

    def __init__(self, alpha: float, beta: float = 0.01, weight_decay: float = 0.0):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha)
        self.alpha = alpha
        self.modules_by_tap = nn.ModuleDict()

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        if missing := [tap for tap in target.taps if tap not in map_shapes]:
            raise ValueError(
                f"AFA needs the shape of the maps at {', '.join(missing)}: start(target, target.map_shapes_on(images))."
            )
        self.modules_by_tap = nn.ModuleDict({module_name(tap): self.attention(*map_shapes[tap]) for tap in target.taps})

    def weights(self, tap: str, source_map: Tensor) -> Tensor:
        """a_l of each image: (B, P_l) or (B, C_l), in full precision. Raises ValueError for maps of another size."""
        if module_name(tap) not in self.modules_by_tap:
            raise RuntimeError(f"AFA has no attention for {tap!r}: call start() before penalty().")
        module = self.modules_by_tap[module_name(tap)]
        expected, found = module.layers[0].in_features, source_map.shape[2] * source_map.shape[3]
        if found != expected:
            raise ValueError(f"The attention at {tap} is for maps of {expected} positions; this one has {found}.")
        with torch.autocast(source_map.device.type, enabled=False):
            return module(full_precision(source_map.detach()))

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs) -> dict[str, Tensor]:
        omega = uniform = entropy = 0.0
        source_outputs = of_source(source_outputs)
        for tap in taps_of(target):
            difference = full_precision(outputs[tap]) - full_precision(source_outputs[tap])
            squares, weights = self.squares(difference), self.weights(tap, source_outputs[tap])
            omega = omega + self.distance(squares, weights)
            with torch.no_grad():
                uniform += 0.5 * squares.sum(dim=1).mean()
                entropy += relative_entropy(weights)
        self.observed = {
            # 1: all alike; 0: all on one position or channel.
            "attention_entropy": entropy / len(target.taps),
            # What the penalty is with a = 1/P or 1/C: attention removes the share 1 - feature_maps / attention_uniform.
            "attention_uniform": self.alpha * uniform,
        }
        return {"feature_maps": self.alpha * omega} | self.head_penalty(target)

    @staticmethod
    def squares(difference: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, P) or (B, C): summed over what is not weighted."""
        raise NotImplementedError

    @staticmethod
    def distance(squares: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError


class AFASpatial(LearnedAttention):
    """Omega = sum_l 1/(2B) sum_{b,c,p} (P_l a_l[b,p] D_l[b,c,p])^2, a_l = SpatialAttention(S_l).

    The weight stands inside the square, as in the authors' code. Stage I of AFA; alpha 0.1 for Dogs and ResNet-101.

    `start(target, shapes)`, shapes {tap: (C, H, W)}, makes the modules, whose parameters (`trained`) belong into the
    optimizer; it raises ValueError for a tap without a shape. `penalty` returns the terms "feature_maps" and "head"; it
    raises RuntimeError before `start`, and ValueError for maps of another size.
    """

    attention, over = SpatialAttention, "positions"

    @staticmethod
    def squares(difference: Tensor) -> Tensor:
        return difference.square().sum(dim=1).flatten(1)

    @staticmethod
    def distance(squares: Tensor, weights: Tensor) -> Tensor:
        return 0.5 * ((weights.shape[1] * weights).square() * squares).sum(dim=1).mean()


class AFAChannel(LearnedAttention):
    """Omega = sum_l 1/(2B) sum_{b,c} C_l a_l[b,c] sum_p D_l[b,c,p]^2, a_l = ChannelAttention(S_l).

    The weight stands outside the square. Stage II of AFA; alpha 0.15 for Dogs and ResNet-101. Use and errors are those
    of AFASpatial.
    """

    attention, over = ChannelAttention, "channels"

    @staticmethod
    def squares(difference: Tensor) -> Tensor:
        return difference.square().sum(dim=(2, 3))

    @staticmethod
    def distance(squares: Tensor, weights: Tensor) -> Tensor:
        return 0.5 * weights.shape[1] * (weights * squares).sum(dim=1).mean()


class AFA(Regularizer):
    """The published sequence: a stage of AFASpatial, then one of AFAChannel that starts from its weights.

    The channel stage has a tenth of the learning rate, and is aligned to the network of the spatial stage as in the
    authors' code (`aligned_to="previous"`), or to the source as in the paper's text ("source"). Where the published
    procedure goes on from the best epoch on the test part, this one goes on from the last iteration.
    Each stage takes the whole schedule: 4,500 iterations each as published, with schedule.iterations=4500.
    """

    def __init__(
        self,
        alpha: float = 0.1,
        channel_alpha: float = 0.15,
        channel_lr_factor: float = 0.1,
        aligned_to: str = "previous",
        beta: float = 0.01,
        weight_decay: float = 0.0,
    ):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha, channel_alpha=channel_alpha)
        self.alpha, self.channel_alpha = alpha, channel_alpha  # of the two stages
        self.channel_lr_factor = channel_lr_factor
        self.aligned_to = one_of("aligned_to", aligned_to, "previous", "source")

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        raise RuntimeError("AFA is two stages: in a loop of your own use AFASpatial, then AFAChannel.")

    def stages(self) -> list[Stage]:
        common = {"beta": self.beta, "weight_decay": self.weight_decay}
        return [
            Stage(AFASpatial(self.alpha, **common)),
            Stage(AFAChannel(self.channel_alpha, **common), self.channel_lr_factor, self.aligned_to),
        ]
