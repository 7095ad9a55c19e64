"""BSS: batch spectral shrinkage (Chen, Wang, Fu, Long, Wang, NeurIPS 2019)."""

import torch
from torch import Tensor

from ..common.options import LARGEST_BATCH, option
from ..models import Network
from .base import DECAY, METHODS, Outputs, Penalty, full_precision


@METHODS.register("bss", "BSS")
class BSS(Penalty):
    """Omega = sum_{i=1..k} sigma_{-i}^2, loss = CE + alpha * Omega + beta/2 * ||head||^2.

    sigma_{-i} is the i-th smallest of the min(B, d) singular values of the embeddings h (B, d), the head's inputs.
    Source: the paper and Transfer-Learning-Library (thuml/Transfer-Learning-Library at ff06720,
    tllib/regularization/bss.py), with alpha 1e-3, k 1 and weight decay 5e-4. The gradient of sigma_i^2
    is 2 sigma_i u_i v_i', with the singular vectors u_i and v_i.

    Omega is neither a sum nor a mean over the batch: alpha belongs to a batch size, and where a batch is divided (over
    several processes, or by schedule.accumulate) each micro-batch has a spectrum of its own. BSS is the one method
    whose every step waits for the GPU, since the decomposition is checked for convergence. `penalty` returns the terms
    "spectrum" and "head".
    """

    alpha: float = option(1e-3, "strength of the penalty on the embeddings' smallest singular values", at_least=0)
    weight_decay: float = option(5e-4, DECAY, at_least=0)
    k: int = option(1, "how many of the smallest singular values are penalised", above=0, at_most=LARGEST_BATCH)

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        singular_values = torch.linalg.svdvals(full_precision(outputs["embedding"]))  # the largest first
        return {"spectrum": self.alpha * singular_values[-self.k :].square().sum()} | self.head_penalty(target)
