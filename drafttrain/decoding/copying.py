"""CopySpec (Dumitru et al. 2025): where the text ends as it did before, propose what followed then."""

from __future__ import annotations

from collections.abc import Sequence

from drafttrain.decoding.copy_index import SOURCES, CopyIndex
from drafttrain.decoding.text_drafter import Found, TextDrafter
from drafttrain.errors import UserError


class Copy(TextDrafter):
    """Copies from prompt and answer.

    Without options it is the published rule: a block of 10 tokens from the earliest place where the last 3 occur.

    Args:
        gamma: tokens that must match.
        length: tokens to copy.
        longest: let the block grow from ``length`` up to this many, to as many tokens as match before the source: a
            long match, or a copy that has been right for long, makes a long block. None is a fixed length.
        source: "earliest", "latest" or "longest", see `CopyIndex`.
        follow: stay with a source that was right, also over one token that differs.
        backoff: after misses, this many more tokens must match for each of them in a row (an adaptive gamma).
        cooldown: tokens to wait after a miss, see `CopyIndex`.
        name: label of its tokens.
    """

    def __init__(
        self,
        gamma: int = 3,
        length: int = 10,
        longest: int | None = None,
        source: str = "earliest",
        follow: bool = False,
        backoff: int = 0,
        cooldown: int = 0,
        name: str = "copy",
    ) -> None:
        if gamma < 1 or length < 1 or min(backoff, cooldown) < 0:
            raise UserError(
                f"Copy needs gamma and length of at least 1, backoff and cooldown of at least 0, not gamma={gamma}, "
                f"length={length}, backoff={backoff}, cooldown={cooldown}"
            )
        if longest is not None and longest < length:
            raise UserError(f"Copy's block cannot grow from length={length} to longest={longest}")
        if source not in SOURCES:
            raise UserError(f"Copy's source is {source!r}, but it must be one of {', '.join(SOURCES)}")
        super().__init__(name, longest or length, lambda: CopyIndex(gamma, source, follow, backoff, cooldown))
        self.length = length

    def _found(self, index: CopyIndex, more: Sequence[int], most: int) -> Found:
        length = len(index.text)
        index.extend(more)
        found = self._copied(index, most)
        index.shorten(length)
        return found

    def _copied(self, index: CopyIndex, most: int) -> Found:
        """What followed the place that the indexed text ends like."""
        source = index.place
        if source is None or most < 1:
            return []
        length = self.length
        if self.max_length > length:
            length = max(length, index.matched(source, self.max_length))
        tokens = index.text[source : source + min(length, most)]
        return [(token, source + place) for place, token in enumerate(tokens)]
