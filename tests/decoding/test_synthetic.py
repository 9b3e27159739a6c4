"""Synthetic acceptance: drafts are accepted at the given rates, whatever the models say, and nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.decoding.draft import Draft
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import Confidence
from drafttrain.decoding.synthetic import SyntheticAcceptance
from drafttrain.decoding.verify import Verdict
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama

GREEDY = Sampling(0.0)
RATES = (0.8, 0.6, 0.3)
PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 3, 4], [1, 2, 3], [20, 4]]


@pytest.fixture(scope="module")
def engines():
    """Two models that have nothing in common: none of the drafts would be accepted."""
    target, drafter = (build_llama(24, layers=1, hidden=16, seed=seed, max_position_embeddings=4096) for seed in (3, 9))
    return Engine(target.double()), Engine(drafter.double())


def decoder(engines, rates, sampling=GREEDY, length=4, seed=0, **drafting):
    drafter = ModelDrafter(engines[1], **(drafting or {"length": length}))
    return Decoder(engines[0], drafter, sampling, seed=seed, synthetic=SyntheticAcceptance(rates))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)])
def test_every_place_is_accepted_at_its_rate(engines, sampling):
    found = decoder(engines, RATES, sampling).generate([[1 + row % 20] for row in range(24)], 160)
    total = sum(each.counts for each in found)
    for place, rate in enumerate((*RATES, RATES[-1])):
        reached = total.reached_at[place]
        assert reached > 80
        spread = math.sqrt(reached * rate * (1 - rate))
        assert abs(total.accepted_at[place] - reached * rate) < 5 * spread
    expected = 1 + 0.8 + 0.8 * 0.6 + 0.8 * 0.6 * 0.3 + 0.8 * 0.6 * 0.3 * 0.3
    assert SyntheticAcceptance(RATES).tau(4) == pytest.approx(expected)
    assert total.tau == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)])
def test_rates_of_0_and_1_are_exact(engines, sampling):
    [none] = decoder(engines, [0.0], sampling).generate([[1, 2]], 30)
    assert none.counts.rounds == 30 and none.counts.accepted == 0 and set(none.sources) == {"target"}
    [all_of_them] = decoder(engines, [1.0], sampling).generate([[1, 2]], 30)
    assert all_of_them.counts.rounds == 6 and all_of_them.counts.discarded == 0
    [first] = decoder(engines, [1.0, 0.0], sampling).generate([[1, 2]], 30)
    assert first.counts.rounds == 15 and first.counts.accepted_at[:2] == [15, 0]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8)])
def test_rows_of_a_batch_draw_as_single_rows_do(engines, sampling):
    together = decoder(engines, RATES, sampling).generate(PROMPTS, [30, 7, 41, 12, 25])
    for row, (prompt, limit) in enumerate(zip(PROMPTS, [30, 7, 41, 12, 25], strict=True)):
        [alone] = decoder(engines, RATES, sampling).generate([prompt], limit, [row])
        assert (alone.token_ids, alone.sources) == (together[row].token_ids, together[row].sources)
        assert alone.counts.accepted_at == together[row].counts.accepted_at


def test_an_accepted_token_is_the_drafted_one_and_other_seeds_accept_others(engines):
    accepted = []
    for seed in (0, 1):
        [found] = decoder(engines, [0.5], seed=seed).generate([[1, 2]], 60)
        accepted.append([place for place, source in enumerate(found.sources) if source != "target"])
        assert 5 < len(accepted[-1]) < 50
    assert accepted[0] != accepted[1]
    [found] = decoder(engines, [1.0], length=8).generate([[1, 2]], 9)
    [plain] = Decoder(engines[1], None, GREEDY).generate([[1, 2]], 8)
    assert found.token_ids[:8] == plain.token_ids


def test_an_adaptive_rule_drafts_what_it_would_and_no_more_is_accepted(engines):
    found = decoder(engines, [1.0], stop=Confidence(0.9, max_length=5)).generate(PROMPTS, 40)
    total = sum(each.counts for each in found)
    assert total.discarded == 0 and total.accepted == total.drafted
    assert total.drafted_at[0] > total.drafted_at[-1] > 0


def test_a_completion_says_that_it_is_no_text_of_the_target(engines):
    assert decoder(engines, RATES).generate([[1, 2]], 4)[0].synthetic
    assert not Decoder(engines[0], None, GREEDY).generate([[1, 2]], 4)[0].synthetic
    assert not Decoder(engines[0], ModelDrafter(engines[1], 3), GREEDY).generate([[1, 2]], 4)[0].synthetic


@given(st.data())
def test_the_verdict_is_the_leading_tokens_whose_draws_lie_below_their_rates(data):
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    rates = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=7))
    lengths = data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows))
    uniforms = st.lists(st.floats(0, 1, exclude_max=True), min_size=width, max_size=width)
    u = data.draw(st.lists(uniforms, min_size=rows, max_size=rows))
    real = torch.tensor(data.draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    draft = Draft(torch.arange(rows * width).reshape(rows, width), torch.tensor(lengths))
    emitted = 100 + torch.arange(rows * (width + 1)).reshape(rows, width + 1)
    acceptance = SyntheticAcceptance(rates)
    found = acceptance.exchange(Verdict(real, emitted), draft, torch.tensor(u, dtype=torch.float64))
    for row in range(rows):
        count = 0
        while count < lengths[row] and u[row][count] < acceptance.rate(count):
            count += 1
        assert found.accepted_B[row] == count
        tokens = [*draft.tokens_BK[row, :count].tolist(), int(emitted[row, real[row]])]
        assert found.emitted[row, : count + 1].tolist() == tokens


@pytest.mark.parametrize(("rates", "told"), [([], "at least one rate"), ([0.5, 1.5], "1.5"), ([-0.1], "-0.1")])
def test_impossible_rates_are_refused(rates, told):
    with pytest.raises(UserError, match=told):
        SyntheticAcceptance(rates)


def test_without_a_drafter_there_is_nothing_to_accept(engines):
    with pytest.raises(UserError, match="needs a drafter"):
        Decoder(engines[0], None, GREEDY, synthetic=SyntheticAcceptance(RATES))
