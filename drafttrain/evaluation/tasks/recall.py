"""Recall: values hidden in a document under keys, asked for by key.

A needle reads "The code for amber-fox is 48213." (or a password, a pair of words); keys of a document are unique except
where one key is given several values on purpose, which are counted ("The second code for ..."), so that their order is
no matter of taste. The answer quotes the needles asked for: what leads to a value is then
what led to it in the document, which is how a small model finds it.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial

from drafttrain.evaluation.tasks.base import Kind, Room, Turn
from drafttrain.evaluation.tasks.filler import ask, fill, noise, paragraphs, prose, scatter
from drafttrain.evaluation.tasks.words import ADJECTIVES, NOUNS

_EXTRA_KEYS = 3
_ONE = ("What is the {what} for {keys}?", "Give the {what} for {keys}.", "Which {what} belongs to {keys}?")
_MANY = ("What are the {what}s for {keys}?", "Give the {what}s for {keys}.", "Which {what}s belong to {keys}?")
_ALL = ("What are the {number} {what}s for {keys}?", "Give the {number} {what}s for {keys}.")
_COUNTED = ("first", "second", "third")
_NUMBERS = ("one", "two", "three")


class Vault:
    """Fresh keys and values of one document: no key and no value is drawn twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._used = rng, set()
        self.what = rng.choice(("code", "password"))

    def key(self) -> str:
        """A key of two words."""
        return self._fresh(lambda: f"{self._rng.choice(ADJECTIVES)}-{self._rng.choice(NOUNS)}")

    def value(self) -> str:
        """A number or a pair of words, by the kind of this document."""
        if self.what == "code":
            return self._fresh(lambda: str(self._rng.randrange(10_000, 100_000)))
        return self._fresh(lambda: "-".join(self._rng.sample(NOUNS, 2)))

    def needle(self, key: str, counted: str = "") -> str:
        """A sentence that ties a value to a key."""
        return statement(f"{counted}{self.what}", key, self.value())

    def distractors(self) -> Iterator[str]:
        """Needles of other keys, without end."""
        while True:
            yield self.needle(self.key())

    def _fresh(self, draw: Callable[[], str]) -> str:
        while (text := draw()) in self._used:
            pass
        self._used.add(text)
        return text


def statement(what: str, key: str, value: str) -> str:
    """The sentence that a needle is."""
    return f"The {what} for {key} is {value}."


def make(hunt: str, hay: str, rng: random.Random, room: Room, questions: int) -> tuple[Turn, ...]:
    """One document and its questions. `hunt` says what is asked, `hay` what the needles hide in."""
    vault = Vault(rng)
    needles = _needles(hunt, vault, rng, questions)
    turns = _questions(hunt, vault.what, needles, rng, questions)
    lines = [sentence for _, sentence in needles]
    for text in (*lines, *(turn.user for turn in turns), *(turn.answer for turn in turns)):
        room.take(text)
    if hay == "distractors":
        return ask("\n".join(scatter(rng, lines, fill(room, vault.distractors(), line=True))), turns)
    straw = fill(room, prose(rng) if hay == "prose" else noise())
    return ask(paragraphs(scatter(rng, lines, straw)), turns)


def _needles(hunt: str, vault: Vault, rng: random.Random, questions: int) -> list[tuple[str, str]]:
    """Keys with the sentences about them, in document order."""
    keys = [vault.key() for _ in range(questions + (hunt in ("multi_key", "multi_query")) * _EXTRA_KEYS)]
    if hunt != "multi_value":
        return [(key, vault.needle(key)) for key in keys]
    owners = [key for key in keys for _ in range(rng.randint(2, len(_COUNTED)))]
    rng.shuffle(owners)
    return [(key, vault.needle(key, f"{_COUNTED[owners[:at].count(key)]} ")) for at, key in enumerate(owners)]


def _questions(hunt: str, what: str, needles: list[tuple[str, str]], rng: random.Random, questions: int) -> list[Turn]:
    keys = list(dict.fromkeys(key for key, _ in needles))
    if hunt == "multi_query":
        asked = [rng.sample(keys, rng.randint(2, 3)) for _ in range(questions)]
    else:
        asked = [[key] for key in rng.sample(keys, questions)]
    return [question(what, group, needles, rng) for group in asked]


def question(what: str, asked: list[str], needles: list[tuple[str, str]], rng: random.Random) -> Turn:
    """A question about some keys; the answer quotes their needles in this order, those of one key as they appear."""
    quoted = [sentence for owner in asked for key, sentence in needles if key == owner]
    keys = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + f" and {asked[-1]}"
    form = rng.choice(_MANY if len(asked) > 1 else _ALL if len(quoted) > 1 else _ONE)
    return Turn(form.format(what=what, keys=keys, number=_NUMBERS[len(quoted) - 1]), " ".join(quoted))


_MIN_LENGTH = {"single": 80, "multi_key": 120, "multi_value": 120, "multi_query": 120}

KINDS = tuple(
    Kind(f"recall/{hunt}/{hay}", _MIN_LENGTH[hunt], partial(make, hunt, hay))
    for hunt in _MIN_LENGTH
    for hay in ("prose", "noise", "distractors")
    if (hunt, hay) != ("single", "distractors")  # that would be multi_key/distractors
)
