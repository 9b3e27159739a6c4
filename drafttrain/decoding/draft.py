"""What passes between the loop and its drafters: the committed text and the proposed tokens."""

# B batch, K drafted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drafttrain.decoding.exclusions import Exclusions
from drafttrain.ops.tree import ABSENT
from drafttrain.ops.upload import upload


@dataclass
class Committed:
    """The text of every row of the batch that is decided for good: prompts and emitted tokens.

    Attributes:
        tokens: token ids of each row; grows in place.
        sample_ids: the rows' sample ids.
        seen_BV: bool, which tokens occur in each row; None unless a repetition penalty needs it.
        exclusions: what must not be copied in each row; None for nothing.
    """

    tokens: list[list[int]]
    sample_ids: list[int]
    seen_BV: Tensor | None = None
    exclusions: list[Exclusions] | None = None
    _last_B1: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.tokens]

    def last(self, device: torch.device) -> Tensor:
        """The last token of every row, int64 [B, 1]; uploaded once for all who read it in a round."""
        if self._last_B1 is None or self._last_B1.device != device:
            self._last_B1 = upload([row[-1:] for row in self.tokens], device)
        return self._last_B1

    def grow(self, emitted: Sequence[Sequence[int]]) -> None:
        """Append to every row what was decided in a round."""
        for row, tokens in zip(self.tokens, emitted, strict=True):
            row += tokens
        self._last_B1 = None

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self._last_B1 = None
        self.tokens = [self.tokens[row] for row in rows]
        self.sample_ids = [self.sample_ids[row] for row in rows]
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[list(rows)]
        if self.exclusions is not None:
            self.exclusions = [self.exclusions[row] for row in rows]

    def extended(self, prefix: Draft | None) -> list[list[int]]:
        """The text of each row with an uncommitted draft behind it, a chain. Reads the draft from the device."""
        if prefix is None or prefix.width == 0:
            return self.tokens
        if prefix.parents_BK is not None:
            raise ValueError("a tree has many ends; only a chain can be extended")
        return [text + more for text, more in zip(self.tokens, prefix.rows(), strict=True)]

    def shared_with(self, other: Committed | None) -> list[int] | None:
        """How many leading tokens of each row, short of its last, another text repeats.

        None where nothing can be reused: no other text, or not exactly one row in each.
        """
        if other is None or len(self.tokens) != 1 or len(other.tokens) != 1:
            return None
        last = len(self.tokens[0]) - 1
        pairs = zip(self.tokens[0][:last], other.tokens[0], strict=False)
        most = min(last, len(other.tokens[0]))
        return [next((place for place, (new, old) in enumerate(pairs) if new != old), most)]


@dataclass
class Draft:
    """Proposed continuations: a chain or a tree of at most K tokens a row.

    Attributes:
        tokens_BK: int64 token ids; what lies beyond a row's length is padding. In a tree siblings are distinct.
        length_B: int64 tokens proposed in each row of chains; None means K in all of them, which the host then knows.
        parents_BK: int64, of a tree: the index of each token's parent, which is an earlier one, `ROOT`, or `ABSENT` for
            padding (ops/tree.py). Siblings are verified in their order. None is a chain.
        probs_BKV: the dense distribution q each token was drawn from, or None where every token is deterministic. May
            be declared only if a token's presence does not depend on its own value; greedy, copied and beam-selected
            tokens are deterministic. A tree keeps q by parent, of the root in row 0 and of token k in row k + 1, as far
            as there are children, which were drawn from it one after another without replacement.
        sampled_BK: bool, which tokens were drawn from their row of ``probs_BKV``; None means all of them.
        source: who proposed the tokens: one label, or one a token ([B][K]).
        forwards: forward passes spent in each row, by member: int64 [B], or one number for all rows.
        origins: of each token the position of its row's text that it was copied from, None for one that was not
            ([B][K]); None where no token was copied.
    """

    tokens_BK: Tensor
    length_B: Tensor | None = None
    probs_BKV: Tensor | None = None
    sampled_BK: Tensor | None = None
    source: str | list[list[str]] = "drafter"
    forwards: dict[str, Tensor | int] = field(default_factory=dict)
    origins: list[list[int | None]] | None = None
    parents_BK: Tensor | None = None

    @property
    def width(self) -> int:
        """K, the padded length."""
        return self.tokens_BK.shape[1]

    def rows(self) -> list[list[int]]:
        """The proposed tokens of each row as lists. Reads from the device."""
        rows = self.tokens_BK.tolist()
        if self.length_B is None:
            return rows
        return [row[:length] for row, length in zip(rows, self.length_B.tolist(), strict=True)]

    def lengths(self) -> list[int]:
        """Tokens proposed in each row. Reads from the device where the host does not know."""
        return [self.width] * len(self.tokens_BK) if self.length_B is None else self.length_B.tolist()

    def inside(self) -> Tensor | None:
        """Which columns hold a row's tokens: bool [B, K], None if all do."""
        if self.parents_BK is not None:
            return self.parents_BK != ABSENT
        if self.length_B is None:
            return None
        return torch.arange(self.width, device=self.tokens_BK.device) < self.length_B.unsqueeze(1)

    def label(self, row: int, column: int) -> str:
        """Who proposed a token."""
        return self.source if isinstance(self.source, str) else self.source[row][column]

    def origin(self, row: int, column: int) -> int | None:
        """The position that a token was copied from."""
        return None if self.origins is None else self.origins[row][column]

    def written_by(self, row: int) -> tuple[str | list[str], list[int | None] | None]:
        """Who proposed a row's tokens, one label or one a token, and from which positions they were copied."""
        source = self.source if isinstance(self.source, str) else self.source[row]
        return source, None if self.origins is None else self.origins[row]

    def to(self, device: torch.device) -> Draft:
        """The same draft on another device."""
        if self.tokens_BK.device == device:
            return self
        names = ("tokens_BK", "length_B", "probs_BKV", "sampled_BK", "parents_BK")
        moved = {name: value.to(device) for name in names if (value := getattr(self, name)) is not None}
        forwards = {
            name: count if isinstance(count, int) else count.to(device) for name, count in self.forwards.items()
        }
        return replace(self, **moved, forwards=forwards)

    @staticmethod
    def of(rows: Sequence[Sequence[int]], source: str, origins: list[list[int | None]] | None = None) -> Draft:
        """A draft of deterministic tokens, copied ones for example, as many as each row has; on the CPU."""
        lengths = [len(row) for row in rows]
        width = max(lengths)
        tokens_BK = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64)
        return Draft(
            tokens_BK, None if min(lengths) == width else torch.tensor(lengths), source=source, origins=origins
        )

    @staticmethod
    def empty(rows: int, device: torch.device) -> Draft:
        """A draft without tokens: the round is then one step of autoregressive decoding."""
        return Draft(torch.zeros(rows, 0, dtype=torch.int64, device=device))
