"""A cache whose layers and heads each hold other tokens of the text, for `drafttrain.context`.

Of a text of n tokens that was read once, every layer, row and key head keeps the keys of its own choice; what comes
later is kept by all. To the loop the cache is what a dense one is: its rows' lengths count tokens of the text, so it is
rolled back, grown and left by rows in the same way. Each layer has one arena, with a region for every row and head.
"""

# B batch, Q query width, S slots, M key heads, G query heads a key head, D head size, A slots of an arena

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from drafttrain.ops.attention import folded_attention
from drafttrain.ops.cache import WrittenLayer
from drafttrain.ops.tree import TreeBlock


class Kept(NamedTuple):
    """What neighbouring heads of a row hold, all of them as much.

    Attributes:
        heads: which key heads.
        keys, values: [M, S, D], views of the arena.
    """

    heads: slice
    keys: Tensor
    values: Tensor


@dataclass
class Arena:
    """Keys and values of one layer, region behind region: one a row and key head, in that order.

    Attributes:
        kept: slots of the first text that each row and head keeps, [B][M].
        room: slots behind them for what comes later, the same for all.
        offsets: where each region begins, [B][M].
        keys, values, positions: [A, D], [A, D] and int32 [A]; None before the first row was filled in.
    """

    kept: list[list[int]]
    room: int
    keys: Tensor | None = None
    values: Tensor | None = None
    positions: Tensor | None = None
    offsets: list[list[int]] = field(init=False)
    slots: int = field(init=False)

    def __post_init__(self) -> None:
        ends = [0, *accumulate(count + self.room for row in self.kept for count in row)]
        starts = iter(ends)
        self.offsets = [[next(starts) for _ in row] for row in self.kept]
        self.slots = ends[-1]
        self._starts: dict[tuple[int, ...], Tensor] = {}

    def allocate(self, keys: Tensor, values: Tensor) -> None:
        """Have storage like these keys and values."""
        if self.keys is None:
            self.keys = keys.new_zeros(self.slots, keys.shape[-1])
            self.values = values.new_zeros(self.slots, values.shape[-1])
            self.positions = torch.zeros(self.slots, dtype=torch.int32, device=keys.device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys, self.values

    def starts(self, rows: Sequence[int]) -> Tensor:
        """The first slot behind what each row and head kept: int64 [B, M]."""
        key = tuple(rows)
        if key not in self._starts:
            found = [
                [offset + count for offset, count in zip(self.offsets[row], self.kept[row], strict=True)]
                for row in rows
            ]
            self._starts = {key: torch.tensor(found, device=self.keys.device)}
        return self._starts[key]

    def grown(self, room: int, used: Sequence[int]) -> Arena:
        """An arena with more room, and all that this one holds; ``used`` counts later tokens of each row."""
        new = Arena(self.kept, room)
        if self.keys is not None:
            new.allocate(self.keys, self.values)
            for row, counts in enumerate(self.kept):
                for head, count in enumerate(counts):
                    size, old, at = count + used[row], self.offsets[row][head], new.offsets[row][head]
                    for mine, theirs in zip(new.tensors, self.tensors, strict=True):
                        mine[at : at + size] = theirs[old : old + size]
                    new.positions[at : at + count] = self.positions[old : old + count]
        return new

    def runs(self, row: int) -> Iterator[slice]:
        """Neighbouring heads of a row that keep equally many."""
        for _, group in groupby(enumerate(self.kept[row]), key=lambda pair: pair[1]):
            heads = [head for head, _ in group]
            yield slice(heads[0], heads[-1] + 1)

    def view(self, storage: Tensor, row: int, heads: slice, size: int) -> Tensor:
        """The first ``size`` slots of some heads' regions: [M, size, ...]."""
        count, offset = self.kept[row][heads.start], self.offsets[row][heads.start]
        number, region = heads.stop - heads.start, count + self.room
        return storage[offset : offset + number * region].unflatten(0, (number, region))[:, :size]


class RaggedCache(Cache):
    """What is left of a batch of texts, and all that is read behind them.

    Args:
        kept: slots that each layer, row and key head will hold of the first text, [layers][B][M].
        lengths: tokens of each row's first text, dropped ones included.
        positions: of the next token of each row; less than its length where the text was closed up.
        windows: sliding window of each layer, None for full attention.
        device: where positions are made; arenas follow their keys.
        room: tokens that can be read behind the texts before the arenas grow.

    Attributes:
        lengths: tokens of each row's text so far, dropped ones included.

    Raises:
        ValueError: a rollback into the first text, which is no longer there.
    """

    def __init__(
        self,
        kept: Sequence[Sequence[Sequence[int]]],
        lengths: Sequence[int],
        positions: Sequence[int],
        windows: Sequence[int | None],
        device: torch.device,
        room: int,
    ) -> None:
        self.device = device
        self.lengths = list(lengths)
        self.room = room
        self.width = 0
        self._windows = list(windows)
        self._arenas = [Arena([list(counts) for counts in layer], room) for layer in kept]
        self._first = list(lengths)
        self._next = list(positions)
        self._regions = list(range(len(lengths)))  # of the active rows
        self._open = 0  # the layer written last
        self._tails: Tensor | None = None
        super().__init__(layers=[WrittenLayer(self, index) for index in range(len(kept))])

    @property
    def rows(self) -> int:
        """Active rows."""
        return len(self.lengths)

    def fill(
        self, layer: int, row: int, keys: Tensor, values: Tensor, chosen: Sequence[Tensor], positions_S: Tensor
    ) -> None:
        """Take what a row keeps of a layer; what lies behind its text is kept by all heads.

        Args:
            layer: which layer.
            row: which row.
            keys: [M, S, D], of the text and ``S - len(positions_S)`` tokens behind it.
            values: likewise.
            chosen: of each head int64 slots of the text, ascending, as many as it was said to keep.
            positions_S: int64, of the text's tokens.
        """
        arena = self._arenas[layer]
        arena.allocate(keys, values)
        text = len(positions_S)
        for head, slots in enumerate(chosen):
            start = arena.offsets[row][head]
            end = start + arena.kept[row][head]
            arena.positions[start:end] = positions_S[slots]
            for storage, states in zip(arena.tensors, (keys, values), strict=True):
                torch.index_select(states[head], 0, slots, out=storage[start:end])
                storage[end : end + states.shape[1] - text] = states[head, text:]

    def held(self, layer: int, row: int) -> list[Kept]:
        """What the heads of a row hold in a layer, as views."""
        arena, region = self._arenas[layer], self._regions[row]
        size = self.lengths[row] - self._first[row] + self.width
        return [
            Kept(
                heads,
                *(arena.view(each, region, heads, arena.kept[region][heads.start] + size) for each in arena.tensors),
            )
            for heads in arena.runs(region)
        ]

    def positions(self, layer: int, row: int, heads: slice) -> Tensor:
        """Absolute positions of what neighbouring heads of a row hold that keep equally many: int64 [M, S]."""
        arena, region = self._arenas[layer], self._regions[row]
        old_MS = arena.view(arena.positions, region, heads, arena.kept[region][heads.start]).long()
        size = self.lengths[row] - self._first[row] + self.width
        new_S = self._next[row] + torch.arange(size, device=old_MS.device)
        return torch.cat([old_MS, new_S.expand(len(old_MS), size)], 1)

    # ---- what the loop and the engine ask of a cache ----

    def open(self, width: int) -> None:
        """Reserve the next ``width`` tokens of every row for one forward pass."""
        used = [length - first for length, first in zip(self.lengths, self._first, strict=True)]
        needed = max(used) + width
        if needed > self.room:
            self._grow(max(needed, self.room + self.room // 2), used)
        self.width = width
        self._tails = torch.tensor(used, device=self.device).unsqueeze(1) + torch.arange(width, device=self.device)

    def query_positions(self) -> Tensor:
        """Absolute positions of the tokens of the open span: int64 [B, Q]."""
        return self._tails + torch.tensor(self._next, device=self.device).unsqueeze(1)

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, M, Q, D] into the open span; the layer's attention reads the arena, not what is returned."""
        arena = self._arenas[layer]
        self._open = layer
        slots_BMQ = arena.starts(self._regions).unsqueeze(2) + self._tails.to(arena.keys.device).unsqueeze(1)
        slots = slots_BMQ.flatten()
        for storage, states in zip(arena.tensors, (key_states, value_states), strict=True):
            storage.index_copy_(0, slots, states.reshape(len(slots), -1))
        return key_states, value_states

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        tree: TreeBlock | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """Attention of [B, N, Q, D] queries over what each row and head of the layer just written holds.

        To be used by `drafttrain.ops.attention.attending_by`; ``key``, ``value`` and the mask are not read. ``tree``
        says what the open span sees of itself, where it is no chain; it must hold the whole tree.
        """
        if kwargs.get("s_aux") is not None:
            raise ValueError("drafttrain's attention does not implement attention sinks")
        layer, groups = self._open, query.shape[1] // key.shape[1]
        rows = []
        for row in range(self.rows):
            parts = []
            for kept in self.held(layer, row):
                q = query[row : row + 1, kept.heads.start * groups : kept.heads.stop * groups]
                mask = self._mask(layer, row, kept, groups, query.dtype, tree)
                out, _ = folded_attention(module, q, kept.keys[None], kept.values[None], mask, scaling, softcap)
                parts.append(out)
            rows.append(parts[0] if len(parts) == 1 else torch.cat(parts, 2))
        return rows[0] if len(rows) == 1 else torch.cat(rows), None

    def advance(self, counts: Sequence[int] | None = None) -> None:
        """Close the span: each row keeps the first ``counts[b]`` of its tokens (None: all of them)."""
        counts = [self.width] * self.rows if counts is None else counts
        self.rollback([length + count for length, count in zip(self.lengths, counts, strict=True)])

    def rollback(self, lengths: Sequence[int]) -> None:
        """Set the rows' lengths. Moves nothing."""
        if any(length < first for length, first in zip(lengths, self._first, strict=True)):
            raise ValueError("a cache whose keys were dropped cannot be rolled back into the text they are of")
        self.lengths, self.width = list(lengths), 0

    def keep_path(self, starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Of the tree behind ``starts`` keep one path a row, which becomes a chain: its few slots move together.

        Args:
            starts: lengths of the rows before the tree.
            paths: the nodes to keep, counted from the tree's first, ascending; they must have been read.
        """
        for row, (start, path) in enumerate(zip(starts, paths, strict=True)):
            if list(path) != list(range(len(path))):
                for arena in self._arenas:
                    begin_M1 = arena.starts(self._regions)[row].unsqueeze(1) + start - self._first[row]
                    old_MK, new_MK = (
                        begin_M1 + torch.tensor(at, device=begin_M1.device) for at in (path, range(len(path)))
                    )
                    for storage in arena.tensors:
                        storage[new_MK] = storage[old_MK]
        self.rollback([start + len(path) for start, path in zip(starts, paths, strict=True)])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order. Moves nothing."""
        for name in ("lengths", "_first", "_next", "_regions"):
            own = getattr(self, name)
            setattr(self, name, [own[row] for row in rows])

    def memory_bytes(self) -> int:
        """Bytes allocated for keys, values and positions."""
        parts = [each for arena in self._arenas for each in (arena.keys, arena.values, arena.positions)]
        return sum(part.nbytes for part in parts if part is not None)

    def _mask(
        self, layer: int, row: int, kept: Kept, groups: int, dtype: torch.dtype, tree: TreeBlock | None
    ) -> Tensor | None:
        """What the open span may attend to: additive [1, M or 1, G * Q, S], None for everything."""
        window, width, device = self._windows[layer], self.width, kept.keys.device
        if window is None and width == 1:
            return None
        size = kept.keys.shape[1]
        if tree is None:
            visible = torch.ones(1, width, size, dtype=torch.bool, device=device).tril(size - width)
        else:
            seen_1QQ = tree.seen_BQT[row].to(device).unsqueeze(0)
            visible = pad(seen_1QQ, (size - width, 0), value=True)
        if window is not None:
            positions_MS = self.positions(layer, row, kept.heads)
            if tree is not None:
                depth_Q = tree.depth_BT[row].to(device)
                positions_MS[:, size - width :] = positions_MS[:, size - width, None] + depth_Q
            query_Q1 = positions_MS[0, size - width :].unsqueeze(1)
            visible = visible & (positions_MS.unsqueeze(1) > query_Q1 - window)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)
        return mask.repeat(1, groups, 1).unsqueeze(0)

    def _grow(self, room: int, used: Sequence[int]) -> None:
        tails = dict(zip(self._regions, used, strict=True))
        every = [tails.get(region, 0) for region in range(len(self._arenas[0].kept))]
        self._arenas = [arena.grown(room, every) for arena in self._arenas]
        self.room = room
