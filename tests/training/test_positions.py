"""Positions and lags: what may be drawn, and that it is drawn again alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.config import PositionsConfig
from drafttrain.errors import UserError
from drafttrain.training.positions import Placing


def placing(**wishes) -> Placing:
    return Placing.of(PositionsConfig(**wishes), context=4096, depth=5, seed=3)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["plain", "anchor_offset", "multi_gap"]),
    st.integers(0, 6),
    st.integers(1, 5),
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_positions_rise_from_zero_and_stay_within_what_is_served(kind, anchors, gaps, lengths, step):
    drawn = placing(kind=kind, anchors=anchors, gaps=gaps, served=300)
    samples = torch.arange(len(lengths)) + 17
    found = drawn.positions(torch.tensor(lengths), 40, samples, step)
    assert found.shape == (len(lengths), 40)
    assert (found.diff(dim=1) >= 1).all()
    kept = min(anchors, 40)
    assert torch.equal(found[:, :kept], torch.arange(kept).expand(len(lengths), -1))
    for row, length in enumerate(lengths):
        assert found[row, length - 1] < 300
        jumps = int((found[row].diff() > 1).sum())
        assert jumps <= {"plain": 0, "anchor_offset": 1, "multi_gap": gaps}[kind]


def test_the_offset_is_uniform_over_the_room():
    drawn = placing(kind="anchor_offset", served=1024)
    offsets = drawn.positions(torch.full((4000,), 24), 24, torch.arange(4000), 0)[:, -1] - 23
    assert offsets.min() < 20 and offsets.max() > 980
    assert abs(offsets.float().mean() - 500) < 20


def test_several_gaps_make_middle_distances():
    """The anchor-offset body spans its own length alone; gaps within it span distances up to the served length."""
    samples, lengths = torch.arange(500), torch.full((500,), 64)
    spans = [
        (found[:, -1] - found[:, 4]).float().mean()
        for found in (placing(kind=kind).positions(lengths, 64, samples, 0) for kind in ("anchor_offset", "multi_gap"))
    ]
    assert spans[0] == 59 and spans[1] > 1000


def test_a_share_of_the_rows_stays():
    found = placing(share=0.3).positions(torch.full((2000,), 16), 16, torch.arange(2000), 0)
    assert 0.66 < (found[:, -1] == 15).float().mean() < 0.74


def test_draws_depend_on_sample_and_step_alone():
    drawn = placing(kind="multi_gap")
    samples, lengths = torch.tensor([5, 9, 2]), torch.tensor([12, 30, 30])
    together = drawn.positions(lengths, 30, samples, 7)
    assert torch.equal(drawn.positions(lengths[1:2], 30, samples[1:2], 7), together[1:2])
    assert not torch.equal(drawn.positions(lengths, 30, samples, 8), together)
    assert torch.equal(drawn.lags(samples, 7)[1:2], drawn.lags(samples[1:2], 7))


def test_every_step_of_a_round_is_trained():
    counts = torch.bincount(placing().lags(torch.arange(5000), 0), minlength=6)
    assert counts[0] == 0 and counts[1:].min() > 900


def test_what_sees_nothing_of_the_target_has_no_weight():
    found = placing().taught(torch.ones(2, 5), torch.tensor([1, 3]), torch.arange(5).expand(2, -1))
    assert found.tolist() == [[0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]


@given(st.integers(0, 5), st.lists(st.integers(1, 3), min_size=11, max_size=11))
def test_nothing_is_learnt_right_behind_a_jump(settling, steps):
    positions = torch.tensor([[0, *steps]]).cumsum(1)
    found = placing(settling=settling).taught(torch.full((1, 12), 0.5), torch.tensor([0]), positions)[0].tolist()
    jumps = [time for time, step in enumerate(steps, 1) if step > 1]
    assert found == [0.5 * all(not 0 <= time - jump < settling for jump in jumps) for time in range(12)]


def test_more_positions_than_the_target_has_are_refused():
    with pytest.raises(UserError, match="served is 5000, but the target has 4096 positions"):
        placing(served=5000)
