"""What drafters share that copy from the text: an index of every row, kept up as the rows grow, and exclusions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.exclusions import NOTHING, Excluded
from drafttrain.ops.random import Draws

Found = list[tuple[int, int | None]]
"""Tokens, each with the position it was copied from; None where it was not copied."""


class TextIndex(Protocol):
    """A text and what finds its repetitions."""

    text: list[int]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""

    def shorten(self, length: int) -> None:
        """Forget all tokens but the first ``length``."""


class TextDrafter(Drafter):
    """Proposes what it finds in the text. It knows no model, and of a chat it keeps the index.

    Args:
        name: label of its tokens.
        max_length: most tokens of a draft.
        new_index: of an empty text.
    """

    def __init__(self, name: str, max_length: int, new_index: Callable[[], TextIndex]) -> None:
        self.name, self.max_length, self.new_index = name, max_length, new_index
        self._rows: list[TextIndex] = []
        self._excluded: list[Excluded] = []
        self._setting: Setting | None = None
        self._committed: Committed | None = None

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """Index the prompts; of a chat only what is new."""
        kept = committed.shared_with(self._committed) if resume else None
        self._setting, self._committed = setting, committed
        if kept is None or len(self._rows) != 1:
            self._rows = [self.new_index() for _ in committed.tokens]
        elif kept[0] < len(self._rows[0].text):
            self._rows[0].shorten(kept[0])
        exclusions = committed.exclusions or [NOTHING] * len(committed.tokens)
        self._excluded = [Excluded(each) for each in exclusions]
        self._read(committed)

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: object | None = None,
    ) -> Draft:
        """Copied tokens are deterministic: they declare no distribution, and the target's stays exact."""
        self._read(committed)
        behind = prefix.rows() if prefix is not None and prefix.width else [[]] * len(self._rows)
        found = [
            self._allowed(self._found(index, more, most), [*index.text, *more] if excluded.any else [], excluded)
            for index, excluded, more, most in zip(self._rows, self._excluded, behind, budget, strict=True)
        ]
        origins = [[origin for _, origin in row] for row in found]
        return Draft.of([[token for token, _ in row] for row in found], self.name, origins)

    def keep(self, rows: Sequence[int]) -> None:
        """Release all other rows."""
        self._rows = [self._rows[row] for row in rows]
        self._excluded = [self._excluded[row] for row in rows]

    @abstractmethod
    def _found(self, index: TextIndex, more: Sequence[int], most: int) -> Found:
        """At most so many tokens behind text ++ more."""

    def _read(self, committed: Committed) -> None:
        """Index what is new."""
        for index, excluded, tokens in zip(self._rows, self._excluded, committed.tokens, strict=True):
            index.extend(tokens[len(index.text) :])
            if excluded.any:
                excluded.read(tokens)

    def _allowed(self, found: Found, text: Sequence[int], excluded: Excluded) -> Found:
        """What may be proposed of it behind a text, which matters only where something is excluded."""
        tokens = proposable([token for token, _ in found], self._setting.eos_ids, self._setting.vocabulary)
        found = found[: len(tokens)]
        if excluded.any:
            places = [-1 if origin is None else origin for _, origin in found]
            found = found[: excluded.allowed(text, tokens, places)]
        return found


def proposable(tokens: Sequence[int], eos_ids: Collection[int], vocabulary: int) -> Sequence[int]:
    """Tokens up to and including an end token, and short of one that the target does not know."""
    for place, token in enumerate(tokens):
        if token >= vocabulary:
            return tokens[:place]
        if token in eos_ids:
            return tokens[: place + 1]
    return tokens
