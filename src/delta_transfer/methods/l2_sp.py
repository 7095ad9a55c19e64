"""L2-SP: a penalty on the distance of the weights from the source's (Li, Grandvalet, Davoine, ICML 2018)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.options import option
from ..models import Network
from .base import METHODS, NO_SHAPES, MapShapes, Outputs, Penalty, SourceShapes, TrainState
from .fast.distances import weight_distance

LEAST_HELD = 0.2  # of a network's parameters: the patches of a ViT alone are 1 %


class HeldWeights(Penalty):
    """A penalty on the distance of weights from the source's; `holds` chooses the weights."""

    beta: float = option(0.01, "strength of the L2 penalty on the new head", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.starting_point: dict[str, Tensor] | None = None

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the penalty holds a parameter of the backbone near the source's; by default convolution kernels."""
        return parameter.dim() == 4

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        held = sum(parameter.numel() for parameter in model.parameters() if self.holds(parameter))
        if not held:
            raise UserError(self._nothing_to_hold())
        if held < LEAST_HELD * (count := sum(parameter.numel() for parameter in model.parameters())):
            raise UserError(
                f"{type(self).__name__} would do next to nothing: it holds convolution kernels, which are "
                f"{100 * held / count:.1f} % of this network's parameters. reg=l2_sp with reg.scope=all holds all."
            )

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        # Before training, the target's backbone is the source's.
        self.starting_point = {
            name: p.detach().clone() for name, p in target.backbone_parameters().items() if self.holds(p)
        }
        if not self.starting_point:
            raise UserError(self._nothing_to_hold())

    def _nothing_to_hold(self) -> str:
        return (
            f"{type(self).__name__} would do nothing: it holds convolution kernels, and this backbone has none. "
            "reg=l2_sp with reg.scope=all holds all."
        )

    def distance(self, target: Network, roots: list[Tensor] | None = None) -> Tensor:
        """Omega. roots: the factor of each entry's difference before it is squared; None: 1."""
        if self.starting_point is None:
            raise RuntimeError(f"{type(self).__name__} has no starting point: call setup() before penalty().")
        parameters = target.backbone_parameters()
        held: list[Tensor] = [parameters[name] for name in self.starting_point]
        return weight_distance(held, list(self.starting_point.values()), roots)


@METHODS.register("l2_sp", "L2-SP")
class L2SP(HeldWeights):
    """Omega = 1/2 * sum_p ||p - p0||^2, loss = CE + alpha * Omega + beta/2 * ||head||^2.

    p runs over the parameters of the backbone; p0 are their values in the source network. The penalty replaces weight
    decay.
    scope="all": every parameter but the head's, BatchNorm scale and shift included (lixingjian/DELTA at 45054d4,
    train.py, alpha 0.01). scope="conv": convolution kernels only (holyseven/TransferLearningClassification at 5842a4f,
    run_classification/train.sh, alpha 0.1). Deviation: these authors leave the head's bias out of the beta term; here
    that term includes it, as in DELTA's code.
    Their code also changes the colours of training images: brightness by up to 63/255 of a grey level (of 255, next to
    nothing), saturation by 0.5 to 1.5 and contrast by 0.2 to 1.8 (holyseven/TransferLearningClassification at 11e5ddd,
    database/dataset_reader.py). Here the schedule can ask for that (+experiment=l2_sp_official does).
    decoupled=True: no Omega in the loss; before each step p <- p - lr alpha (p - p0), with the learning rate of p. This
    is AdamW's weight decay towards p0 (derived; the baseline of SPD's paper). In a loop of your own call
    `watch(optimizer)` for it. For SGD without momentum it equals the penalty. For Adam it does not, since Adam divides
    a penalty's gradient by its size.

    Call `setup(target)` before training, while the target's backbone is still the source's. `penalty` returns the terms
    "weights" and "head" and needs no source outputs. Raises RuntimeError for `penalty` before `setup`, UserError if the
    backbone has no such parameters.
    """

    alpha: float = option(0.01, "strength of the penalty on the backbone's distance from the source", at_least=0)
    scope: str = option(
        "all",
        "what is penalised: all, every parameter but the head's (DELTA's code); or conv, convolution kernels (L2-SP's)",
        choices=("all", "conv"),
    )
    decoupled: bool = option(False, "decay towards the source beside the gradient, as AdamW's, in place of a penalty")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs = replace(type(self).needs, own_steps=self.decoupled, idle_hooks=not self.decoupled)
        self.watched: torch.optim.Optimizer | None = None
        self.places: dict[nn.Parameter, Tensor] = {}  # p0 by p

    def holds(self, parameter: nn.Parameter) -> bool:
        return self.scope == "all" or super().holds(parameter)

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        super().setup(target, map_shapes, source_shapes)
        parameters = target.backbone_parameters()
        self.places = {parameters[name]: start for name, start in (self.starting_point or {}).items()}

    def before_step(self, state: TrainState, step: int, steps: int, seed: int) -> None:
        if self.decoupled and self.watched is not state.optimizer:
            self.watch(state.optimizer)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Decays towards the source before each step of `optimizer`."""
        self.watched = optimizer
        optimizer.register_step_pre_hook(lambda optimizer, *_: self._decay(optimizer))

    @torch.no_grad()
    def _decay(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            if held := [p for p in group["params"] if p in self.places]:
                torch._foreach_lerp_(held, [self.places[p] for p in held], group["lr"] * self.alpha)

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        if self.decoupled:
            return self.head_penalty(target)
        return {"weights": self.alpha * self.distance(target)} | self.head_penalty(target)
