"""Revise: a passage and one instruction; the answer is the whole passage with that one change.

Most of the answer is a copy, which is what a drafter of any worth must get right.
"""

import random
import re
from collections.abc import Callable
from functools import partial

from drafttrain.evaluation.tasks.base import Kind, Room, Turn
from drafttrain.evaluation.tasks.filler import paragraphs, sentence
from drafttrain.evaluation.tasks.words import ADJECTIVES, NOUNS, VERBS

# A passage form makes one unit about a subject from a pool of other nouns.
Unit = Callable[[random.Random, list[str], str], str]


def _prose_unit(rng: random.Random, nouns: list[str], subject: str) -> str:
    return sentence(rng, nouns, subject)


def _record_unit(rng: random.Random, nouns: list[str], subject: str) -> str:
    value = rng.choice((str(rng.randrange(10, 1000)), rng.choice(nouns)))
    return f"{rng.choice(ADJECTIVES)} {subject}: {value}"


def _code_unit(rng: random.Random, nouns: list[str], subject: str) -> str:
    verb, thing, number = rng.choice(VERBS), rng.choice(nouns), rng.randrange(1, 100)
    match rng.randrange(4):
        case 0:
            return f"{thing}={verb}({subject},{number})"
        case 1:
            return f"{subject}={thing}+{number}"
        case 2:
            return f"{verb}({thing},{subject})"
        case _:
            return f"{subject}.{verb}({thing})"


_FORMS: dict[str, Unit] = {"prose": _prose_unit, "record": _record_unit, "code": _code_unit}
_UNIT_NAME = {"prose": "sentence", "record": "line", "code": "line"}


def _join(form: str, units: list[str]) -> str:
    return paragraphs(units) if form == "prose" else "\n".join(units)


def make(change: str, rng: random.Random, room: Room, questions: int) -> tuple[Turn, ...]:
    """One passage and one change. `questions` is not used: a revision is one turn."""
    form = rng.choice(tuple(_FORMS))
    old, new, *nouns = rng.sample(NOUNS, len(NOUNS))
    before, after = _before_and_after(change, _FORMS[form](rng, nouns, old), old, new)
    asked = instruction(change, _UNIT_NAME[form], before, after)
    room.take(f"{asked}\n\n{before}\n{after}\n")
    units = _units(form, rng, room, nouns)
    at = {"append": len(units), "prepend": 0}.get(change, rng.randint(0, len(units)))
    passage, answer = ([*units[:at], *unit, *units[at:]] for unit in (before, after))
    return (Turn(f"{asked}\n\n{_join(form, passage)}", _join(form, answer)),)


def _before_and_after(change: str, unit: str, old: str, new: str) -> tuple[list[str], list[str]]:
    """The units at the place of the change: one with another word, or one where there was none."""
    return ([unit], [re.sub(rf"\b{old}\b", new, unit)]) if change == "replace" else ([], [unit])


def make_again(rng: random.Random, room: Room, questions: int) -> tuple[Turn, ...]:
    """One passage and `questions` changes, a turn each; every turn quotes the passage as it then stands."""
    form = rng.choice(tuple(_FORMS))
    new, *nouns = rng.sample(NOUNS, len(NOUNS))
    changes = [rng.choice(("replace", "append", "prepend")) for _ in range(questions)]
    room.left -= 40 * questions  # what the instructions take, about
    passage = _units(form, rng, room, nouns, times=2 * questions)
    turns = []
    for change in changes:
        at = {"append": len(passage), "prepend": 0}.get(change, rng.randrange(len(passage)))
        before = [passage[at]] if change == "replace" else []
        after = [_FORMS[form](rng, nouns, new)]
        asked = instruction(change, _UNIT_NAME[form], before, after)
        changed = [*passage[:at], *after, *passage[at + len(before) :]]
        turns.append(Turn(f"{asked}\n\n{_join(form, passage)}", _join(form, changed)))
        passage = changed
    return tuple(turns)


def _units(form: str, rng: random.Random, room: Room, nouns: list[str], times: int = 2) -> list[str]:
    """Units that do not mention the word at stake, as many as fit that many times; at least one."""
    units: list[str] = []
    end = "" if form == "prose" else "\n"
    while True:
        unit = _FORMS[form](rng, nouns, rng.choice(nouns))
        if not room.put(unit + end, times) and units:
            return units
        units.append(unit)


def instruction(change: str, unit: str, before: list[str], after: list[str]) -> str:
    """What is asked for; units (lines or sentences) are quoted on lines of their own, as they stand in the passage."""
    quoted = "\n".join(after)
    if change == "replace":
        return f"Replace this {unit}:\n{before[0]}\nby this {unit}:\n{quoted}"
    return f"{'End' if change == 'append' else 'Begin'} with this {unit}:\n{quoted}"


KINDS = tuple(Kind(f"revise/{change}", 60, partial(make, change)) for change in ("replace", "append", "prepend"))

AGAIN = Kind("revise/again", 100, make_again)
"""Several changes in turn: in no mixture of the reference world, for what copies must choose among versions."""
