"""AFA's two losses and its attention against naive loops from the formulas, in float64."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from delta_transfer.data.loader import Loader
from delta_transfer.experiment import experiment
from delta_transfer.methods import AFA, AFAChannel, AFASpatial
from delta_transfer.methods.afa import ChannelAttention, LearnedAttention, SpatialAttention
from delta_transfer.models import Network

from .miniature import delta_run, tiny_overrides, write_cub

B, C, H, W = 2, 3, 4, 4
P, N = H * W, 4


class OneTap:
    taps = ("layer1.0",)


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """The target's map, with a gradient, and the source's."""
    torch.manual_seed(0)
    target, source = torch.randn(2, B, C, H, W, dtype=torch.float64)
    return target.requires_grad_(True), source


def started(method, shape=(C, H, W), **options):
    torch.manual_seed(1)
    made = method(alpha=0.3, beta=0.0, **options)
    made.setup(OneTap, {"layer1.0": shape})
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


@pytest.mark.parametrize("method", [AFASpatial, AFAChannel])
def test_what_attention_does_is_observed(method, maps, monkeypatch):
    """Mass on one position or channel: entropy 0; there the maps agree, so that nothing is left of Omega."""
    target, source = (m.detach().clone() for m in maps)
    places = P if method is AFASpatial else C
    one = torch.zeros(B, places, dtype=torch.float64)
    one[:, 0] = 1
    made = started(method)
    monkeypatch.setattr(made, "weights", lambda tap, source_map: one)
    flat = (target.flatten(2), source.flatten(2))
    where = (slice(None), slice(None), 0) if method is AFASpatial else (slice(None), 0)
    flat[0][where] = flat[1][where]
    terms = made.penalty(OneTap, {"layer1.0": target}, {"layer1.0": source})
    assert made.extra_metrics["attention_entropy"].item() == 0 and terms["feature_maps"].item() == 0
    uniform = 0.3 / (2 * B) * (target - source).square().sum().item()
    assert made.extra_metrics["attention_uniform"].item() == pytest.approx(uniform)
    monkeypatch.setattr(made, "weights", lambda tap, source_map: torch.full_like(one, 1 / places))
    terms = made.penalty(OneTap, {"layer1.0": target}, {"layer1.0": source})
    assert made.extra_metrics["attention_entropy"].item() == pytest.approx(1)
    assert made.extra_metrics["attention_uniform"].item() == pytest.approx(terms["feature_maps"].item()) != 0


@pytest.mark.parametrize("method", [AFASpatial, AFAChannel])
def test_a_map_of_one_position_or_channel_has_a_penalty_and_an_entropy(method):
    """Maps of one position, as a ResNet's last maps for images of 32 pixels, leave nothing to attend to."""
    target, source = torch.randn(2, B, 1, 1, 1, dtype=torch.float64)
    made = started(method, (1, 1, 1))
    terms = made.penalty(OneTap, {"layer1.0": target}, {"layer1.0": source})
    assert terms["feature_maps"].item() == pytest.approx(0.3 / (2 * B) * (target - source).square().sum().item())
    assert made.extra_metrics["attention_entropy"].item() == 1


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
    assert method.distance(method.squares(torch.ones(2, 3, 2, 2)), attention).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("method", "sums"),
    [(SpatialAttention, [354368, 44688, 5684, 735]), (ChannelAttention, [175928, 22492, 3782, 2398])],
)
def test_sizes_follow_from_the_feature_maps(method, sums):
    """Sizes for ResNet-101 at 224 pixels, as published; a map that is not square has a hidden layer of sqrt(P)."""
    shapes = [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert [sum(p.numel() for p in method(*shape).parameters()) for shape in shapes] == sums
    torch.testing.assert_close(method(5, 3, 7)(torch.randn(2, 5, 3, 7)).sum(dim=1), torch.ones(2))


def test_it_is_measured_what_shape_a_map_has(tiny_source):
    assert tiny_source.map_shapes(2, 10, training=True) == {"conv1": (5, 10, 10), "conv2": (5, 10, 10)}
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(16, 2)), "2", ["0"])
    assert network.map_shapes(1, 6, training=False) == {"0": (4, 2, 2)}


# --- both stages as one run ---


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB_200_2011")


def weights_of(network) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.weights().items()}


@pytest.mark.parametrize("alignment_target", ["previous", "source"])
def test_the_channel_stage_goes_on_from_the_spatial_one(alignment_target, cub_root, tmp_path, monkeypatch):
    found, whole = [], experiment.train

    def spy(state, method, loader, *arguments, **options):
        images, _ = loader.train_batch(np.arange(18), 0)
        maps = {name: values.clone() for name, values in state.forward_source(images).items()}
        seen = {"method": type(method), "images": images, "maps": maps, "before": weights_of(state.target)}
        frozen = {name: value.clone() for name, value in state.source.state_dict().items()}
        source = state.source
        seen["source"] = lambda: all(torch.equal(v, frozen[name]) for name, v in source.state_dict().items())
        seconds = whole(state, method, loader, *arguments, **options)
        found.append(seen | {"after": weights_of(state.target), "target": state.target})
        return seconds

    monkeypatch.setattr(experiment, "train", spy)
    overrides = [
        *tiny_overrides(cub_root, tmp_path),
        "reg=afa",
        f"reg.alignment_target={alignment_target}",
        "schedule.lr=0.02",
    ]
    assert delta_run(monkeypatch, *overrides) == 0
    spatial, channel = found
    assert (spatial["method"], channel["method"]) == (AFASpatial, AFAChannel)
    # Head and BatchNorm's statistics too, bit for bit; and each stage moves what it trains.
    assert all(torch.equal(value, spatial["after"][name]) for name, value in channel["before"].items())
    assert not torch.equal(channel["after"]["conv1.weight"], channel["before"]["conv1.weight"])
    assert spatial["maps"].keys() == channel["maps"].keys()
    assert all(stage["source"]() for stage in found)  # what is frozen has not moved

    spatial["target"].traced.load_state_dict(spatial["after"])
    with torch.no_grad():
        left_by_spatial = spatial["target"].eval()(channel["images"])
    expected = left_by_spatial if alignment_target == "previous" else spatial["maps"]
    for tap, values in channel["maps"].items():
        torch.testing.assert_close(values, expected[tap], rtol=1e-4, atol=1e-5)

    (path,) = tmp_path.glob("runs/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["iterations"] == 6
    assert [stage["method"] for stage in summary["stages"]] == ["AFASpatial", "AFAChannel"]
    lines = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in lines] == pytest.approx([0.02, 0.02, 0.002, 0.002, 0.002, 0.0002])
    assert [line["stage"] for line in lines] == [1, 1, 1, 2, 2, 2]
    for line in lines:  # what is observed of the attention is no part of the loss
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["feature_maps"] + line["head"])
        assert 0 < line["attention_entropy"] < 1 and line["attention_uniform"] > 0
    for stage, line in zip(summary["stages"], (lines[2], lines[5]), strict=True):
        assert stage["iterations"] == 3 and stage["test_top1"] == line["test_top1"]
    assert summary["test_top1"] == lines[-1]["test_top1"]


def test_in_bf16_attention_and_penalties_of_both_stages_have_full_precision(cub_root, tmp_path, monkeypatch):
    seen, attend, penalise = [], LearnedAttention.weights, LearnedAttention.penalty

    def weights(method, tap, source_map):
        made = attend(method, tap, source_map)
        assert made.dtype == torch.float32
        torch.testing.assert_close(made.sum(dim=1), torch.ones(len(made)))
        return made

    def penalty(method, target, outputs, source_outputs):
        terms = penalise(method, target, outputs, source_outputs)
        maps = {maps[tap].dtype for maps in (outputs, source_outputs) for tap in target.taps}
        seen.append((type(method), maps, {term.dtype for term in terms.values()}))
        return terms

    monkeypatch.setattr(LearnedAttention, "weights", weights)
    monkeypatch.setattr(LearnedAttention, "penalty", penalty)
    lines = {}
    for precision in ("bf16", "fp32"):
        tiny = [*tiny_overrides(cub_root, tmp_path / precision), "schedule.lr=1e-4"]
        assert delta_run(monkeypatch, *tiny, "reg=afa", f"precision={precision}") == 0
        (path,) = tmp_path.glob(f"{precision}/runs/*/metrics.jsonl")
        lines[precision] = [json.loads(line) for line in path.read_text().splitlines()]
    half = seen[:6]
    assert [method for method, _, _ in half] == 3 * [AFASpatial] + 3 * [AFAChannel]
    assert all(maps == {torch.bfloat16} and terms == {torch.float32} for _, maps, terms in half)
    for one, other in zip(lines["bf16"], lines["fp32"], strict=True):
        assert one["attention_uniform"] == pytest.approx(other["attention_uniform"], rel=0.05)
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)


def test_both_stages_see_the_batches_that_a_run_of_both_lengths_sees(cub_root, tmp_path, monkeypatch):
    seen, whole = [], Loader.train_batch
    monkeypatch.setattr(Loader, "train_batch", lambda *a: seen.append(a[2]) or whole(*a))
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), "reg=afa") == 0
    assert seen == [0, 1, 2, 3, 4, 5]


def test_modules_of_the_two_stages_do_not_begin_alike(cub_root, tmp_path, monkeypatch):
    begun, whole = [], experiment.make_optimizer

    def spy(target, method, *options):
        attention = next(iter(method.modules_by_tap.values()))
        begun.append(attention.layers[0].weight.detach().clone())  # A1, of the same shape in both
        optimizer = whole(target, method, *options)
        assert set(optimizer.param_groups[-1]["params"]) == set(method.parameters())  # a group of their own
        return optimizer

    monkeypatch.setattr(experiment, "make_optimizer", spy)
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), "reg=afa") == 0
    spatial, channel = begun
    assert spatial.shape == channel.shape and not torch.equal(spatial, channel)


@pytest.mark.parametrize("method", [AFASpatial, AFAChannel])
def test_maps_need_not_be_square_but_as_large_as_the_modules_are_for(method, maps):
    wide = started(method, (C, 2, 8))
    target, source = (m.reshape(B, C, 2, 8) for m in maps)
    assert wide.penalty(OneTap, {"layer1.0": target}, {"layer1.0": source})["feature_maps"] > 0
    larger = torch.zeros(B, C, 5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="layer1.0 is for maps of 16 positions; this one has 25"):
        wide.penalty(OneTap, {"layer1.0": larger}, {"layer1.0": larger})


def test_in_a_loop_of_ones_own_the_stages_are_used(tiny_source):
    with pytest.raises(RuntimeError, match="AFASpatial, then AFAChannel"):
        AFA().penalty(tiny_source, {}, {})
