"""Methods that came after DELTA, against values that are computed by hand."""

import math

import pytest
import torch
from torch import nn

from delta_transfer.config import FisherConfig, ScheduleConfig
from delta_transfer.errors import UserError
from delta_transfer.models import Network
from delta_transfer.regularizers import BSS, L2SP, CoTuning, L2SPFisher, build_regularizer
from delta_transfer.training import make_optimizer

from .test_config import composed

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
        method.start(source)
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
    method.start(source)
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
    method.start(source.with_new_head(3, seed=1))
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
    method.start(target)
    optimizer = make_optimizer(target, method, ScheduleConfig(iterations=1, backbone_lr_factor=0.1))
    factors = {p: group["lr_factor"] for group in optimizer.param_groups for p in group["params"]}
    assert {factors[p] for p in method.parameters()} == {0.1} == {factors[target.traced.conv1.weight]}
    assert factors[target.traced.fc.weight] == 1 and len(factors) == len([*target.parameters()]) + 2


# --- their options ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reg=l2_sp_fisher", "reg.form=min"], r"reg\.form=min with reg\.eps=0 is no penalty"),
        (["reg=l2_sp_fisher", "reg.fisher.images=0"], r"reg\.fisher\.images must be positive"),
        (["reg=bss", "reg.k=0"], r"reg\.k must be positive"),
    ],
)
def test_mistakes_are_named_by_their_key(overrides, message):
    with pytest.raises(UserError, match=message):
        composed(*overrides)


@pytest.mark.parametrize("term", ["bss", "l2_sp_fisher", "co_tuning"])
def test_it_can_be_added_to_delta(term):
    config = composed("reg=sum", "+reg@reg.terms.delta=delta", f"+reg@reg.terms.{term}={term}").reg
    assert list(build_regularizer(config).terms) == ["delta", term]
