"""What is asked of every method: test prompts, turn by turn, with the same context for all.

Later turns of a conversation read the target's own earlier answers. Those are decoded once, without a drafter, before
anything is timed; so every method answers the very same contexts, and answers can be compared one by one.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drafttrain.decoding.counts import Completion
from drafttrain.dialogue import Dialogue, answer_text
from drafttrain.errors import UserError
from drafttrain.evaluation.figures import RIGHT_ONLY, loops
from drafttrain.evaluation.schema import Sample
from drafttrain.evaluation.statistics import repetition
from drafttrain.evaluation.tasks.scoring import SCORERS

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One turn to be answered.

    Attributes:
        prompt_id, task, turn: which one.
        ids: the whole context.
        limit: most new tokens, as many as fit into the context.
        reference: the right answer where there is one.
        sample_id: keys the draws.
        context: tokens that it was made to have by text before it; None as it is.
    """

    prompt_id: str
    task: str
    turn: int
    ids: tuple[int, ...]
    limit: int
    reference: str | None
    sample_id: int
    context: int | None = None


@dataclass(frozen=True)
class Limits:
    """Most new tokens of an answer, tokens of the target's context, and questions answered together."""

    max_new_tokens: int
    context: int
    batch_size: int


Answer = Callable[[Sequence[Question]], list[Completion]]


def answers_of(record: Record) -> list[str]:
    """The right answers of a prompt's turns; empty where none are known, or in a form of another tool's."""
    reference = json.loads(record["reference"]) if record["reference"] else None
    answers = reference.get("answers") if isinstance(reference, dict) else None
    return [str(answer) for answer in answers] if isinstance(answers, list) else []


def choose(records: Iterable[Record], splits: Sequence[str], per_task: int) -> list[Record]:
    """At most `per_task` prompts of each task from these splits, by a hash of their names, tasks mixed.

    A choice by hash does not change when other prompts come or go.
    """
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["split"] in splits:
            found.setdefault(record["task"], []).append(record)
    chosen = [
        record
        for task in found.values()
        for record in sorted(task, key=lambda record: _digest(record["prompt_id"]))[:per_task]
    ]
    return sorted(chosen, key=lambda record: _digest(f"order/{record['prompt_id']}"))


def questions_of(records: Sequence[Record], tokenizer: Any, limits: Limits, answer: Answer) -> list[Question]:
    """All turns of the conversations, in their order; a turn whose context leaves no room ends its conversation.

    Args:
        records: of the schema `prompts`.
        tokenizer: the target's.
        limits: of answers.
        answer: decodes a batch of questions without a drafter; called for all turns but the last.

    Raises:
        UserError: a prompt does not fit into the context at all.
    """
    dialogues = [Dialogue.from_record(record) for record in records]
    texts: list[list[str]] = [[] for _ in records]
    found: list[list[Question]] = [[] for _ in records]
    for turn in range(max((dialogue.turns for dialogue in dialogues), default=0)):
        waiting = [at for at, given in enumerate(texts) if len(given) == turn < dialogues[at].turns]
        for at in waiting:
            found[at] += _question(records[at], turn, dialogues[at].context(tokenizer, texts[at]), limits)
        going = [at for at in waiting if len(found[at]) == turn + 1 < dialogues[at].turns]
        for start in range(0, len(going), limits.batch_size):
            part = going[start : start + limits.batch_size]
            for at, completion in zip(part, answer([found[at][-1] for at in part]), strict=True):
                texts[at].append(answer_text(tokenizer, completion.token_ids))
    return [question for turns in found for question in turns]


def _question(record: Record, turn: int, ids: Sequence[int], limits: Limits) -> list[Question]:
    room = min(limits.max_new_tokens, limits.context - len(ids))
    if room < 1 and turn == 0:
        raise UserError(
            f"prompt {record['prompt_id']} has {len(ids)} tokens, which leaves no room for an answer in the target's "
            f"context of {limits.context}; shorten it or set prompts.max_tokens."
        )
    if room < 1:
        return []
    references = answers_of(record)
    reference = references[turn] if turn < len(references) else None
    name = record["prompt_id"]
    return [Question(name, record["task"], turn, tuple(ids), room, reference, _digest(f"{name}/{turn}") >> 2)]


def different(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions, of as many tasks as there are."""
    seen: dict[str, int] = {}
    order = []
    for question in questions:
        seen[question.task] = seen.get(question.task, 0) + 1
        order.append((seen[question.task], len(order)))
    return [questions[at] for _, at in sorted(order)[:count]]


def is_right(reference: str | None, text: str) -> bool | None:
    """Whether an answer is exactly the right one, spaces around it aside; None where none is known."""
    return None if reference is None else text.strip() == reference.strip()


def usable(task: str, reference: str | None, ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether an answer may stand in a figure: it is not in a loop, and right where its task asks for that."""
    right = is_right(reference, answer_text(tokenizer, ids))
    return not loops(ids, right) and not (task in RIGHT_ONLY and right is False)


def to_sample(
    question: Question, completions: Sequence[Completion], method: str, sampling: str, tokenizer: Any
) -> Sample:
    """An answer, scored, from its repeats: tokens and counts of the first, seconds the median of all."""
    completion = completions[0]
    text = answer_text(tokenizer, completion.token_ids)
    right = is_right(question.reference, text)
    seconds = [repeat.counts.decode_seconds for repeat in completions]
    counts = dict(vars(completion.counts))
    del counts["decode_seconds"], counts["prefill_seconds"]
    return Sample(
        prompt_id=question.prompt_id,
        task=question.task,
        turn=question.turn,
        method=method,
        sampling=sampling,
        token_ids=completion.token_ids,
        sources=completion.sources,
        finish_reason=completion.finish_reason,
        text=text,
        counts=counts,
        decode_seconds=statistics.median(seconds),
        prefill_seconds=statistics.median(repeat.counts.prefill_seconds for repeat in completions),
        repetition=repetition(completion.token_ids),
        looping=loops(completion.token_ids, right),
        right=right,
        score=_score(question, text),
        repeats=seconds,
        origins=completion.origins,
    )


def _score(question: Question, text: str) -> float | None:
    if question.reference is None or question.task not in SCORERS:
        return None
    return SCORERS[question.task](question.reference, text)


def prompts_hash(questions: Iterable[Question]) -> str:
    """Identity of a set of test prompts: contexts of first turns, whatever their order."""
    ids = sorted(f"{q.prompt_id} {q.ids} {q.limit}" for q in questions if q.turn == 0)
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def response_row(question: Question, ids: Sequence[int]) -> dict[str, Any]:
    """An answer as a row of responses, which traces are made from."""
    return {
        "prompt_id": question.prompt_id,
        "split": "tune",
        "task": question.task,
        "source": "",
        "turn": question.turn,
        "prompt_ids": list(question.ids),
        "response_ids": list(ids),
    }
