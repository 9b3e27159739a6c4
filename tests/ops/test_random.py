from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.ops.random import Draws, sample, sample_id, uniform

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
