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
    form = "code" if change == "rename" else rng.choice(("prose", "record"))
    old, new, *nouns = rng.sample(NOUNS, len(NOUNS))
    added = _FORMS[form](rng, nouns, rng.choice(nouns))
    asked = instruction(change, _UNIT_NAME[form], old, new, added, rng)
    room.take(asked + "\n\n" + (added if change in ("append", "prepend") else ""))
    marked = _marked(change, form, rng, room, nouns, old)
    units = _scatter_in(rng, marked, _others(form, rng, room, nouns))
    passage = _join(form, units)
    return (Turn(f"{asked}\n\n{passage}", _revised(change, form, units, old, new, added)),)


def _marked(change: str, form: str, rng: random.Random, room: Room, nouns: list[str], old: str) -> list[str]:
    """The units that mention the word at stake: one, or as many as drawn while they fit."""
    times = {"replace": rng.randint(1, 3), "rename": rng.randint(1, 4)}.get(change, 1)
    units = [_FORMS[form](rng, nouns, old) for _ in range(times)]
    room.take(2 * f"{units[0]}\n")
    return units[:1] + [unit for unit in units[1:] if room.put(unit + "\n", times=2)]


def _others(form: str, rng: random.Random, room: Room, nouns: list[str]) -> list[str]:
    """Units that do not mention the word, as many as fit twice; at least one."""
    units: list[str] = []
    end = "" if form == "prose" else "\n"
    while True:
        unit = _FORMS[form](rng, nouns, rng.choice(nouns))
        if not room.put(unit + end, times=2) and units:
            return units
        units.append(unit)


def _scatter_in(rng: random.Random, marked: list[str], units: list[str]) -> list[str]:
    for unit in marked:
        units.insert(rng.randint(0, len(units)), unit)
    return units


def instruction(change: str, unit: str, old: str, new: str, added: str, rng: random.Random) -> str:
    """What is asked for: `change` of the word `old` (to `new`), or of a `unit` (line or sentence) that is `added`."""
    forms = {
        "replace": (f"Replace the word {old} by {new}.", f"Change the word {old} to {new}."),
        "rename": (f"Rename `{old}` to `{new}`.", f"Change the name `{old}` to `{new}`."),
        "append": (f"Add this {unit} at the end:\n{added}", f"End with this {unit}:\n{added}"),
        "prepend": (f"Add this {unit} at the start:\n{added}", f"Begin with this {unit}:\n{added}"),
    }
    return rng.choice(forms[change])


def _revised(change: str, form: str, units: list[str], old: str, new: str, added: str) -> str:
    if change == "append":
        return _join(form, [*units, added])
    if change == "prepend":
        return _join(form, [added, *units])
    return re.sub(rf"\b{old}\b", new, _join(form, units))


KINDS = tuple(
    Kind(f"revise/{change}", 60, partial(make, change)) for change in ("replace", "rename", "append", "prepend")
)
