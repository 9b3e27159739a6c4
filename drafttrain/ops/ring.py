"""A cache for windowed attention whose memory does not grow with the text: a true ring.

Position p lives in slot p mod R. R is the window and a margin: tokens that are written and then rejected overwrite
only what no query can see any more, so rolling back restores exactly what was visible before, and moves nothing. A
slot knows the position that was written to it last; what was rejected has a position in the future of any query that
can be asked before the slot is written again. Where a row goes back so far that a part of its window is gone, it goes
back a window further, and its owner reads that again.
"""

# B batch (active rows), Q query width, R slots, M key heads, D head size

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.ops.upload import upload

NEVER = 1 << 62
"""Position of a slot that was never written: beyond any query."""


class Slots:
    """Keys and values [B, M, R, D] and position [B, R] of every slot of a ring: what a compiled graph needs of it.

    Args:
        keys, values, positions_BR: changed in place.
        window: a query at position t sees the positions t - window + 1 .. t.
    """

    def __init__(self, keys: Tensor, values: Tensor, positions_BR: Tensor, window: int) -> None:
        self.keys, self.values, self.positions_BR, self.window = keys, values, positions_BR, window

    def put(
        self, keys_BMQD: Tensor, values_BMQD: Tensor, positions_BQ: Tensor, counts: Sequence[int] | None = None
    ) -> None:
        """Write tokens.

        Args:
            keys_BMQD: at most as many tokens as there are slots.
            values_BMQD: likewise.
            positions_BQ: of the tokens, [B, Q], or [1, Q] where all rows agree.
            counts: real tokens of each row, None for all; padding leaves no trace.
        """
        rows, slots_BQ = len(self.positions_BR), positions_BQ % self.positions_BR.shape[1]
        if counts is not None:
            real = [(row, column) for row, count in enumerate(counts) for column in range(count)]
            rows_N, columns_N = upload(real, slots_BQ.device).view(-1, 2).unbind(1)
            positions_N, slots_N = (each.expand(rows, -1)[rows_N, columns_N] for each in (positions_BQ, slots_BQ))
            self.keys[rows_N, :, slots_N] = keys_BMQD[rows_N, :, columns_N]
            self.values[rows_N, :, slots_N] = values_BMQD[rows_N, :, columns_N]
            self.positions_BR[rows_N, slots_N] = positions_N
        elif len(slots_BQ) == 1:
            slots_Q = slots_BQ[0]
            self.keys.index_copy_(2, slots_Q, keys_BMQD)
            self.values.index_copy_(2, slots_Q, values_BMQD)
            self.positions_BR.index_copy_(1, slots_Q, positions_BQ.expand(rows, -1))
        else:
            rows_B1 = torch.arange(rows, device=slots_BQ.device).unsqueeze(1)
            self.keys[rows_B1, :, slots_BQ] = keys_BMQD.transpose(1, 2)
            self.values[rows_B1, :, slots_BQ] = values_BMQD.transpose(1, 2)
            self.positions_BR.scatter_(1, slots_BQ, positions_BQ)

    def visible(self, positions_BQ: Tensor) -> Tensor:
        """Which slots each query sees: bool [B, Q, R].

        Args:
            positions_BQ: of the queries, [B or 1, Q]; the text before each must have been written.
        """
        positions_B1R, query_BQ1 = self.positions_BR.unsqueeze(1), positions_BQ.unsqueeze(2)
        return (positions_B1R <= query_BQ1) & (positions_B1R > query_BQ1 - self.window)


class Ring(Slots):
    """Keys and values [B, M, R, D] of the last positions of every row.

    Args:
        rows: batch size.
        window: a query at position t sees the positions t - window + 1 .. t.
        margin: tokens that may be written and taken back.
        heads: M.
        size: D.
        dtype, device: of keys and values.

    Attributes:
        lengths: tokens read of each row; the next one's position is the length.
    """

    def __init__(
        self,
        rows: int,
        window: int,
        margin: int,
        heads: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lengths = [0] * rows
        self.margin, self.slots = margin, window + margin
        self.device = device
        keys, values = (torch.zeros(rows, heads, self.slots, size, dtype=dtype, device=device) for _ in range(2))
        super().__init__(keys, values, torch.full((rows, self.slots), NEVER, device=device), window)
        self._floors = [0] * rows  # from here on each row is whole
        self._lengths_B: Tensor | None = None

    @property
    def rows(self) -> int:
        """Active rows."""
        return len(self.lengths)

    @property
    def aligned(self) -> bool:
        """Whether all rows have the same length."""
        return min(self.lengths) == max(self.lengths)

    def next_positions(self, width: int) -> Tensor:
        """Positions of the next tokens: int64 [B, Q], or [1, Q] where all rows agree."""
        if self.aligned:
            return torch.arange(self.lengths[0], self.lengths[0] + width, device=self.device).unsqueeze(0)
        if self._lengths_B is None:
            self._lengths_B = upload(self.lengths, self.device)
        return self._lengths_B.unsqueeze(1) + torch.arange(width, device=self.device)

    def advance(self, width: int, counts: Sequence[int] | None = None) -> None:
        """Count tokens that were put at `next_positions` as read: their counts, or the width of all rows."""
        ahead_B = None if self._lengths_B is None or counts is not None else self._lengths_B + width
        counts = [width] * self.rows if counts is None else counts
        self._set([length + count for length, count in zip(self.lengths, counts, strict=True)])
        pairs = zip(self._floors, self.lengths, strict=True)
        self._floors = [max(floor, length - self.slots) for floor, length in pairs]
        if ahead_B is not None:
            self._lengths_B = ahead_B

    def skip(self, counts: Sequence[int]) -> None:
        """Pass over so many tokens in each row; where there are any, nothing before them can be gone back to."""
        self._set([length + count for length, count in zip(self.lengths, counts, strict=True)])
        self._floors = [
            length if count else floor for floor, length, count in zip(self._floors, self.lengths, counts, strict=True)
        ]

    def rollback(self, lengths: Sequence[int]) -> None:
        """Set the rows' lengths, none of them longer than it is.

        Where a part of the window before its new end is gone, a row becomes a window shorter than that.
        """
        found = list(lengths)
        for row, length in enumerate(found):
            first = max(0, length - self.window)
            if first < self._floors[row]:
                found[row] = self._floors[row] = first
        self._set(found)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        rows = list(rows)
        self.keys, self.values, self.positions_BR = (
            value[rows] for value in (self.keys, self.values, self.positions_BR)
        )
        self._floors = [self._floors[row] for row in rows]
        self._set([self.lengths[row] for row in rows])

    def memory_bytes(self) -> int:
        """Bytes allocated for keys, values and positions."""
        return sum(value.nbytes for value in (self.keys, self.values, self.positions_BR))

    def _set(self, lengths: list[int]) -> None:
        if lengths != self.lengths:
            self.lengths, self._lengths_B = lengths, None
