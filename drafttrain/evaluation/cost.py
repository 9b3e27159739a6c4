"""From counts to speed: the cost model of speculative decoding, and its measurement on a machine.

    predicted speed-up = N / (sum_m F_m c_m + sum_rounds v(w_r) + R o)

with N emitted tokens, F_m forwards of member m at c_m each, R rounds whose target forward of width w_r costs v(w_r),
and o for the rest of a round; all costs in autoregressive steps of the target. With v(w) = 1 and o = 0 it is the
published N / (N_draft c + N_target) (SpecDec++, eq. 2.1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from drafttrain.decoding.counts import Counts
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.evaluation.replay import Tally
from drafttrain.ops.sampling import Sampling

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


def best(runs: Sequence[Tally | Counts], costs: CostModel) -> int:
    """Index of the run that the cost model finds fastest."""
    return int(np.argmax([costs.predicted_speedup(run) for run in runs]))


def best_by_group(tallies: Sequence[Tally], costs: CostModel) -> dict[str, int]:
    """For every group, the index of the tally that is fastest there: each task's own best setting."""
    return {group: best([tally.of(group) for tally in tallies], costs) for group in tallies[0].groups}


def gap_closed(speedup: float, best_fixed: float, oracle: float) -> float:
    """Share of the way from the best fixed length to perfect stopping; nan where there is no way to go."""
    return (speedup - best_fixed) / (oracle - best_fixed) if oracle > best_fixed else float("nan")


# ---------------------------------------------------------------------------------------------------------------------
# Measurement


@dataclass(frozen=True)
class Measured:
    """Costs of a pair on this machine.

    Attributes:
        model: what predictions are made with.
        step_seconds: one target forward of width 1, the unit.
        spread: by what was timed ("target 1", "drafter"), (quartile 3 - quartile 1) / median.
    """

    model: CostModel
    step_seconds: float
    spread: dict[str, float]


def measure_costs(
    target: Engine,
    drafters: Mapping[str, Engine],
    widths: Sequence[int] = tuple(range(1, 14)),
    context: int = 256,
    repeats: int = 20,
    warm_up: int = 3,
) -> Measured:
    """Time forwards of a pair behind a context, all in turn, so that what the machine does meanwhile hits all alike.

    Args:
        target: its forwards are timed at every width, with logits at all positions.
        drafters: by name; timed at width 1, logits and argmax included.
        widths: must contain 1.
        context: tokens in the caches.
        repeats: timings of each, of which the median counts.
        warm_up: rounds before that.

    Raises:
        ValueError: width 1 is missing.
    """
    if 1 not in widths:
        raise ValueError("the unit is a target forward of width 1: widths must contain 1")
    timed = {f"target {width}": _forward(target, context, width) for width in widths}
    timed |= {name: _forward(drafter, context, 1) for name, drafter in drafters.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(warm_up + repeats):
        for name, run in timed.items():
            elapsed = run()
            if repeat >= warm_up:
                seconds[name].append(elapsed)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    unit = median["target 1"]
    c = {name: median[name] / unit for name in drafters}
    v = {width: median[f"target {width}"] / unit for width in widths}
    loops = [_round_seconds(target, drafter, context, repeats) / unit for drafter in drafters.values()]
    free = [loop - _LOOP_LENGTH * c[name] for name, loop in zip(drafters, loops, strict=True)]
    o = max(0.0, min(free) - CostModel(c, v).verify(_LOOP_LENGTH + 1)) if free else 0.0
    spread = {
        name: float(np.subtract(*np.percentile(values, [75, 25]))) / median[name] for name, values in seconds.items()
    }
    return Measured(CostModel(c, v, o), unit, spread)


_LOOP_LENGTH = 4
"""Drafted tokens of the rounds from which the loop's own cost is taken."""


@torch.inference_mode()
def _forward(engine: Engine, context: int, width: int) -> Callable[[], float]:
    """A function that runs one forward behind the context, takes it back, and returns its seconds."""
    cache = engine.new_cache(1, context + width)
    engine.read(cache, [_tokens(engine, context)])
    block = torch.tensor([_tokens(engine, width)], device=engine.device)

    @torch.inference_mode()
    def run() -> float:
        started = _now(engine)
        engine.forward(cache, block).logits.argmax(-1)
        elapsed = _now(engine) - started
        cache.rollback([context])
        return elapsed

    return run


def _round_seconds(target: Engine, drafter: Engine, context: int, rounds: int) -> float:
    """Median seconds of a whole round of the decoder at a fixed length."""
    decoder = Decoder(target, ModelDrafter(drafter, length=_LOOP_LENGTH), Sampling(temperature=0.0))
    seconds = []
    for _ in range(3):
        [completion] = decoder.generate([_tokens(target, context)], max(2 * _LOOP_LENGTH, rounds))
        seconds.append(completion.counts.decode_seconds / completion.counts.rounds)
    return float(np.median(seconds))


def _tokens(engine: Engine, count: int) -> list[int]:
    """Tokens spread over the vocabulary, always the same."""
    return [(7919 * place + 1) % engine.vocabulary for place in range(count)]


def _now(engine: Engine) -> float:
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return time.perf_counter()
