"""Costs from instrumented runs: c of a draft step, v(w) of a target forward of width w, o of the rest of a round.

All are in units of one autoregressive step as decoded, its loop included: then the predicted speed-up is a ratio of
decoding rates, as the measured one is. c includes drawing the token and asking the stopping rule; what a draft costs
however short it is belongs to the round, to o.

Shared machines are noisy, and in two ways. Load comes and goes: every round is timed in units of the autoregressive
steps that were run beside it, on the same question. Single rounds wait for somebody else: medians are taken, not means.
And what cannot differ between methods is taken from all of them: v, and o; a stopping rule can only add to c.

A drafter from outside has c and o of its own: only it knows what it does beside the forwards that it counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from drafttrain.evaluation.runner import Round, Timings
from drafttrain.evaluation.schema import Breakdown, Costs

FIXED = "fixed"
"""The family without a stopping rule, from which the price of a draft step itself is taken."""

OUTSIDE = "other"
"""What the names of families with a class from outside begin with."""


def costs_by_family(families: Mapping[str, Timings], baseline: Timings, widths: int) -> dict[str, Costs]:
    """Costs of every family of methods.

    Args:
        families: instrumented runs by family, `FIXED` among them.
        baseline: instrumented autoregressive runs.
        widths: v is given for 1 .. widths.
    """
    drafting = [each for timings in families.values() for each in timings.rounds if each.steps]
    verify = verify_costs([*drafting, *baseline.rounds], widths)
    begin, step = draft_line([each for each in families[FIXED].rounds if each.steps])
    loop = _median(each.loop / each.unit for each in drafting)
    unit = _median(each.total for each in baseline.rounds)
    found = {}
    for family, timings in families.items():
        own = [each for each in timings.rounds if each.steps]
        own_begin, c = begin, step
        if family.startswith(OUTSIDE):
            own_begin, c = outside_line(timings.rounds)
        elif own and family != FIXED:
            c = max(step, _step_cost(own, begin))
        found[family] = Costs(unit, dict.fromkeys(timings.counts.draft_forwards, c), verify, own_begin + loop)
    return found


def draft_line(rounds: Sequence[Round]) -> tuple[float, float]:
    """What it costs to begin a draft, and a step of it: a line through the medians of drafts of every length."""
    by_steps: dict[int, list[float]] = {}
    for each in rounds:
        by_steps.setdefault(each.steps, []).append(each.draft / each.unit)
    steps = sorted(by_steps)
    medians = [_median(by_steps[count]) for count in steps]
    if len(steps) > 1:
        step, begin = np.polyfit(steps, medians, 1, w=np.sqrt([len(by_steps[count]) for count in steps]))
        if step > 0 and begin > 0:
            return float(begin), float(step)
    return 0.0, _median(median / count for median, count in zip(medians, steps, strict=True))


def outside_line(rounds: Sequence[Round]) -> tuple[float, float]:
    """The same of a drafter from outside, over the forwards that it counts; where it counts none, all is the begin."""
    asked = [each for each in rounds if each.draft]
    forwards = [sum(int(torch.as_tensor(count).max()) for count in each.forwards.values()) for each in asked]
    if any(forwards):
        return draft_line([replace(each, steps=count) for each, count in zip(asked, forwards, strict=True) if count])
    return _median(each.draft / each.unit for each in asked), 0.0


def _step_cost(rounds: Sequence[Round], begin: float) -> float:
    """What a step costs on the median: over steps, not rounds, since most of the time goes into long drafts."""
    costs = [(each.draft / each.unit - begin) / each.steps for each in rounds]
    return _median(np.repeat(costs, [each.steps for each in rounds]))


def verify_costs(rounds: Iterable[Round], widths: int) -> list[float]:
    """v(1) .. v(widths), widths that did not occur by straight lines between those that did.

    Beyond the widest one seen the mean slope goes on. A wider forward costs no less than a narrower one: where a few
    rounds say otherwise it is noise, and neighbours are pooled by their numbers of rounds.
    """
    seen: dict[int, list[float]] = {}
    for each in rounds:
        seen.setdefault(each.width, []).append(each.verify / each.unit)
    known = sorted(seen)
    costs = rising_fit([_median(seen[width]) for width in known], [len(seen[width]) for width in known])
    found = np.interp(np.arange(1, widths + 1), known, costs)
    if len(known) > 1 and known[-1] < widths:
        slope = (costs[-1] - costs[0]) / (known[-1] - known[0])
        found[known[-1] :] = costs[-1] + slope * (np.arange(known[-1] + 1, widths + 1) - known[-1])
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


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))
