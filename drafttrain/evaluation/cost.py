"""From counts to speed: the cost model of speculative decoding; measure.py finds the costs of a machine.

    predicted speed-up = N / (sum_m F_m c_m + sum_rounds v(w_r) + R o)

with N emitted tokens, F_m forwards of member m at c_m each, R rounds whose target forward of width w_r costs v(w_r),
and o for the rest of a round; all costs in autoregressive steps of the target. With v(w) = 1 and o = 0 it is the
published N / (N_draft c + N_target) (SpecDec++, eq. 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from drafttrain.decoding.counts import Counts
    from drafttrain.evaluation.schema import Costs, Figures


@dataclass(frozen=True)
class CostModel:
    """Costs in units of one autoregressive step of the target.

    Attributes:
        c: of one forward of each drafting member.
        v: of a target forward by width; widths between those given are on straight lines, beyond the widest the last
            slope goes on.
        o: of the rest of a round.
    """

    c: Mapping[str, float]
    v: Mapping[int, float]
    o: float = 0.0

    def __post_init__(self) -> None:
        if not self.v or min(self.v) < 1:
            raise ValueError("v needs the cost of at least one width, and widths start at 1")

    @classmethod
    def of(cls, costs: Costs) -> CostModel:
        """From the costs in a report."""
        return cls(costs.c, dict(enumerate(costs.v, start=1)), costs.o)

    def verify(self, width: int) -> float:
        """v(width)."""
        widths = sorted(self.v)
        if width <= widths[-1] or len(widths) == 1:
            return float(np.interp(width, widths, [self.v[known] for known in widths]))
        last, before = widths[-1], widths[-2]
        slope = (self.v[last] - self.v[before]) / (last - before)
        return self.v[last] + max(0.0, slope) * (width - last)

    def cost(self, counts: Figures | Counts) -> float:
        """What decoding as counted costs, in autoregressive steps.

        Raises:
            KeyError: a member whose cost is not known.
        """
        draft = sum(forwards * self.c[name] for name, forwards in counts.draft_forwards.items())
        verify = sum(rounds * self.verify(width) for width, rounds in widths_of(counts).items())
        return draft + verify + counts.rounds * self.o

    def predicted_speedup(self, counts: Figures | Counts) -> float:
        """Speed-up over autoregressive decoding."""
        return counts.tokens / self.cost(counts)


def predict(figures: Figures | Counts, costs: Costs) -> float:
    """Speed-up that a method's own counts and the measured costs predict."""
    return CostModel.of(costs).predicted_speedup(figures)


def halved(figures: Figures, costs: Costs) -> dict[str, float]:
    """Predicted speed-up with half of what tau, c, v or o costs gone, each alone."""
    half_c = {name: value / 2 for name, value in costs.c.items()}
    half_v = [(value + costs.v[0]) / 2 for value in costs.v]
    return {
        "tau": _tau_gain(figures) * predict(figures, costs),
        "c": predict(figures, replace(costs, c=half_c)),
        "v": predict(figures, replace(costs, v=half_v)),
        "o": predict(figures, replace(costs, o=costs.o / 2)),
    }


def _tau_gain(figures: Figures) -> float:
    """How many times as many tokens a round gives when each position is rejected half as often.

    Drafts keep their lengths: with d_i the share of rounds that draft position i and a_j the conditional acceptance,
    the model is tau = 1 + sum_i d_i a_1 ... a_i, taken with a_j and with (1 + a_j) / 2. The ratio of the two is used,
    which forgives the model that d_i and the a_j are not independent under an adaptive rule.
    """
    now, then, chain_now, chain_then = 1.0, 1.0, 1.0, 1.0
    for drafted, accepted in zip(figures.drafted_at, figures.acceptance_conditional, strict=True):
        chain_now *= accepted
        chain_then *= (1 + accepted) / 2
        now += drafted / figures.rounds * chain_now
        then += drafted / figures.rounds * chain_then
    return then / now


def widths_of(counts: Figures | Counts) -> dict[int, float]:
    """Target forwards by width.

    Rounds that drafted chains of exactly k tokens are those with a k-th token but no k+1-th. Trees are counted by their
    tokens; where some rounds drafted trees and others chains, the lengths of all are taken for those of the chains.
    """
    reach = [counts.rounds, *counts.drafted_at, 0]
    exactly = {place + 1: reach[place] - reach[place + 1] for place in range(len(reach) - 1)}
    if trees := sum(counts.trees_of):
        chains = 1 - trees / reach[1]
        exactly = {width: rounds if width == 1 else chains * rounds for width, rounds in exactly.items()}
        for tokens, rounds in enumerate(counts.trees_of):
            exactly[tokens + 1] = exactly.get(tokens + 1, 0) + rounds
    return {width: rounds for width, rounds in exactly.items() if rounds}
