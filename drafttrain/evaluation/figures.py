"""From answers to figures: which answers count, sums over them, and intervals.

A method is compared with the baseline answer by answer. An answer counts when neither of the two loops (loops flatter
every drafter) and, for *revise*, when both are right (copying the wrong thing fast is worth nothing). The unit that is
resampled is the conversation: its turns share a context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from drafttrain.evaluation.schema import ALL, Figures, Sample
from drafttrain.evaluation.statistics import Interval, bootstrap, rate_ratio, repetition

LOOPING = 0.5
"""An answer loops when more than this share of its 4-grams are repeats; code and tables stay far below it."""

LEAST_GRAMS = 16
"""Shorter answers are never called loops."""

RIGHT_ONLY = ("revise",)
"""Tasks whose answers count only when they are right."""


def loops(ids: Sequence[int], right: bool | None) -> bool:
    """Whether an answer is stuck in a loop. A right answer never is: some lists repeat by nature."""
    return not right and len(ids) >= LEAST_GRAMS + 3 and repetition(ids) > LOOPING


@dataclass(frozen=True)
class Pairs:
    """Answers of a method beside the baseline's on the same turns, and how many were left out."""

    counted: list[tuple[Sample, Sample]]
    looping: int
    wrong: int


def pair(samples: Iterable[Sample], baseline: Iterable[Sample]) -> Pairs:
    """Match a method's answers with the baseline's by conversation and turn, and leave out what must not count."""
    by_turn = {(sample.prompt_id, sample.turn): sample for sample in baseline}
    matched = [(sample, by_turn[sample.prompt_id, sample.turn]) for sample in samples]
    counted, looping, wrong = [], 0, 0
    for both in matched:
        if any(sample.looping for sample in both):
            looping += 1
        elif both[0].task in RIGHT_ONLY and any(sample.right is False for sample in both):
            wrong += 1
        else:
            counted.append(both)
    return Pairs(counted, looping, wrong)


def by_task(
    samples: Sequence[Sample], baseline: Sequence[Sample], resamples: int, seed: int
) -> tuple[Figures, dict[str, Figures]]:
    """Figures over all tasks and of each task."""
    tasks = dict.fromkeys(sample.task for sample in samples)
    rows = {}
    for task in tasks:
        own, base = [[s for s in group if s.task == task] for group in (samples, baseline)]
        rows[task] = summarise(own, base, resamples, seed)
    return summarise(samples, baseline, resamples, seed), rows


def by_turn(samples: Sequence[Sample], baseline: Sequence[Sample], resamples: int, seed: int) -> dict[str, Figures]:
    """Figures of every turn of the tasks that have several."""
    several = {sample.task for sample in samples if sample.turn > 0}
    rows = {}
    for task, turn in sorted({(sample.task, sample.turn) for sample in samples if sample.task in several}):
        own, base = ([s for s in group if (s.task, s.turn) == (task, turn)] for group in (samples, baseline))
        rows[f"{task}, turn {turn + 1}"] = summarise(own, base, resamples, seed)
    return rows


def swi(figures: Figures, parameters: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """The standardized walltime improvement (Chen et al. 2023, section 5) over decoding without a drafter.

    Args:
        figures: of a method.
        parameters: of its members over the target's.
        measured: cost of a forward of its members, in autoregressive steps.

    Returns:
        by the way forwards are charged, "parameters" and "measured", those that are known of all members.
    """
    found = {}
    for name, costs in (("parameters", parameters), ("measured", measured)):
        if figures.tokens and figures.draft_forwards.keys() <= costs.keys():
            drafting = sum(count * costs[member] for member, count in figures.draft_forwards.items())
            found[name] = figures.tokens / (figures.target_forwards + drafting)
    return found


def summarise(samples: Sequence[Sample], baseline: Sequence[Sample], resamples: int, seed: int) -> Figures:
    """Figures of one set of answers against the baseline's answers to the same turns."""
    pairs = pair(samples, baseline)
    own, base = [p[0] for p in pairs.counted], [p[1] for p in pairs.counted]
    figures = Figures(
        prompts=len({sample.prompt_id for sample in own}),
        looping=pairs.looping,
        wrong=pairs.wrong,
        repetition=_mean([sample.repetition for sample in samples]),
        score=_mean([sample.score for sample in samples if sample.score is not None]),
    )
    if not own:
        return figures
    _add_counts(figures, own)
    figures.baseline_tokens = sum(len(sample.token_ids) for sample in base)
    figures.baseline_seconds = sum(sample.decode_seconds for sample in base)
    _add_rates(figures, base)
    figures.speedup = rate_interval(pairs.counted, resamples, seed)
    figures.time_to_first_token = _mean([_first_token(sample) for sample in own])
    return figures


def _first_token(sample: Sample) -> float:
    """Seconds until something is emitted: both prefills and a round."""
    return sample.prefill_seconds + sample.decode_seconds / sample.counts["rounds"]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _add_counts(figures: Figures, samples: Sequence[Sample]) -> None:
    for sample in samples:
        counts = sample.counts
        for name in ("tokens", "rounds", "target_forwards", "drafted", "accepted", "discarded"):
            setattr(figures, name, getattr(figures, name) + counts[name])
        for name in ("draft_forwards", "drafted_by", "accepted_by", "rounds_by", "tokens_by"):
            total = getattr(figures, name)
            for member, number in counts.get(name, {}).items():  # older files lack all but the first
                total[member] = total.get(member, 0) + number
        figures.decode_seconds += sample.decode_seconds
        figures.prefill_seconds += sample.prefill_seconds
    for name in ("drafted_at", "reached_at", "accepted_at", "trees_of"):
        setattr(
            figures, name, _add_lists([sample.counts.get(name, []) for sample in samples])
        )  # older files lack trees


def _add_lists(lists: Sequence[Sequence[int]]) -> list[int]:
    total = [0] * max(map(len, lists), default=0)
    for values in lists:
        for i, value in enumerate(values):
            total[i] += value
    return total


def _add_rates(figures: Figures, base: Sequence[Sample]) -> None:
    figures.tokens_per_second = figures.tokens / figures.decode_seconds
    figures.tau = figures.tokens / figures.rounds
    figures.acceptance_rate = figures.accepted / figures.drafted if figures.drafted else None
    figures.acceptance_unconditional = [count / figures.rounds for count in figures.accepted_at]
    figures.acceptance_conditional = [
        accepted / reached if reached else 0.0
        for accepted, reached in zip(figures.accepted_at, figures.reached_at, strict=True)
    ]
    figures.discard_rate = figures.discarded / figures.tokens
    figures.verification_rate = figures.target_forwards / figures.tokens
    seconds = figures.decode_seconds + figures.prefill_seconds
    base_seconds = figures.baseline_seconds + sum(sample.prefill_seconds for sample in base)
    figures.end_to_end_speedup = (figures.tokens / seconds) / (figures.baseline_tokens / base_seconds)


def rates(own: Sample, base: Sample) -> list[float]:
    """What `rate_ratio` takes the sums of: tokens and seconds of an answer, then of the one it is compared with."""
    return [len(own.token_ids), own.decode_seconds, len(base.token_ids), base.decode_seconds]


def rate_interval(pairs: Sequence[tuple[Sample, Sample]], resamples: int, seed: int) -> Interval:
    """Ratio of decoding rates, first over second, with its 95 % interval over conversations."""
    return figure_interval(pairs, rates, rate_ratio, resamples, seed)


def figure_interval(
    pairs: Sequence[tuple[Sample, Sample]],
    counts: Callable[[Sample, Sample], list[float]],
    figure: Callable[[np.ndarray], np.ndarray],
    resamples: int,
    seed: int,
) -> Interval:
    """Any figure of summed counts of paired answers, with its interval over conversations, tasks as strata."""
    sums: dict[str, np.ndarray] = {}
    tasks: dict[str, str] = {}
    for own, base in pairs:
        row = np.array(counts(own, base), dtype=np.float64)
        sums[own.prompt_id] = sums.get(own.prompt_id, 0) + row
        tasks[own.prompt_id] = own.task
    return bootstrap(np.array(list(sums.values())), figure, list(tasks.values()), resamples, seed)


def versus(samples: Sequence[Sample], other: Sequence[Sample], resamples: int, seed: int) -> Interval | None:
    """Ratio of a method's decoding rate to another method's, on the answers that count for both."""
    counted = pair(samples, other).counted
    return rate_interval(counted, resamples, seed) if counted else None


def workload(samples: Iterable[Sample]) -> dict[str, int]:
    """Conversations of each task, all tasks together under `ALL` last."""
    tasks: dict[str, set[str]] = {}
    for sample in samples:
        tasks.setdefault(sample.task, set()).add(sample.prompt_id)
    counts = {task: len(ids) for task, ids in tasks.items()}
    return counts | {ALL: sum(counts.values())}
