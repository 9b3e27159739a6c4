"""What a task example is, and how its document is sized in tokens without tokenizing it over and over.

A builder fills a `Room`: a budget in tokens, spent by estimate (a sum of cached word counts). `build` then measures the
whole example once, and only if the estimate was off does it build again with a corrected budget.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from drafttrain.evaluation.tasks.scoring import SCORERS

HELD_OUT = 1_000_000_000
"""Seeds from here on are for evaluation only; training draws its seeds below."""

_DRAWS = 12
"""Near a kind's minimum some draws come out too long, or far too short, whatever their filler: then draw again."""

Count = Callable[[str], int]


@dataclass(frozen=True)
class Turn:
    """One exchange: what the user says (a document and a question), and the exact reference answer."""

    user: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A conversation of one or more turns with exact answers; a pure function of its kind, seed and size."""

    task: str
    kind: str
    seed: int
    turns: tuple[Turn, ...]

    def score(self, turn: int, text: str) -> float:
        """The task's score of `text` as the answer of a turn, in [0, 1]; outer whitespace is ignored."""
        return SCORERS[self.task](self.turns[turn].answer, text)

    def exact(self, turn: int, text: str) -> bool:
        """Whether `text` is the reference answer, outer whitespace aside."""
        return self.turns[turn].answer.strip() == text.strip()


class Room:
    """A budget of tokens. `put` spends a text's estimated cost if it still fits."""

    def __init__(self, budget: int, count: Count) -> None:
        self.left = budget
        self._count = count

    def cost(self, text: str) -> int:
        """Estimated tokens: words counted one by one (from a cache) plus the line breaks."""
        words = sum(_word_cost(self._count, word) for word in text.split())
        return words + text.count("\n") * _newline_cost(self._count)

    def take(self, text: str) -> None:
        """Spend a text's cost, whether it fits or not: for what the example cannot do without."""
        self.left -= self.cost(text)

    def put(self, text: str, times: int = 1) -> bool:
        """Spend `times` the text's cost if that much is left; says whether it was."""
        cost = times * self.cost(text)
        if cost > self.left:
            return False
        self.left -= cost
        return True


Make = Callable[[random.Random, Room, int], tuple[Turn, ...]]


@dataclass(frozen=True)
class Kind:
    """A named generator: `make(rng, room, questions)`, and the least length it accepts."""

    name: str
    min_length: int
    make: Make

    @property
    def task(self) -> str:
        """The part of the name before the slash."""
        return self.name.split("/")[0]


def build(kind: Kind, seed: int, length: int, count: Count, questions: int = 1) -> Example:
    """Make the example whose turns together measure at most `length` tokens, and close to it.

    Raises:
        ValueError: `length` is below the kind's minimum, or too small for that many questions.
    """
    if length < kind.min_length:
        raise ValueError(f"{kind.name} needs a length of at least {kind.min_length} tokens, got {length}")
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    best_total, best = 0, None
    for draw in range(_DRAWS):
        total, turns = _fit(kind, f"{kind.name}/{seed}/{draw}", length, count, questions)
        if total > best_total:
            best_total, best = total, turns
        if best_total >= 0.9 * length:
            break
    if best is None:
        raise ValueError(
            f"{kind.name} with {questions} question(s) does not fit into {length} tokens: "
            "ask for a greater length or fewer questions"
        )
    return Example(kind.task, kind.name, seed, best)


def _fit(kind: Kind, seed: str, length: int, count: Count, questions: int) -> tuple[int, tuple[Turn, ...]]:
    """The longest of a few builds that fits, and its tokens; the budget is corrected after each by what it measured."""
    budget, best, best_total = _aim(length), (), 0
    for _ in range(4):
        turns = kind.make(random.Random(seed), Room(budget, count), questions)
        total = sum(count(turn.user) + count(turn.answer) for turn in turns)
        if best_total < total <= length:
            best_total, best = total, turns
        if 0.93 * length <= total <= length or (total > length and budget < 0):
            break
        budget += _aim(length) - total
    return best_total, best


def _aim(length: int) -> int:
    """A little below the limit: an estimate a hair too low must not cost a second build."""
    return int(0.975 * length)


@lru_cache(maxsize=1 << 17)
def _word_cost(count: Count, word: str) -> int:
    return count(" " + word)


@lru_cache(maxsize=64)
def _newline_cost(count: Count) -> int:
    return max(0, count("a\nb") - count("a") - count("b"))
