"""Stopping rules by themselves: when they stop, and that stops are the replay's conventions."""

from __future__ import annotations

import math

import pytest
import torch

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import (
    AcceptanceHeadRule,
    Confidence,
    EntropyBound,
    FixedLength,
    Oracle,
    Step,
)
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from tests.decoding.support import greedy_matches, pair


def step(number: int, q: list[float], hidden: list[float] | None = None) -> Step:
    """A step whose drawn token, 0, had probability q in each row; three equal others share the rest."""
    probs = torch.tensor([[p, *[(1 - p) / 3] * 3] for p in q])
    states = torch.tensor(hidden or [0.0] * len(q)).unsqueeze(1)
    return Step(number, torch.zeros(len(q), dtype=torch.int64), states, lambda: probs)


def stops(rule, steps: list[Step]) -> list[int | None]:
    """The step at which each row first stops."""
    rule.begin(len(steps[0].tokens_B))
    first: list[int | None] = [None] * len(steps[0].tokens_B)
    for each in steps:
        answer = rule.stop(each)
        for row, stop in enumerate(answer.tolist() if answer is not None else []):
            if stop and first[row] is None:
                first[row] = each.number
    return first


def test_confidence_multiplies_over_the_block():
    steps = [step(1, [0.9, 0.5]), step(2, [0.7, 0.9]), step(3, [0.9, 0.9])]
    assert stops(Confidence(0.4), steps) == [3, 1]  # 1 - .9 * .7 = .37, 1 - .567 = .433
    assert stops(Confidence(0.56), steps) == [None, 3]  # .45 * .9


def test_confidence_a_token_looks_at_one_token():
    steps = [step(1, [0.9, 0.5]), step(2, [0.7, 0.9]), step(3, [0.5, 0.9])]
    assert stops(Confidence(0.4, per_token=True), steps) == [3, 1]


def test_the_threshold_itself_does_not_stop():
    assert stops(Confidence(0.5), [step(1, [0.5])]) == [None]


def test_a_new_block_forgets_the_last():
    rule = Confidence(0.4)
    assert stops(rule, [step(1, [0.7]), step(2, [0.7])]) == [2]
    assert stops(rule, [step(1, [0.7])]) == [None]


def test_entropy_is_that_of_the_distribution_in_nats():
    uniform = math.log(4)
    assert stops(EntropyBound(uniform - 1e-3), [step(1, [0.25, 0.97])]) == [1, None]
    assert stops(EntropyBound(uniform + 1e-3), [step(1, [0.25, 0.97])]) == [None, None]


class Recorder:
    """A head that remembers what it was asked and answers 0.8 for everything."""

    def __init__(self, state: str, features=("log_q", "entropy", "step")) -> None:
        self.state, self.features, self.asked = state, features, []

    def score(self, hidden_BH, q_B, entropy_B, step_B):
        self.asked.append((hidden_BH, q_B, entropy_B, step_B))
        return torch.full((len(hidden_BH),), 0.8)


STEPS = [step(1, [0.9], [1.0]), step(2, [0.6], [2.0]), step(3, [0.3], [3.0])]


def test_a_head_on_the_producing_state_scores_the_token_just_drawn():
    head = Recorder("producing")
    assert stops(AcceptanceHeadRule(head, 0.45), STEPS) == [3]
    for number, (asked, q) in enumerate(zip(head.asked, (0.9, 0.6, 0.3), strict=True), start=1):
        hidden, q_B, entropy, place = asked
        assert (hidden.item(), place.item()) == (number, number)
        assert q_B.item() == pytest.approx(q)
        assert entropy.item() == pytest.approx(STEPS[number - 1].entropy_B.item())


def test_a_head_on_the_consumed_state_scores_the_token_before_with_the_state_that_read_it():
    """The published form: one forward later, so the block's last token is unscored."""
    head = Recorder("consumed")
    assert stops(AcceptanceHeadRule(head, 0.3), STEPS) == [3]  # 1 - .8 * .8 = .36 is known only now
    assert len(head.asked) == 2
    hidden, q_B, _, place = head.asked[0]
    assert (hidden.item(), place.item()) == (2, 1)
    assert q_B.item() == pytest.approx(0.9)


def test_a_head_without_features_costs_no_softmax():
    def forbidden():
        raise AssertionError("the distribution was asked for")

    plain = Step(1, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 4), forbidden)
    assert not AcceptanceHeadRule(Recorder("producing", ()), 0.5).stop(plain).item()


def test_impossible_rules_are_refused():
    with pytest.raises(UserError, match="1 <= min <= max"):
        Confidence(0.5, min_length=4, max_length=3)
    with pytest.raises(UserError, match="1 <= min <= max"):
        FixedLength(0)
    with pytest.raises(UserError, match="not a probability"):
        Confidence(1.5)


# ---- in the decoder ----


@pytest.fixture(scope="module")
def engines():
    return tuple(Engine(model) for model in pair())


def drafted(engines, rule, tokens: int = 30):
    drafter = ModelDrafter(engines[1], stop=rule)
    return Decoder(engines[0], drafter, Sampling(0.0)).generate([[1, 5, 3]], tokens)[0].counts


def test_a_rule_that_always_stops_drafts_its_minimum(engines):
    for minimum in (1, 3):
        counts = drafted(engines, EntropyBound(-1.0, minimum, 6))
        assert len(counts.drafted_at) == minimum
        assert counts.drafted_at[0] == counts.drafted_at[-1] + (1 if minimum > 1 else 0)  # the limit cuts the last


def test_a_rule_that_never_stops_drafts_its_maximum(engines):
    never, fixed = drafted(engines, Confidence(1.0, max_length=4)), drafted(engines, FixedLength(4))
    never.prefill_seconds = fixed.prefill_seconds
    never.decode_seconds = fixed.decode_seconds
    assert never == fixed


def test_the_consumed_state_drafts_one_token_more(engines):
    """A head that always wants to stop: at once when producing, one token later when consumed."""

    class Doubt(Recorder):
        def score(self, *features):
            return torch.zeros(len(features[0]))

    assert len(drafted(engines, AcceptanceHeadRule(Doubt("producing"), 0.5)).drafted_at) == 1
    assert len(drafted(engines, AcceptanceHeadRule(Doubt("consumed"), 0.5)).drafted_at) == 2


def test_the_oracle_drafts_what_is_accepted_and_nothing_else(engines):
    prompts = [[1, 5, 3], [2], [7, 8, 9]]
    target, drafter = engines
    plain = Decoder(target, None, Sampling(0.0)).generate(prompts, 25)
    matches = {
        10 + index: greedy_matches(drafter, prompt, completion.token_ids)
        for index, (prompt, completion) in enumerate(zip(prompts, plain, strict=True))
    }
    oracle = Decoder(target, ModelDrafter(drafter, stop=Oracle(matches, 6)), Sampling(0.0))
    best = oracle.generate(prompts, 25, sample_ids=[10, 11, 12])
    assert [c.token_ids for c in best] == [c.token_ids for c in plain]
    total = sum(c.counts for c in best)
    assert total.discarded == 0
    for length in (1, 2, 4, 6):
        fixed = Decoder(target, ModelDrafter(drafter, length), Sampling(0.0)).generate(prompts, 25)
        assert total.rounds <= sum(c.counts for c in fixed).rounds
    assert total.accepted == sum(c.counts for c in fixed).accepted  # length 6, the oracle's own maximum
