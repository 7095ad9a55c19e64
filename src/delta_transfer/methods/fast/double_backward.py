"""Convolution, BatchNorm and mean squares whose backward passes are cheap to differentiate.

PyTorch differentiates a convolution's backward pass by convolutions with the images as channels, and BatchNorm's by a
chain of operations on whole maps. Here each term is written out as one call of the kernels that a forward or backward
pass uses. Below, g is the gradient of a layer's output. u is the adjoint of what the backward pass returns, u_x that of
the gradient of x, and so on. All terms are derivatives of <u, backward(g)>.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Sizes = int | tuple[int, ...]
Options = tuple[Any, ...]  # stride, padding, dilation (two numbers each) and groups of a convolution
Gradients = tuple[Tensor | None, ...]

aten = torch.ops.aten
_to_operands: ContextVar[bool] = ContextVar("_to_operands", default=True)


@contextmanager
def twice_differentiable(to_operands: bool = True) -> Iterator[None]:
    """In this context, networks of modules use these operations.

    to_operands=False: their backward passes can be differentiated with respect to g alone; the derivatives with respect
    to the layers' inputs and parameters are missing. This suits a loss that depends on the wanted variables only
    through the weights of its layers' outputs. Autograd cannot leave out the other work by itself.
    """
    token = _to_operands.set(to_operands)
    try:
        with _Replacing():
            yield
    finally:
        _to_operands.reset(token)


class _Replacing(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return REPLACED.get(function, function)(*args, **(kwargs or {}))


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Tensor:
    """F.conv2d, whose backward pass can be differentiated."""
    if isinstance(padding, str):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    sizes = [[n, n] if isinstance(n, int) else list(n) for n in (stride, padding, dilation)]
    found: Tensor = _Convolution.apply(*_cast(input, weight, bias), (*sizes, groups), _to_operands.get())
    return found


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: Options, to_operands: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.to_operands = options, to_operands
        return torch.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:3])
        return *_ConvolutionBackward.apply(g, *ctx.saved_tensors, ctx.options, wanted, ctx.to_operands), None, None


def _backward(g: Tensor, x: Tensor, weight: Tensor, options: Options, wanted: list[bool]) -> Gradients:
    """Gradients of x, of the weight and of the bias. Neither of the first two needs its own operand's values."""
    stride, padding, dilation, groups = options
    sizes = [weight.shape[0]] if wanted[2] else None
    found: Gradients = aten.convolution_backward(
        g, x, weight, sizes, stride, padding, dilation, False, [0, 0], groups, wanted
    )
    return found


class _ConvolutionBackward(Function):
    """<u, backward(g)> = <g, x * u_w + u_x * w + u_b>, * the convolution."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, options: Options, wanted: list[bool], to_operands: bool
    ) -> Gradients:
        ctx.save_for_backward(g, x, weight)
        ctx.options, ctx.to_operands = options, to_operands
        ctx.set_materialize_grads(False)
        return _backward(g, x, weight, options, wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u_x: Tensor | None, u_w: Tensor | None, u_b: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        of_g = of_x = of_weight = None
        if u_w is not None:
            of_g = torch.conv2d(x, u_w, u_b, *ctx.options)
        if u_x is not None:
            more = torch.conv2d(u_x, weight, None if of_g is not None else u_b, *ctx.options)
            of_g = more if of_g is None else of_g.add_(more)
        if of_g is None and u_b is not None:
            of_g = u_b.view(-1, 1, 1).expand_as(g)
        if ctx.to_operands and (u_x is not None or u_w is not None):
            wanted = [u_w is not None and ctx.needs_input_grad[1], u_x is not None, False]
            operands = x if u_x is None else u_x, weight if u_w is None else u_w
            of_x, of_weight, _ = _backward(g, *operands, ctx.options, wanted)
        return of_g, of_x, of_weight, None, None, None


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """F.batch_norm, whose derivatives are written out for maps (B, C, H, W) with scale and shift."""
    alone = input.dim() != 4 or input.numel() == input.shape[1]  # F.batch_norm raises an error for it
    if not training or weight is None or bias is None or alone:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    found: Tensor = _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps, _to_operands.get())
    return found


class _BatchNorm(Function):
    """y = weight x' + bias, x' = i (x - m), with mean m and i = (variance + eps)^(-1/2) of the batch, per channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        to_operands: bool,
    ) -> Tensor:
        y: Tensor
        y, mean, inverse = aten.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps, ctx.to_operands = eps, to_operands
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return *_BatchNormBackward.apply(g, *ctx.saved_tensors, ctx.eps, ctx.to_operands), None, None, None, None, None


class _BatchNormBackward(Function):
    """With E the mean over a channel's N values, its backward pass is

        g_x = weight i (g - E g - x' E[g x']),  g_weight = N E[g x'],  g_bias = N E g

    and, with a = E u_x, c = E[u_x x'], d = u_weight - weight i c, the derivatives of <u, backward(g)> are

        of g:      weight i (u_x - a - c x') + u_weight x' + u_bias
        of weight: N i (E[g u_x] - a E g - c E[g x'])
        of x:      i (h - E h - x' E[h x']) - weight i^2 x' (E[g u_x] - a E g - c E[g x'])

    where h = d g - weight i E[g x'] u_x.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float, to_operands: bool
    ) -> Gradients:
        found: Gradients = aten.native_batch_norm_backward(
            g, x, weight, None, None, mean, inverse, True, eps, [True] * 3
        )
        ctx.save_for_backward(g, x, weight, mean, inverse, *found[1:])
        ctx.eps, ctx.to_operands = eps, to_operands
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u_x: Tensor, u_weight: Tensor, u_bias: Tensor) -> tuple[Tensor | None, ...]:
        g, x, weight, mean, inverse, g_weight, g_bias = ctx.saved_tensors
        count = x.numel() / x.shape[1]
        # BatchNorm's backward pass of u_x gives the first term, N c and N a.
        of_g, c, a = aten.native_batch_norm_backward(
            u_x, x, weight, None, None, mean, inverse, True, ctx.eps, [True] * 3
        )
        of_g += _affine((x, u_weight * inverse), constant=u_bias - u_weight * inverse * mean)
        if not ctx.to_operands:
            return of_g, None, None, None, None, None, None
        a, c, e, f = a / count, c / count, g_bias / count, g_weight / count
        p = (g * u_x).sum(dim=(0, 2, 3), dtype=a.dtype) / count - a * e - c * f
        d, s = u_weight - weight * inverse * c, weight * inverse * f
        # h = d g - s u_x, so E h = d e - s a and E[h x'] = d f - s c
        of_centred = -inverse * (inverse * (d * f - s * c) + weight * inverse.square() * p)  # of x - m
        constant = -inverse * (d * e - s * a) - of_centred * mean
        of_x = _affine((g, inverse * d), (u_x, -inverse * s), (x, of_centred), constant=constant)
        return of_g, of_x, count * inverse * p, None, None, None, None


def _affine(*terms: tuple[Tensor, Tensor], constant: Tensor) -> Tensor:
    """The sum of maps (B, C, H, W), each times a factor (C,) of its channels, and a constant (C,).

    The sum is taken in the factors' precision, fp32 where the maps are bf16, and returned in the maps'.
    """
    total = constant[:, None, None]
    for values, factor in terms:
        total = torch.addcmul(total, values.to(factor.dtype), factor[:, None, None])
    return total.to(terms[0][0].dtype)


def mean_squares(input: Tensor) -> Tensor:
    """The mean of the squares over the pixels of each channel: (B, C) from maps (B, C, H, W)."""
    found: Tensor = _MeanSquares.apply(input, _to_operands.get())
    return found


class _MeanSquares(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to_operands: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.to_operands = to_operands
        return x.square().mean(dim=(2, 3))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _MeanSquaresBackward.apply(g, *ctx.saved_tensors, ctx.to_operands), None


class _MeanSquaresBackward(Function):
    """(2 / P) g x, with P pixels."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, to_operands: bool) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.to_operands = to_operands
        return x * _per_pixel(g, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        of_g = 2 * (x * u).mean(dim=(2, 3))
        return of_g, u * _per_pixel(g, x) if ctx.to_operands else None, None


def _per_pixel(g: Tensor, x: Tensor) -> Tensor:
    return (g * (2 / (x.shape[2] * x.shape[3])))[:, :, None, None]


def _cast(*tensors: Tensor | None) -> Iterator[Tensor | None]:
    """Casts as autocast does before a convolution, whose backward passes have the same precision."""
    device = next(t.device.type for t in tensors if t is not None)
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (t if t is None or kind is None or t.dtype == torch.float64 else t.to(kind) for t in tensors)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """F.hardsigmoid from relu6: PyTorch differentiates the backward pass of relu6, but not that of F.hardsigmoid."""
    return F.relu6(input + 3) / 6


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """F.hardswish from this hardsigmoid."""
    return input * hardsigmoid(input)


REPLACED: dict[Any, Callable[..., Tensor]] = {
    F.conv2d: convolution,
    F.batch_norm: batch_norm,
    F.hardsigmoid: hardsigmoid,
    F.hardswish: hardswish,
}
