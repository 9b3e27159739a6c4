"""The key-value cache, and the only file that touches transformers' cache interface (transformers >= 5.15).

Slots are not positions. A row's keys live in slots 0 .. length - 1, and every slot knows its absolute position in the
sequence; masks compare positions. Rolling back a chain sets lengths and moves nothing: a slot beyond a row's length
has a position greater than any query that can be asked before the slot is written again, so it is masked by being in
the future. Storage grows by blocks; nothing is concatenated.
"""

# B batch (active rows), Q query width, S slots, N heads, D head size, G query heads a key head

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from drafttrain.ops.upload import upload


class Span:
    """Where one forward pass writes: shared by all layers of a cache.

    Attributes:
        rows: active rows.
        width: tokens a row.
        start: the slot where every row begins, if it is the same for all; else None.
        bound: slots that may be read, one more than the last slot written in any row.
        slots_BQ: the slots written; None where ``start`` says it all.
    """

    def __init__(self, lengths: Sequence[int], width: int, slots_BQ: Tensor | None) -> None:
        self.rows = len(lengths)
        self.width = width
        self.bound = max(lengths) + width
        self.start = lengths[0] if slots_BQ is None else None
        self.slots_BQ = slots_BQ
        self._indices: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and slot indices [B, 1] and [B, Q] on a layer's device (layers of one model may lie on several)."""
        if device not in self._indices:
            self._indices[device] = (torch.arange(self.rows, device=device).unsqueeze(1), self.slots_BQ.to(device))
        return self._indices[device]


class Storage:
    """Keys and values of all layers, allocated as they are first written. It may outlive a cache and serve the next.

    Args:
        layers: number of attention layers.
        rows: of every tensor.
        slots: of every row.

    Attributes:
        tensors: keys and values of each layer, [B, N, S, D]; None where nothing has been written.
    """

    def __init__(self, layers: int, rows: int, slots: int) -> None:
        self.rows, self.slots = rows, slots
        self.tensors: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def layer(self, index: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's tensors. Zeros, not garbage: a masked slot is multiplied by 0, which a NaN would survive."""
        if self.tensors[index] is None:
            self.tensors[index] = tuple(
                states.new_zeros(self.rows, states.shape[1], self.slots, states.shape[3])
                for states in (key_states, value_states)
            )
        return self.tensors[index]

    def grow(self, slots: int) -> None:
        """Have more slots from now on; the layers' tensors follow one by one, by `move`."""
        self.slots = slots

    def move(self, index: int, used: int) -> tuple[Tensor, Tensor] | None:
        """Move a layer to tensors of the present number of slots, copying the first ``used``."""
        if self.tensors[index] is not None:
            self.tensors[index] = tuple(_resized(old, self.slots, used) for old in self.tensors[index])
        return self.tensors[index]


def _resized(old: Tensor, slots: int, used: int) -> Tensor:
    new = old.new_zeros(old.shape[0], old.shape[1], slots, old.shape[3])
    new.narrow(2, 0, used).copy_(old.narrow(2, 0, used))
    return new


class DenseLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, N, S, D], allocated at the first write on the device of the layer."""

    is_sliding = False  # sliding layers are stored in full and masked, so that they can be rolled back

    def __init__(self, cache: DenseCache, index: int) -> None:
        super().__init__()
        # A cycle would keep the storage until garbage is collected, which while runs are timed it is not.
        self._cache = weakref.proxy(cache)
        self._index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the layer's part of the storage."""
        self.keys, self.values = self._cache.storage.layer(self._index, key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kw: object) -> tuple[Tensor, Tensor]:
        """Write [B, N, Q, D] into the span and return all readable slots [B, N, bound, D] as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        span = self._cache.span
        keys, values = self.keys, self.values
        if span.rows != keys.shape[0]:
            keys, values = keys[: span.rows], values[: span.rows]
        if span.start is not None:
            keys.narrow(2, span.start, span.width).copy_(key_states)
            values.narrow(2, span.start, span.width).copy_(value_states)
        else:
            rows_B1, slots_BQ = span.indices(keys.device)
            keys[rows_B1, :, slots_BQ] = key_states.transpose(1, 2)
            values[rows_B1, :, slots_BQ] = value_states.transpose(1, 2)
        return keys.narrow(2, 0, span.bound), values.narrow(2, 0, span.bound)

    def resize(self, used: int) -> None:
        """Follow a storage that has grown; the first ``used`` slots are kept."""
        moved = self._cache.storage.move(self._index, used)
        if self.is_initialized:
            self.keys, self.values = moved

    def copy_row(self, source: int, target: int, used: int) -> None:
        """Overwrite one row by another."""
        if self.is_initialized:
            self.keys[target, :, :used] = self.keys[source, :, :used]
            self.values[target, :, :used] = self.values[source, :, :used]

    def move_slots(self, rows_N1: Tensor, sources_NK: Tensor, targets_NK: Tensor) -> None:
        """Copy slots of some rows to other slots of the same rows; all are read before any is written."""
        if self.is_initialized:
            for storage in (self.keys, self.values):
                rows, sources, targets = (index.to(storage.device) for index in (rows_N1, sources_NK, targets_NK))
                storage[rows, :, targets] = storage[rows, :, sources]

    def gather_slots(self, row: int, slots: Tensor) -> None:
        """Move the given slots of a row to its front, in order."""
        if self.is_initialized:
            for storage in (self.keys, self.values):
                storage[row, :, : len(slots)] = storage[row].index_select(1, slots.to(storage.device))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Readable slots and their offset."""
        return self._cache.span.bound, 0

    def get_seq_length(self) -> int:
        """Tokens in the longest row."""
        return max(self._cache.lengths, default=0)

    def get_max_length(self) -> int:
        """No maximum: the storage grows."""
        return -1


class GraphLayer(CacheLayerMixin):
    """One layer as a compiled graph writes it: where to write and how much to read are arguments of the graph.

    Args:
        keys, values: storage [B, N, S, D] of the active rows.
        slots: int64 slots to write, [Q] for all rows alike or [B, Q].
        bound: slots to read; None reads all.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor, bound: int | None) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._slots, self._bound = slots, bound

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kw: object) -> tuple[Tensor, Tensor]:
        """As `DenseLayer.update`."""
        for storage, states in ((self.keys, key_states), (self.values, value_states)):
            if self._slots.dim() == 1:
                storage.index_copy_(2, self._slots, states)
            else:
                rows_B1 = torch.arange(len(states), device=states.device).unsqueeze(1)
                storage[rows_B1, :, self._slots] = states.transpose(1, 2)
        return self.keys[:, :, : self._bound], self.values[:, :, : self._bound]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Readable slots and their offset."""
        return self._bound or self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Not asked for: positions and masks are given."""
        return 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class Writer(Protocol):
    """A cache that is told layer by layer what to hold."""

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Take keys and values [B, N, Q, D] of a layer; returns what the layer's attention is given."""
        ...


class WrittenLayer(CacheLayerMixin):
    """A layer of a cache that keeps its keys elsewhere: all it does is to hand them on."""

    is_sliding = False

    def __init__(self, cache: Writer, index: int) -> None:
        super().__init__()
        self._cache = weakref.proxy(cache)
        self._index = index
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kw: object) -> tuple[Tensor, Tensor]:
        """Hand them on."""
        return self._cache.write(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked for: masks are given."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Not asked for: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class PassingLayer(CacheLayerMixin):
    """Stores nothing for later: a forward over whole rows sees its own keys and values, and may leave them here.

    Args:
        keep: whether to leave them, as `keys` and `values`.
    """

    is_sliding = False

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self._keep = keep

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to allocate."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kw: object) -> tuple[Tensor, Tensor]:
        """The states themselves."""
        if self._keep:
            self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As without a cache."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Nothing lies before the rows."""
        return 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def captured_layer(decoder: torch.nn.Module, layers: int, layer: int, **inputs: object) -> tuple[Tensor, ...]:
    """Run a decoder over whole rows and keep one layer's keys and values, no others.

    Args:
        decoder: a transformers model without its head, whole or in an engine that splits it.
        layers: how many it has.
        layer: whose keys and values are wanted.
        inputs: of its forward.

    Returns:
        the last hidden states [B, T, H], keys and values [B, M, T, D].
    """
    cache = Cache(layers=[PassingLayer(index == layer) for index in range(layers)])
    hidden_BTH = decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
    kept = cache.layers[layer]
    return hidden_BTH, kept.keys, kept.values


class DenseCache(Cache):
    """A ragged batch of sequences with one storage [B, N, S, D] a layer.

    A forward pass is ``open(width)`` (which fixes the slots), the model's forward, ``advance(counts)``. All rows write
    ``width`` tokens; what lies beyond a row's count is padding, and the next pass overwrites it.

    Args:
        layers: number of attention layers.
        rows: batch size.
        device: where positions and masks are made (each layer's storage follows its own keys).
        capacity: slots to allocate at once; more are added by blocks.
        block: slots are a multiple of it.
        storage: to be used instead of one of its own, with as many rows at least.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        device: torch.device,
        capacity: int = 0,
        block: int = 256,
        storage: Storage | None = None,
    ) -> None:
        self.lengths = [0] * rows
        self.block = block
        self.storage = storage or Storage(layers, rows, max(block, _round_up(capacity, block)))
        self.slots = self.storage.slots
        self.device = device
        self.span = Span(self.lengths, 0, None)
        # Position of each slot [1 or B, S]; one row serves all while no slot has been dropped.
        self.positions_BS = torch.arange(self.slots, device=device).unsqueeze(0)
        self._lengths_B: Tensor | None = None
        super().__init__(layers=[DenseLayer(self, index) for index in range(layers)])

    @property
    def rows(self) -> int:
        """Active rows."""
        return len(self.lengths)

    @property
    def in_order(self) -> bool:
        """Whether every slot's position is its number."""
        return self.positions_BS.shape[0] == 1

    def open(self, width: int) -> Span:
        """Reserve the next ``width`` slots of every row for one forward pass."""
        needed = max(self.lengths) + width
        if needed > self.slots:
            self._grow(needed)
        first = self.lengths[0]
        slots_BQ = None
        if any(length != first for length in self.lengths):
            slots_BQ = self._device_lengths().unsqueeze(1) + torch.arange(width, device=self.device)
        self.span = Span(self.lengths, width, slots_BQ)
        return self.span

    def query_positions(self) -> Tensor:
        """Absolute positions of the tokens of the open span: int64 [B, Q] or [1, Q] where all rows agree."""
        span = self.span
        if span.start is not None:
            positions_BQ = self.positions_BS.narrow(1, span.start, span.width)
            return positions_BQ[: span.rows]
        if self.in_order:
            return span.slots_BQ
        return self.positions_BS[: span.rows].gather(1, span.slots_BQ)

    def visible(self, query_positions_BQ: Tensor, window: int | None = None) -> Tensor:
        """Which slots each query may attend to: bool [B or 1, Q, bound].

        Args:
            query_positions_BQ: absolute positions, of any number of query rows.
            window: sliding window, counting the query itself; None is causal over everything.
        """
        positions_B1S = self.positions_BS[: self.span.rows, : self.span.bound].unsqueeze(1)
        query_BQ1 = query_positions_BQ.unsqueeze(2)
        visible_BQS = positions_B1S <= query_BQ1
        if window is not None:
            visible_BQS &= positions_B1S > query_BQ1 - window
        return visible_BQS

    def advance(self, counts: Sequence[int] | None = None) -> None:
        """Close the span: each row keeps the first ``counts[b]`` of its tokens (None: all of them)."""
        if counts is None:
            width = self.span.width
            self.lengths = [length + width for length in self.lengths]
            if self._lengths_B is not None:
                self._lengths_B = self._lengths_B + width
        else:
            self.rollback([length + count for length, count in zip(self.lengths, counts, strict=True)])

    def rollback(self, lengths: Sequence[int]) -> None:
        """Set the rows' lengths. Moves nothing."""
        lengths = list(lengths)
        if lengths != self.lengths:
            self.lengths = lengths
            self._lengths_B = None

    def keep_path(self, starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Of the tree behind ``starts`` keep one path a row, which becomes a chain: a gather of its few slots.

        Args:
            starts: slots before the tree in each row.
            paths: the nodes to keep, counted from the tree's first, ascending; they must have been read.
        """
        moving = [row for row, path in enumerate(paths) if any(node > place for place, node in enumerate(path))]
        if moving:
            width = max(len(paths[row]) for row in moving)
            targets = [[starts[row] + place for place in range(width)] for row in moving]
            sources = [
                [starts[row] + node for node in paths[row]] + line[len(paths[row]) :]
                for row, line in zip(moving, targets, strict=True)
            ]
            index = [upload(numbers, self.device) for numbers in ([[row] for row in moving], sources, targets)]
            for layer in self.layers:
                layer.move_slots(*index)
        self.rollback([start + len(path) for start, path in zip(starts, paths, strict=True)])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; each may come from its own place or a later one.

        Rows move only into places that have become free, so a batch that loses one row copies at most one.
        """
        rows = list(rows)
        if any(row < place for place, row in enumerate(rows)):
            raise ValueError("a row may stay or move forward, not back: its place may be overwritten")
        for place, row in enumerate(rows):
            if row != place:
                for layer in self.layers:
                    layer.copy_row(row, place, self.lengths[row])
        if not self.in_order:
            self.positions_BS = self.positions_BS[rows]
        self.lengths = [self.lengths[row] for row in rows]
        self._lengths_B = None

    def keep_slots(self, row: int, slots: Tensor) -> None:
        """Keep only these slots of a row, in this order; what they hold keeps its absolute position.

        The next token's position does not change: it stays one beyond the row's last position so far.

        Args:
            row: which row.
            slots: int64 slot numbers, ascending, all below the row's length.
        """
        if self.in_order:
            self.positions_BS = self.positions_BS.repeat(self.rows, 1)
        length, kept = self.lengths[row], len(slots)
        for layer in self.layers:
            layer.gather_slots(row, slots)
        positions_S = self.positions_BS[row].clone()
        following = int(positions_S[length - 1]) + 1 if length else 0
        positions_S[:kept] = positions_S[slots]
        positions_S[kept:] = following + torch.arange(self.slots - kept, device=self.device)
        self.positions_BS[row] = positions_S
        self.rollback([kept if index == row else value for index, value in enumerate(self.lengths)])

    def storages(self) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values [B, N, S, D] of the active rows, layer by layer; None before anything was written."""
        if not self.layers[-1].is_initialized:
            return None
        if self.rows == self.storage.rows:
            return [(layer.keys, layer.values) for layer in self.layers]
        return [(layer.keys[: self.rows], layer.values[: self.rows]) for layer in self.layers]

    def memory_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        tensors = [t for layer in self.layers if layer.is_initialized for t in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors)

    def _device_lengths(self) -> Tensor:
        if self._lengths_B is None:
            self._lengths_B = upload(self.lengths, self.device)
        return self._lengths_B

    def _grow(self, needed: int) -> None:
        slots = _round_up(max(needed, self.slots + self.slots // 2), self.block)
        self.storage.grow(slots)
        for layer in self.layers:
            layer.resize(max(self.lengths))
        extra = torch.arange(1, slots - self.slots + 1, device=self.device)
        self.positions_BS = torch.cat([self.positions_BS, self.positions_BS[:, -1:] + extra], dim=1)
        self.slots = slots


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
