"""The shape of a tree from what it costs and what it gives; a chain is one of the shapes.

What it gives is replayed: a wide tree is drafted once, and of every round the places are kept at which the accepted
tokens stood in their levels, best first. A tree of fewer places a level accepts as far as those places are among its
own. (In a narrower tree a token's place can only be better, for there are fewer beside it; so this is a lower bound.)

What it costs, in autoregressive steps of the target:

    begin + sum over levels (level + token * tokens read) + v(1 + tokens) + rest

where the first level reads one token and every other one the level above it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from drafttrain.evaluation.cost import CostModel

PLACES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Widths of a level that are tried."""


@dataclass(frozen=True)
class TreeCosts:
    """Costs in autoregressive steps of the target.

    Attributes:
        begin: of any draft.
        level: of a forward of the drafter, with what is done to find the next level.
        token: of every token that it reads.
        v: of a target forward by width.
        rest: of a round.
    """

    begin: float
    level: float
    token: float
    v: Mapping[int, float]
    rest: float

    def of(self, widths: Sequence[int]) -> float:
        """A round with a tree of this shape; without levels it is an autoregressive step."""
        if not widths:
            return 1.0
        read = 1 + sum(widths[:-1])
        draft = self.begin + len(widths) * self.level + read * self.token
        return draft + CostModel({}, self.v).verify(1 + sum(widths)) + self.rest


@dataclass(frozen=True)
class Shape:
    """A tree, and what replay and costs predict of it.

    Attributes:
        widths: of its levels; none is autoregressive decoding.
        tau: tokens a round.
        speedup: over autoregressive decoding.
    """

    widths: tuple[int, ...]
    tau: float
    speedup: float

    @property
    def chain(self) -> bool:
        """Whether no level has two tokens."""
        return all(width == 1 for width in self.widths)


class Ranks:
    """Places of accepted tokens.

    Args:
        rounds: of every round the places, counted from 0, of the accepted tokens in levels 1, 2, ...

    Attributes:
        depth: levels that any round reached.
    """

    def __init__(self, rounds: Iterable[Sequence[int]]) -> None:
        rows = [list(row) for row in rounds]
        self.depth = max(map(len, rows), default=0)
        never = 1 << 30
        self._places = np.array([row + [never] * (self.depth - len(row)) for row in rows]).reshape(len(rows), -1)

    def tau(self, widths: Sequence[int]) -> float:
        """Tokens a round of a tree of this shape, the target's own among them."""
        levels = min(len(widths), self.depth)
        if not levels:
            return 1.0
        inside = self._places[:, :levels] < np.array(widths[:levels])
        return 1.0 + float(np.logical_and.accumulate(inside, axis=1).sum(1).mean())

    def acceptance(self, level: int) -> list[float]:
        """How often the token at each place of a level was accepted, of rounds that got there: by place."""
        reached = self._places[:, : level - 1] < 1 << 30
        places = self._places[reached.all(1), level - 1]
        counts = np.bincount(places[places < 1 << 30])
        return (counts / max(1, len(places))).tolist()


def best_shape(ranks: Ranks, costs: TreeCosts, widest: Sequence[int], most: int = 256) -> Shape:
    """The fastest shape.

    From every chain, and from nothing, widths are changed level by level to their neighbours in `PLACES`, and levels
    added and taken away, as long as that makes it faster.

    Args:
        ranks: of a tree at least as wide.
        costs: of this pair on this machine.
        widest: the widths of the tree that the ranks are of.
        most: tokens of a tree.
    """
    starts = [(1,) * length for length in range(len(widest) + 1)]
    return max((_climb(start, ranks, costs, widest, most) for start in starts), key=lambda shape: shape.speedup)


def _climb(widths: tuple[int, ...], ranks: Ranks, costs: TreeCosts, widest: Sequence[int], most: int) -> Shape:
    found = rated(widths, ranks, costs)
    while True:
        near = [each for each in _neighbours(found.widths, widest) if sum(each) <= most]
        better = max((rated(each, ranks, costs) for each in near), key=lambda shape: shape.speedup, default=found)
        if better.speedup <= found.speedup:
            return found
        found = better


def rated(widths: Sequence[int], ranks: Ranks, costs: TreeCosts) -> Shape:
    """A shape with what is predicted of it."""
    tau = ranks.tau(widths)
    return Shape(tuple(widths), tau, tau / costs.of(widths))


def _neighbours(widths: tuple[int, ...], widest: Sequence[int]) -> Iterable[tuple[int, ...]]:
    for level, width in enumerate(widths):
        for other in (_next(width, 1), _next(width, -1)):
            if 1 <= other <= widest[level] and other != width:
                yield (*widths[:level], other, *widths[level + 1 :])
    for first in range(len(widths)):  # all levels from one on together: where each alone would be cut by the next
        wider = tuple(min(_next(width, 1), most) for width, most in zip(widths[first:], widest[first:], strict=False))
        yield (*widths[:first], *wider)
    if widths:
        yield widths[:-1]
    if len(widths) < len(widest):
        yield from ((*widths, more) for more in {1, min(widths[-1] if widths else 1, widest[len(widths)])})


def _next(width: int, step: int) -> int:
    at = min(range(len(PLACES)), key=lambda place: abs(PLACES[place] - width))
    return PLACES[min(max(at + step, 0), len(PLACES) - 1)]
