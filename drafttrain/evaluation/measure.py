"""Costs from instrumented runs: c of a draft step, v(w) of a target forward of width w, o of the rest of a round.

All are in units of one autoregressive step as decoded, its loop included: then the predicted speed-up is a ratio of
decoding rates, as the measured one is. c includes drawing the token and asking the stopping rule; what a draft costs
however short it is belongs to the round, to o.

The slowest rounds of each width are left out: on a shared machine a round now and then waits for somebody else, which
says nothing of the method. What is left out is the same share for every method, the baseline among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from drafttrain.evaluation.runner import Round, Timings
from drafttrain.evaluation.schema import Breakdown, Costs

SLOWEST = 0.05
"""Share of the rounds of a width that is left out."""


def step_seconds(baseline: Timings) -> float:
    """One autoregressive step, loop included: the unit of all costs."""
    return float(np.mean([each.total for each in typical(baseline.rounds)]))


def costs_of(method: Timings, baseline: Timings, verify: Sequence[float]) -> Costs:
    """Costs of a kind of drafting.

    Args:
        method: instrumented runs of it.
        baseline: instrumented autoregressive runs.
        verify: v(1), v(2), ... as `verify_costs` gives them.
    """
    unit = step_seconds(baseline)
    rounds = [each for each in typical(method.rounds) if each.steps]
    if not rounds:
        return Costs(unit, {}, list(verify), 0.0)
    begin, step = draft_line([each.steps for each in rounds], [each.draft for each in rounds])
    loop = float(np.mean([each.loop for each in rounds]))
    c = dict.fromkeys(method.counts.draft_forwards, step / unit)
    return Costs(unit, c, list(verify), (loop + begin) / unit)


def draft_line(steps: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds to begin a draft, and seconds a step, by least squares over rounds of different lengths."""
    if len(set(steps)) > 1:
        step, begin = np.polyfit(steps, seconds, 1)
        if step > 0 and begin > 0:
            return float(begin), float(step)
    return 0.0, sum(seconds) / sum(steps)


def verify_costs(timings: Iterable[Timings], baseline: Timings, widths: int) -> list[float]:
    """v(1) .. v(widths), widths that did not occur by straight lines between those that did.

    Beyond the widest one seen the mean slope goes on. A wider forward costs no less than a narrower one: where a few
    rounds say otherwise it is noise, and neighbours are pooled by their numbers of rounds.
    """
    unit = step_seconds(baseline)
    seen: dict[int, list[Round]] = {}
    for each in [each for one in timings for each in one.rounds] + baseline.rounds:
        seen.setdefault(each.width, []).append(each)
    known = sorted(seen)
    kept = [typical(seen[width]) for width in known]
    means = rising_fit(
        [float(np.mean([each.verify for each in rounds])) / unit for rounds in kept], list(map(len, kept))
    )
    found = np.interp(np.arange(1, widths + 1), known, means)
    if len(known) > 1 and known[-1] < widths:
        slope = max(0.0, (means[-1] - means[0]) / (known[-1] - known[0]))
        beyond = np.arange(known[-1] + 1, widths + 1)
        found[known[-1] :] = means[-1] + slope * (beyond - known[-1])
    return [float(value) for value in found]


def rising_fit(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in weighted squared error (pool adjacent violators)."""
    blocks: list[list[float]] = []  # value, weight, length
    for value, weight in zip(values, weights, strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            value_2, weight_2, length_2 = blocks.pop()
            value_1, weight_1, length_1 = blocks.pop()
            total = weight_1 + weight_2
            blocks.append([(value_1 * weight_1 + value_2 * weight_2) / total, total, length_1 + length_2])
    return [value for value, _, length in blocks for _ in range(int(length))]


def breakdown(timings: Timings) -> Breakdown:
    """Seconds per emitted token, every round counted."""
    tokens = timings.counts.tokens
    return Breakdown(
        sum(each.draft for each in timings.rounds) / tokens,
        sum(each.verify for each in timings.rounds) / tokens,
        sum(each.loop for each in timings.rounds) / tokens,
    )


def typical(rounds: Sequence[Round]) -> list[Round]:
    """The rounds without the slowest of each width."""
    by_width: dict[int, list[Round]] = {}
    for each in rounds:
        by_width.setdefault(each.width, []).append(each)
    kept = []
    for group in by_width.values():
        group.sort(key=lambda each: each.total)
        kept += group[: max(1, round((1 - SLOWEST) * len(group)))]
    return kept
