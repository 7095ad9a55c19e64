"""Methods that came after DELTA, against values that are computed by hand."""

import copy
import functools
import math
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from delta_transfer.common.errors import UserError
from delta_transfer.common.options import OptionError
from delta_transfer.data.loader import Loader
from delta_transfer.engine.loop import TrainState, train_step
from delta_transfer.engine.optimizers import ScheduleConfig, SGDConfig, make_optimizer
from delta_transfer.methods import BSS, L2SP, LPFT, RIFLE, BiTuning, CoTuning, L2SPFisher, StochNorm, Sum
from delta_transfer.methods.base import Batch
from delta_transfer.methods.l2_sp_fisher import FisherConfig
from delta_transfer.methods.lp_ft import ProbeConfig, held_out, logistic_regression
from delta_transfer.methods.stochnorm import StochasticBatchNorm
from delta_transfer.models import Network
from delta_transfer.models.batchnorm import replace_batchnorm

from .conftest import randomise_batchnorm
from .miniature import composed, delta_run, tiny_overrides, write_cub

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


# --- BSS ---


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
@pytest.mark.parametrize("k", [1, 3])
def test_bss_is_the_smallest_squared_singular_values_and_their_gradient(shape, k):
    """From the decomposition by hand: eigenvalues of h'h are sigma^2, and d sigma^2 / dh = 2 sigma u v'."""
    embedding = random(*shape).requires_grad_(True)
    (term,) = BSS(alpha=0.3, k=k).penalty(None, {"embedding": embedding}, None).values()
    h = embedding.detach()
    squares, vectors = torch.linalg.eigh(h @ h.T if shape[0] < shape[1] else h.T @ h)  # ascending
    assert term.item() == pytest.approx(0.3 * squares[:k].sum().item(), rel=1e-10)
    term.backward()
    kept = vectors[:, :k] @ vectors[:, :k].T  # u u' or v v'; and sigma u v' = u u' h = h v v'
    expected = 0.6 * (kept @ h if shape[0] < shape[1] else h @ kept)
    torch.testing.assert_close(embedding.grad, expected, rtol=1e-9, atol=1e-12)


def test_bss_of_fewer_singular_values_than_k_takes_all():
    h = random(2, 5)
    (term,) = BSS(alpha=1.0, k=7).penalty(None, {"embedding": h}, None).values()
    assert term.item() == pytest.approx(h.square().sum().item())


def test_bss_of_two_equal_images_has_a_finite_gradient():
    h = torch.ones(2, 3, dtype=DOUBLE, requires_grad=True)
    (term,) = BSS(alpha=1.0).penalty(None, {"embedding": h}, None).values()
    term.backward()
    assert term.item() == pytest.approx(0) and h.grad.isfinite().all()


# --- L2-SP-Fisher ---


def moved_from(source: Network) -> Network:
    """A target in float64 that has left its starting point."""
    target = source.with_new_head(3, seed=1).requires_grad_(True)
    with torch.no_grad():
        for number, p in enumerate(target.parameters()):
            p.add_(0.1 * random(*p.shape, seed=number))
    return target


def test_with_information_of_1_it_is_l2_sp_on_convolution_kernels(tiny_source):
    source = tiny_source.double()
    kernels = {name: p for name, p in source.backbone_parameters().items() if p.dim() == 4}
    fisher, plain = L2SPFisher(alpha=0.3, beta=0.7), L2SP(alpha=0.3, beta=0.7, scope="conv")
    fisher.load_fitted({name: torch.ones_like(p) for name, p in kernels.items()})
    found = []
    for method in (fisher, plain):
        method.setup(source)
        target = moved_from(source)
        terms = method.penalty(target, {}, None)
        sum(terms.values()).backward()
        found.append((terms, {name: p.grad for name, p in target.traced.named_parameters()}))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", ["add", "min"])
def test_each_entry_has_its_own_weight(form, tiny_source):
    source = tiny_source.double()
    kernels = {name: p for name, p in source.backbone_parameters().items() if p.dim() == 4}
    information = {name: random(*p.shape, seed=9).square() for name, p in kernels.items()}
    method = L2SPFisher(alpha=0.3, beta=0.0, form=form, eps=0.5)
    method.load_fitted(information)
    method.setup(source)
    target = moved_from(source)
    (term,) = method.penalty(target, {}, None).values()
    term.backward()
    omega = 0.0
    for name, start in kernels.items():
        p, f = target.backbone_parameters()[name], information[name]
        weight = f + 0.5 if form == "add" else f.clamp(max=0.5)
        torch.testing.assert_close(p.grad, 0.3 * weight * (p - start).detach())
        omega += 0.5 * (weight * (p - start).square()).sum().item()
    assert term.item() == pytest.approx(0.3 * omega, rel=1e-10)


def test_the_information_is_the_mean_square_of_each_images_gradient():
    """A convolution of 1 x 1 on one pixel: p(y | x) = softmax(V W x), d log p(y) / dW = V'(e_y - p) x'."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Flatten(), nn.Linear(2, 4, bias=False)).double()
    source = Network(model, head="2").freeze()
    images = random(5, 3, 1, 1)
    method = L2SPFisher(fisher=FisherConfig(images=5, seed=3))
    found = method.fit(source, [(images, torch.zeros(5))], num_classes=3)["0.weight"]
    generator, expected = torch.Generator().manual_seed(3), torch.zeros(2, 3, dtype=DOUBLE)
    for x in images[:, :, 0, 0]:
        p = (model[2].weight @ model[0].weight[:, :, 0, 0] @ x).softmax(dim=0)
        drawn = nn.functional.one_hot(torch.multinomial(p, 1, generator=generator)[0], 4)
        expected += torch.outer(model[2].weight.T @ (drawn - p), x).square() / 5
    torch.testing.assert_close(found[:, :, 0, 0], expected)


def test_the_information_is_of_the_network_in_evaluation_mode(tiny_source):
    source = tiny_source.double()
    images, generator, expected = random(2, 3, 4, 4), torch.Generator().manual_seed(3), 0.0
    found = L2SPFisher(fisher=FisherConfig(images=2, seed=3)).fit(source, [(images, torch.zeros(2))], num_classes=3)
    model = source.copy().model.eval().requires_grad_(True)
    for image in images:
        logarithms = model(image[None])[0].log_softmax(dim=0)
        label = torch.multinomial(logarithms.detach().exp(), 1, generator=generator).item()
        expected += torch.autograd.grad(logarithms[label], model.conv2.weight)[0].square() / 2
    torch.testing.assert_close(found["conv2.weight"], expected)


def test_information_needs_as_many_images_as_are_asked_for_over_several_passes(tiny_source):
    source = tiny_source.double()
    batches = [(random(3, 3, 4, 4), torch.zeros(3)), (random(3, 3, 4, 4, seed=1), torch.zeros(3))]
    few, more = (L2SPFisher(fisher=FisherConfig(images=n)).fit(source, batches, 2) for n in (4, 8))
    assert few.keys() == {"conv1.weight", "conv2.weight"}
    assert all((few[name] != more[name]).any() and (more[name] >= 0).all() for name in few)


# --- Co-Tuning ---


def test_the_relationship_is_the_mean_source_softmax_of_each_class(tiny_source):
    source = tiny_source.double()
    images, labels = random(5, 3, 4, 4), torch.tensor([0, 2, 0, 2, 2])
    method = CoTuning()
    fitted = method.fit(source, [(images[:3], labels[:3]), (images[3:], labels[3:])], num_classes=4)
    found = fitted["relationship"]
    expected = torch.zeros(4, 4, dtype=DOUBLE)
    for image, label in zip(images, labels, strict=True):
        logits = source(image[None])["logits"][0].tolist()
        powers = [math.exp(value) for value in logits]
        expected[label] += torch.tensor([power / sum(powers) for power in powers], dtype=DOUBLE)
    expected /= torch.tensor([2, 1, 3, 1])[:, None]  # classes 1 and 3 have no images
    torch.testing.assert_close(found, expected)
    assert (found.sum(dim=1)[[0, 2]] - 1).abs().max() < 1e-12 and (found[[1, 3]] == 0).all()


def test_co_tuning_is_the_cross_entropy_of_the_sources_head_against_the_relationship(tiny_source):
    source = tiny_source.double()
    method = CoTuning(alpha=0.3)
    method.fit(source, [(random(6, 3, 4, 4), torch.arange(6) % 3)], num_classes=3)
    method.setup(source.with_new_head(3, seed=1))
    embedding, labels = random(4, 5, seed=2).requires_grad_(True), torch.tensor([1, 0, 2, 1])
    (term,) = method.penalty(None, {"embedding": embedding, "labels": labels}, None).values()
    head, omega = source.head_parameters(), 0.0
    for h, label in zip(embedding.detach(), labels, strict=True):
        logits = (head["fc.weight"] @ h + head["fc.bias"]).tolist()
        total = math.log(sum(math.exp(value) for value in logits))
        row = method.fitted["relationship"][label].tolist()
        omega -= sum(r * (value - total) for r, value in zip(row, logits, strict=True)) / 4
    assert term.item() == pytest.approx(0.3 * omega, rel=1e-10)
    term.backward()
    assert embedding.grad.abs().min() > 0 and all(p.grad.abs().max() > 0 for p in method.trained())


def test_the_sources_head_is_trained_at_the_backbones_rate(tiny_source):
    method = CoTuning()
    method.fit(tiny_source, [(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))], num_classes=2)
    target = tiny_source.with_new_head(2, seed=1).requires_grad_(True)
    method.setup(target)
    optimizer = make_optimizer(target, method, SGDConfig(), ScheduleConfig(iterations=1, backbone_lr_factor=0.1))
    factors = {p: group["lr_factor"] for group in optimizer.param_groups for p in group["params"]}
    assert {factors[p] for p in method.parameters()} == {0.1} == {factors[target.traced.conv1.weight]}
    assert factors[target.traced.fc.weight] == 1 and len(factors) == len([*target.parameters()]) + 2


# --- LP-FT ---


def test_the_probe_is_at_the_minimum_of_its_loss():
    features, labels = random(30, 4), torch.arange(30) % 3
    weight, bias = logistic_regression(features, labels, 3, c=0.7, iterations=200)
    error = (features @ weight.T + bias).softmax(dim=1) - nn.functional.one_hot(labels, 3)
    gradient = 0.7 * error.T @ features + weight  # of c * sum CE + 1/2 ||W||^2, by hand
    assert gradient.abs().max() < 1e-4 and error.sum(dim=0).abs().max() < 1e-4 and weight.abs().max() > 0.1


def test_lp_ft_starts_from_the_probe_of_the_frozen_features(tiny_source):
    """The features are standardised while it is fitted; the head makes the same of those that are not."""
    source = tiny_source.double()
    images, labels = random(20, 3, 4, 4), torch.arange(20) % 2
    method = LPFT(probe=ProbeConfig(c=0.5))
    method.fit(source, [(images[:15], labels[:15]), (images[15:], labels[15:])], num_classes=2)
    target = source.with_new_head(2, seed=1).requires_grad_(True)
    method.setup(target)
    features = source(images)["embedding"]
    standard = (features - features.mean()) / features.std(correction=0)
    weight, bias = logistic_regression(standard, labels, 2, c=0.5, iterations=200)
    torch.testing.assert_close(target.eval()(images)["logits"], standard @ weight.T + bias)


def test_c_is_chosen_on_held_out_images_one_in_five_of_each_class():
    labels = torch.tensor([0] * 11 + [1] * 2 + [2])
    held = held_out(labels, seed=0)
    assert [int(held[labels == label].sum()) for label in range(3)] == [3, 1, 0]
    assert held.equal(held_out(labels, seed=0)) and not held.equal(held_out(labels, seed=1))
    # What tells the classes apart is beside noise that a strong fit to few images follows.
    method = LPFT(probe=ProbeConfig(choices=10))
    labels = torch.arange(60) % 2
    features = random(60, 40)
    features[:, 0] += 2 * labels
    chosen, accuracy = method._choose(features, labels, 2)
    held, found = held_out(labels, 0), []
    for c in torch.logspace(-7, 2, 10, dtype=DOUBLE).tolist():
        head = logistic_regression(features[~held], labels[~held], 2, c, 200)
        found.append((nn.functional.linear(features[held], *head).argmax(1) == labels[held]).double().mean().item())
    assert accuracy == pytest.approx(100 * max(found), abs=9) and 1e-7 <= chosen <= 1e2


def test_of_equally_good_c_the_smallest_is_chosen():
    labels = torch.arange(20) % 2
    features = torch.stack([2.0 * labels - 1, 1 - 2.0 * labels], dim=1)  # any c tells them apart
    assert LPFT(probe=ProbeConfig(choices=4))._choose(features, labels, 2) == (pytest.approx(1e-7), 100)


def test_c_is_judged_on_images_that_the_fit_has_not_seen():
    """Random labels, and more features than images, so that the probe knows its training images by heart."""
    labels = torch.arange(60) % 2
    _, accuracy = LPFT(probe=ProbeConfig(choices=4))._choose(random(60, 400), labels, 2)
    assert accuracy < 90


def test_without_an_image_to_hold_out_c_has_to_be_set(tiny_source):
    batches = [(torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))]
    with pytest.raises(UserError, match=r"reg\.probe\.c=null is chosen on held-out images"):
        LPFT().fit(tiny_source, batches, num_classes=2)


@pytest.mark.parametrize("fixed", [True, False])
def test_batchnorms_statistics_stay_if_they_are_fixed(fixed, tiny_source):
    method = LPFT(fixed_statistics=fixed)
    method.load_fitted({"weight": torch.zeros(2, 5), "bias": torch.zeros(2)})
    target = tiny_source.with_new_head(2, seed=1).requires_grad_(True).train()
    method.setup(target)
    before = target.traced.bn1.running_mean.clone()
    images = torch.randn(6, 3, 4, 4)
    in_training = target(images)["embedding"]
    assert torch.equal(before, target.traced.bn1.running_mean) == fixed
    assert torch.allclose(in_training, target.eval()(images)["embedding"]) == fixed
    in_training.sum().backward()
    assert target.traced.bn1.weight.grad.abs().max() > 0


# --- RIFLE ---


class Optimised:
    """What a method sees of the training loop's state."""

    def __init__(self, target: Network, optimizer: torch.optim.Optimizer):
        self.target, self.optimizer = target, optimizer


def after_a_step(source: Network, method) -> Optimised:
    target = source.with_new_head(3, seed=1).requires_grad_(True)
    optimizer = make_optimizer(target, method, SGDConfig(), ScheduleConfig(iterations=1))
    target(torch.ones(2, 3, 4, 4))["logits"].square().sum().backward()
    optimizer.step()
    return Optimised(target, optimizer)


@pytest.mark.parametrize(("bound", "limit"), [("classes", 3**-0.5), ("features", 5**-0.5)])
@pytest.mark.parametrize("more", [False, True])
def test_rifle_draws_the_head_anew_at_its_fractions_of_the_schedule(bound, limit, more, tiny_source):
    method = RIFLE(at=(0.3, 0.5), bound=bound, bias=more, reset_momentum=more)
    state = after_a_step(tiny_source, method)
    head, changed = state.target.traced.fc, []
    for step in range(10):
        before = {name: p.clone() for name, p in state.target.traced.named_parameters()}
        momentum = state.optimizer.state[head.weight]["momentum_buffer"].clone()
        method.before_step(state, step, 10, seed=step)
        after = dict(state.target.traced.named_parameters())
        names = {name for name in before if not torch.equal(before[name], after[name])}
        if names:
            changed.append(step)
            assert names == ({"fc.weight", "fc.bias"} if more else {"fc.weight"})
            assert limit / 2 < head.weight.abs().max() <= limit
            now = state.optimizer.state[head.weight]["momentum_buffer"]
            assert torch.equal(now, torch.zeros_like(now) if more else momentum)
    assert changed == [3, 5]
    drawn = head.weight.clone()
    method.before_step(state, 3, 10, seed=5)
    assert torch.equal(drawn, head.weight)  # of the seed alone


# --- StochNorm ---


def normalised(p: float, images: torch.Tensor) -> tuple[torch.Tensor, nn.BatchNorm2d, nn.BatchNorm2d]:
    """The outputs of StochasticBatchNorm, the layer itself, and BatchNorm with the same values."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(images.shape[1], eps=1e-3, momentum=0.3).double()
    holder = nn.Sequential(plain)
    randomise_batchnorm(holder)
    other = copy.deepcopy(plain)
    replace_batchnorm(holder, StochasticBatchNorm, p=p)
    return holder(images), holder[0], other


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_stochnorm_at_its_limits_is_batchnorm_by_one_kind_of_statistics(p):
    images, again = (random(4, 3, 5, 5).requires_grad_(True) for _ in range(2))
    found, layer, plain = normalised(p, images)
    expected = copy.deepcopy(plain).train(p == 1)(again)
    torch.testing.assert_close(found, expected)
    weights = random(4, 3, 5, 5, seed=1)
    for output in (found, expected):
        (output * weights).sum().backward()
    torch.testing.assert_close(images.grad, again.grad)
    plain(images)  # the moving statistics are updated in any case
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(getattr(layer, name), buffer)
    torch.testing.assert_close(layer.eval()(images), plain.eval()(images))


def test_each_channel_is_drawn_by_itself_and_again_in_every_step():
    images = random(4, 200, 2, 2)
    found, layer, plain = normalised(0.3, images)
    by_moving, by_batch = copy.deepcopy(plain).eval()(images), copy.deepcopy(plain)(images)
    of_batch = torch.isclose(found, by_batch).all(dim=(0, 2, 3))
    assert torch.equal(found, torch.where(of_batch.view(-1, 1, 1), by_batch, by_moving))
    assert 30 < of_batch.sum() < 90
    torch.manual_seed(7)
    first, second = layer(images), layer(images)
    assert not torch.allclose(first, second)


def test_stochnorm_replaces_every_batchnorm_of_the_target_and_shares_its_values(tiny_source):
    target = tiny_source.with_new_head(3, seed=1).requires_grad_(True).train()
    names = list(target.weights())
    StochNorm(p=0.25).setup(target)
    layers = [m for m in target.traced.modules() if isinstance(m, _BatchNorm)]
    assert [(type(layer), layer.p) for layer in layers] == [(StochasticBatchNorm, 0.25)] * 2
    assert list(target.weights()) == names
    target(torch.randn(4, 3, 4, 4))["logits"].sum().backward()
    with torch.no_grad():
        for p in target.parameters():
            p -= 0.1 * p.grad
    copied = target.copy()  # of the model that was traced: with layers of its own kind, and the trained values
    assert all(torch.equal(value, copied.weights()[name]) for name, value in target.weights().items())
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(copied.eval()(images)["logits"], target.eval()(images)["logits"])


# --- Bi-Tuning ---

Q, T, CLASSES = 2, 0.5, 3


@pytest.fixture
def bi_tuning(tiny_source) -> tuple[BiTuning, Network]:
    target = tiny_source.double().with_new_head(CLASSES, seed=1).requires_grad_(True).train()
    torch.manual_seed(2)
    method = BiTuning(alpha=0.3, queue=Q, temperature=T, momentum=0.9, dimensions=4)
    method.setup(target)
    return method, target


def unit(values: torch.Tensor) -> torch.Tensor:
    return values / values.square().sum().sqrt()


def naive_contrast(similarities: list[float]) -> float:
    """KL(e || softmax) of one image, whose first Q + 1 entries are its own class's."""
    total = math.log(sum(math.exp(s / T) for s in similarities))
    e = 1 / (Q + 1)
    return sum(e * (math.log(e) - (s / T - total)) for s in similarities[: Q + 1])


def test_bi_tuning_equals_the_naive_loops(bi_tuning, monkeypatch):
    """Image by image; L_z of the queues before the batch, L_y of those with its keys."""
    method, target = bi_tuning
    labels = torch.tensor([1, 0, 1])
    h_q, h_k = random(3, 5, seed=3).requires_grad_(True), random(3, 5, seed=4)
    queue_z, queue_g = method.queue_z.clone(), method.queue_g.clone()
    assert torch.allclose(queue_z.norm(dim=2), torch.ones(CLASSES, Q, dtype=DOUBLE))
    monkeypatch.setattr(method, "keys", lambda outputs: h_k)
    terms = method.penalty(target, {"embedding": h_q, "labels": labels}, None)

    one = torch.ones(1, dtype=DOUBLE)
    z_q, z_k = ([unit(layer(h)) for h in hs] for layer, hs in ((method.projection, h_q), (method.key_projection, h_k)))
    g_q, g_k = ([unit(torch.cat([h, one])) for h in hs] for hs in (h_q, h_k))
    head, of_images, of_classes = target.traced.fc, 0.0, 0.0
    for b, c in enumerate(labels.tolist()):
        queued = [key for other in (c, *({0, 1, 2} - {c})) for key in queue_z[other]]
        of_images += naive_contrast([float((z_q[b] * key).sum().detach()) for key in [z_k[b], *queued]]) / 3
    queue_g[1, 0], queue_g[0, 0], queue_g[1, 1] = (g.detach() for g in g_k)
    pull = torch.zeros(3, dtype=DOUBLE)  # dL_y / d(g_q u_c)
    for b, c in enumerate(labels.tolist()):
        u = unit(torch.cat([head.weight[c], head.bias[c : c + 1]])).detach()
        queued = [key for other in (c, *({0, 1, 2} - {c})) for key in queue_g[other]]
        similarities = [float((u * key).sum().detach()) for key in [g_q[b], *queued]]
        of_classes += naive_contrast(similarities) / 3
        share = math.exp(similarities[0] / T) / sum(math.exp(s / T) for s in similarities)
        pull[b] = (share - 1 / (Q + 1)) / T / 3
    assert terms["contrast_images"].item() == pytest.approx(0.3 * of_images, rel=1e-10)
    assert terms["contrast_classes"].item() == pytest.approx(0.3 * of_classes, rel=1e-10)
    torch.testing.assert_close(method.queue_g, queue_g)
    assert torch.equal(method.position, torch.tensor([1, 0, 0]))

    (gradient,) = torch.autograd.grad(terms["contrast_classes"], h_q, retain_graph=True)
    u = method.classifiers(target)[labels]
    of_g = torch.stack(g_q)
    (expected,) = torch.autograd.grad((0.3 * pull * (of_g * u).sum(dim=1)).sum(), h_q, retain_graph=True)
    torch.testing.assert_close(gradient, expected)
    trained = [*method.projection.parameters(), *head.parameters()]
    gradients = torch.autograd.grad(sum(terms.values()), trained, allow_unused=True)
    assert [g is None for g in gradients] == [False, False, True, True]  # neither the classifiers nor the keys


def test_the_oldest_keys_of_a_class_leave_its_queue_in_the_order_of_the_batch(bi_tuning):
    method, _ = bi_tuning
    before = method.queue_z.clone()
    z, g = random(4, 4), random(4, 6, seed=1)
    method.enqueue(torch.tensor([0, 2, 0, 0]), z, g)  # more of class 0 than its queue holds
    assert torch.equal(method.queue_z[0], torch.stack([z[3], z[2]]))
    assert torch.equal(method.queue_g[2, 0], g[1]) and torch.equal(method.queue_z[2, 1], before[2, 1])
    assert torch.equal(method.queue_z[1], before[1]) and method.position.tolist() == [1, 0, 1]
    method.enqueue(torch.tensor([0]), z[:1], g[:1])
    assert torch.equal(method.queue_z[0], torch.stack([z[3], z[0]]))


def test_the_key_encoder_follows_the_target_and_keeps_its_own_statistics(bi_tuning):
    method, target = bi_tuning
    start = target.traced.conv1.weight.detach().clone()
    with torch.no_grad():
        for p in target.parameters():
            p += 1
    method.follow(target)
    torch.testing.assert_close(method.key_encoder.traced.conv1.weight, start + 0.1)
    mean, own = target.traced.bn1.running_mean.clone(), method.key_encoder.traced.bn1.running_mean.clone()
    views = random(4, 3, 4, 4)
    keys = method.keys({"view_2": views, "logits": views, "embedding": views})
    assert torch.equal(mean, target.traced.bn1.running_mean) and not keys.requires_grad
    assert not torch.equal(own, method.key_encoder.traced.bn1.running_mean)
    assert set(method.trained()) == set(method.projection.parameters())


def test_a_step_takes_keys_of_the_second_views_from_an_encoder_that_has_followed(bi_tuning):
    method, target = bi_tuning
    start = target.copy()
    with torch.no_grad():
        for p in target.parameters():
            p.add_(0.1 * random(*p.shape))
    moved = target.copy()
    expected = target.copy().train()
    with torch.no_grad():
        for p, p0, p1 in zip(*(n.backbone_parameters().values() for n in (expected, start, moved)), strict=True):
            p.copy_(0.9 * p0 + 0.1 * p1)
    torch.testing.assert_close(method.projection.state_dict(), method.key_projection.state_dict())
    optimizer = make_optimizer(target, method, SGDConfig(), ScheduleConfig(iterations=1))
    images, second, labels = random(3, 3, 4, 4), random(3, 3, 4, 4, seed=1), torch.arange(3)
    state = TrainState(target, None, optimizer, "fp32")
    method.before_step(state, 0, 1, seed=0)
    logits, _, _ = train_step(state, method, Batch(images, labels, (second,)))
    torch.testing.assert_close(logits, moved.train()(images)["logits"].detach())
    keys = nn.functional.pad(expected(second)["embedding"].detach(), (0, 1), value=1.0)
    for label, key in enumerate(keys):
        torch.testing.assert_close(method.queue_g[label, 0], unit(key))
    followed = method.key_encoder.backbone_parameters()
    assert all(torch.allclose(p, followed[name]) for name, p in expected.backbone_parameters().items())


# --- as runs ---


@pytest.fixture(scope="module")
def cub_root(tmp_path_factory) -> Path:
    return write_cub(tmp_path_factory.mktemp("data") / "CUB_200_2011")


def test_the_second_view_is_of_the_same_images_with_a_crop_of_its_own(cub_root, tmp_path, monkeypatch):
    seen, images_seen, whole, forward = [], [], BiTuning.penalty, TrainState.forward

    def penalty(method, target, outputs, source_outputs):
        seen.append((images_seen.pop(), outputs["view_2"]))
        return whole(method, target, outputs, source_outputs)

    monkeypatch.setattr(BiTuning, "penalty", penalty)
    monkeypatch.setattr(
        TrainState, "forward", lambda state, images: images_seen.append(images) or forward(state, images)
    )
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), "reg=bi_tuning", "backbone.resize=16") == 0
    mirrored = 0
    for images, second in seen:  # of whole images: a view is mirrored, or it is not
        for one, other in zip(images, second, strict=True):
            assert torch.equal(one, other) or torch.equal(one, other.flip(2))
            mirrored += not torch.equal(one, other)
    assert len(seen) == 3 and 0 < mirrored < 12


@pytest.mark.parametrize(("reg", "method"), [("co_tuning", CoTuning), ("lp_ft", LPFT)])
def test_it_is_fitted_to_the_centre_crop_of_each_training_image_once(reg, method, cub_root, tmp_path, monkeypatch):
    seen, whole = [], method.fit

    def fit(self, source, batches, num_classes):
        seen.extend(torch.cat([images for images, _ in batches]) for _ in range(2))
        return whole(self, source, batches, num_classes)

    monkeypatch.setattr(method, "fit", fit)
    options = [FEW_CHOICES] if reg == "lp_ft" else []
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path), f"reg={reg}", *options) == 0
    assert len(seen[0]) == 18 and torch.equal(*seen)  # no crop is drawn at random


ADDED = ("co_tuning", "stochnorm", "rifle", "l2_sp_fisher")  # each keeps a state of another kind
FEW_CHOICES = "reg.probe.choices=3"


@pytest.mark.parametrize(
    "method",
    [
        ["reg=bi_tuning"],
        ["reg=lp_ft", FEW_CHOICES],
        ["reg=sum", *(f"+reg@reg.terms.{n}={n}" for n in ADDED), "reg.terms.l2_sp_fisher.fisher.images=4"],
    ],
    ids=lambda method: method[0],
)
def test_stopped_after_a_step_it_ends_with_the_same_bits(method, cub_root, tmp_path, monkeypatch):
    batch = Loader.train_batch

    def stop(loader, indices, iteration):
        if iteration == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch(loader, indices, iteration)

    options = [*method, "schedule.iterations=4"]
    assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path / "whole"), *options) == 0
    stopped = [*tiny_overrides(cub_root, tmp_path / "stopped"), *options]
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "train_batch", stop)
        assert delta_run(patch, *stopped) == 128 + signal.SIGTERM
    assert list(tmp_path.glob("stopped/runs/*/last.pt"))
    assert delta_run(monkeypatch, *stopped) == 0
    (run,), (other,) = ((tmp_path / name / "runs").iterdir() for name in ("whole", "stopped"))
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in other.iterdir())
    for file in run.glob("*.safetensors"):
        one, two = load_file(file), load_file(other / file.name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_what_is_learned_beside_the_target_is_kept_but_no_second_backbone(cub_root, tmp_path, monkeypatch):
    for reg, names in (
        ("bi_tuning", ["projection.bias", "projection.weight"]),
        ("co_tuning", ["head.bias", "head.weight"]),
    ):
        assert delta_run(monkeypatch, *tiny_overrides(cub_root, tmp_path / reg), f"reg={reg}") == 0
        (file,) = tmp_path.glob(f"{reg}/runs/*/method.safetensors")
        assert sorted(load_file(file)) == [f"stage1.{name}" for name in names]


@pytest.fixture(scope="module")
def trained(cub_root, tmp_path_factory) -> Callable[..., dict[str, torch.Tensor]]:
    """The network of a short run."""

    @functools.cache
    def weights(*options: str) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("trained")
        same = ["reg.weight_decay=1e-3", "schedule.iterations=4"]
        with pytest.MonkeyPatch.context() as patch:
            assert delta_run(patch, *tiny_overrides(cub_root, folder), *options, *same) == 0
        (file,) = folder.glob("runs/*/model.safetensors")
        return load_file(file)

    return weights


@pytest.mark.parametrize(
    ("reg", "option"), [("stochnorm", "p=0.5"), ("rifle", "bias=true"), ("lp_ft", "probe.choices=3")]
)
def test_a_method_without_a_penalty_does_in_a_sum_what_it_does_alone(reg, option, trained):
    """Beside a penalty of weight 0, with its own weight decay: bit for bit the same network."""
    zero = ["+reg@reg.terms.zero=bss", "reg.terms.zero.alpha=0"]
    alone = trained(f"reg={reg}", f"reg.{option}")
    added = trained("reg=sum", *zero, f"+reg@reg.terms.x={reg}", f"reg.terms.x.{option}")
    plain = trained("reg=l2")
    assert all(torch.equal(alone[key], added[key]) for key in alone)
    assert any(not torch.equal(alone[key], plain[key]) for key in alone)


def test_delta_with_all_that_can_be_added_runs(cub_root, tmp_path, monkeypatch):
    names = ("delta", "bss", "l2_sp_fisher", "co_tuning", "lp_ft", "rifle")
    terms = [f"+reg@reg.terms.{name}={name}" for name in names]
    few = [f"reg.terms.delta.attention.{option}" for option in ("images=4", "head_epochs=1")]
    few.append("reg.terms.lp_ft.probe.choices=3")
    tiny = tiny_overrides(cub_root, tmp_path)
    assert delta_run(monkeypatch, *tiny, "reg=sum", *terms, *few, "reg.terms.l2_sp_fisher.fisher.images=3") == 0
    (run,) = (tmp_path / "runs").iterdir()
    fitted = {path.stem for path in run.glob("*.safetensors")}
    assert fitted >= {"attention", "fisher", "relationship", "probe"}


# --- their options ---


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["reg=l2_sp_fisher", "reg.form=min"], "reg.eps"),
        (["reg=l2_sp_fisher", "reg.fisher.images=0"], "reg.fisher.images"),
        (["reg=lp_ft", "reg.probe.c=0"], "reg.probe.c"),
        (["reg=bi_tuning", "reg.queue=0"], "reg.queue"),
        (["reg=bi_tuning", "reg.momentum=1"], "reg.momentum"),
        (["reg=rifle", "reg.at=[0.5,1]"], "reg.at"),
        (["reg=rifle", "reg.at=[]"], "reg.at"),
        (["reg=rifle", "reg.bound=both"], "reg.bound"),
        (["reg=stochnorm", "reg.p=1.5"], "reg.p"),
        (["reg=bss", "reg.k=0"], "reg.k"),
    ],
)
def test_mistakes_are_named_by_their_key(overrides, key):
    with pytest.raises(OptionError, match=re.escape(key)) as raised:
        composed(*overrides)
    assert raised.value.key == key


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"x": BiTuning}, "BiTuning needs several views"),
        ({"x": StochNorm, "y": LPFT}, r"not both reg\.terms\.x and .*\.y"),
    ],
)
def test_terms_that_do_not_go_together_are_refused(terms, message):
    with pytest.raises(UserError, match=message):
        Sum({name: method() for name, method in terms.items()})


@pytest.mark.parametrize("method", [StochNorm, BiTuning])
def test_several_processes_are_refused_where_they_would_draw_or_queue_apart(method, tiny_source):
    method().requires(tiny_source, "sgd", processes=1)
    with pytest.raises(UserError, match="one process"):
        method().requires(tiny_source, "sgd", processes=2)


def test_what_would_do_nothing_on_a_network_is_refused():
    plain, convolutions = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Conv2d(3, 2, 3))
    for method in (StochNorm(), Sum({"x": StochNorm()}), L2SP(scope="conv"), L2SPFisher()):
        with pytest.raises(UserError, match="do nothing"):
            method.requires(plain, "sgd", processes=1)
    for method in (L2SP(), L2SP(scope="conv"), LPFT()):
        method.requires(convolutions, "sgd", processes=1)


def test_lp_ft_goes_with_stochnorm_if_it_leaves_batchnorm_alone():
    terms = ["reg=sum", "+reg@reg.terms.x=stochnorm", "+reg@reg.terms.y=lp_ft"]
    assert list(composed(*terms, "reg.terms.y.fixed_statistics=false").reg.build().terms) == ["x", "y"]


@pytest.mark.parametrize("term", ["bss", "l2_sp_fisher", "co_tuning", "stochnorm", "rifle", "lp_ft"])
def test_it_can_be_added_to_delta(term):
    config = composed("reg=sum", "+reg@reg.terms.delta=delta", f"+reg@reg.terms.{term}={term}").reg
    assert list(config.build().terms) == ["delta", term]
