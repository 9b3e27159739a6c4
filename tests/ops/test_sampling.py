from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling, log_probability_and_entropy, seen_along, seen_tokens

LOGITS = st.lists(st.floats(-8, 8).map(lambda x: round(x, 2)), min_size=2, max_size=12)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 13),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    min_p=st.sampled_from([0.0, 0.1, 0.6]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
)


def reference(logits: list[float], sampling: Sampling, seen: set[int]) -> list[float]:
    """The same distribution, token by token in Python floats."""
    penalty = sampling.repetition_penalty
    logits = [x if t not in seen else x / penalty if x > 0 else x * penalty for t, x in enumerate(logits)]
    logits = [x / sampling.temperature for x in logits]
    if sampling.top_k:
        kth = sorted(logits, reverse=True)[min(sampling.top_k, len(logits)) - 1]
        logits = [x if x >= kth else -math.inf for x in logits]
    weights = [math.exp(x - max(logits)) for x in logits]
    probs = [w / math.fsum(weights) for w in weights]
    if sampling.top_p < 1:
        probs = [p if math.fsum(o for o in probs if o > p) < sampling.top_p - 1e-12 else 0.0 for p in probs]
    probs = [p if p >= sampling.min_p * max(probs) else 0.0 for p in probs]
    return [p / math.fsum(probs) for p in probs]


@given(LOGITS, SAMPLINGS, st.sets(st.integers(0, 11)))
def test_every_combination_of_options_gives_the_reference_distribution(logits, sampling, seen):
    seen = {token for token in seen if token < len(logits)}
    seen_BKV = torch.tensor([[[token in seen for token in range(len(logits))]]])
    probs = sampling.probabilities(torch.tensor([[logits]], dtype=torch.float64), seen_BKV)[0, 0]
    expected = torch.tensor(reference(logits, sampling, seen), dtype=torch.float64)
    assert torch.allclose(probs, expected, atol=1e-9)


def test_the_shape_of_the_batch_does_not_change_a_distribution():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 40)
    sampling = Sampling(0.7, top_k=20, top_p=0.8, min_p=0.02)
    together = sampling.probabilities(logits)
    assert torch.equal(together[1, 2], sampling.probabilities(logits[1:2, 2:3])[0, 0])


def test_tokens_that_tie_with_the_last_kept_one_stay():
    logits = torch.log(torch.tensor([0.4, 0.2, 0.2, 0.2]))
    assert Sampling(top_k=2).probabilities(logits).gt(0).all()
    assert Sampling(top_p=0.5).probabilities(logits).gt(0).all()
    assert Sampling(top_p=0.4 - 1e-6).probabilities(logits).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-5])
def test_a_vanishing_temperature_is_greedy_and_one_hot(temperature):
    logits = torch.tensor([[0.1, 3.0, 3.0, -1.0]])
    sampling = Sampling(temperature)
    assert sampling.greedy
    assert sampling.choose(logits).tolist() == [1]
    assert sampling.probabilities(logits).tolist() == [[0, 1, 0, 0]]


def test_just_above_the_bound_it_is_a_distribution():
    assert not Sampling(1.1e-5).greedy
    assert torch.allclose(Sampling(1.1e-5).probabilities(torch.tensor([[1.0, 1.0, 0.0]])).sum(), torch.tensor(1.0))


def test_greedy_choice_sees_the_penalty():
    logits = torch.tensor([[2.0, 1.9]])
    seen = torch.tensor([[True, False]])
    assert Sampling(0.0, repetition_penalty=1.2).choose(logits, seen).tolist() == [1]


def test_low_precision_is_widened_before_anything_is_computed():
    logits = torch.randn(1, 300, dtype=torch.bfloat16)
    probs = Sampling(0.5).probabilities(logits)
    assert probs.dtype == torch.float32
    assert torch.allclose(probs, (logits.float() / 0.5).softmax(-1))


def test_confidence_is_measured_at_temperature_one_where_greedy_would_say_nothing():
    assert Sampling(0.0, repetition_penalty=1.3).scoring == Sampling()
    assert Sampling(0.4, top_k=3).scoring == Sampling(0.4, top_k=3)


def test_log_probability_and_entropy_of_a_filtered_distribution_are_finite():
    log_q, entropy = log_probability_and_entropy(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([1]))
    assert log_q.tolist() == pytest.approx([math.log(0.5)])
    assert entropy.tolist() == pytest.approx([math.log(2)])


@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.lists(st.integers(0, 7), max_size=5))
def test_seen_tokens_along_a_block_grow_one_at_a_time(prompt, drafted):
    seen_BV = seen_tokens([prompt], 8, torch.device("cpu"))
    seen_BKV = seen_along(seen_BV, torch.tensor([drafted], dtype=torch.int64).reshape(1, -1))
    for place in range(len(drafted) + 1):
        expected = set(prompt) | set(drafted[:place])
        assert set(seen_BKV[0, place].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize(
    "setting",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 1.0}, {"repetition_penalty": 0.0}],
)
def test_impossible_settings_are_refused_by_name(setting):
    with pytest.raises(UserError, match=f"sampling.{next(iter(setting))}"):
        Sampling(**setting)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_greedy_token_is_the_first_of_the_largest_also_beside_cut_off_rows(dtype):
    logits_BKV = torch.randn(3, 4, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits_BKV[:, :, [9, 21]] = 50.0
    logits_BKV[1, 2] = 0.0
    logits_BKV[:, :, 36:] = 99.0
    tokens_BK = Sampling(0.0).choose(logits_BKV[..., :36])
    assert tokens_BK.dtype == torch.int64
    assert tokens_BK.tolist() == [[9, 9, 9, 9], [9, 9, 0, 9], [9, 9, 9, 9]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_equal_logits_the_first_is_chosen_however_many_positions_are_read(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (40, 4, 67), generator=generator).to(dtype)
    logits[:8] -= 5.0
    logits[8] = -0.0
    logits[8, :, 5:9] = 0.0
    first = (logits == logits.amax(-1, keepdim=True)).int().numpy().argmax(-1)
    greedy = Sampling(0.0)
    assert greedy.choose(logits).tolist() == first.tolist()
    alone = [[greedy.choose(logits[row : row + 1, at : at + 1]).item() for at in range(4)] for row in range(40)]
    assert alone == first.tolist()
