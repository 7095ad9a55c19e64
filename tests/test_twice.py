"""Operations with written-out derivatives of their backward passes: they are PyTorch's."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad, gradcheck, gradgradcheck

from delta_transfer.methods.fast.double_backward import batch_norm, convolution, mean_squares, twice_differentiable

from .conftest import TinyNet, randomise_batchnorm


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def batch_normed(x, weight, bias):
    return batch_norm(x, None, None, weight, bias, training=True)


OPERATIONS = {
    "convolution": (
        lambda *a: convolution(*a, padding=1),
        F.conv2d,
        [(2, 4, 5, 4), (3, 4, 3, 3), (3,)],
        {"padding": 1},
    ),
    "without bias": (convolution, F.conv2d, [(2, 4, 5, 4), (3, 4, 3, 3)], {}),
    "strided groups": (
        lambda *a: convolution(*a, stride=2, padding=(1, 0), groups=2),
        F.conv2d,
        [(2, 4, 6, 5), (6, 2, 3, 3), (6,)],
        {"stride": 2, "padding": (1, 0), "groups": 2},
    ),
    "padding by name": (
        lambda *a: convolution(*a, padding="same"),
        F.conv2d,
        [(2, 4, 5, 4), (3, 4, 3, 3)],
        {"padding": "same"},
    ),
    "BatchNorm": (
        batch_normed,
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        [(3, 4, 3, 2), (4,), (4,)],
        {},
    ),
    "mean squares": (mean_squares, lambda x: x.square().mean(dim=(2, 3)), [(2, 4, 3, 2)], {}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_both_derivatives(name):
    ours, theirs, shapes, options = OPERATIONS[name]
    inputs = [random(*shape) for shape in shapes]
    torch.testing.assert_close(ours(*inputs), theirs(*inputs, **options))
    assert gradcheck(ours, inputs) and gradgradcheck(ours, inputs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_where_not_every_gradient_is_differentiated(name):
    """The gradient of one input, differentiated with respect to all inputs."""
    ours, theirs, shapes, options = OPERATIONS[name]
    for index in range(len(shapes)):
        inputs = [random(*shape) for shape in shapes]
        found = []
        for operation, extra in ((ours, {}), (theirs, options)):
            (gradient,) = grad(operation(*inputs, **extra).sin().sum(), inputs[index], create_graph=True)
            found.append(grad(gradient.square().sum(), inputs, allow_unused=True, materialize_grads=True))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


def loss_of(network: nn.Module, images: torch.Tensor, phi: torch.Tensor) -> torch.Tensor:
    return (phi * mean_squares(network.bn1(network.conv1(images)))).sum() + phi.sum() * network(images).sin().sum()


def test_gradients_alone_are_enough_for_what_weighs_the_loss():
    """Nothing is computed for the parameters, since they would get wrong values."""
    torch.manual_seed(0)
    network, images, phi = TinyNet().double(), random(4, 3, 6, 6).detach(), random(5)
    theta = list(network.parameters())

    def through(mode, *inputs):
        with mode:
            loss = loss_of(network, images, phi)
        gradients = grad(loss, theta, create_graph=True)
        return grad([g.square().sum() for g in gradients], inputs, allow_unused=True)

    expected, whole = through(twice_differentiable(), phi, network.conv1.weight)
    for found, other in zip(through(nullcontext(), phi, network.conv1.weight), (expected, whole), strict=True):
        torch.testing.assert_close(found, other)
    found, of_kernel = through(twice_differentiable(to_operands=False), phi, network.conv1.weight)
    torch.testing.assert_close(found, expected)
    assert of_kernel is None or not torch.allclose(of_kernel, whole)
    with twice_differentiable(to_operands=False):  # it ends with its block, and the one around it goes on
        with twice_differentiable():
            inner = mean_squares(images.requires_grad_())
        outer = mean_squares(images)
    assert inner.grad_fn.to_operands and not outer.grad_fn.to_operands


def test_arguments_by_name_are_pytorchs():
    x, kernel = random(2, 4, 5, 4), random(3, 4, 3, 3)
    with twice_differentiable():
        torch.testing.assert_close(F.conv2d(input=x, weight=kernel, padding=1), torch.conv2d(x, kernel, None, 1, 1))
    with twice_differentiable(), pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm2d(4).double()(random(1, 4, 1, 1))


def test_modules_are_made_of_them():
    torch.manual_seed(0)
    network = TinyNet()
    randomise_batchnorm(network)
    images, before = torch.randn(4, 3, 6, 6), network.bn1.running_mean.clone()
    expected = network.train()(images)
    statistics = network.bn1.running_mean.clone()
    network.bn1.running_mean.copy_(before)
    with twice_differentiable():
        outputs = network(images)
        maps = network.bn1(network.conv1(images))
    torch.testing.assert_close(outputs, expected)
    assert type(maps.grad_fn).__name__ == "_BatchNormBackward"
    assert type(maps.grad_fn.next_functions[0][0]).__name__ == "_ConvolutionBackward"
    assert not torch.equal(statistics, before)
    network.bn1.running_mean.copy_(before)
    with twice_differentiable():
        network.eval()(images)  # which uses the statistics
        network.train()(images)
    torch.testing.assert_close(network.bn1.running_mean, statistics)


def test_batchnorm_of_vectors_and_without_scale_is_pytorchs():
    x, images = random(6, 4), random(3, 4, 2, 2)
    with twice_differentiable():
        outputs = [nn.BatchNorm1d(4).double()(x), nn.BatchNorm2d(4, affine=False).double()(images)]
    for output, values in zip(outputs, (x, images), strict=True):
        assert type(output.grad_fn).__name__ == "NativeBatchNormBackward0"
        (gradient,) = grad(output.sin().sum(), values, create_graph=True)
        assert gradient.square().sum().requires_grad


def test_autocast_reaches_the_convolutions():
    network, images = TinyNet(), torch.randn(4, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = network.conv2(network.conv1(images))
        with twice_differentiable():
            found = network.conv2(network.conv1(images))
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    (gradient,) = grad(found.float().square().sum(), network.conv1.weight, create_graph=True)
    assert gradient.dtype == torch.float32
    (second,) = grad(gradient.square().sum(), network.conv1.weight)
    assert second.isfinite().all()
