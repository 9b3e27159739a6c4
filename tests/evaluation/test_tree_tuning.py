"""Tuning a tree's shape on a tiny pair: what replay predicts of other shapes is what they give."""

from __future__ import annotations

import pytest
import torch

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.runner import Round
from drafttrain.evaluation.tree_shape import Ranks
from drafttrain.evaluation.tree_tuning import Places, costs_of, tune_tree
from drafttrain.ops.sampling import Sampling
from tests.decoding.support import pair

GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def engines():
    target, drafter = pair()
    return Engine(target), Engine(drafter)


def questions(count: int, limit: int = 40) -> list[Question]:
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(0, 24, (count, 6), generator=generator).tolist()
    return [Question(f"p{number}", "", 0, tuple(ids), limit, None, number) for number, ids in enumerate(prompts)]


def counts_of(engines, drafter, asked):
    decoder = Decoder(engines[0], drafter, GREEDY)
    return sum(own.counts for own in decoder.generate([each.ids for each in asked], [each.limit for each in asked]))


@pytest.mark.parametrize("widths", [[1, 1, 1], [3, 2, 1], [2, 4, 4], [8, 8, 8]])
def test_a_wide_tree_tells_what_other_shapes_would_accept(engines, widths):
    asked = questions(24)
    watched = Places(TreeDrafter(engines[1], [8, 8, 8]), [8, 8, 8])
    counts_of(engines, watched, asked)
    measured = counts_of(engines, TreeDrafter(engines[1], widths), asked)
    assert Ranks(watched.rounds).tau(widths) == pytest.approx(measured.tau, rel=0.08)


def test_watching_changes_nothing(engines):
    asked = questions(3)
    plain, watched = TreeDrafter(engines[1], [4, 3]), Places(TreeDrafter(engines[1], [4, 3]), [4, 3])
    assert counts_of(engines, plain, asked).accepted_at == counts_of(engines, watched, asked).accepted_at
    assert all(len(row) <= 2 and all(0 <= place < 4 for place in row) for row in watched.rounds)


def test_costs_are_what_the_rounds_were_made_of():
    def rounds(widths: tuple[int, ...]) -> list[Round]:
        draft = 0.1 + 0.2 * len(widths) + 0.01 * (1 + sum(widths[:-1]))
        verify = 1 + 0.02 * sum(widths)
        total = draft + verify + 0.07
        return [Round(0.0, 2 * draft, 2 * verify, 2 * total, 1 + sum(widths), unit=2.0) for _ in range(3)]

    alone = [Round(0.0, 0.0, 2.0, 2.1, 1, unit=2.0)]
    short = Round(0.0, 9.0, 9.0, 30.0, 2, unit=2.0)
    found = costs_of({s: [*rounds(s), short] for s in [(1, 1), (4, 4), (4, 8, 8), (1,) * 6]}, alone)
    assert (found.begin, found.level, found.token) == pytest.approx((0.1, 0.2, 0.01))
    assert found.rest == pytest.approx(0.07)
    assert found.of([4, 8]) == pytest.approx(0.1 + 0.4 + 0.05 + 1.24 + 0.07)


def test_a_shape_is_tuned_from_real_runs(engines):
    target, engine = engines
    tuned = tune_tree(lambda widths: TreeDrafter(engine, widths), target, GREEDY, questions(3, 20), widest=(4, 8, 8, 4))
    shape = tuned.shape
    assert shape.speedup >= 1.0 and shape.tau == tuned.ranks.tau(shape.widths)
    assert all(own <= most for own, most in zip(shape.widths, (4, 8, 8, 4), strict=False))
    assert tuned.costs.v[1] > 0 and tuned.costs.of([1]) > tuned.costs.v[1]  # what each part costs, load decides here
