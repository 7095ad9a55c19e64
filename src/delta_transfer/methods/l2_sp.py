"""L2-SP: the source weights as the starting point that is not to be left (Li, Grandvalet, Davoine, ICML 2018)."""

from torch import Tensor

from ..common.errors import UserError
from ..models import Network
from .base import NO_SHAPES, MapShapes, Outputs, OutputShapes, Regularizer, not_negative, one_of
from .distances import weight_distance


class L2SP(Regularizer):
    """Omega = 1/2 * sum_p ||p - p0||^2, loss = CE + alpha * Omega + beta/2 * ||head||^2.

    p runs over the parameters of the backbone, p0 are their values in the source network; no weight decay beside it.
    scope="all": every non-head parameter, BatchNorm scale and shift included (official DELTA code, alpha 0.01).
    scope="conv": convolution kernels only (the L2-SP authors' code, alpha 0.1); they also leave the head's bias out
    of the beta term, which here always includes it.

    Args:
        alpha: of Omega; beta: of the head's L2 penalty; weight_decay: of the optimizer, on everything.
        scope: all | conv.

    Call `start(target)` before training, while the target's backbone is the source's; `penalty`, which returns the
    terms "weights" and "head" and needs no source outputs, otherwise raises RuntimeError. `start` raises UserError if
    the backbone has no such parameters, the constructor ValueError for another scope or a negative strength.
    """

    def __init__(self, alpha: float = 0.01, beta: float = 0.01, weight_decay: float = 0.0, scope: str = "all"):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha)
        self.alpha = alpha
        self.scope = one_of("scope", scope, "all", "conv")
        self.starting_point: dict[str, Tensor] | None = None

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        # Before training the backbone of the target is the source's.
        self.starting_point = {
            name: p.detach().clone()
            for name, p in target.backbone_parameters().items()
            if self.scope == "all" or p.dim() == 4
        }
        if not self.starting_point:
            raise UserError(
                f"L2-SP with scope={self.scope} finds nothing to keep: the backbone has no such parameters."
            )

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        if self.starting_point is None:
            raise RuntimeError("L2-SP has no starting point: call start() before penalty().")
        parameters = target.backbone_parameters()
        omega = weight_distance([parameters[name] for name in self.starting_point], list(self.starting_point.values()))
        return {"weights": self.alpha * omega} | self.head_penalty(target)
