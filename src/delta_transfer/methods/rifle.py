"""RIFLE: the head is drawn anew several times, so that the backbone has to learn more (Li et al., ICML 2020)."""

import torch
from torch import nn

from ..common.options import option
from ..models import Network
from .base import METHODS, TrainState, WithoutPenalty


@METHODS.register("rifle", "RIFLE")
class RIFLE(WithoutPenalty):
    """Loss = CE; at the fractions `at` of the schedule the head's weight W (K x d) is drawn anew from U(-b, b).

    Source: the paper draws fresh values at chosen epochs. PaddlePaddle/PaddleTransfer at 7ab5613 (rifle.py) does so at
    epochs 10, 20 and 30 of 40, and leaves bias, momentum and learning rate alone, as here. bound="features" is b =
    1/sqrt(d), as the head was initialised. bound="classes" is PaddleTransfer's b = 1/sqrt(K), from the second dimension
    of a weight stored as d x K: with few classes it is so large (0.7 for two) that the loss begins far above that of
    guessing. bias=True draws the bias from U(-b, b), too. reset_momentum=True sets the optimizer's momentum of the
    redrawn parameters to 0; otherwise the momentum of the old head goes on.
    """

    at: list[float] = option(
        [0.25, 0.5, 0.75], "fractions of the schedule at which the head is drawn anew", above=0, below=1
    )
    bound: str = option(
        "features",
        "bound of the new weights, 1/sqrt(number): of features, as at the start; or of classes, as in PaddleTransfer",
        choices=("features", "classes"),
    )
    bias: bool = option(False, "whether the bias is drawn anew, too")
    reset_momentum: bool = option(False, "whether the optimizer's momentum of the head is set to 0")

    def check(self) -> None:
        self.require(bool(self.at), "at", "reg.at needs at least one fraction of the schedule, in (0, 1).")

    def before_step(self, state: TrainState, step: int, steps: int, seed: int) -> None:
        if step in {round(fraction * steps) for fraction in self.at}:
            self.redraw(state.target, state.optimizer, seed)

    @torch.no_grad()
    def redraw(self, target: Network, optimizer: torch.optim.Optimizer, seed: int) -> None:
        """Draws the head anew. It works on the CPU's generator, so that the values are the same on any device."""
        head = target.traced.get_submodule(target.head)
        generator = torch.Generator().manual_seed(seed)
        drawn: list[nn.Parameter] = [head.get_parameter("weight")]
        classes, features = drawn[0].shape
        if self.bias and getattr(head, "bias", None) is not None:
            drawn.append(head.get_parameter("bias"))
        bound = (classes if self.bound == "classes" else features) ** -0.5
        for parameter in drawn:
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values, non_blocking=True)
            if self.reset_momentum:
                for name in ("momentum_buffer", "exp_avg"):  # SGD's and Adam's
                    momentum = optimizer.state[parameter].get(name)
                    if momentum is not None:
                        momentum.zero_()
