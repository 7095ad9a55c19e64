"""LwF, attention transfer and feature matching against naive loops, in float64, for sources of other architectures."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from delta_transfer.common.errors import UserError
from delta_transfer.methods import AT, FM, L2TWW, LwF
from delta_transfer.methods.matching import Pair, choose_pairs
from delta_transfer.models import Network
from delta_transfer.models.arcface import CosineHead

from .conftest import TinyNet

B = 2
TAPS = {"conv1": (5, 6, 6), "conv2": (5, 3, 3)}
SOURCE_TAPS = {"a": (4, 6, 6), "b": (3, 5, 5), "c": (2, 3, 3)}
# Two sources, as the outputs of several are named; logits are among them.
TWO = {"one/a": (4, 6, 6), "one/b": (2, 3, 3), "one/logits": (7,), "two.5/a": (3, 3, 3), "two.5/logits": (2,)}


class Target:
    """A stand-in with everything that the methods ask of a network. Its head takes 5 features."""

    head = "fc"

    @staticmethod
    def head_parameters() -> dict[str, nn.Parameter]:
        return {"fc.weight": nn.Parameter(torch.zeros(4, 5)), "fc.bias": nn.Parameter(torch.zeros(4))}


def random_outputs(shapes, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(B, *shape, dtype=torch.float64, generator=generator) for key, shape in shapes.items()}


def started(method, source_shapes):
    torch.manual_seed(1)
    method.setup(Target, TAPS, source_shapes)
    return method.double()


def naive_activity(feature_map: torch.Tensor) -> list[float]:
    """q of one image's map (C, H, W)."""
    channels, height, width = feature_map.shape
    means = [
        sum(float(feature_map[c, i, j]) ** 2 for c in range(channels)) / channels
        for i in range(height)
        for j in range(width)
    ]
    norm = math.sqrt(sum(mean**2 for mean in means))
    return [mean / norm for mean in means]


def resized(source_map: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if source_map.shape[2:] == like.shape[2:]:
        return source_map
    return F.interpolate(source_map, like.shape[2:], mode="bilinear")


@pytest.mark.parametrize(
    ("which", "pairs"),
    [
        ("one_to_one", [("a", "conv1"), ("c", "conv2")]),
        ("single", [("c", "conv2")]),
        ("all_to_all", [(m, n) for m in "abc" for n in TAPS]),
    ],
)
def test_attention_transfer_equals_the_naive_loop(which, pairs):
    outputs, sources = random_outputs(TAPS, 0), random_outputs(SOURCE_TAPS, 1)
    total = 0.0
    for m, n in pairs:
        source_map = resized(sources[m], outputs[n])
        for b in range(B):
            q, of_source = naive_activity(outputs[n][b]), naive_activity(source_map[b])
            total += sum((s - t) ** 2 for s, t in zip(of_source, q, strict=True)) / (B * len(q))
    (loss,) = started(AT(alpha=0.3, pairs=which), SOURCE_TAPS).penalty(None, outputs, sources).values()
    assert loss.item() == pytest.approx(0.3 * total, rel=1e-12)


@pytest.mark.parametrize("which", ["one_to_one", "all_to_all"])
def test_feature_matching_equals_the_naive_loop_and_l2t_ww_without_meta_networks(which):
    outputs, sources = random_outputs(TAPS, 0), random_outputs(SOURCE_TAPS, 1)
    method = started(FM(alpha=0.3, pairs=which), SOURCE_TAPS)
    total = 0.0
    for m, n in [("a", "conv1"), ("c", "conv2")] if which == "one_to_one" else [(m, n) for m in "abc" for n in TAPS]:
        source_map, matcher = resized(sources[m], outputs[n]), method.adapters[f"{m}>{n}"]
        squares = 0.0
        for b in range(B):
            for c in range(len(source_map[b])):
                matched = matcher.bias[c] + sum(matcher.weight[c, k, 0, 0] * outputs[n][b, k] for k in range(5))
                squares += (source_map[b, c] - matched).square().sum().item()
        total += squares / source_map.numel()
    (loss,) = method.penalty(None, outputs, sources).values()
    assert loss.item() == pytest.approx(0.3 * total, rel=1e-12)
    without = started(L2TWW(alpha=0.3, pairs=which, what=False, where="off"), SOURCE_TAPS)
    without.adapters.load_state_dict(method.adapters.state_dict())
    torch.testing.assert_close(without.penalty(None, outputs, sources)["matching"], loss)


def test_lwf_equals_the_naive_loop():
    outputs, sources = random_outputs({"embedding": (5,)}, 0), random_outputs(TWO, 1)
    method = started(LwF(alpha=0.3, temperature=2.5), TWO)

    def softmax(logits) -> list[float]:
        powers = [math.exp(z.item() / 2.5) for z in logits]
        return [power / sum(powers) for power in powers]

    total = 0.0
    for key, head, classes in (("one/logits", "one/logits", 7), ("two.5/logits", "two/5/logits", 2)):
        layer = method.heads[head]
        for b in range(B):
            expected = softmax(sources[key][b])
            found = softmax(layer.weight @ outputs["embedding"][b] + layer.bias)
            total += sum(p * math.log(p / q) for p, q in zip(expected, found, strict=True)) / (B * classes)
    (loss,) = method.penalty(None, outputs, sources).values()
    assert loss.item() == pytest.approx(2 * 0.3 * 2.5**2 * total, rel=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AT(alpha=2.0, pairs="all_to_all"),
        lambda: FM(alpha=2.0, pairs="all_to_all"),
        lambda: LwF(alpha=2.0, temperature=3.0),
    ],
    ids=["at", "fm", "lwf"],
)
def test_gradients_by_finite_differences_reach_target_and_own_modules_alone(make):
    method, sources = started(make(), TWO), random_outputs(TWO, 1)
    names = ["embedding"] if isinstance(method, LwF) else list(TAPS)
    values = random_outputs(TAPS | {"embedding": (5,)}, 0)
    inputs = [values[name].requires_grad_(True) for name in names]
    own = dict(method.named_parameters())
    assert set(method.trained()) == set(own.values()) and bool(own) != isinstance(method, AT)

    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.method = method

        def forward(self, *outputs):
            (loss,) = self.method.penalty(None, dict(zip(names, outputs, strict=True)), sources).values()
            return loss

    def penalty(*tensors):
        outputs, parameters = tensors[: len(names)], tensors[len(names) :]
        named = {f"method.{name}": value for name, value in zip(own, parameters, strict=True)}
        return torch.func.functional_call(Penalty(), named, outputs)

    parameters = [p.detach().clone().requires_grad_(True) for p in own.values()]
    assert torch.autograd.gradcheck(penalty, (*inputs, *parameters))
    for value in sources.values():
        value.requires_grad_(True)
    penalty(*inputs, *parameters).backward()
    assert all(value.grad is None for value in sources.values())


def test_pairs_of_several_sources_are_chosen_for_each():
    assert choose_pairs("one_to_one", TWO, TAPS) == [
        Pair("one/a", "conv1"),
        Pair("one/b", "conv2"),
        Pair("two.5/a", "conv2"),
    ]
    assert choose_pairs("single", TWO, TAPS) == [Pair("one/b", "conv2"), Pair("two.5/a", "conv2")]
    assert len(choose_pairs("all_to_all", TWO, TAPS)) == 6
    with pytest.raises(UserError, match=r"in source two \(7 x 7\)"):
        choose_pairs("one_to_one", TWO | {"two/a": (3, 7, 7)}, TAPS)


def test_l2t_ww_has_meta_networks_for_each_source():
    method = started(L2TWW(pairs="one_to_one"), TWO)
    assert set(method.meta_networks) == {"one/a>conv1", "one/b>conv2", "two/5/a>conv2"} == set(method.adapters)
    (loss,) = method.penalty(None, random_outputs(TAPS, 0), random_outputs(TWO, 1)).values()
    assert loss.isfinite()


def test_lwf_has_to_know_how_many_classes_the_source_has():
    with pytest.raises(ValueError, match="source_shapes"):
        LwF().setup(Target, TAPS)


@pytest.mark.parametrize("head", [nn.Linear, CosineHead])
@pytest.mark.parametrize("training", [True, False])
def test_the_embedding_is_the_heads_input(head, training):
    torch.manual_seed(0)
    model = TinyNet()
    model.fc = head(5, 4)
    network = Network(model, "fc", ("conv2",)).train(training)
    assert network.classes == 4
    outputs = network(torch.randn(3, 3, 6, 6))
    assert outputs["embedding"].shape == (3, 5)
    torch.testing.assert_close(model.fc(outputs["embedding"]), outputs["logits"])
    outputs["embedding"].sum().backward()
    assert model.conv1.weight.grad is not None
