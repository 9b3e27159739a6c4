"""Self-correct: write a list, take in a correction, write the list again.

The third answer repeats the first but for one line, so what was just generated is the best draft of it.
"""

import random
from functools import partial

from drafttrain.evaluation.tasks.base import Kind, Room, Turn
from drafttrain.evaluation.tasks.filler import paragraphs
from drafttrain.evaluation.tasks.words import ADJECTIVES, NOUNS

_LINES = {"lines": "{item}: {count}", "table": "| {item} | {count} |", "csv": "{item},{count}"}
_FIRST = ("Write this list as {form}.", "Give this list as {form}.")
_SECOND = (
    "The {item} count is {new}, not {old}. Which line changes?",
    "Correction: {new} {item}, not {old}. What changes?",
)
_THIRD = ("Write the whole list again.", "Give the full corrected list.")
_LEAST_ITEMS = 2
_MISSES = 3  # a shorter item may still fit where one did not


def make(form: str, rng: random.Random, room: Room, questions: int) -> tuple[Turn, ...]:
    """Three turns about one ledger. `questions` is not used: the turns are fixed."""
    line = _LINES[form].format
    first, second, third = rng.choice(_FIRST).format(form=form), rng.choice(_SECOND), rng.choice(_THIRD)
    room.take(first + second + third)
    items = _items(form, rng, room)
    at = rng.randrange(len(items))
    item, old = items[at]
    new = rng.choice([count for count in range(2, 100) if count != old])
    corrected = [*items[:at], (item, new), *items[at + 1 :]]
    ledger = paragraphs([f"{count} {item}," for item, count in items]).rstrip(",")
    return (
        Turn(f"{ledger}\n\n{first}", "\n".join(line(item=item, count=count) for item, count in items)),
        Turn(second.format(item=item, new=new, old=old), line(item=item, count=new)),
        Turn(third, "\n".join(line(item=item, count=count) for item, count in corrected)),
    )


def _items(form: str, rng: random.Random, room: Room) -> list[tuple[str, int]]:
    """Items with unique names and their counts; each is written three times, and one of them once more."""
    items: dict[str, int] = {}
    misses = 0
    while misses < _MISSES or len(items) < _LEAST_ITEMS:
        item, count = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", rng.randrange(2, 100)
        if item in items:
            continue
        written = _LINES[form].format(item=item, count=count) + "\n"
        if room.put(f"{count} {item}," + (2 + (not items)) * f" {written}") or misses >= _MISSES:
            items[item] = count
        else:
            misses += 1
    return list(items.items())


KINDS = tuple(Kind(f"self_correct/{form}", 120, partial(make, form)) for form in _LINES)
