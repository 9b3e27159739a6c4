"""Max-Gram (Chen et al. 2023, section 4.3): copy behind the longest match, else follow a bigram table. No model.

The bottom of a drafting cascade: its cost is close to none, and a reviewer sorts out what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drafttrain.decoding.draft import Draft
from drafttrain.decoding.suffixes import Suffixes
from drafttrain.decoding.text_drafter import Found, TextDrafter
from drafttrain.errors import UserError
from drafttrain.models.bigrams import UNSEEN, BigramTable

BIGRAMS = "bigrams"
"""Label of tokens that the table proposed."""


class MaxGram(TextDrafter):
    """Copies what followed the earliest of the longest matches of the text's end.

    Where the match stands so near to the end that fewer tokens follow, it is looked for once more behind them; what is
    missing still the bigram table adds, if there is one, as long as it knows a successor.

    Args:
        bigrams: the table; None proposes nothing where nothing matches.
        length: tokens to propose.
        least: tokens that must match; with fewer it abstains from copying.
        name: label of its copied tokens.
    """

    def __init__(
        self, bigrams: BigramTable | None = None, length: int = 10, least: int = 1, name: str = "max-gram"
    ) -> None:
        if length < 1 or least < 1:
            raise UserError(f"MaxGram's length and least must be at least 1, not {length} and {least}")
        super().__init__(name, length, Suffixes)
        self.least = least
        self.successors = bigrams.successors if bigrams is not None else []

    def propose(self, *args: Any, **kwargs: Any) -> Draft:
        """Deterministic tokens behind committed ++ prefix."""
        draft = super().propose(*args, **kwargs)
        if self.successors:
            draft.source = [[BIGRAMS if origin is None else self.name for origin in row] for row in draft.origins]
        return draft

    def _found(self, index: Suffixes, more: Sequence[int], most: int) -> Found:
        length = min(self.max_length, most)
        if length < 1:
            return []
        found: Found = []
        for _ in range(2):
            behind = [*more, *(token for token, _ in found)]
            source, matched = index.match(behind)
            if matched < self.least:
                break
            text = index.text
            copied = text[source : source + length - len(found)]
            if source + len(copied) >= len(text):
                copied = [*copied, *behind[max(0, source - len(text)) :]][: length - len(found)]
            found += [(token, source + place) for place, token in enumerate(copied)]
            if len(found) >= length:
                break
        last = found[-1][0] if found else more[-1] if more else index.text[-1]
        while len(found) < length and last < len(self.successors) and self.successors[last] != UNSEEN:
            last = self.successors[last]
            found.append((last, None))
        return found
