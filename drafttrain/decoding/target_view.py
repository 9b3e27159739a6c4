"""What a drafter may read of its target while it drafts: keys and values as they lie, embeddings, angles, logits."""

# B batch (active rows), Q query width, S slots, M key heads, D head size, H hidden, V vocabulary

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from drafttrain.decoding.engine import Engine
from drafttrain.models.shared_target import RotaryOf
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
        """Keys and values of a layer, [B, M, S, D] each, S the longest row's length: views, nothing is copied.

        What lies beyond a row's own length means nothing.
        """
        held, (rows, longest) = self.cache.layers[layer], (self.cache.rows, max(self.lengths))
        return tuple(states[:rows].narrow(2, 0, longest) for states in (held.keys, held.values))

    def embeddings(self, tokens_BQ: Tensor) -> Tensor:
        """[B, Q, H]."""
        return self.engine.model.get_input_embeddings()(tokens_BQ)

    def logits(self, states_BQH: Tensor) -> Tensor:
        """The target's head over a drafter's states, [B, Q, V] without padding rows."""
        return self.engine.logits(states_BQH)

    @cached_property
    def rotary(self) -> RotaryOf:
        """(states, positions) -> cosines and sines."""
        return RotaryOf(self.engine.model)
