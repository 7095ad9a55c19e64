"""DELTA: a penalty on the distance from the source's feature maps (Li et al., ICLR 2019; TKDD 2021)."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor

from ..common.options import option
from ..models import Network
from .attention import AttentionConfig, attention_weights, channel_attention, removal_cost
from .base import METHODS, Batches, FeaturePenalty, Needs, Outputs, added, of_source, of_tap, options_in, taps_of
from .fast.distances import map_distance, unit_positions


class MapPenalty(FeaturePenalty):
    """DELTA's penalty on feature maps, with or without attention."""

    alpha: float = option(
        0.01,
        "strength of the penalty on the feature maps, a sum over the batch: for twice the batch, halve alpha",
        at_least=0,
    )
    beta: float = option(0.01, "strength of the L2 penalty on the new head", at_least=0)
    normalize_maps: bool = option(
        False,
        "divide both maps by their norm over the channels at each position, so that alpha does not depend on their "
        "scale",
    )

    needs = Needs(source=True, taps=True)
    normalize = True  # divide by H * W

    def penalty(self, target: Network, outputs: Outputs, source_outputs: Outputs | None) -> dict[str, Tensor]:
        def omega() -> Tensor:
            return added([self.distance(tap, outputs[tap], of_source(source_outputs)) for tap in taps_of(target)])

        penalty = self.alpha * self.in_this_step(omega, next(iter(outputs.values())))
        return {"feature_maps": penalty} | self.head_penalty(target)

    def distance(self, tap: str, target_map: Tensor, source_outputs: Outputs) -> Tensor:
        """The part of Omega of one tap, for maps (B, C, H, W)."""
        source_map = of_tap(source_outputs, tap, like=target_map)
        if self.normalize_maps:
            target_map, source_map = unit_positions(target_map), unit_positions(source_map)
        layer = map_distance(target_map, source_map, self.relative_weights(tap))
        height, width = target_map.shape[2:]
        # The loss is averaged over micro-batches; `loss_scale` makes their mean a sum over the batch again.
        return self.loss_scale * (layer / (height * width) if self.normalize else layer)

    def relative_weights(self, tap: str) -> Tensor | None:
        """C_l * w_l, (C_l,), whose mean is 1. None stands for uniform weights."""
        return None


@METHODS.register("delta_noatt", "DELTA w/o ATT")
class DELTAWithoutAttention(MapPenalty):
    """Omega = 1/2 * sum_l sum_{b,c} ||D_l[b,c]||^2 / (H_l W_l), loss = CE + alpha * Omega + beta/2 * ||head||^2.

    D_l = F_l(theta, x) - F_l(theta0, x), (B, C_l, H_l, W_l), is the target's feature map at tap l minus the frozen
    source's, both for the same images. This is DELTA with the uniform weights w = 1/C_l, on the same scale of alpha.
    normalize=False leaves out the division by H_l W_l, as the official code does. At the stages of a ResNet and 224
    pixels Omega is then 3136/784/196/49 times as large, so that alpha means something else.
    Omega is a sum over the batch, while CE is a mean: for a mean over the batch, alpha would be B times as large.
    normalize_maps=True divides each position of both maps by its norm over the channels, as LDIFS does. Then no layer's
    part of an image exceeds 2, whatever the scale of the network's maps, and alpha means the same for every network.

    Source: the paper and the official code (lixingjian/DELTA at 45054d4, train.py: fea_map), with alpha 0.01 for
    batches of 64, 0.1 for Stanford Dogs, and no weight decay. Deviation: the division by H_l W_l, so that alpha means
    what it means for DELTA.

    `penalty` returns the terms "feature_maps" and "head". It raises UserError for a target without taps, or with a tap
    that is not a feature map.
    """

    normalize: bool = option(True, "divide by H * W as DELTA does; false: the authors' sum, where alpha is smaller")


@METHODS.register("delta", "DELTA")
class DELTA(MapPenalty):
    """Omega = 1/2 * sum_l sum_{b,c} C_l w_{l,c} ||D_l[b,c]||^2 / (H_l W_l).

    Loss = CE + alpha * Omega + beta/2 * ||head||^2; D_l as in DELTAWithoutAttention.
    w_l = softmax((v_l - mean v_l) / (T * std v_l)), sum_c w_{l,c} = 1. v_{l,c} is how much the cross-entropy of a
    linear probe on the frozen source network rises when channel c of tap l is removed. T is the temperature.

    Source: the paper and the official code (lixingjian/DELTA at 45054d4, train.py: att_fea_map), with alpha 0.01, 0.1
    for Stanford Dogs, and T 5. The standard scores before the softmax are in the code alone. The module `attention`
    says how the probe deviates.

    Call `fit` (or `load_fitted`, with importances {tap: (C_l,)} in nats) before `penalty`, which otherwise raises
    RuntimeError. `state_dict` carries what was fitted, and `to` moves it.
    """

    attention: AttentionConfig = option(AttentionConfig, "how the importance of channels is measured")

    needs = Needs(source=True, taps=True, fitted="attention")
    memory_option = "attention.forward_images"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.attention = options_in(AttentionConfig, self.attention)
        self.fit_seed, self.fit_batch_size = self.attention.seed, self.attention.batch_size
        if self.attention.head_images:
            self.most_fit_images = self.attention.head_images / self.attention.head_epochs
        self._relative_weights: dict[str, Tensor] = {}

    def fit_options(self) -> dict[str, Any]:
        # forward_images changes no result, temperature and shuffle apply after `fit`, and seed and batch size are
        # attributes of every method. Results that are older than probe_batchnorm or head_images have their defaults.
        left_out = {"forward_images", "temperature", "shuffle", "seed", "batch_size"}
        left_out |= {"probe_batchnorm"} if self.attention.probe_batchnorm == "eval" else set()
        left_out |= {"head_images"} if self.attention.head_images is None else set()
        return {k: v for k, v in asdict(self.attention).items() if k not in left_out}

    def fit(self, source: Network, batches: Batches, num_classes: int) -> dict[str, Tensor]:
        """Importance v_l of every channel, {tap: (C_l,) fp32}: how much the probe's loss rises without it.

        `<tap>/split_half` tells how well two halves of the images agree on the ranking of the channels.
        """
        result = channel_attention(source, batches, num_classes, self.attention, self.sample_loss, self.unfinished)
        fitted = result.importance
        fitted |= {f"{tap}/split_half": torch.tensor(r) for tap, r in result.agreement.items() if r is not None}
        self.load_fitted(fitted)
        return fitted

    def estimate_fit(self, source: Network, images: Tensor, num_classes: int) -> tuple[dict[str, Tensor], float, float]:
        channels, forward, removal = removal_cost(source, images, self.attention.forward_images)
        if self.attention.method == "taylor":
            removal = 2 * forward  # the cost of a backward pass
        uniform = {tap: torch.zeros(count) for tap, count in channels.items()}
        return uniform, self.attention.head_epochs * forward, self.attention.images * (forward + removal)

    def load_fitted(self, fitted: dict[str, Tensor]) -> None:
        self.fitted = dict(fitted)
        importance = {tap: v for tap, v in fitted.items() if not tap.endswith("/split_half")}
        weights = {tap: len(v) * attention_weights(v, self.attention.temperature) for tap, v in importance.items()}
        self._relative_weights = weights if self.attention.shuffle is None else self.shuffled(weights)
        self.fit_report = {key: round(v.item(), 3) for key, v in fitted.items() if key not in importance}

    def shuffled(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of each tap, given to its channels in random order."""
        order = torch.Generator().manual_seed(self.attention.shuffle or 0)
        return {tap: w[torch.randperm(len(w), generator=order).to(w.device)] for tap, w in weights.items()}

    def relative_weights(self, tap: str) -> Tensor:
        if tap not in self._relative_weights:
            raise RuntimeError(f"DELTA has no attention for {tap!r}: call fit() or load_fitted() before penalty().")
        return self._relative_weights[tap]

    def get_extra_state(self) -> dict[str, Tensor]:
        return dict(self.fitted)

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        if state:
            self.load_fitted(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.fitted = {name: fn(value) for name, value in self.fitted.items()}
        self._relative_weights = {name: fn(value) for name, value in self._relative_weights.items()}
        super()._apply(fn, recurse)
        return self
