"""What a forward of every model costs by its width, and what a round costs beside: in autoregressive steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from drafttrain.decoding.engine import Engine
from drafttrain.evaluation.measure import rising_fit
from drafttrain.evaluation.sketch import Sketch

WIDTHS = (1, 2, 3, 4, 6, 8, 11, 16, 24, 33, 49)
"""Widths that are timed; those between lie on straight lines."""


@dataclass(frozen=True)
class ForwardCosts:
    """Costs of a pair of models, or more, on a machine.

    Attributes:
        target: v(w), in autoregressive steps.
        models: c(w) of every other model, choosing its tokens included.
        round: o, what a drafted round costs beside drafting and the target's forward.
        step_seconds: an autoregressive step.
        judge: what asking a stopping rule about a token costs.
        host: how many times its seconds in a loop of its own a drafter's Python takes between forwards, whose weights
            push it out of the processor's caches.
    """

    target: Mapping[int, float]
    models: Mapping[str, Mapping[int, float]]
    round: float
    step_seconds: float
    judge: float = 0.0
    host: float = 1.0

    def predicted(self, sketch: Sketch) -> float:
        """Speed-up over autoregressive decoding of a method that does what the sketch counted."""
        return sketch.tokens / self.cost(sketch)

    def cost(self, sketch: Sketch) -> float:
        """In autoregressive steps."""
        return self.forwards(sketch) + self.host * sketch.host_seconds / self.step_seconds

    def forwards(self, sketch: Sketch) -> float:
        """All but what drafters do beside their models."""
        verify = sum(rounds * (self.round + at(self.target, width)) for width, rounds in sketch.rounds.items())
        draft = sum(
            n * at(self.models[name], width) for name, reads in sketch.reads.items() for width, n in reads.items()
        )
        return verify + draft + self.judge * sketch.judged


def at(costs: Mapping[int, float], width: int) -> float:
    """The cost of a width; beyond the widest that was timed the last slope goes on."""
    widths = sorted(costs)
    if width <= widths[-1]:
        return float(np.interp(width, widths, [costs[each] for each in widths]))
    slope = (costs[widths[-1]] - costs[widths[-2]]) / (widths[-1] - widths[-2])
    return costs[widths[-1]] + slope * (width - widths[-1])


@torch.inference_mode()
def forward_seconds(engines: Mapping[str, Engine], context: int, repeats: int = 40) -> dict[str, dict[int, float]]:
    """Median seconds of a forward behind `context` tokens, by engine and width, all in turn.

    A shared machine is now fast, now slow: widths and engines are timed in turn, and each forward in units of the
    target's single-token forward beside it would be noisier than its median.
    """
    caches = {name: engine.new_cache(1, context + max(WIDTHS) + 1) for name, engine in engines.items()}
    for name, engine in engines.items():
        engine.read(caches[name], [[1] * context])
    found: dict[tuple[str, int], list[float]] = {}
    for repeat in range(repeats + 2):
        for width in WIDTHS:
            tokens = torch.ones(1, width, dtype=torch.int64)
            for name, engine in engines.items():
                tokens_BQ = tokens.to(engine.device)
                started = time.perf_counter()
                logits = engine.forward(caches[name], tokens_BQ).logits
                logits[:, -1].float().argmax(-1).tolist()
                if repeat > 1:
                    found.setdefault((name, width), []).append(time.perf_counter() - started)
                caches[name].rollback([context])
    medians = {name: [float(np.median(found[name, width])) for width in WIDTHS] for name in engines}
    return {
        name: dict(zip(WIDTHS, rising_fit(values, [1.0] * len(values)), strict=True))
        for name, values in medians.items()
    }


def fitted(costs: ForwardCosts, runs: Sequence[tuple[Sketch, float]]) -> ForwardCosts:
    """The costs with what rounds and draft forwards cost beside, such that real runs cost what was measured.

    Steps are taken to be s times the forwards', h times the drafters' own, o a round, e a draft forward and j a token
    that a stopping rule judges, none negative: least squares over the runs. s is the machine's load, which was another
    when the forwards were timed.

    Args:
        costs: of the forwards alone.
        runs: of each run what it did and the autoregressive steps that it took.
    """
    table = np.array(
        [
            [
                costs.forwards(sketch),
                sketch.rounds.total(),
                _forwards(sketch),
                sketch.judged,
                sketch.host_seconds / costs.step_seconds,
            ]
            for sketch, _ in runs
        ]
    )
    steps = np.array([taken for _, taken in runs])
    scale, beside, each, judge, host = _least_squares(table, steps)
    target = {width: scale * v for width, v in costs.target.items()}
    models = {name: {width: scale * c + each for width, c in own.items()} for name, own in costs.models.items()}
    return ForwardCosts(target, models, beside, costs.step_seconds, judge, host)


def _least_squares(table_RC: np.ndarray, steps_R: np.ndarray) -> list[float]:
    """Non-negative least squares in relative errors, by trying which of the few coefficients are zero."""
    table_RC, goal_R = table_RC / steps_R[:, None], np.ones(len(steps_R))
    best, least = [1.0] + [0.0] * (table_RC.shape[1] - 1), np.inf
    for count in range(1, table_RC.shape[1] + 1):
        for columns in combinations(range(table_RC.shape[1]), count):
            found, *_ = np.linalg.lstsq(table_RC[:, columns], goal_R, rcond=None)
            error = float(((table_RC[:, columns] @ found - goal_R) ** 2).sum())
            if (found >= 0).all() and error < least:
                least, best = error, [0.0] * table_RC.shape[1]
                for column, value in zip(columns, found, strict=True):
                    best[column] = float(value)
    return best


def _forwards(sketch: Sketch) -> int:
    return sum(reads.total() for reads in sketch.reads.values())
