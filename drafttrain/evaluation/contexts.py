"""What becomes of a method as prompts grow longer: tokens per round, speed, and what its drafter keeps, by length.

A prompt belongs to the smallest power of two of tokens that holds it, 1,024 at least. Reading the prompt is told apart
from decoding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from drafttrain.decoding.loop import Decoder
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.runner import answer
from drafttrain.evaluation.schema import ContextBucket, Sample

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
    questions: Sequence[Question], samples: Mapping[str, Sequence[Sample]], decoders: Mapping[str, Decoder], name: str
) -> list[ContextBucket]:
    """Figures of every method by the length of the prompt; empty where all prompts are of one bucket.

    Args:
        questions: what was asked.
        samples: by method, one answer a question.
        decoders: by method.
        name: of the decoding setting.
    """
    places: dict[int, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(bucket_of(len(question.ids)), []).append(place)
    if len(places) < 2:
        return []
    found = []
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
                )
            )
    return found


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
