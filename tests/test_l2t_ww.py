"""L2T-ww: the gradient through tried steps against recorded values and finite differences; nothing stays of them."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from delta_transfer.common.errors import UserError
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer, set_learning_rate
from delta_transfer.methods import L2TWW, l2t_ww, look_ahead
from delta_transfer.methods.base import Batch
from delta_transfer.methods.l2t_ww import MetaNetwork
from delta_transfer.methods.look_ahead import SGD, meta_gradient
from delta_transfer.methods.matching import Adapters, Pair, choose_pairs
from delta_transfer.models import Network
from delta_transfer.records.checkpoints import read_checkpoint, write_checkpoint

from .conftest import TinyNet, randomise_batchnorm
from .miniature import composed

# --- the gradient through steps of SGD ---


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("steps", "outer", "expected"),
    [
        (1, None, [[0.0450, 0.2697], [-0.0450, 0]]),
        (2, None, [[0.1039, 0.6236], [-0.1039, 0]]),
        (3, None, [[0.1348, 0.8087], [-0.1348, 0]]),
        (10, 0.8456, [[-1.1952, -7.1712], [1.1952, 0.0000]]),  # recorded by the authors
    ],
)
def test_the_authors_recorded_meta_gradient(steps, outer, expected):
    theta = [tensor([1.0, 3.0]), tensor([[-1.0, -2.0], [1.0, 0.0]])]
    phi = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    inner = [lambda t: t[0].square().mean() + (phi * t[1].square()).sum()] * steps
    velocity = [torch.zeros_like(p) for p in theta]
    value, (gradient,) = meta_gradient(
        inner, lambda t: (t[0] * t[1]).mean(), theta, velocity, [phi], SGD([0.1, 0.1], 0.9, 0.01)
    )
    torch.testing.assert_close(gradient, tensor(expected), rtol=0, atol=5e-5)
    if outer is not None:
        assert value.item() == pytest.approx(outer, abs=5e-5)


@pytest.mark.parametrize(
    ("momentum", "decay", "final", "loss", "expected"),
    [
        (0.9, 0.01, [1.535097, -1.582005], 0.034580, [-0.513070, -0.537685]),
        (0.0, 0.0, [1.294019, -1.778638], 0.322184, [-0.299808, -0.336652]),
    ],
)
def test_two_steps_of_matching_and_one_on_the_task(momentum, decay, final, loss, expected):
    phi, ended = tensor([0.5, 0.25]).requires_grad_(), []

    def matching(theta):
        return 0.5 * (phi * (theta[0] - tensor([3.0, 1.0])).square()).sum()

    def task(theta):
        ended[:] = [theta[0].detach()]
        return 0.5 * (theta[0] - tensor([2.0, -1.0])).square().sum() + 0.1 * theta[0].prod()

    theta = [tensor([1.0, -2.0])]
    value, (gradient,) = meta_gradient(
        [matching, matching, task], task, theta, [torch.zeros_like(theta[0])], [phi], SGD([0.1], momentum, decay)
    )
    torch.testing.assert_close(ended[0], tensor(final), rtol=0, atol=5e-7)
    assert value.item() == pytest.approx(loss, abs=5e-7)
    torch.testing.assert_close(gradient, tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_a_tried_step_is_the_optimizers_own(momentum, nesterov):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 0.02), strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov, weight_decay=0.05)
    theta, velocity = [p.detach().clone() for p in parameters], [torch.zeros_like(p) for p in parameters]
    for _ in range(3):
        gradient = [torch.randn_like(p) for p in parameters]
        theta, velocity = SGD.of(optimizer).step(theta, velocity, gradient)
        for parameter, g in zip(parameters, gradient, strict=True):
            parameter.grad = g
        optimizer.step()
    for value, parameter in zip(theta, parameters, strict=True):
        torch.testing.assert_close(value, parameter.detach())


# --- M ---

TAPS = {"conv1": (5, 6, 6), "conv2": (5, 3, 3)}
SOURCE_TAPS = {"a": (4, 6, 6), "b": (3, 5, 5)}


def started(source_shapes=SOURCE_TAPS, target_shapes=TAPS, **options) -> L2TWW:
    torch.manual_seed(1)
    method = L2TWW(**options)
    method.setup(None, target_shapes, source_shapes)
    return method.double()


def maps(shapes, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {tap: torch.rand(2, *shape, dtype=torch.float64, generator=generator) for tap, shape in shapes.items()}


@pytest.mark.parametrize("what", [True, False])
@pytest.mark.parametrize("where", ["relu6", "relu", "relu_mean", "constant", "off"])
def test_matching_equals_the_naive_loop(what, where):
    method, outputs, sources = started(what=what, where=where, alpha=0.5), maps(TAPS, 0), maps(SOURCE_TAPS, 1)
    for parameter in method.meta_networks.parameters():
        nn.init.normal_(parameter, std=0.3)
    total = 0.0
    for m, n in (("a", "conv1"), ("a", "conv2"), ("b", "conv1"), ("b", "conv2")):
        network, matcher = method.meta_networks[f"{m}>{n}"], method.adapters[f"{m}>{n}"]
        size = TAPS[n][1:]
        resized = F.interpolate(sources[m], size, mode="bilinear") if size != SOURCE_TAPS[m][1:] else sources[m]
        channels = SOURCE_TAPS[m][0]
        for b in range(2):
            gap = sources[m][b].mean(dim=(1, 2))
            w = [1 / channels if where == "off" else 1.0] * channels
            if what:
                w = torch.softmax(network.what.weight @ gap + network.what.bias, 0).tolist()
            amount = 1.0
            if where == "constant":
                amount = torch.log1p(torch.exp(10 * network.k)).item()
            elif where != "off":
                score = (network.where.weight @ gap).item() / (channels if where == "relu_mean" else 1)
                amount = max(0.0, score + network.where.bias.item())
                amount = min(amount, 6.0) if where == "relu6" else amount
            for c in range(channels):
                values = matcher.bias[c] + sum(matcher.weight[c, k, 0, 0] * outputs[n][b, k] for k in range(5))
                total += 0.5 * amount * w[c] * (resized[b, c] - values).square().mean().item() / 2
    (term,) = method.penalty(None, outputs, sources).values()
    assert term.item() == pytest.approx(total, rel=1e-10)


def test_both_networks_off_is_feature_matching():
    """A mean over all elements; there is nothing to learn, and no look-ahead."""
    method, outputs, sources = started(pairs="single", what=False, where="off"), maps(TAPS, 0), maps(SOURCE_TAPS, 1)
    matched = method.adapters["a>conv1"](outputs["conv1"])
    expected = 0.5 * F.mse_loss(matched, sources["a"])
    torch.testing.assert_close(method.penalty(None, outputs, sources)["matching"], expected)
    assert method.adam is None and not list(method.meta_networks.parameters())


def test_it_begins_with_equal_channels_and_an_amount_around_1():
    w, amount = MetaNetwork(8, what=True, where="relu6")(torch.zeros(2, 8))
    assert torch.equal(w, torch.full((2, 8), 1 / 8)) and torch.equal(amount, torch.ones(2, 1))
    assert "attention_entropy" not in started(what=False).extra_metrics


def test_a_source_map_of_one_channel_has_an_entropy():
    method = started({"a": (1, 6, 6)}, pairs="single")
    method.penalty(None, maps(TAPS, 0), maps({"a": (1, 6, 6)}, 1))
    assert method.extra_metrics["attention_entropy"].item() == 1


def test_the_kept_step_trains_matchers_but_not_the_meta_networks():
    method, outputs, sources = started(), maps(TAPS, 0), maps(SOURCE_TAPS, 1)
    outputs["conv1"].requires_grad_(True)
    method.penalty(None, outputs, sources)["matching"].backward()
    assert all(p.grad is not None for p in method.adapters.parameters()) and outputs["conv1"].grad.abs().max() > 0
    assert all(p.grad is None for p in method.meta_networks.parameters())
    assert set(method.trained()) == set(method.adapters.parameters())


# The facts sheet's networks: channels and sizes at their taps.
AT_224 = {f"layer{i + 1}": (64 * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)}
RESNET32 = {"4": (16, 32, 32), "9": (32, 16, 16), "14": (64, 8, 8)}
VGG9 = {str(i): (c, 32 // 2**i, 32 // 2**i) for i, c in enumerate((64, 128, 256, 512, 512))}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [(AT_224, AT_224, (1_396_480, 3_856, 925_440)), (RESNET32, VGG9, (27_440, 575, 165_424))],
)
def test_sizes_of_the_published_networks(source, target, expected):
    pairs = choose_pairs("all_to_all", source, target)
    assert len(pairs) == len(source) * len(target)
    networks = [MetaNetwork(source[pair.source][0], what=True, where="relu6") for pair in pairs]

    def count(modules) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    adapters = Adapters(pairs, source, target)
    assert (count(n.what for n in networks), count(n.where for n in networks), count([adapters])) == expected


def test_published_options():
    """The published values are the defaults of the class and of conf/reg; Adam gets those of the meta-networks."""
    config, built = composed("reg=l2t_ww", "source=small_resnet").reg, L2TWW()
    options = {"alpha": 0.5, "weight_decay": 1e-4, "pairs": "all_to_all", "what": True, "where": "relu6"}
    options |= {"inner_steps": 2, "meta_lr": 1e-4, "meta_weight_decay": 1e-4}
    for name, value in options.items():
        assert getattr(config, name) == value and getattr(built, name) == value, name
    method = started(meta_lr=0.02, meta_weight_decay=0.3)
    (group,) = method.adam.param_groups
    assert type(method.adam) is torch.optim.Adam and (group["lr"], group["weight_decay"]) == (0.02, 0.3)
    assert group["params"] == list(method.meta_networks.parameters())


def test_pairs():
    by_size = [Pair("4", "0"), Pair("9", "1"), Pair("14", "2")]
    assert choose_pairs("one_to_one", RESNET32, VGG9) == by_size
    assert choose_pairs("single", RESNET32, VGG9) == by_size[-1:]
    # Of one size each is taken once.
    twice = {"x": (3, 8, 8), "y": (3, 8, 8)}
    assert choose_pairs("one_to_one", twice, twice) == [Pair("x", "x"), Pair("y", "y")]
    with pytest.raises(UserError, match="all_to_all needs no common size"):
        choose_pairs("one_to_one", {"x": (3, 7, 7)}, VGG9)


def test_several_processes_and_other_optimizers_are_refused():
    with pytest.raises(UserError, match="one process"):
        L2TWW().requires(TinyNet(), "sgd", processes=2)
    with pytest.raises(UserError, match="adamw"):
        L2TWW().requires(TinyNet(), "adamw", processes=1)
    L2TWW(meta_lr=0.0).requires(TinyNet(), "adamw", processes=1)  # it does not look ahead
    L2TWW().requires(TinyNet(), "sgd", processes=1)


# --- a step of the method on networks with BatchNorm ---


class Source(nn.Module):
    """Another architecture than TinyNet: other channels and sizes."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean(dim=(2, 3)))


IMAGES, LABELS = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(5)), torch.arange(8) % 4


class Exact(TrainState):
    """In float64 throughout."""

    def task_loss(self, outputs, labels):
        return {"cross_entropy": F.cross_entropy(outputs["logits"], labels)}


def learning(dtype=torch.float32, accumulate=1, nesterov=False, **options) -> tuple[TrainState, L2TWW]:
    """A target after one kept step, so that there is momentum; phi is far from where it begins."""
    torch.manual_seed(0)
    model, other = TinyNet(), Source()
    randomise_batchnorm(model)
    target, source = (Network(network, "fc", ("conv1", "conv2")) for network in (model, other))
    options = {"meta_lr": 0.01, "weight_decay": 0.01} | options
    method = L2TWW(**options)
    method.setup(target, target.map_shapes(8, 6, training=True), source.map_shapes(8, 6, training=False))
    for network in (target, source.freeze(), method):
        network.to(dtype)
    for parameter in method.meta_networks.parameters():
        nn.init.normal_(parameter, mean=0.3, std=0.3)
    schedule = ScheduleConfig(iterations=9, lr=0.1, backbone_lr_factor=0.7)
    optimizer = make_optimizer(target, method, SGDConfig(nesterov=nesterov), schedule)
    set_learning_rate(optimizer, schedule.lr)
    kind = Exact if dtype == torch.float64 else TrainState
    state = kind(target.train(), source, optimizer, "fp32", accumulate=accumulate)
    adam, method.adam = method.adam, None  # the kept step alone
    train_step(state, method, Batch(IMAGES.to(dtype), LABELS))
    method.adam = adam
    return state, method


def step_of(state: TrainState, method: L2TWW) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss terms and extra metrics of a step."""
    return train_step(state, method, Batch(IMAGES, LABELS))[1:]


def seen(state: TrainState, images: torch.Tensor = IMAGES) -> tuple[list[Batch], list[dict[str, torch.Tensor]]]:
    """The micro-batches of a step, and what the source returns for them."""
    micro_batches = Batch(images, LABELS).split(state.accumulate)
    return micro_batches, [state.forward_source(batch.images) for batch in micro_batches]


def found_gradient(state: TrainState, method: L2TWW, monkeypatch) -> tuple[float, torch.Tensor]:
    """The meta loss, and its gradient with respect to all of phi."""
    phi = list(method.meta_networks.parameters())
    taken = []
    monkeypatch.setattr(method.adam, "step", lambda: taken.extend(p.grad.flatten() for p in phi))
    meta_loss = method.meta_step(state, *seen(state, IMAGES.double()))
    return meta_loss.item(), torch.cat(taken)


def tried_for_real(change: torch.Tensor, **options) -> float:
    """The meta loss by the modules and the optimizer themselves, after `change` is added to phi."""
    state, method = learning(torch.float64, **options)
    with torch.no_grad():
        begin = 0
        for p in method.meta_networks.parameters():
            p += change[begin : begin + p.numel()].view_as(p)
            begin += p.numel()
    trained = [p for group in state.optimizer.param_groups for p in group["params"]]

    micro_batches = Batch(IMAGES.double(), LABELS).split(state.accumulate)

    def step(loss_of) -> None:
        for p in trained:  # an unused parameter's gradient is 0: it decays
            p.grad = torch.zeros_like(p)
        for batch in micro_batches:
            (loss_of(batch) / state.accumulate).backward()
        state.optimizer.step()

    def matching(batch):
        outputs, source_outputs = state.forward(batch.images), state.forward_source(batch.images)
        return method.penalty(state.target, outputs, source_outputs)["matching"]

    def task(batch):
        return state.task_loss(state.forward(batch.images), batch.labels)["cross_entropy"]

    for _ in range(method.inner_steps):
        step(matching)
    step(task)
    with torch.no_grad():
        return torch.stack([task(batch) for batch in micro_batches]).mean().item()


def finite_differences(size: int, **options) -> torch.Tensor:
    """Along a few directions, the same in every call."""
    step = 1e-5
    values = []
    for direction in directions(size):
        ahead, behind = (tried_for_real(sign * step * direction, **options) for sign in (1, -1))
        values.append((ahead - behind) / (2 * step))
    return tensor(values)


def directions(size: int) -> torch.Tensor:
    return torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(
    "options",
    [{}, {"nesterov": True}, {"accumulate": 2}, {"inner_steps": 3, "pairs": "single"}, {"where": "off"}],
    ids=str,
)
def test_meta_gradient_is_that_of_finite_differences(options, monkeypatch):
    meta_loss, gradient = found_gradient(*learning(torch.float64, **options), monkeypatch)
    assert meta_loss == pytest.approx(tried_for_real(torch.zeros_like(gradient), **options), rel=1e-12)
    expected = finite_differences(len(gradient), **options)
    assert expected.abs().min() > 1e-5
    torch.testing.assert_close(directions(len(gradient)) @ gradient, expected, rtol=1e-5, atol=1e-9)


def leave_out(term: str, monkeypatch) -> None:
    """Leaves a term out of the reverse pass."""
    adjoint, through = SGD.adjoint, look_ahead._through
    if term == "second order":

        def first_order(gradient, vector, phi, theta):
            return through(gradient, vector, phi, [])[0], [torch.zeros_like(p) for p in theta]

        monkeypatch.setattr(look_ahead, "_through", first_order)
    else:
        monkeypatch.setattr(SGD, "adjoint", lambda sgd, *a: adjoint(dataclasses.replace(sgd, **{term: 0.0}), *a))


@pytest.mark.parametrize("term", ["momentum", "weight_decay", "second order"])
def test_a_reverse_pass_with_a_term_left_out_would_be_noticed(term, monkeypatch):
    state, method = learning(torch.float64)
    leave_out(term, monkeypatch)
    meta_loss, gradient = found_gradient(state, method, monkeypatch)
    monkeypatch.undo()
    assert meta_loss == pytest.approx(tried_for_real(torch.zeros_like(gradient)), rel=1e-12)  # the way there is right
    expected = finite_differences(len(gradient))
    difference = (directions(len(gradient)) @ gradient - expected).abs() / expected.abs()
    assert difference.max() > 1e-3  # the test above asks for 1e-5


def state_of(state: TrainState, method: L2TWW) -> dict:
    parts = state.target.state_dict(), state.optimizer.state_dict(), method.adapters.state_dict()
    return copy.deepcopy(dict(enumerate(parts)))


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_nothing_stays_of_the_tried_steps():
    """Weights, statistics and momentum are bit-identical; phi has moved."""
    state, method = learning()
    before, phi = state_of(state, method), copy.deepcopy(method.meta_networks.state_dict())
    assert "momentum_buffer" in next(iter(before[1]["state"].values()))
    assert any(name.endswith("running_mean") for name in before[0])
    method.meta_step(state, *seen(state))
    assert same(state_of(state, method), before)
    assert all(p.grad is None for p in state.target.parameters())
    moved = method.meta_networks.state_dict()
    assert all(not torch.equal(value, moved[name]) for name, value in phi.items())


def test_without_a_meta_learning_rate_it_is_plain_training_with_fixed_weights():
    """1e-30 moves nothing in fp32, but tries the steps; 0 leaves them out."""
    states = []
    for rate in (1e-30, 0.0):
        state, method = learning(meta_lr=rate)
        assert (method.adam is None) == (rate == 0)
        for _ in range(3):
            step_of(state, method)
        states.append((state_of(state, method), copy.deepcopy(method.meta_networks.state_dict())))
    assert same(*states)


def test_the_amounts_and_the_meta_loss_are_observed():
    state, method = learning()
    terms, metrics = step_of(state, method)
    assert set(terms) == {"cross_entropy", "matching"}
    pairs = {f"attention_{m}>{n}" for m in ("conv1", "conv2") for n in ("conv1", "conv2")}
    assert {name for name in metrics if name.startswith("attention_")} == {
        *pairs,
        "attention_entropy",
        "attention_meta_loss",
    }
    assert all(value.dim() == 0 for value in metrics.values())


def test_it_makes_as_many_passes_as_the_published_scheme(monkeypatch):
    """Five of the target forward and backward, three backward through a backward pass, the first to phi alone."""
    state, method = learning()
    passes = {"forward": 0, "tried": 0, "through": []}
    forward, tried, through = state.forward, l2t_ww.forward_with, look_ahead._through

    def count(name, function, *arguments):
        passes[name] += 1
        return function(*arguments)

    def counted_through(gradient, vector, phi, theta):
        passes["through"].append(len(theta) > 0)
        return through(gradient, vector, phi, theta)

    monkeypatch.setattr(state, "forward", lambda *a: count("forward", forward, *a))
    monkeypatch.setattr(l2t_ww, "forward_with", lambda *a: count("tried", tried, *a))
    monkeypatch.setattr(look_ahead, "_through", counted_through)
    step_of(state, method)
    assert passes == {"forward": 1, "tried": 4, "through": [True, True, False]}


def test_it_goes_on_from_a_checkpoint_bit_for_bit(tmp_path):
    state, method = learning()
    for _ in range(2):
        step_of(state, method)
    path = tmp_path / "last.pt"
    saved = {
        "target": state.target.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "method": method.state_dict(),
    }
    with path.open("wb") as file:
        write_checkpoint(file, saved, "cpu")
    for _ in range(2):
        step_of(state, method)

    def resumed(forget_adam: bool) -> tuple[TrainState, L2TWW]:
        again, its_method = learning()
        saved = read_checkpoint(path, "cpu")
        again.target.load_state_dict(saved["target"])
        again.optimizer.load_state_dict(saved["optimizer"])
        if forget_adam:
            saved["method"]["_extra_state"]["adam"]["state"] = {}
        its_method.load_state_dict(saved["method"])
        for _ in range(2):
            step_of(again, its_method)
        return again, its_method

    again, its_method = resumed(forget_adam=False)
    assert same(state_of(again, its_method), state_of(state, method))
    assert same(its_method.state_dict(), method.state_dict())
    _, forgetful = resumed(forget_adam=True)
    assert not same(dict(forgetful.meta_networks.state_dict()), dict(method.meta_networks.state_dict()))
