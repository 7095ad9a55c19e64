"""Squared distances with their gradients written out: one pass over the memory where autograd makes several.

Both are 1/2 * a sum of squares, whose gradient is the (weighted) difference that is squared. Autograd's own chain for
the same sums takes twice as long on a CPU (docs/performance.md). They cannot be differentiated twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...common.errors import UserError
from ..base import full_precision


class _MapDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, target: Tensor, source: Tensor, weights: Tensor | None) -> Tensor:
        difference = full_precision(target) - full_precision(source)
        weights = None if weights is None else weights.to(difference).view(-1, 1, 1)
        # Keeps the maps, not their difference: the target's is kept anyway, and in bf16 the maps are half as large.
        ctx.save_for_backward(target, source, weights)
        if weights is not None:
            difference *= weights.sqrt()
        # Norms of the C channels of each pixel, then their sum: a norm of the whole map is off by 1e-3 in fp32.
        norms: Tensor = torch.linalg.vector_norm(difference.permute(0, 2, 3, 1), dim=-1)
        return 0.5 * norms.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        target, source, weights = ctx.saved_tensors
        difference = full_precision(target) - full_precision(source)
        difference *= gradient if weights is None else gradient * weights
        return difference.to(target.dtype), None, None


def map_distance(target: Tensor, source: Tensor, weights: Tensor | None = None) -> Tensor:
    """1/2 * sum_{b,c,h,w} w_c * (target - source)^2 of feature maps (B, C, H, W), a scalar in fp32 or double.

    weights (C,) are not negative; None stands for 1. Only `target` gets a gradient, w_c * (target - source).
    Raises UserError for maps of another rank.
    """
    if target.dim() != 4:
        raise UserError(
            f"A tapped map has the shape {tuple(target.shape)} instead of (B, C, H, W): name its layout, as in "
            'tapped(model, ..., layout="BNC").'
        )
    # A tensor made in inference_mode cannot be kept for a backward pass.
    distance: Tensor = _MapDistance.apply(target, source.clone() if source.is_inference() else source, weights)
    return distance


def unit_positions(feature_map: Tensor) -> Tensor:
    """A map (B, C, ...) or features (B, C), at each position divided by the norm over the channels plus 1e-10."""
    values = full_precision(feature_map)
    unit: Tensor = values / (torch.linalg.vector_norm(values, dim=1, keepdim=True) + 1e-10)
    return unit


class _WeightDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, starting_point: list[Tensor], roots: list[Tensor] | None, *parameters: Tensor) -> Tensor:
        ctx.differences, ctx.roots = torch._foreach_sub(parameters, starting_point), roots
        if roots is not None:
            torch._foreach_mul_(ctx.differences, roots)
        return 0.5 * torch.stack(torch._foreach_norm(ctx.differences)).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch._foreach_mul(ctx.differences, gradient)
        if ctx.roots is not None:
            torch._foreach_mul_(gradients, ctx.roots)
        return None, None, *gradients


def weight_distance(
    parameters: list[Tensor], starting_point: list[Tensor], roots: list[Tensor] | None = None
) -> Tensor:
    """1/2 * sum_p ||r (p - p0)||^2 over lists of tensors of the same shapes, a scalar. Without roots r is 1.

    The gradient of each p is r^2 (p - p0).
    """
    distance: Tensor = _WeightDistance.apply(starting_point, roots, *parameters)
    return distance
