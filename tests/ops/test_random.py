from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drafttrain.ops.random import Draws, _apart_on_device, sample, sample_apart, sample_id, uniform
from tests.decoding.support import FALSE_ALARM, p_value

INTS = st.integers(min_value=0, max_value=2**40)


def splitmix64(x: int) -> int:
    """The finaliser in plain integers, as published."""
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 % 2**64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@given(INTS, INTS)
def test_the_hash_is_splitmix64_over_the_counters(sample_id, position):
    from drafttrain.ops.random import _GOLDEN, _key

    inner = splitmix64((sample_id * _GOLDEN + _key(3, "draft")) % 2**64)
    expected = splitmix64((inner + position * _GOLDEN) % 2**64) >> 11
    [u] = uniform(3, "draft", torch.tensor([sample_id]), torch.tensor([position])).tolist()
    assert u == expected * 2.0**-53


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it():
    ids, positions = torch.arange(50).unsqueeze(1), torch.arange(70)
    table = uniform(1, "target", ids, positions)
    assert table[13, 44] == uniform(1, "target", torch.tensor([13]), torch.tensor([44]))[0]


def test_seeds_and_purposes_give_other_numbers():
    ids, positions = torch.arange(100), torch.arange(100)
    tables = [uniform(seed, purpose, ids, positions) for seed in (0, 1) for purpose in ("draft", "accept")]
    for index, table in enumerate(tables):
        for other in tables[:index]:
            assert not torch.any(table == other)


def test_draws_are_uniform_and_rows_are_uncorrelated():
    u = uniform(0, "accept", torch.arange(200).unsqueeze(1), torch.arange(200))
    counts = torch.histc(u, bins=100, min=0, max=1)
    statistic = ((counts - 400) ** 2 / 400).sum()
    assert torch.special.gammaincc(torch.tensor(99 / 2), statistic / 2) > 1e-6
    correlation = torch.corrcoef(torch.stack([u[:-1].flatten(), u[1:].flatten(), u.roll(1, 1)[1:].flatten()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.03


@given(st.lists(st.sampled_from([0.0, 0.0, 1e-9, 0.3, 1.0]), min_size=1, max_size=8), st.floats(0, 1, exclude_max=True))
def test_a_token_without_probability_is_never_drawn(weights, u):
    if sum(weights) == 0:
        weights[0] = 1.0
    token = sample(torch.tensor([weights]), torch.tensor([u], dtype=torch.float64)).item()
    assert weights[token] > 0


def test_every_turn_of_every_prompt_has_a_key_of_its_own():
    keys = {sample_id(f"p{prompt}", turn) for prompt in range(1000) for turn in (0, 1, 11)}
    assert len(keys) == 3000 and all(0 <= key < 2**63 for key in keys)
    assert max(keys) > 2**60  # 32 bits would collide among 10^5 responses


def test_samples_follow_the_distribution():
    probs = torch.tensor([0.5, 0.0, 0.2, 0.3])
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    tokens = sample(probs.expand(1000, 4), u)
    assert torch.bincount(tokens, minlength=4).tolist() == [500, 0, 200, 300]


def test_draws_of_a_batch_are_the_uniforms_of_its_positions():
    draws = Draws(7, [4, 9, 2], [10, 3, 5], torch.device("cpu"))
    for starts, width in (([10, 3, 5], 4), ([15, 20, 9], 2), ([700, 3, 5], 3)):
        expected = torch.stack(
            [
                uniform(7, "draft", torch.tensor(sample_id), torch.arange(start, start + width))
                for sample_id, start in zip([4, 9, 2], starts, strict=True)
            ]
        )
        assert torch.equal(draws.at("draft", starts, width), expected)


def test_rows_keep_their_draws_when_others_leave():
    draws = Draws(7, [4, 9, 2], [10, 3, 5], torch.device("cpu"))
    before = draws.at("accept", [12, 5, 9], 4)
    draws.keep([2, 0])
    assert torch.equal(draws.at("accept", [9, 12], 4), before[[2, 0]])


def test_a_position_before_the_row_is_refused():
    with pytest.raises(ValueError, match="before the row"):
        Draws(0, [0], [5], torch.device("cpu")).at("draft", [4], 1)


def test_draws_without_replacement_have_their_exact_distribution():
    """Ordered triples from two distributions, interleaved, against the product of what is left each time."""
    rounds, q = 40_000, torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.1, 0.2, 0.3, 0.4]]).double()
    u = uniform(1, "apart", torch.arange(rounds).unsqueeze(1), torch.arange(5))
    names = torch.tensor([[0, 1, 1, 0, 0]]).expand(rounds, -1)
    tokens, present = sample_apart(q.expand(rounds, 2, 4), names, u)
    assert present.all()
    for which, columns in ((0, [0, 3, 4]), (1, [1, 2])):
        counts, expected = torch.zeros(4 ** len(columns)), torch.zeros(4 ** len(columns)).double()
        code = sum(4**place * tokens[:, column] for place, column in enumerate(columns))
        counts = torch.bincount(code, minlength=4 ** len(columns))
        for order in itertools.permutations(range(4), len(columns)):
            left, chance = 1.0, 1.0
            for token in order:
                chance *= q[which, token].item() / left if left > 1e-12 else 0.0
                left -= q[which, token].item()
            expected[sum(4**place * token for place, token in enumerate(order))] = chance
        assert p_value(counts, expected) > FALSE_ALARM


def test_nothing_is_drawn_twice_and_exhaustion_is_told():
    q = torch.tensor([[[0.3, 0.0, 0.7]]])
    for u in (0.0, 0.25, 0.5, 1 - 2.0**-40):
        tokens, present = sample_apart(
            q, torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), u, dtype=torch.float64)
        )
        assert present.tolist() == [[True, True, False, False]]
        assert sorted(tokens[0, :2].tolist()) == [0, 2]


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=9, max_size=9), st.integers(0, 99))
@example([0, 0.5, 0, 0, 0, 0, 0, 0, 0.9999999999999998], 49)
@settings(max_examples=60, deadline=None)
def test_all_tokens_are_drawn_once_from_wild_distributions(numbers, seed):
    """Masses over thirty orders of magnitude, where rounding could lead back into a token that is taken."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.exp(-30 * torch.rand(1, 1, 9, generator=generator, dtype=torch.float64))
    names, u = torch.zeros(1, 9, dtype=torch.int64), torch.tensor([numbers], dtype=torch.float64)
    tokens, present = sample_apart(q, names, u)
    on_device = _apart_on_device(q.cumsum(-1), names, u)
    assert torch.equal(on_device[1], present) and torch.equal(on_device[0][present], tokens[present])
    drawn = tokens[0][present[0]].tolist()
    assert len(set(drawn)) == len(drawn) >= 1
