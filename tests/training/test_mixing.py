"""Token mixing: its rate, its draws, and which positions are trained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.training.mixing import mix_tokens

tokens = st.lists(st.integers(0, 3), min_size=0, max_size=30)


@given(tokens, st.floats(0, 1), st.integers(0, 5), st.integers(0, 1000), st.data())
def test_every_position_holds_x_or_y_and_is_trained_where_it_holds_y(x, rate, epoch, sample, data):
    y = data.draw(st.lists(st.integers(0, 3), min_size=len(x), max_size=len(x)))
    x, y = torch.tensor(x, dtype=torch.long), torch.tensor(y, dtype=torch.long)
    z, trained = mix_tokens(x, y, rate, seed=1, epoch=epoch, sample=sample)
    assert ((z == x) | (z == y)).all()
    assert torch.equal(trained, z == y)
    assert trained[x == y].all()


def test_the_rate_is_the_share_of_the_targets_tokens():
    x, y = torch.zeros(20000, dtype=torch.long), torch.ones(20000, dtype=torch.long)
    z, trained = mix_tokens(x, y, 0.15, seed=0, epoch=0, sample=7)
    assert (z == 0).double().mean() == pytest.approx(0.15, abs=0.01)
    assert trained.double().mean() == pytest.approx(0.85, abs=0.01)


def test_the_ends_of_the_rate():
    x, y = torch.zeros(50, dtype=torch.long), torch.ones(50, dtype=torch.long)
    assert torch.equal(mix_tokens(x, y, 0.0, seed=0, epoch=0, sample=0)[0], y)
    assert torch.equal(mix_tokens(x, y, 1.0, seed=0, epoch=0, sample=0)[0], x)


def test_draws_are_new_each_epoch_and_sample_and_the_same_otherwise():
    x, y = torch.zeros(200, dtype=torch.long), torch.ones(200, dtype=torch.long)

    def mixed(seed=0, epoch=0, sample=3):
        return mix_tokens(x, y, 0.5, seed=seed, epoch=epoch, sample=sample)[0]

    assert torch.equal(mixed(), mixed())
    for other in (mixed(epoch=1), mixed(sample=4), mixed(seed=1)):
        assert not torch.equal(mixed(), other)


def test_a_prefix_draws_the_same_as_the_whole():
    x, y = torch.zeros(80, dtype=torch.long), torch.ones(80, dtype=torch.long)
    whole = mix_tokens(x, y, 0.5, seed=0, epoch=2, sample=9)[0]
    part = mix_tokens(x[:30], y[:30], 0.5, seed=0, epoch=2, sample=9)[0]
    assert torch.equal(whole[:30], part)


def test_wrong_lengths_and_rates_are_refused():
    with pytest.raises(ValueError, match="drafted"):
        mix_tokens(torch.zeros(2), torch.zeros(3), 0.1, seed=0, epoch=0, sample=0)
    with pytest.raises(ValueError, match="rate"):
        mix_tokens(torch.zeros(2), torch.zeros(2), 1.5, seed=0, epoch=0, sample=0)
