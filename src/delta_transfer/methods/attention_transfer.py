"""AT: attention transfer (Zagoruyko, Komodakis, ICLR 2017) compares where two networks are active, not the values."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.options import option
from ..models import Network
from .base import METHODS, Outputs, added, full_precision
from .matching import PairedMaps


@METHODS.register("at", "AT")
class AT(PairedMaps):
    """A = sum_mn alpha * mean (q(S_m) - q(T_n))^2, loss = CE + A + beta/2 * ||head||^2.

    q(F) = a / ||a||, (B, P), where a is the mean of F^2 over the channels at each of the P positions. The mean is over
    images and positions. S_m is resized bilinearly to T_n's size. The method has no parameters, whatever the numbers of
    channels. q has norm 1, so that a pair's mean is at most 2 / P, and alpha is large.

    `penalty` returns the terms "activity" and "head", and raises RuntimeError before `setup`. `setup` raises UserError
    if no maps fit `pairs`.

    Source: the paper, and at_loss of L2T-ww's authors (alinlab/L2T-ww at 023c642, utils/utils.py). Their alpha was not
    found: tune it on validation data.
    """

    alpha: float = option(
        100.0, "strength of the penalty, whose squares are about 1/positions; our choice, none is published", at_least=0
    )

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        with torch.no_grad():
            expected = {key: activity(source_map) for key, source_map in self.source_maps(source_outputs).items()}
        found = {tap: activity(outputs[tap]) for tap in self.sizes}
        total = added([F.mse_loss(found[pair.target], expected[pair.key]) for pair in self.matched])
        return {"activity": self.alpha * total} | self.head_penalty(target)


def activity(feature_map: Tensor) -> Tensor:
    """q: (B, C, H, W) -> (B, H W), in full precision."""
    return F.normalize(full_precision(feature_map).square().mean(dim=1).flatten(1))
