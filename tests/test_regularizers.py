"""Each penalty against a naive loop written from the formula, and its gradient."""

import pytest
import torch

from delta_transfer.methods import DELTA, L2, L2FE, L2SP, DELTAWithoutAttention
from delta_transfer.methods.attention import AttentionConfig, attention_weights
from delta_transfer.methods.fast.distances import map_distance, weight_distance
from delta_transfer.models import Network


@pytest.fixture
def double(tiny_source):
    """Frozen source, a target that has moved away from it, and images, in float64."""
    source = tiny_source.double()
    target = source.with_new_head(3, seed=1).requires_grad_(True).train()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in target.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return source, target, torch.randn(2, 3, 4, 4, dtype=torch.float64)


def naive_delta(outputs, source_outputs, taps, weights, normalize=True):
    """1/2 sum_l sum_b sum_c C_l w_lc sum_hw D^2 / (H_l W_l), one number at a time."""
    omega = 0.0
    for tap in taps:
        target_map, source_map = outputs[tap], source_outputs[tap]
        batch, channels, height, width = target_map.shape
        for b in range(batch):
            for c in range(channels):
                squares = 0.0
                for i in range(height):
                    for j in range(width):
                        squares += float(target_map[b, c, i, j] - source_map[b, c, i, j]) ** 2
                area = height * width if normalize else 1
                omega += 0.5 * channels * float(weights[tap][c]) * squares / area
    return omega


def maps_of(target, source, images):
    return target(images), source(images)


def test_a_source_map_of_inference_mode_will_do():
    target_map = torch.randn(2, 3, 4, 4, requires_grad=True)
    with torch.inference_mode():
        source_map = torch.randn(2, 3, 4, 4)
    map_distance(target_map, source_map).backward()
    torch.testing.assert_close(target_map.grad, target_map.detach() - source_map.clone())


def test_delta_equals_the_naive_loop(double):
    source, target, images = double
    importance = {tap: torch.randn(5, dtype=torch.float64) for tap in target.taps}
    weights = {tap: attention_weights(v, 5.0) for tap, v in importance.items()}
    delta = DELTA(alpha=0.3, beta=0.7)
    delta.load_fitted(importance)
    outputs, source_outputs = maps_of(target, source, images)
    terms = delta.penalty(target, outputs, source_outputs)
    expected = 0.3 * naive_delta(outputs, source_outputs, target.taps, weights)
    assert terms["feature_maps"].item() == pytest.approx(expected, rel=1e-12)
    head = sum(float(x) ** 2 for p in target.head_parameters().values() for x in p.flatten())
    assert terms["head"].item() == pytest.approx(0.7 * 0.5 * head, rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_delta_without_attention_equals_the_naive_loop(double, normalize):
    source, target, images = double
    uniform = {tap: torch.full((5,), 1 / 5) for tap in target.taps}
    regularizer = DELTAWithoutAttention(alpha=0.3, normalize=normalize)
    outputs, source_outputs = maps_of(target, source, images)
    terms = regularizer.penalty(target, outputs, source_outputs)
    expected = 0.3 * naive_delta(outputs, source_outputs, target.taps, uniform, normalize)
    assert terms["feature_maps"].item() == pytest.approx(expected, rel=1e-6)


def test_published_small_values():
    """The facts sheet: D = 1 everywhere, B=2, C=3, H=W=2, one layer: 3 for any normalised weights, 12 undivided."""

    class Stub:
        taps = ("a",)

    ones, zeros = {"a": torch.ones(2, 3, 2, 2)}, {"a": torch.zeros(2, 3, 2, 2)}
    delta = DELTA(alpha=1.0, beta=0.0)
    delta.load_fitted({"a": torch.tensor([0.0, 1.0, 2.0])})
    assert delta.penalty(Stub, ones, zeros)["feature_maps"].item() == pytest.approx(3)
    undivided = DELTAWithoutAttention(alpha=1.0, beta=0.0, normalize=False)
    assert undivided.penalty(Stub, ones, zeros)["feature_maps"].item() == pytest.approx(12)


def test_attention_weights_published_values():
    weights = attention_weights(torch.tensor([0.0, 1.0, 2.0]), temperature=5.0)
    assert weights.tolist() == pytest.approx([0.2558, 0.3268, 0.4175], abs=1e-4)
    assert attention_weights(torch.zeros(4), 5.0).tolist() == [0.25] * 4


def test_shuffled_attention_gives_the_same_weights_to_other_channels():
    importance = {"a": torch.arange(8.0), "b": torch.arange(8.0)}

    def weights(shuffle: int | None) -> dict[str, list[float]]:
        delta = DELTA(attention={"shuffle": shuffle})
        delta.load_fitted(importance)
        return {tap: delta.relative_weights(tap).tolist() for tap in importance}

    own, shuffled = weights(None), weights(0)
    assert own["a"] == sorted(own["a"]) == sorted(shuffled["a"]) == sorted(shuffled["b"])
    assert own["a"] != shuffled["a"] != shuffled["b"] and shuffled == weights(0) != weights(1)


@pytest.mark.parametrize("scope", ["all", "conv"])
def test_l2_sp_equals_the_naive_loop(double, scope):
    source, target, images = double
    l2_sp = L2SP(alpha=0.3, beta=0.7, scope=scope)
    l2_sp.setup(source)
    outputs = target(images)
    terms = l2_sp.penalty(target, outputs, None)
    start = dict(source.traced.named_parameters())
    omega = 0.0
    for name, p in target.traced.named_parameters():
        if name.startswith("fc.") or (scope == "conv" and p.dim() != 4):
            continue
        omega += 0.5 * sum(float(x - x0) ** 2 for x, x0 in zip(p.flatten(), start[name].flatten(), strict=True))
    assert terms["weights"].item() == pytest.approx(0.3 * omega, rel=1e-12)


def test_l2_sp_gradient_is_weight_decay_on_the_difference(double):
    source, target, images = double
    l2_sp = L2SP(alpha=0.3, beta=0.0)
    l2_sp.setup(source)
    l2_sp.penalty(target, target(images), None)["weights"].backward()
    start = source.backbone_parameters()
    for name, p in target.backbone_parameters().items():
        torch.testing.assert_close(p.grad, 0.3 * (p - start[name]).detach())
    assert all(p.grad is None for p in target.head_parameters().values())


def test_l2_sp_at_the_starting_point_is_zero_with_zero_gradient(double):
    source, _, images = double
    target = source.with_new_head(3, seed=1).requires_grad_(True)
    l2_sp = L2SP(alpha=0.3, beta=0.0)
    l2_sp.setup(target)
    penalty = l2_sp.penalty(target, target(images), None)["weights"]
    penalty.backward()
    assert penalty.item() == 0
    assert all((p.grad == 0).all() for p in target.backbone_parameters().values())


def fitted_delta(taps):
    delta = DELTA(alpha=0.3, beta=0.7)
    delta.load_fitted({tap: torch.linspace(0, 1, 5, dtype=torch.float64) for tap in taps})
    return delta


@pytest.mark.parametrize(
    "make",
    [
        lambda taps: fitted_delta(taps),
        lambda taps: DELTAWithoutAttention(alpha=0.3, beta=0.7),
        lambda taps: DELTAWithoutAttention(alpha=0.3, beta=0.7, normalize=False),
        lambda taps: L2SP(alpha=0.3, beta=0.7),
        lambda taps: L2SP(alpha=0.3, beta=0.7, scope="conv"),
    ],
)
def test_gradients_by_finite_differences(double, make):
    """gradcheck of the whole penalty as a function of every parameter of the target."""
    source, target, images = double
    target.eval()  # BatchNorm's running statistics must not change between evaluations
    regularizer = make(target.taps)
    regularizer.setup(source)
    source_outputs = source(images)
    parameters = dict(target.traced.named_parameters())

    def total(*values):
        named = dict(zip(parameters, values, strict=True))
        moved = _View(target, named)
        outputs = torch.func.functional_call(target.traced, named, (images,))
        return sum(regularizer.penalty(moved, outputs, source_outputs).values())

    values = [p.detach().clone().requires_grad_(True) for p in parameters.values()]
    assert torch.autograd.gradcheck(total, values)


class _View:
    """A stand-in for a Network with other parameter values."""

    def __init__(self, network: Network, values: dict):
        self.taps = network.taps
        self._head = {n: v for n, v in values.items() if network.is_head(n)}
        self._backbone = {n: v for n, v in values.items() if not network.is_head(n)}

    def head_parameters(self):
        return self._head

    def backbone_parameters(self):
        return self._backbone


def test_feature_map_penalty_reaches_the_target_only(double):
    source, target, images = double
    source.requires_grad_(True)  # even then nothing may flow into it
    fitted_delta(target.taps).penalty(target, target(images), source(images))["feature_maps"].backward()
    assert all(p.grad is None for p in source.parameters())
    assert target.traced.get_parameter("conv2.weight").grad.abs().sum() > 0
    # Nothing behind the last tap is reached.
    assert target.traced.get_parameter("bn2.weight").grad is None
    assert all(p.grad is None for p in target.head_parameters().values())


def test_methods_without_a_penalty_have_none(tiny_source):
    assert L2().penalty(tiny_source, {}, None) == {}
    assert L2FE().penalty(tiny_source, {}, None) == {}
    assert L2FE().weight_decay == L2().weight_decay == 1e-4


def test_delta_without_attention_values_is_refused(double):
    source, target, images = double
    with pytest.raises(RuntimeError, match="fit"):
        DELTA(attention=AttentionConfig()).penalty(target, *maps_of(target, source, images))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weighted", [True, False])
def test_map_distance_and_its_gradient(layout, weighted):
    torch.manual_seed(0)
    target, source = (torch.randn(2, 3, 4, 5).double().contiguous(memory_format=layout) for _ in range(2))
    weights = torch.tensor([0.0, 0.5, 2.0]).double() if weighted else None
    target.requires_grad_(True)
    expected = 0.5 * ((target - source).square() * (weights if weighted else torch.ones(3)).view(-1, 1, 1)).sum()
    torch.testing.assert_close(map_distance(target, source, weights), expected)
    expected_gradient, gradient = (
        torch.autograd.grad(3 * distance, target)[0] for distance in (expected, map_distance(target, source, weights))
    )
    torch.testing.assert_close(gradient, expected_gradient)
    # No distance, no gradient; the square root of 0 in between must not show.
    (gradient,) = torch.autograd.grad(map_distance(target, target.detach(), weights), target)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_map_distance_of_bf16_is_computed_in_fp32():
    target, source = (torch.randn(2, 3, 4, 4).bfloat16() for _ in range(2))
    target.requires_grad_(True)
    distance = map_distance(target, source)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, 0.5 * (target.float() - source.float()).square().sum())
    (gradient,) = torch.autograd.grad(distance, target)
    assert gradient.dtype == torch.bfloat16


def test_map_distance_of_large_maps_is_exact():
    """At this size the norm of the whole map in fp32 would be off by 1e-3."""
    torch.manual_seed(0)
    target = torch.randn(16, 256, 56, 56).contiguous(memory_format=torch.channels_last)
    expected = 0.5 * target.double().square().sum().item()
    assert map_distance(target, torch.zeros_like(target)).item() == pytest.approx(expected, rel=1e-6)


def test_weight_distance_and_its_gradient():
    torch.manual_seed(0)
    parameters = [torch.randn(shape).double().requires_grad_(True) for shape in ((2, 3), (4,))]
    starting_point = [torch.randn_like(p) for p in parameters]
    expected = 0.5 * sum((p - p0).square().sum() for p, p0 in zip(parameters, starting_point, strict=True))
    torch.testing.assert_close(weight_distance(parameters, starting_point), expected)
    assert torch.autograd.gradcheck(lambda *p: 3 * weight_distance(list(p), starting_point), parameters)
