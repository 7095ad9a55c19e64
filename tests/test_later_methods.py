"""Methods that came after DELTA, against values that are computed by hand."""

import pytest
import torch

from delta_transfer.errors import UserError
from delta_transfer.regularizers import BSS, build_regularizer

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


# --- their options ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reg=bss", "reg.k=0"], r"reg\.k must be positive"),
    ],
)
def test_mistakes_are_named_by_their_key(overrides, message):
    with pytest.raises(UserError, match=message):
        composed(*overrides)


@pytest.mark.parametrize("term", ["bss"])
def test_it_can_be_added_to_delta(term):
    config = composed("reg=sum", "+reg@reg.terms.delta=delta", f"+reg@reg.terms.{term}={term}").reg
    assert list(build_regularizer(config).terms) == ["delta", term]
