"""Load: what a report holds of larger batches, and the batch size at which speculation stops paying, also in words.

Speculation spends computation to save memory traffic. A batch saves traffic too, so the wider it is, the more a drafted
token costs and the less it gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from drafttrain.evaluation.statistics import Interval


@dataclass
class LoadPoint:
    """One method at one batch size."""

    method: str
    tokens_per_second: float
    """of the whole batch, prefill left out"""
    latency_median: float
    """seconds from the start of the batch, prefill included, to the end of a request; the median over requests"""
    latency_95: float
    """their 95th percentile"""
    live_rows: float
    """rows decoded in a round, on the mean: a batch shrinks as its answers end"""
    speedup: Interval | None = None
    """throughput over that of the baseline at the same batch size; None of the baseline itself"""


@dataclass
class LoadBatch:
    """All methods at one batch size."""

    batch_size: int
    points: list[LoadPoint]
    """the baseline first"""
    v: list[float]
    """cost of a target forward of width 1, 2, ... over all rows, in forwards of width 1 of as many rows"""


@dataclass
class BreakEven:
    """Where a method stops paying."""

    method: str
    batch_size: int | None
    """the smallest size measured from which on no interval of the speed-up lies above 1; None: not within them"""
    crossing: float | None
    """where the speed-up falls to 1 for good, on a straight line over log(batch size) between sizes measured; None:
    nowhere"""


@dataclass
class Load:
    """The same requests at several batch sizes, under one decoding setting."""

    sampling: str
    requests: int
    repeated: int
    """of those, questions asked again with other draws, for want of prompts"""
    prompts: int
    """conversations that the requests are turns of"""
    batches: list[LoadBatch]
    """by rising size"""
    break_even: list[BreakEven]
    """one a method, the baseline left out"""

    def speedups(self, method: str) -> dict[int, Interval]:
        """Speed-up of a method by batch size; nothing of the baseline."""
        points = [(batch.batch_size, point) for batch in self.batches for point in batch.points]
        return {size: point.speedup for size, point in points if point.method == method and point.speedup}


def break_even(method: str, speedups: Mapping[int, Interval]) -> BreakEven:
    """Find where a method stops paying.

    Args:
        method: its expression.
        speedups: over the baseline at the same batch size, by batch size, at least one.
    """
    sizes = sorted(speedups)
    paying = [size for size in sizes if speedups[size].low > 1]
    stops = next((size for size in sizes if not paying or size > paying[-1]), None)
    above = [size for size in sizes if speedups[size].value > 1]
    if not above or above[-1] == sizes[-1]:
        return BreakEven(method, stops, None)
    a, b = above[-1], sizes[sizes.index(above[-1]) + 1]
    share = (speedups[a].value - 1) / (speedups[a].value - speedups[b].value)
    return BreakEven(method, stops, math.exp((1 - share) * math.log(a) + share * math.log(b)))


def told(load: Load, found: BreakEven) -> str:
    """Where a method stops paying, in a sentence."""
    speedups = load.speedups(found.method)
    sizes = sorted(speedups)
    if found.batch_size is None:
        last = f"{speedups[sizes[-1]]:.2f} times as fast at {sizes[-1]}"
        listed = ", ".join(map(str, sizes))
        line = f"pays at every batch size measured ({listed}; {last}): where it stops is not within them"
    elif found.batch_size == sizes[0]:
        line = f"is not shown to pay at any batch size measured ({speedups[sizes[0]]:.2f} times as fast at {sizes[0]})"
    else:
        line = f"stops paying at a batch of {found.batch_size} ({speedups[found.batch_size]:.2f} times as fast)"
    if found.crossing is not None:
        line += f"; between the sizes measured its speed-up falls to 1 at a batch of about {found.crossing:.1f}"
    return f"`{found.method}` {line}."
