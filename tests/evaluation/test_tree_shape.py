"""Shapes of trees: what is replayed of them, and that the fastest is found."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from drafttrain.evaluation.tree_shape import Ranks, TreeCosts, best_shape, rated

WIDEST = (4, 4, 4)


def drawn(rounds: int = 3000, first: float = 0.6, places: int = 4, depth: int = 3, seed: int = 0) -> Ranks:
    """The token at place r of a level is accepted with probability first / 2^r of what the others leave."""
    random = np.random.default_rng(seed)
    chances = np.array([first / 2**place for place in range(places)])
    chances = chances / max(1.0, chances.sum() / 0.95)
    rows = []
    for _ in range(rounds):
        row = []
        while len(row) < depth and (u := random.random()) < chances.sum():
            row.append(int(np.searchsorted(chances.cumsum(), u)))
        rows.append(row)
    return Ranks(rows)


def costs(slope: float, draft: float = 0.1, token: float = 0.0) -> TreeCosts:
    return TreeCosts(0.02, draft, token, {1: 1.0, 101: 1.0 + 100 * slope}, 0.05)


def test_a_tree_accepts_as_far_as_the_accepted_places_are_its_own():
    ranks = Ranks([[0, 1, 0], [2], [], [0, 0]])
    assert ranks.tau([1, 1, 1]) == 1 + (1 + 0 + 0 + 2) / 4
    assert ranks.tau([1, 2, 1]) == 1 + (3 + 0 + 0 + 2) / 4
    assert ranks.tau([3, 2, 1]) == 1 + (3 + 1 + 0 + 2) / 4
    assert ranks.tau([3]) == 1 + 3 / 4
    assert ranks.tau([3, 2, 1, 9]) == ranks.tau([3, 2, 1])
    assert ranks.tau([]) == 1
    assert ranks.acceptance(1) == [0.5, 0, 0.25] and ranks.acceptance(2) == [1 / 3, 1 / 3]


def test_a_round_costs_its_forwards_its_tokens_and_the_target():
    one = TreeCosts(0.1, 0.2, 0.01, {1: 1.0, 11: 2.0}, 0.05)
    assert one.of([2, 3]) == pytest.approx(0.1 + 2 * 0.2 + 3 * 0.01 + 1.5 + 0.05)
    assert one.of([]) == 1.0


@pytest.mark.parametrize("slope", [0.0, 0.005, 0.02, 0.1, 0.5])
@pytest.mark.parametrize("first", [0.2, 0.6, 0.9])
def test_the_fastest_of_all_shapes_is_found(slope, first):
    """Against every shape there is up to three levels of four."""
    ranks, price = drawn(first=first), costs(slope)
    every = [
        rated(widths, ranks, price) for depth in range(4) for widths in itertools.product((1, 2, 3, 4), repeat=depth)
    ]
    assert best_shape(ranks, price, WIDEST).speedup == pytest.approx(max(shape.speedup for shape in every), rel=0.005)


def test_where_width_is_dear_a_chain_is_chosen_and_where_it_is_free_a_tree():
    ranks = drawn()
    dear = best_shape(drawn(first=0.8, places=1), costs(0.2, draft=0.02), WIDEST)
    assert dear.chain and dear.widths
    assert best_shape(ranks, costs(0.0), WIDEST).widths == WIDEST
    middle = best_shape(ranks, costs(0.05), WIDEST)
    assert not middle.chain and sum(middle.widths) < 12


def test_where_drafting_cannot_pay_nothing_is_drafted():
    found = best_shape(drawn(first=0.05), costs(0.3, draft=0.9), WIDEST)
    assert found.widths == () and found.speedup == 1.0


def test_a_limit_of_tokens_is_kept():
    assert sum(best_shape(drawn(), costs(0.0), WIDEST, most=7).widths) <= 7
