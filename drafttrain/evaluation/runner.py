"""Real runs: every method answers every question, in turn, so that what the machine does meanwhile hits all alike.

Order: question by question (or batch by batch), repeat by repeat, and within a repeat method by method, starting with
another method each time. The autoregressive baseline is one of the methods. Nothing inside a timed run synchronises
with a device beyond what the decoder does itself; where the time goes is measured in separate, instrumented runs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from drafttrain.decoding.counts import Completion, Counts
from drafttrain.decoding.draft import Draft
from drafttrain.decoding.engine import Engine, Output
from drafttrain.decoding.loop import Decoder
from drafttrain.distributed import progress
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.schema import AUTOREGRESSIVE
from drafttrain.ops.cache import DenseCache


def answer(decoder: Decoder, questions: Sequence[Question]) -> list[Completion]:
    """Decode a batch of questions."""
    ids, limits = [question.ids for question in questions], [question.limit for question in questions]
    return decoder.generate(ids, limits, [question.sample_id for question in questions])


def batches(questions: Sequence[Question], size: int) -> list[list[Question]]:
    """Questions decoded together: the same batches for every method."""
    return [list(questions[start : start + size]) for start in range(0, len(questions), size)]


def interleave(
    decoders: Mapping[str, Decoder],
    questions: Sequence[Question],
    batch_size: int,
    repeats: int,
    warmup: int,
    description: str,
) -> dict[str, list[list[Completion]]]:
    """Run every method on every question.

    Args:
        decoders: by method.
        questions: what is asked.
        batch_size: questions decoded together.
        repeats: of every run; they differ in nothing but their time.
        warmup: batches that every method answers untimed before.
        description: of the progress bar.

    Returns:
        by method, for each question the completions of all repeats.
    """
    methods, groups = list(decoders), batches(questions, batch_size)
    for group in groups[:warmup]:
        for decoder in decoders.values():
            answer(decoder, group)
    found: dict[str, list[list[Completion]]] = {method: [] for method in methods}
    with steady():
        for number, group in enumerate(progress(groups, len(groups), description)):
            runs: dict[str, list[list[Completion]]] = {method: [] for method in methods}
            for repeat in range(repeats):
                turn = (number + repeat) % len(methods)
                for method in methods[turn:] + methods[:turn]:
                    runs[method].append(answer(decoders[method], group))
            for method in methods:
                found[method] += [list(repeated) for repeated in zip(*runs[method], strict=True)]
    return found


@contextmanager
def steady() -> Iterator[None]:
    """No garbage collection while runs are timed: it would fall on whichever method happens to run."""
    enabled = gc.isenabled()
    if enabled:  # else around this there is another one
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes


@dataclass
class Round:
    """One round of an instrumented run: when it began, seconds of its parts, the widths of what was done."""

    start: float
    draft: float = 0.0
    verify: float = 0.0
    total: float = 0.0
    width: int = 0
    """tokens that the target read at once; 0 while it has not"""
    steps: int = 0
    """draft steps of the longest row"""
    unit: float = 1.0
    """seconds of an autoregressive step at about the same time, on the same question"""
    rows: int = 0
    """sequences that the target read"""
    forwards: dict[str, Tensor | int] = field(default_factory=dict)
    """of the drafter, as the draft counts them"""

    @property
    def loop(self) -> float:
        """What is neither drafting nor the target's forward."""
        return self.total - self.draft - self.verify


@dataclass
class Timings:
    """Rounds of instrumented runs, in order, their summed counts, and the most bytes of keys and values they held."""

    rounds: list[Round] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    kv_bytes: int = 0

    def add(self, other: Timings) -> None:
        """Take in other runs."""
        self.rounds += other.rounds
        self.counts += other.counts
        self.kv_bytes = max(self.kv_bytes, other.kv_bytes)


def instrument(decoder: Decoder, groups: Sequence[Sequence[Question]], engines: Sequence[Engine]) -> Timings:
    """Run a method with a clock around every draft and every forward of the target, synchronised on a GPU.

    A round ends where the next one begins, the last one with the call.

    Args:
        decoder: of the method.
        groups: batches of questions.
        engines: all that the method runs, whose caches are counted.
    """
    watch = _Watch(decoder, engines)
    with steady(), watch.attached():
        for group in groups:
            watch.run(group)
    return watch.timings


_WARM_TOKENS = 8


def instrument_all(
    decoders: Mapping[str, Decoder], groups: Sequence[Sequence[Question]], engines: Sequence[Engine]
) -> dict[str, Timings]:
    """Instrumented runs of several methods, batch by batch in turn, after a short one of each that does not count.

    The autoregressive method, where it is among them, is run again directly before each of the others and so gives
    their units: how fast a shared machine is may change from one second to the next.
    """
    timings = {method: Timings() for method in decoders}
    short = [replace(question, limit=min(question.limit, _WARM_TOKENS)) for question in groups[0]]
    base, unit = decoders.get(AUTOREGRESSIVE), 1.0
    with steady():
        for number, group in enumerate([short, *groups]):
            for method, decoder in decoders.items():
                if base is not None:
                    beside = instrument(base, [group], engines)
                    unit = statistics.median(each.total for each in beside.rounds)
                own = beside if decoder is base else instrument(decoder, [group], engines)
                for each in own.rounds:
                    each.unit = unit
                if number > 0:
                    timings[method].add(own)
    return timings


class _Watch:
    """Stands in for `propose` of the drafter and `forward` of the target of one decoder while attached."""

    def __init__(self, decoder: Decoder, engines: Sequence[Engine]) -> None:
        self.decoder = decoder
        self.engines = engines
        self.timings = Timings()
        self._caches: list[DenseCache] = []
        self._rounds: list[Round] = []
        self._drafting = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Replace the methods on the instances; afterwards those of their classes show again."""
        target, drafter = self.decoder.target, self.decoder.drafter
        stand_ins = [(target, "forward", self._forward(target.forward))]
        if drafter is not None:
            stand_ins.append((drafter, "propose", self._propose(drafter.propose)))
        stand_ins += [(engine, "new_cache", self._new_cache(engine.new_cache)) for engine in set(self.engines)]
        for thing, name, stand_in in stand_ins:
            setattr(thing, name, stand_in)
        try:
            yield
        finally:
            for thing, name, _ in stand_ins:
                delattr(thing, name)

    def run(self, group: Sequence[Question]) -> None:
        """Answer a batch and keep its rounds."""
        self._rounds, self._caches = [], []
        completions = answer(self.decoder, group)
        ends = [each.start for each in self._rounds[1:]] + [self._now()]
        for each, end in zip(self._rounds, ends, strict=True):
            each.total = end - each.start
        self.timings.rounds += self._rounds
        self.timings.counts += sum(completion.counts for completion in completions)
        self.timings.kv_bytes = max(self.timings.kv_bytes, sum(cache.memory_bytes() for cache in self._caches))

    def _now(self) -> float:
        if self.decoder.target.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _propose(self, propose: Callable[..., Draft]) -> Callable[..., Draft]:
        def timed(*args: Any, **kwargs: Any) -> Draft:
            start = self._now()
            self._drafting = True
            draft = propose(*args, **kwargs)
            self._drafting = False
            self._rounds.append(Round(start, draft=self._now() - start, steps=draft.width, forwards=draft.forwards))
            return draft

        return timed

    def _forward(self, forward: Callable[..., Output]) -> Callable[..., Output]:
        def timed(cache: Any, tokens_BQ: Any, counts: Any = None, keep: str | None = "all", **more: Any) -> Output:
            if self._drafting or keep in (None, "cache"):  # a drafter that is the target itself; a prompt being read
                return forward(cache, tokens_BQ, counts, keep, **more)
            start = self._now()
            output = forward(cache, tokens_BQ, counts, keep, **more)
            seconds = self._now() - start
            if not self._rounds or self._rounds[-1].width:  # nothing was drafted in this round
                self._rounds.append(Round(start))
            now = self._rounds[-1]
            now.verify, (now.rows, now.width) = seconds, tokens_BQ.shape
            return output

        return timed

    def _new_cache(self, new_cache: Callable[..., DenseCache]) -> Callable[..., DenseCache]:
        def kept(*args: Any, **kwargs: Any) -> DenseCache:
            self._caches.append(new_cache(*args, **kwargs))
            return self._caches[-1]

        return kept
