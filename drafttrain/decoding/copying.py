"""CopySpec (Dumitru et al. 2025): where the text ends as it did before, propose what followed then."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from drafttrain.decoding.copy_index import SOURCES, CopyIndex
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.exclusions import NOTHING, Excluded, Exclusions
from drafttrain.errors import UserError
from drafttrain.ops.random import Draws


class Copy(Drafter):
    """Copies from prompt and answer. It knows no model, and of a chat it keeps the index.

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
        self.name = name
        self.max_length = longest or length
        self.length = length
        self.new_index = lambda: CopyIndex(gamma, source, follow, backoff, cooldown)
        self._rows: list[CopyIndex] = []
        self._excluded: list[Excluded] = []
        self._setting: Setting | None = None
        self._committed: Committed | None = None

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """Index the prompts; of a chat only what is new."""
        kept = committed.shared_with(self._committed) if resume else None
        self._setting, self._committed = setting, committed
        if kept is None or not self._rows:
            self._rows = [self.new_index() for _ in committed.tokens]
        else:
            self._rows[0].shorten(min(kept[0], len(self._rows[0].text)))
        self._excluded = [Excluded(each) for each in exclusions_of(committed)]
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
        found: list[tuple[Sequence[int], int]] = []
        for index, excluded, more, most in zip(self._rows, self._excluded, behind, budget, strict=True):
            length = len(index.text)
            index.extend(more)
            found.append(self._copied(index, excluded, most))
            index.shorten(length)
        origins = [list(range(source, source + len(tokens))) for tokens, source in found]
        return Draft.of([tokens for tokens, _ in found], self.name, origins)

    def keep(self, rows: Sequence[int]) -> None:
        """Release all other rows."""
        self._rows = [self._rows[row] for row in rows]
        self._excluded = [self._excluded[row] for row in rows]

    def _read(self, committed: Committed) -> None:
        """Index what is new."""
        for index, excluded, tokens in zip(self._rows, self._excluded, committed.tokens, strict=True):
            index.extend(tokens[len(index.text) :])
            if excluded.any:
                excluded.read(tokens)

    def _copied(self, index: CopyIndex, excluded: Excluded, most: int) -> tuple[Sequence[int], int]:
        """What to propose behind the indexed text, and from which position."""
        source = index.place
        if source is None or most < 1:
            return (), 0
        length = self.length
        if self.max_length > length:
            length = max(length, index.matched(source, self.max_length))
        tokens = index.text[source : source + min(length, most)]
        tokens = proposable(tokens, self._setting.eos_ids, self._setting.vocabulary)
        allowed = excluded.allowed(index.text, tokens, range(source, source + len(tokens)))
        return tokens[:allowed], source


def exclusions_of(committed: Committed) -> list[Exclusions]:
    """What each row excludes from copying."""
    return committed.exclusions or [NOTHING] * len(committed.tokens)


def proposable(tokens: Sequence[int], eos_ids: Collection[int], vocabulary: int) -> Sequence[int]:
    """Tokens up to and including an end token, and short of one that the target does not know."""
    for place, token in enumerate(tokens):
        if token >= vocabulary:
            return tokens[:place]
        if token in eos_ids:
            return tokens[: place + 1]
    return tokens
