"""What must never be copied: spans of a prompt and token patterns, given per request.

They restrict drafting alone. A drafter that copies proposes nothing from there; the target may still write the same
tokens itself, since its distribution is not touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drafttrain.errors import UserError


@dataclass(frozen=True)
class Exclusions:
    """What one request excludes from copying.

    Attributes:
        spans: [start, end) positions of the prompt. What the target itself repeats of them is new text: to keep that
            from being copied, too, give it as a pattern.
        patterns: sequences of token ids; every occurrence in prompt and answer is excluded, and no draft completes one.
    """

    spans: Sequence[tuple[int, int]] = ()
    patterns: Sequence[Sequence[int]] = ()

    def check(self, prompt: int, tokens: int) -> None:
        """Refuse what lies outside a prompt.

        Args:
            prompt: its number, for the message.
            tokens: its length.

        Raises:
            UserError: a span is out of range, or a pattern empty.
        """
        for start, end in self.spans:
            if not 0 <= start < end <= tokens:
                raise UserError(
                    f"the excluded span {start} to {end} does not lie in prompt {prompt}, which has {tokens} tokens; "
                    "spans are [start, end) with 0 <= start < end <= tokens"
                )
        if not all(len(pattern) for pattern in self.patterns):
            raise UserError(f"prompt {prompt} has an empty excluded pattern; a pattern needs at least one token")


NOTHING = Exclusions()


class Excluded:
    """The positions of one row's text that must not be copied, kept up while the text grows.

    Args:
        exclusions: of the row.
    """

    def __init__(self, exclusions: Exclusions) -> None:
        self.patterns = [list(pattern) for pattern in exclusions.patterns]
        self.any = bool(exclusions.spans or exclusions.patterns)
        self._positions = {place for start, end in exclusions.spans for place in range(start, end)}
        self._read = 0

    def read(self, text: Sequence[int]) -> None:
        """Find the patterns in what is new of a text."""
        self._positions |= self._occurrences(text, self._read)
        self._read = len(text)

    def allowed(self, text: Sequence[int], tokens: Sequence[int], origins: Sequence[int]) -> int:
        """How many leading tokens of a draft may be proposed.

        Args:
            text: what the draft continues; what goes beyond the text that was `read` is searched here.
            tokens: drafted.
            origins: where each was copied from; negative for one that was not.
        """
        if not self.any:
            return len(tokens)
        closed = self._positions | self._occurrences(text, self._read) if self.patterns else self._positions
        allowed = next((place for place, origin in enumerate(origins) if origin in closed), len(tokens))
        drafted = self._occurrences([*text, *tokens[:allowed]], len(text))
        return min([allowed, *(place - len(text) for place in drafted if place >= len(text))])

    def _occurrences(self, text: Sequence[int], start: int) -> set[int]:
        """Positions inside patterns that end behind ``start`` tokens of a text."""
        found: set[int] = set()
        for pattern in self.patterns:
            size = len(pattern)
            for first in range(max(0, start - size + 1), len(text) - size + 1):
                if text[first] == pattern[0] and list(text[first : first + size]) == pattern:
                    found.update(range(first, first + size))
        return found
