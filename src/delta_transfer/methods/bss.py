"""BSS: batch spectral shrinkage (Chen, Wang, Fu, Long, Wang, NeurIPS 2019)."""

import torch
from torch import Tensor

from ..models import Network
from .base import Outputs, Regularizer, not_negative
from .distances import full_precision


class BSS(Regularizer):
    """Omega = sum_{i=1..k} sigma_{-i}^2, loss = CE + alpha * Omega + beta/2 * ||head||^2.

    sigma_{-i} is the i-th smallest of the min(B, d) singular values of the embeddings h (B, d), which are what the head
    is given. Source: paper and Transfer-Learning-Library: alpha 1e-3, k 1, weight decay 5e-4. The gradient of
    sigma_i^2 is 2 sigma_i u_i v_i', with the singular vectors u_i and v_i.

    Neither a sum nor a mean over the batch: alpha belongs to a batch size, and of a batch in parts (several processes,
    schedule.accumulate) each part has a spectrum of its own. The one method whose every step waits for a GPU: the
    decomposition is checked for convergence.
    """

    def __init__(self, alpha: float = 1e-3, beta: float = 0.0, weight_decay: float = 5e-4, k: int = 1):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha)
        self.alpha, self.k = alpha, k

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        singular_values = torch.linalg.svdvals(full_precision(outputs["embedding"]))  # the largest first
        return {"spectrum": self.alpha * singular_values[-self.k :].square().sum()} | self.head_penalty(target)
