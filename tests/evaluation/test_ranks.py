"""Ranks are uniform where tokens were drawn from p, whatever p is at each place, and not where they were not."""

import numpy as np
import pytest

from drafttrain.evaluation.ranks import PARTS, Ranks

V, LIMIT = 12, 8


def distributions(seed, spread=2.0, rows=LIMIT):
    logits = np.random.default_rng(seed).normal(0, spread, (rows, V))
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def ranks(twist=lambda p, q: p, answers=150, seed=0, ends=()):
    """Of answers drawn from a twist of p and q, each at other distributions."""
    random, found = np.random.default_rng(seed), Ranks()
    for number in range(answers):
        p, q = distributions(number), distributions(number + 10_000)
        tokens = []
        for place in range(LIMIT):
            tokens.append(int(random.choice(V, p=twist(p[place], q[place]))))
            if tokens[-1] in ends:
                break
        found.add(tokens, p, q, ends, LIMIT, random)
    return found


@pytest.mark.parametrize("ends", [(), (0, 5)])
def test_tokens_of_p_have_uniform_ranks_also_where_some_end_an_answer(ends):
    found = ranks(ends=ends)
    assert found.impossible == 0 and (found.test().observations == 150 * LIMIT) == (ends == ())
    assert found.test().degrees == PARTS * (PARTS**2 - 1)
    assert found.test().p_value > 1e-4


def test_false_alarms_are_as_rare_as_stated_to_a_factor_of_two():
    """At the fewest tokens that fill the cells of a stratum."""
    random, alarms = np.random.default_rng(1), {0.01: 0, 0.001: 0}
    trials = 20_000
    for _ in range(trials):
        found = Ranks(random.multinomial(5 * PARTS**3, np.full(PARTS**3, PARTS**-3.0)).reshape(PARTS, PARTS, PARTS))
        p_value = found.test().p_value
        alarms = {level: count + (p_value < level) for level, count in alarms.items()}
    assert all(count < 2 * level * trials for level, count in alarms.items())


@pytest.mark.parametrize(
    "twist",
    [
        lambda p, q: p**2 / (p**2).sum(),
        lambda p, q: 0.8 * p + 0.2 * q,
        lambda p, q: np.minimum(p, q) + (1 - np.minimum(p, q).sum()) * p,
        lambda p, q: p[::-1] / p.sum(),
    ],
    ids=["cooler", "of the drafter", "without residual", "of another context"],
)
def test_tokens_of_another_distribution_do_not(twist):
    assert ranks(twist).test().p_value < 1e-8


def test_draws_that_repeat_show_though_each_alone_is_right():
    """One uniform number for all tokens of an answer: every token has the right distribution, the text has not."""
    random, found = np.random.default_rng(2), Ranks()
    p = np.full((LIMIT, V), 1 / V)
    for _ in range(150):
        found.add([int(random.integers(V))] * LIMIT, p, p, (), LIMIT, random)
    assert found.test().p_value < 1e-8


def test_impossible_tokens_and_wrong_ends_are_never_forgiven():
    p = distributions(0)
    p[:, 3] = 0
    for tokens, ends in (([1] * 7 + [3], ()), ([1] * 7, ()), ([1] * 8, (1,))):
        found = ranks()
        found.add(tokens, p, p, ends, LIMIT, np.random.default_rng(0))
        assert found.impossible == 1 and found.test().p_value == 0
