"""StochNorm: stochastic normalisation (Kou, You, Long, Wang, NeurIPS 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.errors import UserError
from ..engine import processes as distributed
from ..models import Network
from ..models.batchnorm import replace_batchnorm
from .base import NO_SHAPES, MapShapes, OutputShapes, Regularizer


class StochasticBatchNorm(nn.BatchNorm2d):
    """z = (1 - r) BN(x; moving statistics before this step) + r BN(x; batch statistics), r (C,) ~ Bernoulli(p).

    One r for each channel and step, of PyTorch's generator, which the training loop seeds in every step. Scale and
    shift are shared, the moving statistics updated as ever; in evaluation it is BatchNorm.
    """

    def __init__(self, num_features: int, p: float):
        super().__init__(num_features)
        self.p = p

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        r = torch.rand(self.num_features, device=images.device) < self.p
        moving = self.running_mean.clone(), self.running_var.clone()  # which the next line changes
        by_batch = super().forward(images)
        by_moving = F.batch_norm(images, *moving, self.weight, self.bias, eps=self.eps)
        return torch.where(r.view(-1, 1, 1), by_batch, by_moving)


class StochNorm(Regularizer):
    """Loss = CE; in training each BatchNorm layer is a StochasticBatchNorm.

    Source: paper and Transfer-Learning-Library, p 0.5 (which there is 0.5 whatever is asked for) and weight decay 5e-4.
    p=1 is plain fine-tuning, p=0 normalises by the moving statistics alone.
    """

    replaces_batchnorm = True

    def __init__(self, weight_decay: float = 5e-4, p: float = 0.5):
        super().__init__(weight_decay=weight_decay)
        self.p = p

    def start(
        self, target: Network, map_shapes: MapShapes = NO_SHAPES, source_shapes: OutputShapes | None = None
    ) -> None:
        if distributed.processes() > 1:
            raise UserError("reg=stochnorm runs in one process: each would draw channels of its own.")
        replace_batchnorm(target.traced, StochasticBatchNorm, p=self.p)
