"""Intervals cover, tests reject what they should, and nothing is a mean of means."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.evaluation.statistics import SurpriseSum, bootstrap, chi_square, rate_ratio, repetition


def total(sums):
    return sums[..., 0]


def test_the_value_is_the_figure_of_the_sums_not_a_mean_of_ratios():
    counts = np.array([[10.0, 1.0, 10.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert bootstrap(counts, rate_ratio, ["a", "a"]).value == pytest.approx((11 / 2) / (11 / 3))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = bootstrap(random.normal(5, 1, (40, 1)), lambda sums: sums[..., 0] / 40, [0] * 40, 400, trial)
        covered += interval.low <= 5 <= interval.high
    assert 175 <= covered <= 199


def test_pairing_makes_the_interval_of_two_equally_slow_prompts_narrow():
    seconds = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    tokens = np.full(5, 100.0)
    exact = np.stack([tokens, seconds / 2, tokens, seconds], axis=1)
    interval = bootstrap(exact, rate_ratio, ["a"] * 5)
    assert interval.low == pytest.approx(2) and interval.high == pytest.approx(2)


def test_resamples_keep_the_mixture_of_tasks():
    counts = np.array([[1.0], [1.0], [1000.0], [1000.0]])
    interval = bootstrap(counts, total, ["short", "short", "long", "long"])
    assert interval.low == interval.high == 2002


def test_the_same_seed_gives_the_same_interval_whatever_the_labels_are():
    counts = np.random.default_rng(1).random((9, 4))
    by_name = bootstrap(counts, rate_ratio, "aaabbbccc", seed=3)
    assert by_name == bootstrap(counts, rate_ratio, [1, 1, 1, 2, 2, 2, 3, 3, 3], seed=3)


def test_tasks_of_one_prompt_are_resampled_together():
    counts = np.array([[100.0, 50.0, 100.0, 100.0], [100.0, 200.0, 100.0, 100.0]])
    interval = bootstrap(counts, rate_ratio, ["a", "b"])
    assert interval.low < interval.value < interval.high


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="0 rows"):
        bootstrap(np.zeros((0, 4)), rate_ratio, [])


@given(st.lists(st.integers(0, 3), max_size=40))
def test_repetition_is_a_share(ids):
    assert 0 <= repetition(ids) < 1


def test_a_loop_repeats_and_fresh_text_does_not():
    assert repetition([1, 2, 3] * 30) > 0.9
    assert repetition(list(range(90))) == 0
    assert repetition([1, 2, 3]) == 0


@pytest.mark.parametrize(("temperature", "rejected"), [(1.0, False), (1.3, True)])
def test_chi_square_accepts_the_true_distribution_and_rejects_another(temperature, rejected):
    logits = np.linspace(0, 4, 12)
    true = np.exp(logits) / np.exp(logits).sum()
    other = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    drawn = np.random.default_rng(5).choice(12, size=4000, p=other)
    result = chi_square(Counter(drawn.tolist()), dict(enumerate(true.tolist())))
    assert (result.p_value < 1e-9) == rejected
    assert result.observations == 4000


def test_chi_square_agrees_with_a_known_value():
    result = chi_square(Counter({0: 60, 1: 40}), {0: 0.5, 1: 0.5})
    assert result.statistic == pytest.approx(4.0)
    assert result.p_value == pytest.approx(0.0455, abs=1e-4)  # P(|N| > 2)


def test_an_impossible_outcome_is_never_forgiven():
    assert chi_square(Counter({0: 10_000, 7: 1}), {0: 1.0, 7: 0.0}).p_value == 0
    assert chi_square(Counter({0: 10_000, 7: 1}), {0: 1.0}).p_value == 0


@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=30), st.integers(1, 10_000))
def test_merging_cells_loses_no_observation(weights, draws):
    p = np.array(weights) / sum(weights)
    counts = Counter(np.random.default_rng(0).choice(len(p), size=draws, p=p).tolist())
    result = chi_square(counts, dict(enumerate(p.tolist())))
    assert 0 <= result.p_value <= 1 and result.observations == draws


def surprise(p, drawn_from, tokens=2000):
    ids = torch.multinomial(drawn_from, 1, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    score = SurpriseSum()
    score.add(p[:tokens], ids[:tokens])
    return score.z


def test_the_surprise_of_tokens_from_p_is_a_standard_score_and_of_others_is_not():
    logits = torch.randn(2000, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2
    p, sharper = logits.softmax(-1), (1.15 * logits).softmax(-1)
    assert abs(surprise(p, p)) < 4
    assert surprise(p, sharper) > 5


def test_a_token_outside_the_support_is_never_forgiven():
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    score = SurpriseSum()
    score.add(p, torch.tensor([2]))
    assert score.z == float("inf")


def test_certain_tokens_carry_no_surprise():
    score = SurpriseSum()
    score.add(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0]))
    assert score.z == 0
