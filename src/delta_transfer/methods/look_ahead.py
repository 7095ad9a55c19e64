"""Look-ahead: tries steps of SGD, undoes them, and differentiates the loss after them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models import Network
from .base import Outputs
from .fast.double_backward import twice_differentiable

Tensors = list[Tensor]
Loss = Callable[[Tensors], Tensor]  # of the parameters theta, a scalar


def forward_with(target: Network, parameters: Mapping[str, Tensor], images: Tensor, precision: str) -> Outputs:
    """What `target` returns for `images` with other values of its parameters, which are given by name.

    BatchNorm's statistics stay as they are. The network is never compiled, so that this can be differentiated twice.
    """
    buffers = {f"traced.{name}": buffer.clone() for name, buffer in target.traced.named_buffers()}
    values = {f"traced.{name}": value for name, value in parameters.items()} | buffers
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    with autocast, sdpa_kernel(SDPBackend.MATH):  # the one attention kernel that can be differentiated twice
        outputs: Outputs = torch.func.functional_call(target, values, (images,))
        return outputs


@dataclass(frozen=True)
class SGD:
    """v <- mu v + d, theta <- theta - lr v, where d = g + wd theta; Nesterov: theta <- theta - lr (d + mu v)."""

    lr: list[float] | list[Tensor]  # of each parameter; tensors are scalars
    momentum: float = 0.0  # mu
    weight_decay: float = 0.0  # wd
    nesterov: bool = False

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, lr: list[Tensor] | None = None) -> "SGD":
        """The next step of `optimizer`, an SGD, for its parameters in their order; `lr` replaces its own."""
        lr = lr or [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
        first = optimizer.param_groups[0]  # groups differ in their learning rate only
        return cls(lr, first["momentum"], first["weight_decay"], first["nesterov"])

    @torch.no_grad()
    def step(self, theta: Tensors, velocity: Tensors, gradient: Tensors) -> tuple[Tensors, Tensors]:
        """theta and v after a step; the arguments stay as they are."""
        decayed = torch._foreach_add(gradient, theta, alpha=self.weight_decay)
        moved = torch._foreach_add(decayed, velocity, alpha=self.momentum)
        direction = torch._foreach_add(decayed, moved, alpha=self.momentum) if self.nesterov else moved
        return list(torch._foreach_sub(theta, torch._foreach_mul(direction, self.lr))), list(moved)

    @torch.no_grad()
    def adjoint(self, of_theta: Tensors, of_velocity: Tensors) -> tuple[Tensors, Tensors, Tensors]:
        """Takes the adjoints a0 of theta and a1 of v back through one step.

        Returns s, the adjoint of the step's gradient g, and a0 and a1 before the step:

        s = a1 - lr a0, a0 <- a0 + wd s, a1 <- mu s. The part of a0 that comes through g(theta) is left out. Nesterov's
        step reaches theta through v and through d.
        """
        through_theta = torch._foreach_mul(of_theta, self.lr)
        reached = torch._foreach_sub(of_velocity, through_theta, alpha=self.momentum if self.nesterov else 1.0)
        of_gradient = torch._foreach_sub(reached, through_theta) if self.nesterov else reached
        before = torch._foreach_add(of_theta, of_gradient, alpha=self.weight_decay)
        return list(of_gradient), list(before), list(torch._foreach_mul(reached, self.momentum))


def meta_gradient(
    inner: Sequence[Loss], outer: Loss, theta: Tensors, velocity: Tensors, phi: Tensors, sgd: SGD
) -> tuple[Tensor, Tensors]:
    """outer(theta_K) after one SGD step on each of the K losses `inner`, and its exact gradient d outer / d phi.

    phi: the variables of the losses `inner` beside theta. The steps begin at `theta` and `velocity`, which stay as they
    are. The gradient begins with a0 = d outer / d theta_K and a1 = 0. For each step, the last first:

        s = a1 - lr a0;  d phi += d(g . s)/d phi;  a0 <- a0 + wd s + d(g . s)/d theta;  a1 <- mu s

    where g is the step's gradient, kept with its graph, so that no forward pass is repeated. This takes K + 1 passes
    forward and backward, and K passes backward through a backward pass. The first step is differentiated with respect
    to phi alone, since nothing before it depends on phi. This is right where phi weighs outputs of layers: no input or
    parameter of a convolution, BatchNorm or `mean_squares` of the first loss may depend on phi.
    """
    steps: list[tuple[Tensors, Tensors]] = []
    for loss in inner:
        theta = leaves(theta)
        with twice_differentiable(to_operands=len(steps) > 0):
            value = loss(theta)
        gradient = list(grad(value, theta, create_graph=True, allow_unused=True, materialize_grads=True))
        steps.append((theta, gradient))
        theta, velocity = sgd.step(theta, velocity, [g.detach() for g in gradient])
    theta = leaves(theta)
    value = outer(theta)
    of_theta = list(grad(value, theta, allow_unused=True, materialize_grads=True))
    of_velocity = [torch.zeros_like(p) for p in theta]
    of_phi = [torch.zeros_like(p) for p in phi]
    while steps:
        theta, gradient = steps.pop()
        of_gradient, of_theta, of_velocity = sgd.adjoint(of_theta, of_velocity)
        to_phi, to_theta = _through(gradient, of_gradient, phi, theta if steps else [])
        torch._foreach_add_(of_phi, to_phi)
        if steps:
            torch._foreach_add_(of_theta, to_theta)
        del gradient  # and with it the step's graph
    return value.detach(), of_phi


def _through(gradient: Tensors, vector: Tensors, phi: Tensors, theta: Tensors) -> tuple[Tensors, Tensors]:
    """d(g . s)/d phi and d(g . s)/d theta."""
    # A constant gradient, such as that of an unused parameter, has no graph.
    curved = [(g, s) for g, s in zip(gradient, vector, strict=True) if g.requires_grad]
    inputs = [*phi, *theta]
    if not curved:
        found = [torch.zeros_like(p) for p in inputs]
    else:
        outputs, vectors = zip(*curved, strict=True)
        found = list(grad(outputs, inputs, vectors, allow_unused=True, materialize_grads=True))
    return found[: len(phi)], found[len(phi) :]


def leaves(tensors: Tensors) -> Tensors:
    """The same values as leaves of a new graph."""
    return [t.detach().requires_grad_(True) for t in tensors]
