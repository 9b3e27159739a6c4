"""From counts to speed: the cost model of speculative decoding; measure.py finds the costs of a machine.

    predicted speed-up = N / (sum_m F_m c_m + sum_rounds v(w_r) + R o)

with N emitted tokens, F_m forwards of member m at c_m each, R rounds whose target forward of width w_r costs v(w_r),
and o for the rest of a round; all costs in autoregressive steps of the target. With v(w) = 1 and o = 0 it is the
published N / (N_draft c + N_target) (SpecDec++, eq. 2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from drafttrain.decoding.counts import Counts
from drafttrain.evaluation.replay import Tally

if TYPE_CHECKING:
    from drafttrain.evaluation.schema import Costs


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

    def cost(self, run: Tally | Counts, member: str = "drafter") -> float:
        """What decoding as counted costs, in autoregressive steps.

        Args:
            run: a replay, or the decoder's counts.
            member: whose forwards a replay's drafted tokens are.

        Raises:
            KeyError: a member whose cost is not known.
        """
        counts = run.counts(member) if isinstance(run, Tally) else run
        draft = sum(forwards * self.c[name] for name, forwards in counts.draft_forwards.items())
        verify = sum(rounds * self.verify(width) for width, rounds in widths_of(counts).items())
        return draft + verify + counts.rounds * self.o

    def predicted_speedup(self, run: Tally | Counts, member: str = "drafter") -> float:
        """Speed-up over autoregressive decoding; arguments as in `cost`."""
        return run.tokens / self.cost(run, member)


def widths_of(counts: Counts) -> dict[int, int]:
    """Target forwards by width: rounds that drafted exactly k tokens are those with a k-th token but no k+1-th."""
    reach = [counts.rounds, *counts.drafted_at, 0]
    exactly = {place + 1: reach[place] - reach[place + 1] for place in range(len(reach) - 1)}
    return {width: rounds for width, rounds in exactly.items() if rounds}
