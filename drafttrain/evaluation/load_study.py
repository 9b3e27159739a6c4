"""The load study: the baseline and the best method of each kind answer the same requests at several batch sizes.

Methods are interleaved batch by batch as in the headline's runs. All rows of a batch start together and none joins
later, so a batch shrinks as its answers end; how far is reported (`live_rows`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from drafttrain.config import EvaluateConfig
from drafttrain.decoding.counts import Completion
from drafttrain.distributed import say
from drafttrain.evaluation.figures import pair, rate_interval
from drafttrain.evaluation.load import Load, LoadBatch, LoadPoint, break_even
from drafttrain.evaluation.measure import verify_costs
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.questions import Question, to_sample
from drafttrain.evaluation.runner import batches, instrument_all, interleave
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Kind, MethodResult, Sample
from drafttrain.evaluation.tuning import CALIBRATION_TOKENS
from drafttrain.ops.sampling import Sampling

LEAST_REQUESTS = 16
"""Asked at every batch size, and as many as the largest batch holds."""

INSTRUMENTED_REQUESTS = 6
"""Of those, at least one batch, in the runs that v is measured on."""

_GROUPS: dict[Kind, str] = {"fixed": "fixed", "head": "adaptive", "confidence": "adaptive", "entropy": "adaptive"}


def sizes_of(config: EvaluateConfig) -> list[int]:
    """Batch sizes to study, rising; none where one request at a time is all that is asked for."""
    sizes = sorted(set(config.batch_sizes))
    return [] if sizes == [1] else sizes


def request_count(sizes: Sequence[int]) -> int:
    """Requests asked at every batch size."""
    return max(LEAST_REQUESTS, *sizes)


def group_of(kind: Kind) -> str:
    """Kinds of which only the best method is studied: fixed lengths, adaptive rules, all others."""
    return _GROUPS.get(kind, "other")


def best_of_groups(rows: Sequence[MethodResult]) -> list[str]:
    """Of each group the method that replay chose, the fastest where replay knows none; nothing that was not measured.

    Args:
        rows: of one decoding setting.
    """
    measured = [row for row in rows if row.kind != "autoregressive" and row.overall.speedup is not None]
    best: dict[str, MethodResult] = {}
    for row in measured:
        group = group_of(row.kind)
        if group not in best or _merit(row) > _merit(best[group]):
            best[group] = row
    return [row.method for row in best.values()]


def _merit(row: MethodResult) -> tuple[float, float]:
    return row.replayed_speedup or 0.0, row.overall.speedup.value


def requests_of(questions: Sequence[Question], samples: Mapping[str, Sequence[Sample]], count: int) -> list[Question]:
    """What is asked: of the questions whose answers count with every method those with the longest, longest first.

    Long answers are what the batches of a busy server hold most of the time, and with equally long ones a batch stays
    full. Where questions are too few they are asked again with other sample ids, hence other draws.

    Args:
        questions: test questions.
        samples: their answers by method, the baseline's among them.
        count: of requests.

    Returns:
        none where no question counts.
    """
    base = samples[AUTOREGRESSIVE]
    counted = [{(own.prompt_id, own.turn) for own, _ in pair(answers, base).counted} for answers in samples.values()]
    lengths = {(sample.prompt_id, sample.turn): len(sample.token_ids) for sample in base}
    fit = [each for each in questions if (each.prompt_id, each.turn) in set.intersection(*counted)]
    fit.sort(key=lambda each: -lengths[each.prompt_id, each.turn])
    again = [divmod(number, len(fit)) for number in range(count)] if fit else []
    asked = [replace(fit[at], sample_id=fit[at].sample_id + times) for times, at in again]
    return sorted(asked, key=lambda each: -lengths[each.prompt_id, each.turn])


class Study:
    """The load study of one decoding setting.

    Args:
        models: of the pair.
        sampling: the setting.
        name: its name.
        config: sizes, repeats, resamples.
        seed: of all draws.

    Attributes:
        notes: what a reader must know of how it went, a sentence each.
    """

    def __init__(self, models: Models, sampling: Sampling, name: str, config: EvaluateConfig, seed: int) -> None:
        self.models = models
        self.sampling = sampling
        self.name = name
        self.config = config
        self.seed = seed
        self.notes: list[str] = []

    def run(
        self, rows: Sequence[MethodResult], questions: Sequence[Question], samples: Mapping[str, Sequence[Sample]]
    ) -> Load | None:
        """Run it.

        Args:
            rows: methods of this setting as the headline's runs found them.
            questions: test questions.
            samples: answers of the headline's runs by method.

        Returns:
            None where it was not asked for, or nothing was left to measure.
        """
        sizes, methods = sizes_of(self.config), best_of_groups(rows)
        if not sizes or not methods:
            return None
        methods = [AUTOREGRESSIVE, *methods]
        asked = requests_of(questions, {method: samples[method] for method in methods}, request_count(sizes))
        if not asked:
            self.notes.append(f"Load was not measured ({self.name}): no prompt's answers count with every method.")
            return None
        say(f"{self.name}: load, {len(asked)} requests, {len(methods)} methods, batch sizes {sizes}")
        measured = self._batches(sizes, methods, asked)
        if not measured:
            return None
        different_turns = {(each.prompt_id, each.turn) for each in asked}
        prompts = {each.prompt_id for each in asked}
        found = Load(self.name, len(asked), len(asked) - len(different_turns), len(prompts), measured, [])
        found.break_even = [break_even(method, found.speedups(method)) for method in methods[1:]]
        return found

    def _batches(self, sizes: Sequence[int], methods: Sequence[str], asked: Sequence[Question]) -> list[LoadBatch]:
        """Up to the size that memory has no room for."""
        measured = []
        for size in sizes:
            whole = asked[: len(asked) // size * size]  # a smaller last batch would be no batch of this size
            try:
                measured.append(LoadBatch(size, self._points(size, methods, whole), self._verify(size, methods, whole)))
            except torch.OutOfMemoryError:
                self.notes.append(f"Load was not measured at a batch of {size} ({self.name}): memory has no room.")
                break
        return measured

    def _points(self, size: int, methods: Sequence[str], asked: Sequence[Question]) -> list[LoadPoint]:
        config, models = self.config, self.models
        decoders = {method: models.decoder(method, self.sampling, self.seed) for method in methods}
        title = f"{self.name}: batches of {size}"
        found = interleave(decoders, asked, size, config.repeats, config.warmup, title)
        answers = {
            method: [
                to_sample(question, completions, method, self.name, models.tokenizer)
                for question, completions in zip(asked, found[method], strict=True)
            ]
            for method in methods
        }
        base = answers[AUTOREGRESSIVE]
        points = []
        for method, own in answers.items():
            seconds = latencies(found[method], size)
            point = LoadPoint(
                method,
                sum(len(sample.token_ids) for sample in own) / sum(sample.decode_seconds for sample in own),
                statistics.median(seconds),
                float(np.percentile(seconds, 95)),
                live_rows(found[method], size),
            )
            if method != AUTOREGRESSIVE:
                both = list(zip(own, base, strict=True))
                point.speedup = rate_interval(both, config.bootstrap, self.seed)
            points.append(point)
        return points

    def _verify(self, size: int, methods: Sequence[str], asked: Sequence[Question]) -> list[float]:
        """v(1), v(2), ... of full batches, as far as the longest draft of the sweep; v(1) is 1."""
        longest = self.config.max_length
        probes = dict.fromkeys(
            [*methods, *(f"{self.models.chain}(drafter, length={length})" for length in (1, longest))]
        )
        decoders = {method: self.models.decoder(method, self.sampling, self.seed) for method in probes}
        short = [replace(each, limit=min(each.limit, CALIBRATION_TOKENS)) for each in asked]
        groups = batches(short, size)[: max(1, INSTRUMENTED_REQUESTS // size)]
        timings = instrument_all(decoders, groups, self.models.engines())
        rounds = [each for own in timings.values() for each in own.rounds if each.rows == size]
        costs = verify_costs(rounds, longest + 1)
        return [cost / costs[0] for cost in costs]


def latencies(found: Sequence[Sequence[Completion]], size: int) -> list[float]:
    """Seconds until each request ended, the median of its repeats.

    Args:
        found: for each request the completions of all repeats; the requests batch by batch.
        size: of a batch.
    """
    seconds: list[float] = []
    for start in range(0, len(found), size):
        repeats = zip(*found[start : start + size], strict=True)
        ends = [finish_times(batch) for batch in repeats]
        seconds += [statistics.median(each) for each in zip(*ends, strict=True)]
    return seconds


def finish_times(batch: Sequence[Completion]) -> list[float]:
    """Seconds from the start of a batch, prefill included, to the end of each of its rows.

    Every round's seconds are shared by the rows that are in it, and rows leave but never join: of two rows that end one
    after the other, the shares differ by the seconds in between over the rows that were left.
    """
    now, before = sum(row.counts.prefill_seconds for row in batch), 0.0
    ends = [0.0] * len(batch)
    order = sorted(range(len(batch)), key=lambda at: batch[at].counts.decode_seconds)
    for gone, at in enumerate(order):
        share = batch[at].counts.decode_seconds
        now += (share - before) * (len(batch) - gone)
        ends[at], before = now, share
    return ends


def live_rows(found: Sequence[Sequence[Completion]], size: int) -> float:
    """Rows decoded in a round, on the mean over rounds; arguments as of `latencies`."""
    rounds = [repeats[0].counts.rounds for repeats in found]
    return sum(rounds) / sum(max(rounds[start : start + size]) for start in range(0, len(rounds), size))
