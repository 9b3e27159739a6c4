"""Trace: follow assignments ("lamp = 48213", later "fox = lamp") scattered among other lines.

Several chains run through a document at once, each from its own value, so that the hops must be followed and cannot be
guessed from the one value in sight. Asked for a value, the answer walks back over the assignments to it.
"""

import random
from functools import partial

from drafttrain.evaluation.tasks.base import Kind, Room, Turn
from drafttrain.evaluation.tasks.filler import ask, fill, noise, prose, scatter
from drafttrain.evaluation.tasks.words import NOUNS

_LEAST_CHAINS = 3
_MOST_HOPS = 4
MOST_QUESTIONS = len(NOUNS) // (_MOST_HOPS + 1)
_VALUE_OF = ("What is the value of {name}?", "Give the value of {name}.")
_NAMES_WITH = ("Which names have the value {value}?", "List the names with the value {value}.")


def make(wanted: str, rng: random.Random, room: Room, questions: int) -> tuple[Turn, ...]:
    """One document and its questions, each about another chain: its last name's value, or all its names."""
    if questions > MOST_QUESTIONS:
        raise ValueError(f"trace has names for at most {MOST_QUESTIONS} questions a document, got {questions}")
    chains = _chains(rng, max(_LEAST_CHAINS, questions))
    lines = _interleave(rng, [_assignments(value, names) for value, names in chains])
    turns = [_question(wanted, value, names, rng) for value, names in rng.sample(chains, questions)]
    for text in (*(line + "\n" for line in lines), *(turn.user for turn in turns), *(turn.answer for turn in turns)):
        room.take(text)
    hay = fill(room, rng.choice((prose(rng), noise())), line=True)
    return ask("\n".join(scatter(rng, lines, hay)), turns)


def _chains(rng: random.Random, number: int) -> list[tuple[str, list[str]]]:
    """Values, each with the names that come to hold it; no name and no value twice."""
    names = iter(rng.sample(NOUNS, number * (_MOST_HOPS + 1)))
    values = rng.sample(range(10_000, 100_000), number)
    return [(str(value), [next(names) for _ in range(1 + rng.randint(1, _MOST_HOPS))]) for value in values]


def _assignments(value: str, names: list[str]) -> list[str]:
    return [f"{name} = {source}" for name, source in zip(names, [value, *names[:-1]], strict=True)]


def _interleave(rng: random.Random, sequences: list[list[str]]) -> list[str]:
    """All lines in a random order that keeps each sequence's own."""
    turns = [at for at, sequence in enumerate(sequences) for _ in sequence]
    rng.shuffle(turns)
    sources = [iter(sequence) for sequence in sequences]
    return [next(sources[at]) for at in turns]


def _question(wanted: str, value: str, names: list[str], rng: random.Random) -> Turn:
    if wanted == "variable":
        walk = "\n".join(reversed(_assignments(value, names)))
        return Turn(rng.choice(_VALUE_OF).format(name=names[-1]), walk)
    return Turn(rng.choice(_NAMES_WITH).format(value=value), ", ".join(names))


KINDS = (
    Kind("trace/variable", 160, partial(make, "variable")),
    Kind("trace/names", 160, partial(make, "names")),
)
