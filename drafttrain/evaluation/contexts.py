"""What becomes of a method as prompts grow longer: tokens per round, speed, and what its drafter keeps, by length.

A prompt belongs to the smallest power of two of tokens that holds it, 1,024 at least, or to the length that it was
brought to by other text (`filler`); then tau is also compared with that of the same questions at the shortest length.
Reading the prompt is told apart from decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from drafttrain.decoding.loop import Decoder
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.runner import answer
from drafttrain.evaluation.schema import ContextBucket, Interval, Sample
from drafttrain.evaluation.statistics import bootstrap

SHORTEST = 1024
"""Prompts up to here are one bucket."""

_FEW = 8
"""Tokens decoded to see what a drafter keeps."""


def bucket_of(length: int) -> int:
    """The bucket of a prompt of so many tokens.

    Example:
        >>> [bucket_of(length) for length in (3, 1024, 1025, 5000)]
        [1024, 1024, 2048, 8192]
    """
    return max(SHORTEST, 1 << (length - 1).bit_length())


def by_context(
    questions: Sequence[Question],
    samples: Mapping[str, Sequence[Sample]],
    decoders: Mapping[str, Decoder],
    name: str,
    resamples: int = 1000,
) -> list[ContextBucket]:
    """Figures of every method by the length of the prompt; empty where all prompts are of one bucket.

    Args:
        questions: what was asked.
        samples: by method, one answer a question.
        decoders: by method.
        name: of the decoding setting.
        resamples: behind intervals.
    """
    places: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(question.context or bucket_of(len(question.ids)), []).append(place)
    if len(places) < 2:
        return []
    found = []
    paired = all(question.context is not None for question in questions)
    first = min(places)
    for method, answers in samples.items():
        for context, chosen in sorted(places.items()):
            own = [answers[place] for place in chosen]
            longest = max((questions[place] for place in chosen), key=lambda question: len(question.ids))
            tokens, rounds = (sum(count(sample) for sample in own) for count in (_tokens, _rounds))
            found.append(
                ContextBucket(
                    method=method,
                    sampling=name,
                    context=context,
                    prompts=len(own),
                    tokens=tokens,
                    tau=tokens / rounds if rounds else 0.0,
                    tokens_per_second=tokens / max(1e-9, sum(sample.decode_seconds for sample in own)),
                    prefill_seconds=sum(sample.prefill_seconds for sample in own) / len(own),
                    drafter_kv_bytes=drafter_bytes(decoders[method], longest),
                    tau_ratio=_ratio(own, [answers[place] for place in places[first]], resamples) if paired else None,
                )
            )
    return found


def _ratio(own: Sequence[Sample], first: Sequence[Sample], resamples: int) -> Interval:
    """tau over tau of the same questions, drawn together."""
    columns = [[_tokens(sample), _rounds(sample)] for samples in (own, first) for sample in samples]
    values = np.array(columns, dtype=np.float64).reshape(2, len(own), 2).transpose(1, 0, 2).reshape(len(own), 4)

    def ratio(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] * sums[..., 3] / np.maximum(sums[..., 1] * sums[..., 2], 1e-9)

    return bootstrap(values, ratio, ["all"] * len(own), resamples)


def paired_lines(buckets: Sequence[ContextBucket]) -> list[str]:
    """A sentence on each method's longest prompts, where the same questions were asked at several lengths."""
    paired = [bucket for bucket in buckets if bucket.tau_ratio is not None and bucket.drafter_kv_bytes is not None]
    shortest, longest = (end((bucket.context for bucket in paired), default=0) for end in (min, max))
    return [
        f"With {longest} tokens before the answer in place of {shortest}, `{bucket.method}` writes "
        f"{bucket.tau_ratio.value:.3f} [{bucket.tau_ratio.low:.3f}, {bucket.tau_ratio.high:.3f}] times as many tokens "
        f"a round on the same {bucket.prompts} questions ({bucket.sampling})."
        for bucket in paired
        if bucket.context == longest
    ]


def drafter_bytes(decoder: Decoder, question: Question) -> int | None:
    """Bytes of keys and values that a method's drafter keeps behind a prompt, None for one without a cache."""
    if decoder.drafter is None:
        return None
    answer(decoder, [dataclasses.replace(question, limit=min(question.limit, _FEW))])
    cache = getattr(decoder.drafter, "cache", None)
    return None if cache is None else cache.memory_bytes()


def _tokens(sample: Sample) -> int:
    return len(sample.token_ids)


def _rounds(sample: Sample) -> int:
    return sample.counts["rounds"]
