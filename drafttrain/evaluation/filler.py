"""The same questions at several lengths: text of other prompts stands before them.

What is asked stays at the end, behind the template's first token, so that only the distance to the beginning and the
amount of text to be read change from length to length, and lengths can be compared prompt by prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from drafttrain.errors import UserError
from drafttrain.evaluation.questions import Question

SEPARATOR = "@"
"""Between a prompt's name and the length that it was brought to."""


def check_contexts(contexts: Sequence[int], room: int) -> None:
    """Refuse lengths that leave no room for an answer.

    Args:
        contexts: as the recipe has them.
        room: tokens that the pair can read, with one to be written.

    Raises:
        UserError: names the length.
    """
    if contexts and max(contexts) >= room:
        raise UserError(f"evaluate.contexts has {max(contexts)}, but the pair's context is {room} tokens; lower it.")


def behind_filler(
    questions: Sequence[Question], contexts: Sequence[int], others: Iterable[Sequence[int]], room: int
) -> list[Question]:
    """First turns at every length, all lengths of a question one after the other.

    Args:
        questions: any; those longer than the shortest length are left out.
        contexts: lengths in tokens.
        others: token ids of prompts that are not asked; they are repeated where they are too few.
        room: tokens of the pair's context.

    Raises:
        UserError: as `check_contexts`, every question is longer, or there is no other text.
    """
    check_contexts(contexts, room)
    lengths = sorted(set(contexts))
    chosen = [question for question in questions if question.turn == 0 and len(question.ids) <= lengths[0]]
    if not chosen:
        raise UserError(f"no prompt has at most {lengths[0]} tokens; raise the shortest of evaluate.contexts.")
    text = [token for ids in others for token in ids[1:]]
    if not text:
        raise UserError("evaluate.contexts needs other prompts to stand before those that are asked; give more.")
    return [_at(question, length, text, room) for question in chosen for length in lengths]


def _at(question: Question, length: int, text: Sequence[int], room: int) -> Question:
    """A question of `length` tokens: each begins elsewhere in the other text, and its lengths end with the same."""
    missing = length - len(question.ids)
    end = question.sample_id % len(text)
    filler = [text[(end - missing + at) % len(text)] for at in range(missing)]
    return dataclasses.replace(
        question,
        prompt_id=f"{question.prompt_id}{SEPARATOR}{length}",
        ids=(*question.ids[:1], *filler, *question.ids[1:]),
        limit=min(question.limit, room - length),
        context=length,
    )
