"""The reference is a distribution, and agrees with hand-made ones, with the decoder's sampling and with brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.evaluation.reference import IMPOSSIBLE, distribution, tree
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama

logits = st.lists(st.floats(-8, 8), min_size=4, max_size=12, unique=True).map(np.array)
samplings = st.builds(
    Sampling,
    st.floats(0.3, 2),
    st.integers(0, 5),
    st.floats(0.3, 1),
    st.floats(0, 0.3),
    st.sampled_from([0.7, 1.0, 1.6]),
)


@given(logits, samplings, st.lists(st.integers(0, 13)))
def test_two_implementations_of_sampling_agree(row, sampling, text):
    seen = torch.tensor([[token in text for token in range(len(row))]])
    ours = sampling.probabilities(torch.tensor(row, dtype=torch.float64)[None], seen)[0].numpy()
    reference = distribution(row, sampling, text)
    assert reference.sum() == pytest.approx(1)
    # At the very edge of a nucleus either may keep a token: the sums differ in their last bits.
    if ((ours > 0) == (reference > 0)).all():
        assert ours == pytest.approx(reference, abs=1e-12)


def test_truncation_by_hand():
    row = np.log([0.5, 0.3, 0.15, 0.05])
    assert distribution(row, Sampling(1.0, top_k=2)) == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(row, Sampling(1.0, top_p=0.7)) == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(row, Sampling(1.0, min_p=0.5)) == pytest.approx([0.625, 0.375, 0, 0])
    assert distribution(row, Sampling(0.5))[0] == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025))


def test_tokens_that_tie_with_the_last_of_a_nucleus_stay():
    row = np.log([0.4, 0.2, 0.2, 0.2])
    assert distribution(row, Sampling(1.0, top_p=0.5)) == pytest.approx([0.4, 0.2, 0.2, 0.2])


def test_a_penalty_by_hand():
    row = np.array([2.0, -1.0, 0.5, 0.0])
    penalised = np.exp([1.0, -2.0, 0.5, 0.0])
    found = distribution(row, Sampling(1.0, repetition_penalty=2.0), [0, 1, 1, 9])
    assert found == pytest.approx(penalised / penalised.sum())


@pytest.fixture(scope="module")
def model():
    return build_llama(12, seed=3).double()


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_k=5), Sampling(1.0, repetition_penalty=2.0)])
def test_leaves_sum_to_one_and_agree_with_brute_force(model, sampling):
    found = tree(model, [0, 7, 3], sampling, frozenset({5}), 12, depth=2, wide=3)
    assert sum(found.leaves.values()) == pytest.approx(1, abs=1e-9)
    whole = dict.fromkeys(found.leaves, 0.0)
    for first, second in itertools.product(range(12), range(12)):
        p = _probability(model, sampling, first)
        if p > 0 and IMPOSSIBLE not in found.leaf([first, second]):
            # A leaf that is reached by the first token alone is met once with every second one.
            q = 1 / 12 if len(found.leaf([first, second])) == 1 else _probability(model, sampling, second, first)
            whole[found.leaf([first, second])] += p * q
    assert whole == pytest.approx(found.leaves, abs=1e-9)


def _probability(model, sampling, token, *before):
    with torch.no_grad():
        row = model(torch.tensor([[0, 7, 3, *before]])).logits[0, -1].numpy()
    return distribution(row, sampling, [0, 7, 3, *before])[token]


def test_answers_fall_into_leaves_and_impossible_ones_into_none(model):
    sampling = Sampling(1.0, top_k=9)
    found = tree(model, [0, 7, 3], sampling, frozenset({5}), 12, depth=2, wide=2)
    answers = list(itertools.product(range(12), range(12)))
    for answer in answers:
        possible = _probability(model, sampling, answer[0]) > 0
        assert possible or found.leaf(answer) == (IMPOSSIBLE,)
        assert (found.leaf(answer) in found.leaves) == (IMPOSSIBLE not in found.leaf(answer))
    assert sum(found.count(answers).values()) == 144
