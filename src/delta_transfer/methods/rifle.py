"""RIFLE: the head is forgotten now and then, so that the backbone has to learn more (Li et al., ICML 2020)."""

from collections.abc import Sequence

import torch

from ..models import Network
from .base import Regularizer, TrainState, one_of


class RIFLE(Regularizer):
    """Loss = CE; at the fractions `at` of the schedule the head's weight W (K x d) is drawn anew, U(-b, b).

    Source: the paper has fresh values at chosen epochs; PaddlePaddle/PaddleTransfer 10, 20 and 30 of 40 epochs, and
    leaves bias, momentum and learning rate alone, as here. bound="features" is b = 1/sqrt(d), what the head begins
    with. bound="classes" is PaddleTransfer's b = 1/sqrt(K), from the second dimension of a weight stored as d x K: at
    few classes so large (0.7 at two) that the loss begins far above that of guessing. bias=True draws the bias from
    U(-b, b), too. reset_momentum=True sets the optimizer's momentum of what is drawn to 0; otherwise it goes on from
    the head that is gone.
    """

    def __init__(
        self,
        weight_decay: float = 1e-4,
        at: Sequence[float] = (0.25, 0.5, 0.75),
        bound: str = "features",
        bias: bool = False,
        reset_momentum: bool = False,
    ):
        super().__init__(weight_decay=weight_decay)
        self.at, self.bound = tuple(at), one_of("bound", bound, "features", "classes")
        self.bias, self.reset_momentum = bias, reset_momentum

    def before_step(self, learner: TrainState, step: int, steps: int, seed: int) -> None:
        if step in {round(fraction * steps) for fraction in self.at}:
            self.redraw(learner.target, learner.optimizer, seed)

    @torch.no_grad()
    def redraw(self, target: Network, optimizer: torch.optim.SGD, seed: int) -> None:
        head = target.traced.get_submodule(target.head)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same values on any device
        classes, features = head.weight.shape
        bound = (classes if self.bound == "classes" else features) ** -0.5
        for parameter in [head.weight] + ([head.bias] if self.bias and getattr(head, "bias", None) is not None else []):
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
            parameter.copy_(values, non_blocking=True)
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if self.reset_momentum and momentum is not None:
                momentum.zero_()
