"""Greedy tokens of a method against autoregressive ones: identity in float64, noise at every difference in less."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drafttrain.decoding.counts import Completion
from drafttrain.decoding.loop import Decoder
from drafttrain.distributed import progress
from drafttrain.errors import UserError
from drafttrain.evaluation.controls import CONTROLS
from drafttrain.evaluation.distributions import broken_method
from drafttrain.evaluation.exactness import greedy_check
from drafttrain.evaluation.findings import Finding, judged
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.runner import answer, batches
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Exactness
from drafttrain.ops.sampling import Sampling

LOW_PRECISION = ("float32", "bfloat16")

BATCH = 8
"""Answers that are decoded together."""

GREEDY = Sampling(0.0)
PENALISED = Sampling(0.0, repetition_penalty=1.3)


def float64_findings(models: Models, method: str, questions: Sequence[Question], seed: int) -> list[Finding]:
    """Identity with autoregressive decoding, one answer at a time and in batches, and a control that must break it."""
    ways = [
        ("greedy, float64, one at a time", GREEDY, 1),
        (f"greedy, float64, batches of {BATCH}", GREEDY, BATCH),
        (f"greedy, repetition penalty {PENALISED.repetition_penalty}, float64, batches of {BATCH}", PENALISED, BATCH),
    ]
    bases = {
        sampling: _answers(models.decoder(AUTOREGRESSIVE, sampling, seed, "float64"), questions, BATCH, "baseline")
        for sampling in (GREEDY, PENALISED)
    }
    found = []
    for test, sampling, batch in ways:
        decoder = models.decoder(method, sampling, seed, "float64")
        own = _answers(decoder, questions, batch, f"{method}: {test}")
        found.append(Finding(method, test, *judged(_check(decoder, questions, own, bases[sampling]))))
    broken = broken_method(models, method)
    for control in (each for each in CONTROLS if each.greedy):
        test = f"greedy, float64, control: {control.name}" + (f" ({broken})" if broken != method else "")
        decoder = control.broken(models.decoder(broken, GREEDY, seed, "float64"))
        own = _answers(decoder, questions, BATCH, f"{method}: {test}")
        found.append(Finding(method, test, *judged(_check(decoder, questions, own, bases[GREEDY]), control=True)))
    return found


def low_precision_finding(
    models: Models, method: str, questions: Sequence[Question], dtype: str, tolerance: float, seed: int
) -> Finding:
    """Both one answer at a time, where the dtype can be had.

    Args:
        models: of the pair.
        method: an expression.
        questions: what is asked.
        dtype: in which both decode.
        tolerance: how many times the noise a gap may be.
        seed: of the decoders.
    """
    test = f"greedy, {dtype}, one at a time"
    try:
        models.engines(dtype)
    except (UserError, torch.OutOfMemoryError) as error:
        return Finding(method, test, "not checked", str(error).splitlines()[0])
    own, base = (models.decoder(each, GREEDY, seed, dtype) for each in (method, AUTOREGRESSIVE))
    answers = [_answers(each, questions, 1, f"{method}: {test}") for each in (own, base)]
    return Finding(method, test, *judged(_check(own, questions, *answers, tolerance)))


def _answers(decoder: Decoder, questions: Sequence[Question], batch: int, description: str) -> list[Completion]:
    groups = batches(questions, batch)
    return [found for group in progress(groups, len(groups), description) for found in answer(decoder, group)]


def _check(
    decoder: Decoder,
    questions: Sequence[Question],
    own: Sequence[Completion],
    base: Sequence[Completion],
    tolerance: float = 0.0,
) -> Exactness:
    longest = decoder.drafter.max_length if decoder.drafter else 1
    widths = sorted({2, 1 + longest})
    return greedy_check(decoder.target, decoder.sampling, questions, own, base, widths, tolerance)
