"""Answers of the target to prompts: written by the bundled decoder, or taken from a log.

Both give records of the schema `responses`, one for every turn of a conversation. A row is a function of its prompt,
the settings and the seed: draws are keyed by prompt and turn, never by a place in a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drafttrain.dialogue import Dialogue, answer_text
from drafttrain.errors import UserError
from drafttrain.ops.random import sample_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from drafttrain.decoding.loop import Completion

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A turn to be answered.

    Attributes:
        at: number of its prompt among those handed in.
        turn: number of the turn in its conversation.
        ids: what the target reads.
        room: most tokens the answer may have.
        sample_id: keys the draws.
    """

    at: int
    turn: int
    ids: list[int]
    room: int
    sample_id: int


@dataclass(frozen=True)
class Limits:
    """Sizes: tokens of context, most tokens of an answer, questions answered together."""

    context: int
    max_new_tokens: int
    batch_size: int

    def room(self, ids: Sequence[int]) -> int:
        """Tokens that an answer to this context may have; below 1 it does not fit."""
        return min(self.max_new_tokens, self.context - len(ids))


Decode = Callable[[Sequence[Question]], "list[Completion]"]
Answered = Iterator[tuple[int, dict[str, Any]]]


def generated(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", decode: Decode, limits: Limits
) -> Answered:
    """Rows of prompts answered by the target, turn after turn, each turn given the target's own earlier answers.

    Questions of a turn are sorted by length, so that a batch holds prompts of about one size. A turn whose context
    leaves no room for an answer ends its conversation.

    Args:
        records: of the schema `prompts`.
        tokenizer: the target's.
        decode: answers a batch.
        limits: sizes.

    Yields:
        (number of the prompt, row), as they are answered.
    """
    dialogues = [Dialogue.from_record(record) for record in records]
    answers: list[list[str]] = [[] for _ in records]
    for turn in range(max((dialogue.turns for dialogue in dialogues), default=0)):
        waiting = [at for at, given in enumerate(answers) if len(given) == turn < dialogues[at].turns]
        questions = [_question(at, dialogues[at], answers[at], tokenizer, limits) for at in waiting]
        fitting = sorted((each for each in questions if each.room >= 1), key=lambda each: (-len(each.ids), each.at))
        for start in range(0, len(fitting), limits.batch_size):
            batch = fitting[start : start + limits.batch_size]
            for question, completion in zip(batch, decode(batch), strict=True):
                text = answer_text(tokenizer, completion.token_ids)
                answers[question.at].append(text)
                ids, reason = completion.token_ids, completion.finish_reason
                yield question.at, _row(records[question.at], turn, question.ids, ids, reason, text)


def logged(
    records: Sequence[Record], tokenizer: "PreTrainedTokenizerBase", ends: frozenset[int], limits: Limits
) -> Answered:
    """Rows of recorded answers, each turn given the recorded ones before it; longer answers than allowed are cut.

    Yields:
        (number of the prompt, row).

    Raises:
        UserError: the chat template cannot show where a recorded answer begins.
    """
    for at, record in enumerate(records):
        dialogue = Dialogue.from_record(record)
        for turn in range(dialogue.turns):
            found = dialogue.recorded(tokenizer, turn, ends)
            if found is None or limits.room(found[0]) < 1:
                continue
            ids = found[1][: limits.room(found[0])]
            reason = "eos" if ids and ids[-1] in ends else "length"
            if ids:
                yield at, _row(record, turn, found[0], ids, reason, answer_text(tokenizer, ids))


def in_order(rows: Iterable[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows by prompt, then by turn."""
    return [row for _, _, row in sorted(((at, row["turn"], row) for at, row in rows), key=lambda entry: entry[:2])]


def require_recorded(records: Iterable[Record]) -> None:
    """Refuse prompts without a single recorded answer.

    Raises:
        UserError: there is none.
    """
    if not any(Dialogue.from_record(record).has_recorded for record in records):
        raise UserError(
            "responses.source is logged, but no prompt has a recorded answer; use messages with assistant turns, name "
            "the field with prompts.fields.answer, or set responses.source: generate."
        )


def _question(
    at: int, dialogue: Dialogue, answers: Sequence[str], tokenizer: "PreTrainedTokenizerBase", limits: Limits
) -> Question:
    ids = dialogue.context(tokenizer, answers)
    return Question(at, len(answers), ids, limits.room(ids), sample_id(dialogue.prompt_id, len(answers)))


def _row(record: Record, turn: int, prompt: list[int], response: list[int], reason: str, text: str) -> dict[str, Any]:
    copied = {name: record[name] for name in ("prompt_id", "split", "task", "source")}
    answer = {"prompt_ids": prompt, "response_ids": response, "finish_reason": reason, "text": text}
    return {**copied, "turn": turn, **answer}
