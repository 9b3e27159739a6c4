"""The shape of a method's trees, tuned on prompts: places from one wide tree, costs from instrumented runs of a few.

shape = tune_tree(lambda widths: build(f"Model(drafter, tree={list(widths)})", members), target, setting, questions)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build
from drafttrain.decoding.loop import Decoder
from drafttrain.evaluation.measure import verify_costs
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.runner import Round, answer, batches, instrument_all
from drafttrain.evaluation.schema import AUTOREGRESSIVE
from drafttrain.evaluation.tree_shape import Ranks, Shape, TreeCosts, best_shape
from drafttrain.evaluation.tuning import CALIBRATION_TOKENS
from drafttrain.ops.sampling import Sampling

WIDEST = (16,) * 6
"""The tree that places are taken from: no level of a tuned one is wider, nor is it deeper."""

PROBES = ((1,), (1,) * 6, (4, 4), (4, 8, 8), (16,) * 4)
"""Shapes that costs are measured on: drafts of few and many levels, narrow and wide."""

Make = Callable[[Sequence[int]], Drafter]
"""A new drafter of trees of given widths."""


@dataclass(frozen=True)
class Tuned:
    """The outcome.

    Attributes:
        shape: the fastest.
        ranks: it was chosen by.
        costs: likewise.
    """

    shape: Shape
    ranks: Ranks
    costs: TreeCosts


def tune_tree(
    make: Make,
    target: Engine,
    sampling: Sampling,
    questions: Sequence[Question],
    eos_ids: frozenset[int] = frozenset(),
    batch_size: int = 1,
    seed: int = 0,
    widest: Sequence[int] = WIDEST,
    timed: Sequence[Question] | None = None,
) -> Tuned:
    """The fastest shape on these questions and this machine.

    Args:
        make: makes drafters.
        target: whose text is decoded.
        sampling: of the run.
        questions: tuning prompts, answered with the widest tree.
        eos_ids: end tokens.
        batch_size: answered together.
        seed: of all draws.
        widest: of what is tried.
        timed: answered with each probe for the costs; by default the same.
    """

    def decoder(drafter: Drafter | None) -> Decoder:
        return Decoder(target, drafter, sampling, eos_ids, seed)

    watched = Places(make(widest), widest)
    for group in batches(questions, batch_size):
        answer(decoder(watched), group)
    decoders = {AUTOREGRESSIVE: decoder(None)}
    shapes = {str(shape): shape for shape in PROBES if _within(shape, widest)}
    decoders |= {name: decoder(make(shape)) for name, shape in shapes.items()}
    timings = instrument_all(decoders, batches(timed or questions, batch_size), [target])
    costs = costs_of({shapes[name]: timings[name].rounds for name in shapes}, timings[AUTOREGRESSIVE].rounds)
    ranks = Ranks(watched.rounds)
    return Tuned(best_shape(ranks, costs, widest), ranks, costs)


def tuned_tree(
    models: Models,
    sampling: Sampling,
    questions: Sequence[Question],
    timed: Sequence[Question],
    batch_size: int,
    seed: int,
) -> Tuned:
    """`tune_tree` for a pair; the questions that are timed are answered as far as those of a calibration."""
    target, members = models.engines()[0], models.members()

    def make(widths: Sequence[int]) -> Drafter:
        return build(f"{models.chain}(drafter, tree={list(widths)})", members, models.allow_code)

    short = [replace(each, limit=min(each.limit, CALIBRATION_TOKENS)) for each in timed]
    return tune_tree(make, target, sampling, questions, models.ends, batch_size, seed, timed=short)


class Places:
    """Notes of a drafter of trees where the accepted tokens stood in their levels.

    Args:
        drafter: whose trees have the given widths wherever a row's limit allows.
        widths: of its levels.

    Attributes:
        rounds: places of the accepted tokens, a list a row and round; rounds cut short by the end of a text are left
            out.
    """

    def __init__(self, drafter: Drafter, widths: Sequence[int]) -> None:
        self.drafter = drafter
        self.name, self.max_length = drafter.name, drafter.max_length
        self.rounds: list[list[int]] = []
        self._firsts = np.cumsum([0, *widths])
        self._full: list[bool] = []

    def start(self, committed: Committed, setting: Setting, *more: Any) -> None:
        """As the drafter."""
        self.drafter.start(committed, setting, *more)

    def propose(self, committed: Committed, prefix: Draft | None, budget: Sequence[int], *more: Any) -> Draft:
        """As the drafter."""
        self._full = [most >= len(self._firsts) - 1 for most in budget]
        return self.drafter.propose(committed, prefix, budget, *more)

    def commit(self, agreed: Sequence[int], paths: Sequence[Sequence[int]] | None = None) -> None:
        """Note, then as the drafter."""
        if paths is None:
            self.drafter.commit(agreed)
            return
        for path, full in zip(paths, self._full, strict=True):
            if full:
                self.rounds.append([int(node - first) for node, first in zip(path, self._firsts, strict=False)])
        self.drafter.commit(agreed, paths)

    def keep(self, rows: Sequence[int]) -> None:
        """As the drafter."""
        self.drafter.keep(rows)


def costs_of(drafted: Mapping[tuple[int, ...], Sequence[Round]], alone: Sequence[Round]) -> TreeCosts:
    """Costs from instrumented runs.

    Drafting is fitted to medians by least squares, its parts being no less than nothing.

    Args:
        drafted: rounds by shape; those cut short by the end of a text are left out.
        alone: rounds of autoregressive decoding.
    """
    rows, seconds, rest, whole = [], [], [], []
    for widths, rounds in drafted.items():
        full = [each for each in rounds if each.width == 1 + sum(widths)]
        if full:
            rows.append([1.0, len(widths), 1 + sum(widths[:-1])])
            seconds.append(np.median([each.draft / each.unit for each in full]))
            rest += [each.loop / each.unit for each in full]
            whole += full
    begin, level, token = _non_negative(np.array(rows), np.array(seconds))
    known = sorted({each.width for each in [*whole, *alone]})
    found = verify_costs([*whole, *alone], known[-1])
    v = {width: found[width - 1] for width in known}
    return TreeCosts(begin, level, token, v, float(np.median(rest)))


def _non_negative(rows: np.ndarray, values: np.ndarray) -> list[float]:
    """Least squares without negative solutions: of all choices of unknowns that are zero, the best that is allowed."""
    best, least = np.zeros(rows.shape[1]), np.inf
    for code in range(1, 1 << rows.shape[1]):
        chosen = [column for column in range(rows.shape[1]) if code >> column & 1]
        solution, *_ = np.linalg.lstsq(rows[:, chosen], values, rcond=None)
        error = float(((rows[:, chosen] @ solution - values) ** 2).sum())
        if (solution >= 0).all() and error < least - 1e-12:
            best, least = np.zeros(rows.shape[1]), error
            best[chosen] = solution
    return best.tolist()


def _within(shape: Sequence[int], widest: Sequence[int]) -> bool:
    return len(shape) <= len(widest) and all(own <= most for own, most in zip(shape, widest, strict=False))
