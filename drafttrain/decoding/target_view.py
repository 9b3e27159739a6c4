"""What a drafter may read of its target while it drafts: keys and values as they lie."""

# B batch (active rows), S slots, M key heads, D head size

from __future__ import annotations

from torch import Tensor

from drafttrain.decoding.engine import Engine
from drafttrain.ops.cache import DenseCache


class TargetView:
    """A target as a drafter sees it.

    Args:
        engine: of the target.
        cache: its cache; the loop puts it here when it has made one.
    """

    def __init__(self, engine: Engine, cache: DenseCache | None = None) -> None:
        self.engine = engine
        self.cache = cache

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that the target has read: the text but its last token."""
        return self.cache.lengths

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [B, M, S, D] each: its storage, nothing is copied.

        What lies beyond a row's own length means nothing.
        """
        held, rows = self.cache.layers[layer], self.cache.rows
        return held.keys[:rows], held.values[:rows]
