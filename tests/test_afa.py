"""AFA's two losses and its attention against naive loops from the formulas, in float64."""

import math

import pytest
import torch
from torch import nn

from delta_transfer.models import Network
from delta_transfer.regularizers import AFAChannel, AFASpatial
from delta_transfer.regularizers.afa import ChannelAttention, SpatialAttention

B, C, H, W = 2, 3, 4, 4
P, N = H * W, 4


class OneTap:
    taps = ("layer1.0",)


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Target's, with a gradient, and source's."""
    torch.manual_seed(0)
    target, source = torch.randn(2, B, C, H, W, dtype=torch.float64)
    return target.requires_grad_(True), source


def started(method, shape=(C, H, W), **options):
    torch.manual_seed(1)
    made = method(alpha=0.3, beta=0.0, **options)
    made.start(OneTap, {"layer1.0": shape})
    return made.double()


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    powers = [math.exp(v - largest) for v in values]
    return [power / sum(powers) for power in powers]


def naive_spatial_attention(module: SpatialAttention, source) -> list[list[float]]:
    first, _, second = module.layers
    weights = []
    for b in range(B):
        mean = [sum(float(source[b, c, p // W, p % W]) for c in range(C)) / C for p in range(P)]
        hidden = [max(0.0, sum(float(first.weight[n, p]) * mean[p] for p in range(P))) for n in range(N)]
        scores = [
            float(second.bias[p]) + sum(float(second.weight[p, n]) * hidden[n] for n in range(N)) for p in range(P)
        ]
        weights.append(softmax(scores))
    return weights


def naive_channel_attention(module: ChannelAttention, source) -> list[list[float]]:
    first, _, second = module.layers
    weights = []
    for b in range(B):
        scores = []
        for c in range(C):
            values = [float(source[b, c, p // W, p % W]) for p in range(P)]
            hidden = [max(0.0, sum(float(first.weight[n, p]) * values[p] for p in range(P))) for n in range(N)]
            scores.append(sum(float(second.weight[0, n]) * hidden[n] for n in range(N)) + float(module.bias[c]))
        weights.append(softmax(scores))
    return weights


def naive_omega(method, attention, target, source) -> tuple[float, torch.Tensor]:
    """Omega, and its gradient with respect to the target's map."""
    omega, gradient = 0.0, torch.zeros(B, C, H, W, dtype=torch.float64)
    for b in range(B):
        for c in range(C):
            for p in range(P):
                difference = float(target[b, c, p // W, p % W] - source[b, c, p // W, p % W])
                weight = (P * attention[b][p]) ** 2 if method is AFASpatial else C * attention[b][c]
                omega += weight * difference**2 / (2 * B)
                gradient[b, c, p // W, p % W] = weight * difference / B
    return omega, gradient


@pytest.mark.parametrize(
    ("method", "naive"), [(AFASpatial, naive_spatial_attention), (AFAChannel, naive_channel_attention)]
)
def test_loss_attention_and_gradient_equal_the_naive_loops(method, naive, maps):
    target, source = maps
    made = started(method)
    source.requires_grad_(True)
    if method is AFAChannel:
        nn.init.normal_(made.modules_by_tap["layer1/0"].bias)
    attention = made.weights("layer1.0", source)
    expected = naive(made.modules_by_tap["layer1/0"].requires_grad_(False), source.detach())
    torch.testing.assert_close(attention, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(B, dtype=torch.float64))
    assert not torch.allclose(attention[0], attention[1])  # of each image its own

    (loss,) = made.penalty(OneTap, {"layer1.0": target}, {"layer1.0": source.detach()}).values()
    omega, gradient = naive_omega(method, expected, target.detach(), source.detach())
    assert loss.item() == pytest.approx(0.3 * omega, rel=1e-12)
    loss.backward()
    torch.testing.assert_close(target.grad, 0.3 * gradient, rtol=1e-12, atol=1e-15)
    assert source.grad is None


@pytest.mark.parametrize("method", [AFASpatial, AFAChannel])
def test_gradient_of_the_modules_is_that_of_finite_differences(method, maps):
    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.method = started(method)

        def forward(self, target, source):
            return self.method.penalty(OneTap, {"layer1.0": target}, {"layer1.0": source})["feature_maps"]

    penalty, inputs = Penalty(), [values.detach() for values in maps]
    parameters = dict(penalty.named_parameters())

    def loss(*values):
        return torch.func.functional_call(penalty, dict(zip(parameters, values, strict=True)), tuple(inputs))

    values = [p.detach().clone().requires_grad_(True) for p in parameters.values()]
    assert torch.autograd.gradcheck(loss, values)
    gradients = torch.autograd.grad(loss(*values), values)
    assert all(g.abs().max() > 0 for g in gradients)
    if method is AFAChannel:  # the softmax does not change when the same is added to all channels
        bias = gradients[[name.endswith("bias") for name in parameters].index(True)]
        assert bias.sum().abs() < 1e-12


@pytest.mark.parametrize(
    ("method", "attention", "expected"),
    [
        (AFASpatial, torch.full((2, 4), 1 / 4), 6),
        (AFASpatial, torch.eye(4)[:2], 24),  # the weight is squared
        (AFAChannel, torch.full((2, 3), 1 / 3), 6),
        (AFAChannel, torch.eye(3)[:2], 6),  # it is not
    ],
)
def test_small_values(method, attention, expected):
    """The facts sheet: D = 1 everywhere, B=2, C=3, H=W=2."""
    assert method.distance(torch.ones(2, 3, 2, 2), attention).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "sums"),
    [(SpatialAttention, [354368, 44688, 5684, 735]), (ChannelAttention, [175928, 22492, 3782, 2398])],
)
def test_sizes_follow_from_the_feature_maps(method, sums):
    """Of ResNet-101 at 224 pixels, as published; a map that is not square has a hidden layer of sqrt(P)."""
    shapes = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert [sum(p.numel() for p in method(*shape).parameters()) for shape in shapes] == sums
    torch.testing.assert_close(method(5, 3, 7)(torch.randn(2, 5, 3, 7)).sum(dim=1), torch.ones(2))


def test_it_is_measured_what_shape_a_map_has(tiny_source):
    assert tiny_source.map_shapes(2, 10, training=True) == {"conv1": (5, 10, 10), "conv2": (5, 10, 10)}
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 2)), "2", ["0"])
    assert network.map_shapes(1, 6, training=False) == {"0": (4, 2, 2)}
