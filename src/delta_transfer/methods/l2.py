"""The baselines without a penalty of their own."""

from dataclasses import replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.errors import UserError
from ..common.options import option
from ..models import Network
from .base import METHODS, NO_SHAPES, MapShapes, Needs, SourceShapes, WithoutPenalty


@METHODS.register("l2", "L2")
class L2(WithoutPenalty):
    """Plain fine-tuning: cross-entropy, and weight decay on all parameters, BatchNorm and head included.

    The published value is 1e-4 (lixingjian/DELTA at 45054d4, train.py). Weight decay w adds w/2 * ||theta||^2 to the
    loss.
    """


@METHODS.register("l2_fe", "L2-FE")
class L2FE(L2):
    """Feature extraction: the backbone's parameters and BatchNorm statistics are frozen; only the head is trained.

    Deviation: AFA's code (xiezheng-cs/AFA at bb42a53, framework.py) freezes the parameters alone. The network is in
    training mode there: BatchNorm normalises by the batch, and its statistics move to the new images.
    fixed_statistics=False does so. By default the features are the source's, which the name says, and a step costs
    less.
    """

    fixed_statistics: bool = option(
        True, "whether BatchNorm keeps the source's statistics; false: it normalises by the batch, and they move on"
    )

    needs = Needs(frozen_backbone=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs = replace(type(self).needs, frozen_backbone=self.fixed_statistics)

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        if not self.fixed_statistics and not any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise UserError("reg.fixed_statistics=false would do nothing: this network has no BatchNorm layers.")

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        if not self.fixed_statistics:
            target.train()
            for parameter in target.backbone_parameters().values():
                parameter.requires_grad_(False)


@METHODS.register("scratch", "Scratch")
class Scratch(L2):
    """No transfer: L2 from random weights (backbone.weights=none)."""

    # It uses no source, but a table may show it beside methods that learn from another architecture.
    needs = Needs(random_start=True, other_sources=True)
