"""Exact scorers: each compares an answer with its reference and returns a share in [0, 1].

Saying more than was asked is never free: every share is taken over the longer of the two sequences.
"""

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest


def share_in_place(reference: Sequence[str], given: Sequence[str]) -> float:
    """Share of positions at which both sequences hold the same item, over the longer one."""
    right = sum(r == g for r, g in zip_longest(reference, given))
    return right / max(len(reference), len(given), 1)


def score_items(reference: str, text: str) -> float:
    """For lists (sentences, lines, values between commas): share of items right and in their place."""
    return share_in_place(_items(reference), _items(text))


def score_words(reference: str, text: str) -> float:
    """For long passages: share of whitespace-separated words right and in their place."""
    return share_in_place(reference.split(), text.split())


def score_exact(reference: str, text: str) -> float:
    """1.0 for the reference itself (outer whitespace aside), else 0.0."""
    return float(reference.strip() == text.strip())


def _items(text: str) -> list[str]:
    return [item.strip() for item in re.split(r",|\n|(?<=\.)\s", text.strip())]


SCORERS: dict[str, Callable[[str, str], float]] = {
    "revise": score_words,
    "self_correct": score_exact,
    "recall": score_items,
    "trace": score_items,
    "common_words": score_items,
    "frequent_words": score_items,
    "facts": score_items,
}
