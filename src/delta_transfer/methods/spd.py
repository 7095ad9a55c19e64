"""SPD: selective projection decay (Tian, Huang, Kira, NeurIPS 2024)."""

import torch
from torch import Tensor

from ..common.options import option
from ..models import Network
from .base import METHODS, NO_SHAPES, MapShapes, Needs, Penalty, SourceShapes, TrainState


@METHODS.register("spd", "SPD")
class SPD(Penalty):
    """After each step, for each parameter tensor of the backbone with sum g * (theta - theta0) > 0:

        u <- u - alpha * r * (u - theta0),  r = clip((||u - theta0|| - ||theta - theta0||) / ||u - theta0||, 0, 1)

    theta is the tensor before the step and g its gradient; u is the tensor after the optimizer's step; theta0 is the
    source's. The condition says that a move back to the source would lower the loss. If the step led away from the
    source, alpha = 1 restores the tensor's distance from the source; other tensors are free. Loss = CE + beta/2 *
    ||head||^2.

    Source: the paper, whose weight decay is alpha and whose optimizer is Adam (optimizer=adamw). The formula is that of
    the authors' code (GT-RIPL/Selective-Projection-Decay at b377695), which has no licence: no line of it is here. With
    SGD the same projection follows SGD's step; that form is derived. Deviation: the README there holds every trained
    parameter, a new head at its first values too; here the head is free, since the source knows nothing of it. The
    optimizer's own weight decay belongs to the step.

    Call `setup(target)` while the target's backbone is the source's, and `watch(optimizer)` in a loop of your own.
    """

    alpha: float = option(1.0, "strength of the projection; 1 undoes a step's move away from the source", at_least=0)

    needs = Needs(own_steps=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.held: list[Tensor] = []  # the parameters of the backbone
        self.starting_point: list[Tensor] = []
        self.watched: torch.optim.Optimizer | None = None
        self.before: tuple[list[Tensor], list[Tensor]] = [], []  # whether the condition holds, and ||theta - theta0||

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        self.held = list(target.backbone_parameters().values())
        self.starting_point = [p.detach().clone() for p in self.held]

    def before_step(self, state: TrainState, step: int, steps: int, seed: int) -> None:
        if self.watched is not state.optimizer:
            self.watch(state.optimizer)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Projects after each step of `optimizer`."""
        self.watched = optimizer
        optimizer.register_step_pre_hook(lambda *_: self._look())
        optimizer.register_step_post_hook(lambda *_: self._project())

    @torch.no_grad()
    def _look(self) -> None:
        away = torch._foreach_sub(self.held, self.starting_point)
        applies = [
            p.new_zeros((), dtype=torch.bool) if p.grad is None else (p.grad * d).sum() > 0
            for p, d in zip(self.held, away, strict=True)
        ]
        self.before = applies, list(torch._foreach_norm(away))

    @torch.no_grad()
    def _project(self) -> None:
        away = torch._foreach_sub(self.held, self.starting_point)
        for p, d, after, applies, before in zip(self.held, away, torch._foreach_norm(away), *self.before, strict=True):
            r = ((after - before) / after.clamp(min=torch.finfo(after.dtype).tiny)).clamp(0, 1)
            p.sub_(self.alpha * r * applies * d)
