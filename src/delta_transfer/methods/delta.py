"""DELTA: keep the feature maps of the source network (Li et al., ICLR 2019; TKDD 2021)."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..config import AttentionConfig
from ..models import Network
from .attention import attention_weights, channel_attention, removal_cost
from .base import Batches, Outputs, Regularizer, not_negative, of_source, taps_of
from .distances import map_distance


class DELTAWithoutAttention(Regularizer):
    """Omega = 1/2 * sum_l sum_{b,c} ||D_l[b,c]||^2 / (H_l W_l), loss = CE + alpha * Omega + beta/2 * ||head||^2.

    D_l = F_l(theta, x) - F_l(theta0, x), (B, C_l, H_l, W_l): target minus frozen source at tap l, both on the same
    batch. This is DELTA with the uniform weights w = 1/C_l, on the same scale of alpha.
    normalize=False leaves out the division by H_l W_l, as the official code does: 3136/784/196/49 times as much at
    the stages of a ResNet at 224 pixels, so that alpha means something else there.
    A sum over the batch, while CE is a mean: alpha for a batch mean is B times as large.

    Args:
        alpha: of Omega. Official code: 0.01 for batches of 64, 0.1 for Dogs.
        beta: of the head's L2 penalty, weight and bias.
        weight_decay: of the optimizer, on everything; official code: 0.

    `penalty` returns the terms "feature_maps" and "head". Raises ValueError for a negative strength; UserError, in
    `penalty`, for a target without taps or a tap that is no feature map.
    """

    needs_source = True
    needs_taps = True

    def __init__(self, alpha: float = 0.01, beta: float = 0.01, weight_decay: float = 0.0, normalize: bool = True):
        super().__init__(beta=beta, weight_decay=weight_decay)
        not_negative(alpha=alpha)
        self.alpha = alpha
        self.normalize = normalize

    def relative_weights(self, tap: str) -> Tensor | None:
        """C_l * w_l, (C_l,), mean 1; None stands for uniform weights."""
        return None

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        omega, source_outputs = 0.0, of_source(source_outputs)
        for tap in taps_of(target):
            layer = map_distance(outputs[tap], source_outputs[tap], self.relative_weights(tap))
            height, width = outputs[tap].shape[2:]
            # A sum over the batch, of which this may be one of several parts, over which the loss is averaged.
            omega = omega + self.parts * (layer / (height * width) if self.normalize else layer)
        return {"feature_maps": self.alpha * omega} | self.head_penalty(target)


class DELTA(DELTAWithoutAttention):
    """Omega = 1/2 * sum_l sum_{b,c} C_l w_{l,c} ||D_l[b,c]||^2 / (H_l W_l).

    Loss = CE + alpha * Omega + beta/2 * ||head||^2; D_l as in DELTAWithoutAttention.
    w_l = softmax((v_l - mean v_l) / (T * std v_l)), sum_c w_{l,c} = 1, where v_{l,c} is how much the
    cross-entropy of a linear probe on the frozen source network rises when channel c of tap l is removed, and T is the
    temperature (official code: 5).

    alpha, beta and weight_decay are as of DELTAWithoutAttention; attention: how the importances are measured, and T.
    Call `fit` (or `load_fitted`, with importances {tap: (C_l,)} in nats) before `penalty`, which otherwise raises
    RuntimeError. The weights are on the device of what was fitted.
    """

    fitted_name = "attention"

    def __init__(
        self,
        alpha: float = 0.01,
        beta: float = 0.01,
        weight_decay: float = 0.0,
        attention: AttentionConfig | None = None,
    ):
        super().__init__(alpha=alpha, beta=beta, weight_decay=weight_decay)
        self.attention = attention or AttentionConfig()
        self.fit_seed = self.attention.seed
        self._relative_weights: dict[str, Tensor] = {}

    def fit_options(self) -> dict[str, Any]:
        # Neither changes the importances: how many images go through at once, and the softmax over the result.
        return {k: v for k, v in asdict(self.attention).items() if k not in ("forward_images", "temperature", "seed")}

    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """Importance v_l of every channel, {tap: (C_l,) fp32}: how much the probe's loss rises without it.

        Beside it, as `<tap>/split_half`, how well two halves of the images agree on the ranking of the channels.
        """
        result = channel_attention(source, batches, num_classes, self.attention)
        fitted = result.importance
        fitted |= {f"{tap}/split_half": torch.tensor(r) for tap, r in result.agreement.items() if r is not None}
        self.load_fitted(fitted)
        return fitted

    def rehearse(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        channels, forward, removal = removal_cost(source, images, self.attention.forward_images)
        if self.attention.method == "taylor":
            removal = 2 * forward  # a backward pass
        uniform = {tap: torch.zeros(count) for tap, count in channels.items()}
        return uniform, self.attention.head_epochs * forward, self.attention.images * (forward + removal)

    def load_fitted(self, fitted: dict[str, Tensor]) -> None:
        importance = {tap: v for tap, v in fitted.items() if not tap.endswith("/split_half")}
        self._relative_weights = {
            tap: len(v) * attention_weights(v, self.attention.temperature) for tap, v in importance.items()
        }
        self.fit_report = {key: round(v.item(), 3) for key, v in fitted.items() if key not in importance}

    def relative_weights(self, tap: str) -> Tensor:
        if tap not in self._relative_weights:
            raise RuntimeError(f"DELTA has no attention for {tap!r}: call fit() or load_fitted() before penalty().")
        return self._relative_weights[tap]
