"""Common words and frequent words: a shuffled list of words; name the three that appear most often, in order.

The first appears twice as often as the second, the second twice as often as the third, and every other word at most
two thirds as often as the third (in long lists far less): the answer is never a near tie.
"""

import random
from collections.abc import Sequence
from functools import partial

from drafttrain.evaluation.tasks.base import Kind, Room, Turn
from drafttrain.evaluation.tasks.filler import paragraphs
from drafttrain.evaluation.tasks.words import ADJECTIVES, NOUNS, VERBS

_ASK = (
    "Which three words appear most often, in order?",
    "Name the three most frequent words, in order.",
)
_WORDS_A_LINE = 16
_TOP_SHARES = (0.36, 0.18, 0.09)
_REST = 1 - sum(_TOP_SHARES)
_LEAST_THIRD = 3
_DOTS = "..."


def make(task: str, rng: random.Random, room: Room, questions: int) -> tuple[Turn, ...]:
    """One list, one question. `questions` is not used: a list has one answer."""
    invented = task == "frequent_words"
    pool = _invented(rng) if invented else rng.sample((*NOUNS, *ADJECTIVES, *VERBS), 240)
    top, others = pool[:3], pool[3:]
    question, answer = rng.choice(_ASK), ", ".join(top)
    room.take(question + "\n\n" + answer)
    slots = _slots(room, top, others, dots=invented)
    third = max(_LEAST_THIRD, int(_TOP_SHARES[2] * slots))
    words = 4 * third * [top[0]] + 2 * third * [top[1]] + third * [top[2]]
    words += _rest(others, max(0, slots - len(words)), spread=20 if invented else len(others))
    words += (slots // 8) * [_DOTS] if invented else []
    rng.shuffle(words)
    return (Turn(f"{paragraphs(words, _WORDS_A_LINE)}\n\n{question}", answer),)


def _slots(room: Room, top: Sequence[str], others: Sequence[str], dots: bool) -> int:
    """How many words the room holds, dots not counted, at the shares they will have."""
    mean = _REST * sum(map(room.cost, others)) / len(others) + room.cost("\n") / _WORDS_A_LINE
    mean += sum(share * room.cost(word) for share, word in zip(_TOP_SHARES, top, strict=True))
    mean += room.cost(_DOTS) / 8 if dots else 0
    return max(0, int(room.left / mean))


def _rest(others: Sequence[str], slots: int, spread: int) -> list[str]:
    """The other words dealt evenly, about two of each while the pool lasts, over `spread` words at most."""
    number = min(spread, max(16, slots // 2))
    return [others[at % number] for at in range(slots)]


def _invented(rng: random.Random) -> list[str]:
    """Made-up words of two syllables: nothing but their count tells them apart."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = dict.fromkeys("".join(rng.sample(syllables, 2)) for _ in range(80))
    return list(words)[:40]


KINDS = (
    Kind("common_words/list", 100, partial(make, "common_words")),
    Kind("frequent_words/list", 100, partial(make, "frequent_words")),
)
