"""The cost model agrees with hand-made sums."""

from __future__ import annotations

import numpy as np
import pytest

from drafttrain.decoding.counts import Counts
from drafttrain.evaluation.cost import CostModel, widths_of
from drafttrain.evaluation.policies import FixedPolicy
from drafttrain.evaluation.replay import replay
from drafttrain.evaluation.trace_record import Record

MODEL = CostModel({"drafter": 0.2}, {1: 1.0, 3: 1.2, 5: 1.6}, 0.1)


def rounds(*drafted_and_accepted: tuple[int, int]) -> Counts:
    counts = Counts()
    for drafted, accepted in drafted_and_accepted:
        counts.add_round(accepted + 1, drafted, accepted, {"drafter": drafted}, 0.0)
    return counts


def record(lengths=(40, 60), seed=0) -> Record:
    accepted = np.random.default_rng(seed).random(sum(lengths)) < 0.7
    runs = np.zeros((int((~accepted).sum()), 0), dtype=bool)
    finished = [False] * len(lengths)
    return Record.make(lengths, accepted, np.zeros(len(accepted), bool), runs, finished, None, ["a", "b"])


def test_v_is_straight_between_widths_and_goes_on_beyond():
    assert [MODEL.verify(width) for width in (1, 2, 3, 4, 5, 7)] == pytest.approx([1.0, 1.1, 1.2, 1.4, 1.6, 2.0])
    assert CostModel({}, {1: 1.0}).verify(9) == 1.0


def test_predicted_speedup_is_tokens_over_the_sum_of_costs():
    counts = rounds((2, 2), (2, 0), (4, 3), (0, 0))
    assert widths_of(counts) == {1: 1, 3: 2, 5: 1}
    cost = 8 * 0.2 + (2 * 1.2 + 1.6 + 1.0) + 4 * 0.1
    assert MODEL.cost(counts) == pytest.approx(cost)
    assert MODEL.predicted_speedup(counts) == pytest.approx(9 / cost)


def test_trees_cost_what_their_tokens_do():
    counts = Counts()
    counts.add_round(3, 8, 2, {"drafter": 3}, 0.0, depth=3)
    counts.add_round(1, 8, 0, {"drafter": 3}, 0.0, depth=3)
    counts.add_round(2, 2, 1, {"drafter": 1}, 0.0, depth=1)
    counts.add_round(1, 0, 0, {}, 0.0)
    assert widths_of(counts) == {1: 1, 3: 1, 9: 2}
    assert counts.drafted_at == [3, 2, 2] and counts.accepted_at == [2, 1, 0]
    mixed = counts + rounds((2, 1))
    assert sum(widths_of(mixed).values()) == mixed.rounds
    assert MODEL.cost(counts) == pytest.approx(7 * 0.2 + 2 * MODEL.verify(9) + 1.2 + 1.0 + 4 * 0.1)


def test_autoregressive_decoding_is_the_unit():
    assert CostModel({}, {1: 1.0}).predicted_speedup(Counts(tokens=7, rounds=7, target_forwards=7)) == 1.0


def test_groups_cost_together_what_they_cost_apart():
    [tally] = replay(record(), [FixedPolicy(3)])
    apart = [MODEL.cost(tally.of(group).counts()) for group in tally.groups]
    assert MODEL.cost(tally.counts()) == pytest.approx(sum(apart))


def test_unknown_members_and_widths_are_refused():
    with pytest.raises(KeyError):
        MODEL.cost(rounds((1, 1)) + Counts(draft_forwards={"other": 1}))
    with pytest.raises(ValueError, match="widths"):
        CostModel({}, {})
