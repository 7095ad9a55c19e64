"""LDIFS, SPD, LoRA, BitFit, LN-tune, decoupled L2-SP, normalised maps and every=k: formulas, gradients, steps."""

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn
from torch.autograd import gradcheck

from delta_transfer.common.errors import UserError
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import AdamWConfig, ScheduleConfig, SGDConfig, make_optimizer, set_learning_rate
from delta_transfer.methods import DELTA, L2SP, LDIFS, SPD, BitFit, DELTAWithoutAttention, LNTune, LoRA
from delta_transfer.methods.base import Batch
from delta_transfer.methods.sum import Sum
from delta_transfer.models import Network

TAPPED = SimpleNamespace(taps=("a", "b"), head_parameters=dict)
SHAPES = {"a": (2, 3, 4, 2), "b": (2, 4, 1, 3), "embedding": (2, 5), "logits": (2, 3)}


@pytest.fixture
def tiny_source(tiny_source) -> Network:
    """In double precision, in which formulas are compared."""
    return tiny_source.double()


def outputs(seed: int, zero: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    if zero:
        made["a"][0, :, 0, 0] = 0  # as behind a ReLU
    return made


def naive_unit(feature_map: torch.Tensor) -> torch.Tensor:
    result = feature_map.clone().flatten(2) if feature_map.dim() > 2 else feature_map.clone()[:, :, None]
    for b in range(result.shape[0]):
        for p in range(result.shape[2]):
            norm = sum(result[b, c, p] ** 2 for c in range(result.shape[1])) ** 0.5
            result[b, :, p] = result[b, :, p] / (norm + 1e-10)
    return result


def test_ldifs_equals_the_naive_loop():
    target, source = outputs(0, zero=True), outputs(1)
    layers = []
    for name in ("a", "b", "embedding"):
        squares = (naive_unit(target[name]) - naive_unit(source[name])) ** 2
        layers.append(sum(square.item() for square in squares.flatten()) / squares.numel())
    expected = 3.0 * sum(layers) / 3
    assert LDIFS(alpha=3.0).penalty(TAPPED, target, source)["features"].item() == pytest.approx(expected, rel=1e-12)
    scaled = {name: 7 * value for name, value in target.items()}
    assert LDIFS(alpha=3.0).penalty(TAPPED, scaled, source)["features"].item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("kind", [DELTA, DELTAWithoutAttention])
def test_delta_on_normalised_maps_equals_the_naive_loop_whatever_the_maps_scale(kind):
    target, source = outputs(0, zero=True), outputs(1)
    method = kind(alpha=1.0, beta=0.0, normalize_maps=True)
    weights = {name: [1.0] * SHAPES[name][1] for name in ("a", "b")}
    if kind is DELTA:
        method.load_fitted({name: torch.arange(float(len(of)), dtype=torch.float64) for name, of in weights.items()})
        weights = {name: method.relative_weights(name).tolist() for name in weights}
    expected = 0.0
    for name, of_channels in weights.items():
        squares = (naive_unit(target[name]) - naive_unit(source[name])) ** 2
        layer = sum(weight * squares[:, c].sum().item() for c, weight in enumerate(of_channels))
        expected += 0.5 * layer / squares.shape[2]
    assert method.penalty(TAPPED, target, source)["feature_maps"].item() == pytest.approx(expected, rel=1e-12)
    larger = [{name: 9 * value for name, value in values.items()} for values in (target, source)]
    assert method.penalty(TAPPED, *larger)["feature_maps"].item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("method", [LDIFS(alpha=2.0), DELTAWithoutAttention(alpha=2.0, beta=0.0, normalize_maps=True)])
def test_gradients_by_finite_differences(method):
    target, source = outputs(0), outputs(1)
    names = [name for name in SHAPES if name != "logits"]

    def penalty(*values):
        given = target | dict(zip(names, values, strict=True))
        return sum(method.penalty(TAPPED, given, source).values())

    assert gradcheck(penalty, [target[name].requires_grad_(True) for name in names])


@pytest.mark.parametrize("method", [LDIFS(alpha=2.0), DELTAWithoutAttention(alpha=2.0, beta=0.0, normalize_maps=True)])
def test_a_position_of_zeros_has_a_finite_gradient(method):
    target = {name: value.requires_grad_(True) for name, value in outputs(0, zero=True).items()}
    sum(method.penalty(TAPPED, target, outputs(1)).values()).backward()
    assert target["a"].grad.isfinite().all()


# ---- every=k -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LDIFS, DELTAWithoutAttention])
def test_the_penalty_of_every_kth_step_is_k_times_as_strong_and_the_others_are_0(kind):
    target, source = outputs(0), outputs(1)
    whole = next(iter(kind(alpha=1.0, beta=0.0).penalty(TAPPED, target, source).values()))
    seen = []
    for step in range(7):  # a fresh method in each step: what it does follows from the step alone
        method = kind(alpha=1.0, beta=0.0, every=3)
        method.count_from(step)
        value = next(iter(method.penalty(TAPPED, target, None if method.skips_source else source).values()))
        seen.append((value / whole).item())
    assert seen == pytest.approx([3, 0, 0, 3, 0, 0, 3])
    with pytest.raises(RuntimeError):
        kind(alpha=1.0, every=2).penalty(TAPPED, target, source)


def test_the_source_runs_in_every_kth_step_alone(tiny_source):
    target, source = started(tiny_source), Counting(tiny_source)
    method = DELTAWithoutAttention(alpha=1e-3, every=2)
    state = TrainState(target, source, optimizer_for(target, method), "fp32")
    names, runs = [], []
    for step in range(4):
        method.before_step(state, step, 4, 0)
        _, losses, _ = train_step(state, method, batch())
        names.append(list(losses))
        runs.append(source.calls)
    first = runs[0]  # a CPU takes the batch in several passes
    assert runs == [first, first, 2 * first, 2 * first] and first > 0
    assert names == [names[0]] * 4


def test_a_sum_runs_the_source_whenever_a_term_needs_it(tiny_source):
    often, seldom = DELTAWithoutAttention(alpha=1e-3, every=2), LDIFS(alpha=1.0, every=3)
    method = Sum({"often": often, "seldom": seldom}, weight_decay=0.0)
    skipped = []
    for step in range(6):
        method.before_step(None, step, 6, 0)
        skipped.append(method.skips_source)
    assert skipped == [False, True, False, False, False, True]


# ---- steps ---------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self, network: Network):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, images):
        self.calls += 1
        return self.network(images)


def started(source: Network) -> Network:
    return source.with_new_head(3, seed=0).requires_grad_(True).train()


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return Batch(images, torch.tensor([0, 1, 2, 0, 1, 2]))


def optimizer_for(target, method, config=None, lr: float = 0.1) -> torch.optim.Optimizer:
    optimizer = make_optimizer(target, method, config or SGDConfig(), ScheduleConfig(iterations=1, lr=lr))
    set_learning_rate(optimizer, lr)
    return optimizer


def trained(source: Network, method, config=None, steps: int = 3, lr: float = 0.1) -> Network:
    target = started(source)
    method.setup(target)
    state = TrainState(target, source, optimizer_for(target, method, config, lr), "fp32")
    for step in range(steps):
        method.before_step(state, step, steps, 0)
        train_step(state, method, batch(step))
    return target


def same(a: Network, b: Network, tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(v, b.weights()[n], atol=tolerance) for n, v in a.weights().items())


def test_decoupled_l2_sp_with_sgd_without_momentum_is_the_penalty(tiny_source):
    plain = SGDConfig(momentum=0.0)
    penalty, decay = (trained(tiny_source, L2SP(0.5, 0.0, decoupled=d), plain) for d in (False, True))
    assert same(penalty, decay, 1e-12)
    assert not same(penalty, trained(tiny_source, L2SP(0.0, 0.0), plain))


def test_decoupled_l2_sp_with_adamw_is_its_weight_decay_towards_the_source(tiny_source):
    """With a source of zeros it is AdamW's own weight decay."""
    method, target = L2SP(0.5, 0.0, decoupled=True), started(tiny_source)
    method.setup(target)
    for start in method.places.values():
        start.zero_()
    state = TrainState(target, None, optimizer_for(target, method, AdamWConfig()), "fp32")
    reference = started(tiny_source)
    backbone, head = reference.backbone_parameters().values(), reference.head_parameters().values()
    adamw = torch.optim.AdamW(
        [{"params": list(head), "weight_decay": 0.0}, {"params": list(backbone)}], 0.1, weight_decay=0.5
    )
    for step in range(3):
        method.before_step(state, step, 3, 0)
        train_step(state, method, batch(step))
        images, labels = batch(step).images, batch(step).labels
        nn.functional.cross_entropy(reference(images)["logits"], labels).backward()
        adamw.step()
        adamw.zero_grad()
    assert same(target, reference)
    assert method.penalty(target, {}, None) == {}


def naive_spd(before, after, start, gradient, alpha):
    result = {}
    for name, u in after.items():
        inner = sum((gradient[name] * (before[name] - start[name])).flatten().tolist())
        far, near = (u - start[name]).norm().item(), (before[name] - start[name]).norm().item()
        ratio = min(max((far - near) / far, 0.0), 1.0) if inner > 0 and far > 0 else 0.0
        result[name] = u - alpha * ratio * (u - start[name])
    return result


@pytest.mark.parametrize("config", [SGDConfig(), AdamWConfig()])
def test_spd_projects_what_its_formula_says(config, tiny_source):
    method, target = SPD(alpha=0.7), started(tiny_source)
    method.setup(target)
    state = TrainState(target, None, optimizer_for(target, method, config), "fp32")
    start = {name: p.detach().clone() for name, p in target.backbone_parameters().items()}
    parameters, seen = target.backbone_parameters(), {}
    # These hooks run before and after the method's own: what the step alone does.
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.update(
            before={n: p.detach().clone() for n, p in parameters.items()},
            gradient={n: p.grad.clone() for n, p in parameters.items()},
        )
    )
    state.optimizer.register_step_post_hook(
        lambda *_: seen.update(after={n: p.detach().clone() for n, p in parameters.items()})
    )
    moved = 0
    for step in range(6):
        method.before_step(state, step, 6, 0)
        train_step(state, method, batch(step))
        expected = naive_spd(seen["before"], seen["after"], start, seen["gradient"], 0.7)
        for name, p in parameters.items():
            torch.testing.assert_close(p, expected[name], rtol=0, atol=1e-12)
            moved += not torch.equal(p, seen["after"][name])
    assert moved  # it did something


def test_lora_trains_a_and_b_by_the_gradient_that_its_formula_has(tiny_source):
    """Against autograd through W0 + scale/rank B A in a functional call."""
    method, target = LoRA(rank=2, scale=6.0, layers="all"), started(tiny_source)
    torch.manual_seed(1)
    method.setup(target)
    with torch.no_grad():
        for b in method.b.values():
            b.normal_(std=0.1)
    method.merge()
    a, b = ({k: v.detach().clone().requires_grad_(True) for k, v in of.items()} for of in (method.a, method.b))
    weights = {
        key.replace("/", "."): start + 3.0 * (b[key] @ a[key]).view_as(start)
        for key, start in method.starting_point.items()
    }
    found = torch.func.functional_call(target.traced, weights, (batch().images,))
    nn.functional.cross_entropy(found["logits"], batch().labels).backward()
    buffers = {name: value.clone() for name, value in tiny_source.traced.named_buffers()}
    target.traced.load_state_dict(buffers, strict=False)
    nn.functional.cross_entropy(target(batch().images)["logits"], batch().labels).backward()
    assert len(a) == 2
    for key in a:
        torch.testing.assert_close(method.a[key].grad, a[key].grad, rtol=0, atol=1e-12)
        torch.testing.assert_close(method.b[key].grad, b[key].grad, rtol=0, atol=1e-12)
        assert a[key].grad.abs().max() > 1e-4
        assert method.weights[key].grad is None


def test_lora_leaves_the_rest_and_changes_weights_by_a_low_rank(tiny_source):
    method = LoRA(rank=2)
    target = trained(tiny_source, method, steps=4)
    for name, value in target.backbone_parameters().items():
        change = value - tiny_source.backbone_parameters()[name]
        if name.replace(".", "/") in method.a:
            assert torch.linalg.matrix_rank(change.flatten(1), atol=1e-5) == 2
        else:
            assert not change.any()
    assert set(method.a) == {"conv1/weight", "conv2/weight"}  # no linear layer but the head: convolutions


def test_accumulated_micro_batches_add_up_in_a_and_b(tiny_source):
    frozen = tiny_source.copy().eval()

    def after(accumulate: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        method, target = LoRA(rank=2), frozen.with_new_head(3, seed=0).requires_grad_(True).eval()
        method.setup(target)
        state = TrainState(target, None, optimizer_for(target, method), "fp32", accumulate=accumulate)
        for _ in range(2):
            train_step(state, method, batch())
        return dict(target.weights())

    whole, parts = after(1), after(3)
    assert all(torch.allclose(value, parts[name], atol=1e-5) for name, value in whole.items())


def test_lora_finds_the_linear_layers_of_a_vit():
    with torch.device("meta"):
        vit = torchvision.models.vit_b_16(weights=None)
    backbone = {name: p for name, p in vit.named_parameters() if not name.startswith("heads.")}
    auto, everything = (set(LoRA(layers=layers)._changed(vit, backbone)) for layers in ("auto", "all"))
    assert len(auto) == 12 * 4 and "encoder.layers.encoder_layer_0.self_attention.in_proj_weight" in auto
    assert everything - auto == {"conv_proj.weight"}


@pytest.mark.parametrize(
    ("method", "changed"),
    [(BitFit, {"bn1.bias", "bn2.bias"}), (LNTune, {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"})],
)
def test_partial_tuning_trains_what_it_names_and_the_head(method, changed, tiny_source):
    target = trained(tiny_source, method())
    before = tiny_source.backbone_parameters()
    assert {n for n, p in target.backbone_parameters().items() if not torch.equal(p, before[n])} == changed
    head = tiny_source.with_new_head(3, seed=0).head_parameters()
    assert not any(torch.equal(p, head[name]) for name, p in target.head_parameters().items())


@pytest.mark.parametrize("term", [LoRA(rank=2), BitFit(), SPD()])
def test_they_go_with_penalties_on_features(term, tiny_source):
    method = Sum({"delta": DELTAWithoutAttention(alpha=1e-3), "other": term}, weight_decay=0.0)
    target = trained(tiny_source, method)
    assert not same(target, trained(tiny_source, term))
    if isinstance(term, BitFit):
        assert torch.equal(target.weights()["conv1.weight"], tiny_source.weights()["conv1.weight"])


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("method", [BitFit(), LNTune(), LoRA()])
def test_what_would_do_nothing_is_refused(method):
    with pytest.raises(UserError):
        method.requires(Bare(), "sgd", 1)


def test_changed_steps_are_refused_beside_a_look_ahead():
    from delta_transfer.methods import L2TWW

    for term in (SPD(), LoRA(), L2SP(decoupled=True)):
        with pytest.raises(UserError):
            Sum({"a": L2TWW(), "b": term})
    Sum({"a": L2TWW(), "b": L2SP()})
