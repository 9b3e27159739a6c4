"""Answers for show: text in pieces, each with where its tokens came from; and the files that keep all answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.schema import ExampleAnswer, Piece, Sample, to_json_line
from drafttrain.run_folder import write_atomically

_PROMPT_SHOWN = 1500
"""Characters of a prompt's end that are shown."""


def pieces(
    tokenizer: Any, ids: Sequence[int], sources: Sequence[str], origins: Sequence[int | None] = ()
) -> list[Piece]:
    """Text of an answer by source. A character of several tokens goes to the source of its last one.

    Args:
        tokenizer: of the answer.
        ids: its tokens.
        sources: who each came from.
        origins: the position each was copied from; what was copied from one stretch of text is one piece.

    Returns:
        pieces that together are the answer's text, special tokens left out.
    """
    found: list[Piece] = []
    shown, waiting = "", 0
    for end, source in enumerate(sources, start=1):
        text = tokenizer.decode(list(ids[:end]), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        waiting += 1
        if text.endswith("\ufffd") and end < len(ids):
            continue
        added, shown = text[len(shown) :], text
        if found and found[-1].source == source and _goes_on(origins, end - 1):
            found[-1].text += added
            found[-1].tokens += waiting
        elif added:
            found.append(Piece(added, source, waiting, origins[end - waiting] if origins else None))
        waiting = 0
    return found


def _goes_on(origins: Sequence[int | None], place: int) -> bool:
    """Whether a token was copied from behind the one before it, or neither was copied."""
    if not origins:
        return True
    before, now = origins[place - 1 : place + 1]
    return now is None if before is None else now == before + 1


def examples(
    tokenizer: Any, questions: Sequence[Question], samples: Sequence[Sample], count: int = 3
) -> list[ExampleAnswer]:
    """A few answers of one method, of different tasks, the longest that does not loop of each."""
    asked = {(question.prompt_id, question.turn): question for question in questions}
    best: dict[str, Sample] = {}
    for sample in samples:
        if not sample.looping and len(sample.token_ids) > len(
            best[sample.task].token_ids if sample.task in best else ()
        ):
            best[sample.task] = sample
    chosen = sorted(best.values(), key=lambda sample: -len(sample.token_ids))[:count]
    return [_example(tokenizer, asked[sample.prompt_id, sample.turn], sample) for sample in chosen]


def _example(tokenizer: Any, question: Question, sample: Sample) -> ExampleAnswer:
    prompt = tokenizer.decode(list(question.ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return ExampleAnswer(
        prompt_id=sample.prompt_id,
        task=sample.task,
        method=sample.method,
        sampling=sample.sampling,
        prompt=prompt if len(prompt) <= _PROMPT_SHOWN else "... " + prompt[-_PROMPT_SHOWN:],
        pieces=pieces(tokenizer, sample.token_ids, sample.sources, sample.origins),
        tau=sample.counts["tokens"] / sample.counts["rounds"],
    )


def sample_path(sampling: str, method: str) -> str:
    """File of a method's answers, relative to the run folder: readable, and different for different methods."""
    return f"samples/{_slug(sampling)}--{_slug(method)}.jsonl"


def write_samples(folder: Path, samples: Iterable[Sample], path: str) -> None:
    """Write answers as JSON lines, whole or not at all."""
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / path, "".join(to_json_line(sample) + "\n" for sample in samples))


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=_]+", "-", text).strip("-")
