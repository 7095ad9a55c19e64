"""StochNorm: stochastic normalisation (Kou, You, Long, Wang, NeurIPS 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.errors import UserError
from ..common.options import option
from ..models import Network
from ..models.batchnorm import AnyBatchNorm, replace_batchnorm
from .base import DECAY, METHODS, NO_SHAPES, MapShapes, Needs, SourceShapes, WithoutPenalty


class StochasticBatchNorm(AnyBatchNorm):
    """z = (1 - r) BN(x; moving statistics before this step) + r BN(x; batch statistics), r (C,) ~ Bernoulli(p).

    There is one r for each channel and step, drawn from PyTorch's generator, which the training loop seeds in every
    step. Scale and shift are shared, and the moving statistics are updated as in BatchNorm. In evaluation mode it is
    BatchNorm.
    """

    def __init__(self, num_features: int, p: float):
        super().__init__(num_features)
        self.p = p

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        assert self.running_mean is not None and self.running_var is not None
        r = torch.rand(self.num_features, device=images.device) < self.p
        mean, variance = self.running_mean.clone(), self.running_var.clone()  # which the next line changes
        by_batch = super().forward(images)
        by_moving = F.batch_norm(images, mean, variance, self.weight, self.bias, eps=self.eps)
        return torch.where(r.view(-1, *[1] * (images.dim() - 2)), by_batch, by_moving)


@METHODS.register("stochnorm", "StochNorm")
class StochNorm(WithoutPenalty):
    """Loss = CE; in training, each BatchNorm layer is a StochasticBatchNorm.

    Source: the paper and Transfer-Learning-Library (thuml/Transfer-Learning-Library at 0aecfaa,
    tllib/normalization/stochnorm.py), with p 0.5 (the library ignores other values) and weight decay 5e-4. Deviation:
    that library differentiates with the statistics after the update, which is not the gradient of what it computes;
    here finite differences agree. p=1 is plain fine-tuning; p=0 normalises by the moving statistics alone.
    """

    weight_decay: float = option(5e-4, DECAY, at_least=0)
    p: float = option(0.5, "probability that a channel is normalised by the batch", at_least=0, at_most=1)

    needs = Needs(own_batchnorm=True)

    def requires(self, model: nn.Module, optimizer: str, processes: int) -> None:
        if processes > 1:
            raise UserError("reg=stochnorm runs in one process: each process would draw channels of its own.")
        if not any(isinstance(module, _BatchNorm) for module in model.modules()):
            raise UserError("reg=stochnorm would do nothing: this network has no BatchNorm layers.")

    def setup(self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: SourceShapes = None) -> None:
        replace_batchnorm(target.traced, StochasticBatchNorm, p=self.p)
