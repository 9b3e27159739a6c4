"""Losses as mathematics: signs, limits, identities, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.errors import UserError
from drafttrain.training.losses import (
    DIVERGENCES,
    cross_entropy,
    expected_acceptance,
    forward_kl,
    jensen_shannon,
    mixed,
    reverse_kl,
    total_variation,
)

VOCABULARY = 7


def log_probs(seed: int, spread: float, rows: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64) * spread).log_softmax(-1)


pairs = st.tuples(st.integers(0, 10_000), st.integers(0, 10_000), st.floats(0.01, 20.0))


@given(pairs)
@settings(max_examples=50, deadline=None)
def test_divergences_are_positive_between_different_models_and_zero_between_equal_ones(pair):
    log_p, log_q = log_probs(pair[0], pair[2]), log_probs(pair[1] + 20_000, pair[2])
    for divergence in DIVERGENCES.values():
        assert (divergence(log_p, log_q) > 0).all()
        assert torch.allclose(divergence(log_p, log_p), torch.zeros(5, dtype=torch.float64), atol=1e-12)


@given(pairs)
@settings(max_examples=50, deadline=None)
def test_total_variation_is_one_minus_expected_acceptance_and_obeys_pinsker(pair):
    log_p, log_q = log_probs(pair[0], pair[2]), log_probs(pair[1], pair[2])
    distance = total_variation(log_p, log_q)
    assert torch.allclose(distance, 1 - expected_acceptance(log_p, log_q), atol=1e-12)
    assert (distance <= (forward_kl(log_p, log_q) / 2).clamp(min=0).sqrt() + 1e-9).all()


@given(pairs, st.floats(0.05, 0.95))
@settings(max_examples=50, deadline=None)
def test_jensen_shannon_is_bounded_and_swaps_with_beta(pair, beta):
    log_p, log_q = log_probs(pair[0], pair[2]), log_probs(pair[1], pair[2])
    value = jensen_shannon(log_p, log_q, beta)
    entropy = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
    assert (value <= entropy + 1e-9).all()
    assert torch.allclose(value, jensen_shannon(log_q, log_p, 1 - beta), atol=1e-12)


def test_jensen_shannon_tends_to_forward_and_reverse_kl():
    log_p, log_q = log_probs(1, 1.0), log_probs(2, 1.0)
    beta = 1e-6
    assert torch.allclose(jensen_shannon(log_p, log_q, beta) / beta, forward_kl(log_p, log_q), rtol=1e-4)
    assert torch.allclose(jensen_shannon(log_p, log_q, 1 - beta) / beta, reverse_kl(log_p, log_q), rtol=1e-4)


def test_divergences_by_hand():
    log_p = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    assert forward_kl(log_p, log_q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert reverse_kl(log_p, log_q).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert total_variation(log_p, log_q).item() == pytest.approx(0.25)
    assert expected_acceptance(log_p, log_q).item() == pytest.approx(0.75)


def test_cross_entropy_without_a_label_is_its_mean_over_the_targets_draws():
    log_p, log_q = log_probs(3, 1.0, rows=1), log_probs(4, 1.0, rows=1)
    each = torch.stack([cross_entropy(log_p, log_q, torch.tensor([token]))[0] for token in range(VOCABULARY)])
    missing = cross_entropy(log_p, log_q, torch.tensor([-100]))
    assert torch.allclose(missing, (log_p[0].exp() * each).sum())


def test_forward_kl_and_soft_cross_entropy_have_one_gradient():
    log_p = log_probs(5, 2.0)
    grads = []
    for loss in (mixed({"forward_kl": 1.0}), mixed({"cross_entropy": 1.0})):
        logits = log_probs(6, 2.0).clone().requires_grad_()
        loss(log_p, logits.log_softmax(-1), torch.full((5,), -100)).sum().backward()
        grads.append(logits.grad)
    assert torch.allclose(*grads, atol=1e-12)


def test_a_mix_is_the_weighted_sum():
    log_p, log_q, labels = log_probs(7, 1.0), log_probs(8, 1.0), torch.tensor([0, 1, 2, 3, -100])
    mix = mixed({"forward_kl": 0.5, "jensen_shannon(0.1)": 2.0, "cross_entropy": 0.25, "reverse_kl": 0.0})
    expected = (
        0.5 * forward_kl(log_p, log_q)
        + 2.0 * jensen_shannon(log_p, log_q, 0.1)
        + 0.25 * cross_entropy(log_p, log_q, labels)
    )
    assert torch.allclose(mix(log_p, log_q, labels), expected)


@pytest.mark.parametrize(
    "weights",
    [{}, {"forward_kl": 0.0}, {"forward_kl": -1.0}, {"kl": 1.0}, {"forward_kl(0.5)": 1.0}, {"jensen_shannon(1)": 1.0}],
)
def test_an_impossible_mix_is_refused_in_one_sentence(weights):
    with pytest.raises(UserError, match="losses"):
        mixed(weights)


def test_no_loss_breaks_on_impossible_tokens():
    log_p = torch.tensor([[0.0, -200.0, -300.0]])
    log_q = torch.tensor([[-300.0, 0.0, -200.0]])
    for divergence in DIVERGENCES.values():
        logits = log_q.clone().requires_grad_()
        value = divergence(log_p, logits.log_softmax(-1))
        value.sum().backward()
        assert value.isfinite().all() and logits.grad.isfinite().all()
