"""ArcFace (Deng, Guo, Xue, Zafeiriou, CVPR 2019): a head of cosines, and cross-entropy with an additive angular margin.

theta_j is the angle between an image's embedding x, the head's input, and row j of the head's weight W.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..common.options import Options, option

SMALLEST = 1e-6  # of sin^2: below it the sine's gradient, which is unbounded, is taken as 0


@dataclass
class ArcFaceConfig(Options):
    """The loss of task=verification, with its published values."""

    key: ClassVar[str] = "arcface"

    scale: float = option(64.0, "factor on the cosines", above=0)
    margin: float = option(0.5, "margin between classes, in radians", at_least=0, below=math.pi)


@fx.wrap  # one node of the traced network, whose input is the embedding
def scaled_cosines(embedding: Tensor, weight: Tensor, scale: float) -> Tensor:
    """s * cos(theta_j), (B, D) and (K, D) -> (B, K), in full precision."""
    with torch.autocast(embedding.device.type, enabled=False):
        x, w = (t if t.dtype == torch.float64 else t.float() for t in (embedding, weight))
        return scale * F.linear(F.normalize(x), F.normalize(w))


class CosineHead(nn.Linear):
    """logits_j = s * cos(theta_j); no bias. The margin, which needs the labels, is part of the loss."""

    def __init__(self, in_features: int, num_classes: int, scale: float = 64.0):
        super().__init__(in_features, num_classes, bias=False)
        self.scale = scale

    def forward(self, embedding: Tensor) -> Tensor:
        return scaled_cosines(embedding, self.weight, self.scale)


@dataclass(frozen=True)
class ArcFaceLoss:
    """Cross-entropy of s * cos(theta_y + m) for the true class y, s * cos(theta_j) for the others; mean over the batch.

    cos(theta + m) is expanded, which needs no arccos. For theta + m > pi it would rise again, and is replaced by
    cos(theta) - m sin(m), as in the authors' code.
    """

    scale: float = 64.0
    margin: float = 0.5

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits: (B, K), of a CosineHead with the same scale. labels: (B,). Returns a scalar."""
        labels = labels[:, None]
        cosine = logits.gather(1, labels) / self.scale
        turned = self.scale * turned_by(cosine, self.margin)
        return F.cross_entropy(logits.scatter(1, labels, turned), labels[:, 0])


def turned_by(cosine: Tensor, margin: float) -> Tensor:
    """cos(theta + m) from cos(theta), and its replacement for theta + m > pi."""
    sine = (1 - cosine.square()).clamp(min=SMALLEST).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))
