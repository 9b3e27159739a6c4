"""Filler: what needles hide in. None of it holds a hyphen, an equals sign, a digit or a proper name.

So no filler sentence can be mistaken for a needle, an assignment or a fact, whatever words it uses.
"""

import random
from collections.abc import Iterator, Sequence

from drafttrain.evaluation.tasks.base import Room, Turn
from drafttrain.evaluation.tasks.words import ADJECTIVES, NOUNS, VERBS

NOISE = (
    "The sky is wide.",
    "The water is clear.",
    "The wind comes and goes.",
    "We walk and we rest.",
    "Then we walk again.",
)

_PLACES = ("near", "behind", "beside", "under")


def sentence(rng: random.Random, nouns: Sequence[str] = NOUNS, subject: str | None = None) -> str:
    """One sentence of a small grammar; `subject` fixes its first noun."""
    pick, subject = rng.choice, subject or rng.choice(nouns)
    adjective, verb, thing = pick(ADJECTIVES), pick(VERBS), pick(nouns)
    match rng.randrange(4):
        case 0:
            return f"The {adjective} {subject} {verb} the {thing}."
        case 1:
            return f"The {subject} {verb} the {adjective} {thing}."
        case 2:
            return f"The {subject} {verb} the {thing} {pick(_PLACES)} the {pick(nouns)}."
        case _:
            return f"The {subject} near the {thing} was {adjective}."


def prose(rng: random.Random) -> Iterator[str]:
    """Endless sentences of the grammar."""
    while True:
        yield sentence(rng)


def noise() -> Iterator[str]:
    """The same few sentences, for ever."""
    while True:
        yield from NOISE


def fill(room: Room, units: Iterator[str], line: bool = False) -> list[str]:
    """As many units as the room holds; `line` counts each one's line break."""
    taken = []
    for unit in units:
        if not room.put(unit + "\n" if line else unit):
            return taken
        taken.append(unit)
    return taken


def scatter(rng: random.Random, needles: Sequence[str], hay: Sequence[str]) -> list[str]:
    """Hay with the needles at random places, both in their own order."""
    total = len(needles) + len(hay)
    places = set(rng.sample(range(total), len(needles)))
    needle, straw = iter(needles), iter(hay)
    return [next(needle) if at in places else next(straw) for at in range(total)]


def paragraphs(sentences: Sequence[str], size: int = 8) -> str:
    """Sentences as running text, a line break after every few."""
    return "\n".join(" ".join(sentences[at : at + size]) for at in range(0, len(sentences), size))


def ask(document: str, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Put the document before the first question; the later ones ask about it again."""
    first = turns[0]
    return (Turn(f"{document}\n\n{first.user}", first.answer), *turns[1:])
