"""The queries of a drafter that reads a prompt and drafts: all that draft attention needs beside the cached keys."""

# B batch, N query heads, M key heads, W window, S tokens of a prompt, L drafted tokens, D head size

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from drafttrain.context.scoring import Looked
from drafttrain.decoding.engine import Engine
from drafttrain.ops.attention import Attend, windows_by_layer
from drafttrain.ops.cache import DenseCache


class QueryWatch:
    """Keeps the queries of the last prompt tokens and of the drafted ones, for every layer and row.

    They are stored by position, so chunks, padding and unequal rows need no care: what padding wrote, the real token of
    that position overwrites.

    Args:
        engine: of the drafter.
        lengths: tokens of each row's prompt.
        window: W, last prompt tokens to keep.
        ahead: most drafted tokens to keep.
    """

    def __init__(self, engine: Engine, lengths: Sequence[int], window: int, ahead: int) -> None:
        self.engine = engine
        self.lengths = list(lengths)
        self.window, self.width = window, window + ahead
        self._windows = windows_by_layer(engine.config)
        self._queries: list[Tensor | None] = [None] * engine.layers
        self._how: list[tuple[float | None, float | None]] = [(None, None)] * engine.layers
        self._cache: DenseCache | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the engine inside the block; afterwards, also after an exception, it is as it was."""
        before, self.engine.watch = self.engine.watch, self._watch
        try:
            yield
        finally:
            self.engine.watch = before

    def looked(self, layer: int, row: int, drafted: int = 0) -> Looked:
        """What a layer's watched queries may look at.

        Args:
            layer: of the drafter.
            row: of the batch.
            drafted: drafted tokens whose queries count; each must have been read.
        """
        text = self.lengths[row]
        first = max(0, text - self.window)
        device = self._queries[layer].device
        query = self._queries[layer][row, :, first - text + self.window : self.window + drafted]
        key = self._cache.layers[layer].keys[row, :, : text + drafted]
        rows = torch.arange(first, text + drafted, device=device)
        positions = torch.arange(text + drafted, device=device)
        return Looked(query, key, rows, positions, self._windows[layer], *self._how[layer])

    def _watch(self, cache: DenseCache, usual: Attend) -> Attend:
        self._cache = cache
        starts = list(cache.lengths)

        def attend(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
            self._keep(module.layer_idx, query, starts)
            self._how[module.layer_idx] = (scaling, softcap)
            return usual(module, query, key, value, mask, scaling, softcap, **kwargs)

        return attend

    def _keep(self, layer: int, query: Tensor, starts: Sequence[int]) -> None:
        if self._queries[layer] is None:
            batch, heads, _, size = query.shape
            self._queries[layer] = query.new_zeros(batch, heads, self.width, size)
        stored, width = self._queries[layer], query.shape[2]
        for row, start in enumerate(starts):
            at = start - (self.lengths[row] - self.window)  # place of the first query
            skipped, end = max(0, -at), min(width, self.width - at)
            if skipped < end:
                stored[row, :, at + skipped : at + end] = query[row, :, skipped:end]
