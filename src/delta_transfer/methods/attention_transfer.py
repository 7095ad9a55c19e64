"""AT: attention transfer (Zagoruyko, Komodakis, ICLR 2017), where a network is active, not what it computes there."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import Network
from .base import Outputs
from .distances import full_precision
from .matching import PairedMaps


class AT(PairedMaps):
    """A = sum_mn alpha * mean (q(S_m) - q(T_n))^2, loss = CE + A + beta/2 * ||head||^2.

    q(F) = a / ||a||, (B, P), of a = the mean over channels of F^2 at each of the P positions; the mean is over images
    and positions. S_m is resized bilinearly to T_n's size. There is nothing to learn, whatever the numbers of channels.
    q has norm 1, so that a pair's mean is at most 2 / P: alpha is large. That of L2T-ww's baseline was not found: tune
    it on validation data.
    """

    def __init__(self, alpha: float = 100.0, beta: float = 0.0, weight_decay: float = 1e-4, pairs: str = "one_to_one"):
        super().__init__(alpha, beta, weight_decay, pairs)

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs) -> dict[str, Tensor]:
        with torch.no_grad():
            expected = {key: activity(source_map) for key, source_map in self.references(source_outputs).items()}
        found = {tap: activity(outputs[tap]) for tap in self.sizes}
        total = sum(F.mse_loss(found[pair.target], expected[pair.key]) for pair in self.pairs)
        return {"activity": self.alpha * total} | self.head_penalty(target)


def activity(feature_map: Tensor) -> Tensor:
    """q: (B, C, H, W) -> (B, H W), in full precision."""
    return F.normalize(full_precision(feature_map).square().mean(dim=1).flatten(1))
