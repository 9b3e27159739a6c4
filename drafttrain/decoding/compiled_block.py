"""The compiled forward of a LongSpec block beside a target that is compiled for a CPU.

A block is small: read step by step, most of its time goes into Python and dispatch. Lengths of texts, rings and batches
are symbols of a graph, as in `drafttrain.decoding.compiled`; one graph serves each combination of single or several
rows, one or several tokens, rings of equal or of different length, and the target's caches likewise. Rows with unequal
numbers of new tokens, trees, and texts of which the target has read nothing are read uncompiled.
"""

# B batch, Q query width, R ring slots, S slots of the target, M key heads, D head size, H hidden, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from drafttrain.decoding.compiled import (
    STAND_IN_BOUND,
    STAND_IN_ROWS,
    STAND_IN_SLOTS,
    STAND_IN_WIDTH,
    compiled_or_refused,
)
from drafttrain.ops.ring import Slots

if TYPE_CHECKING:
    from drafttrain.decoding.longspec import BlockEngine


class Seen(NamedTuple):
    """What a block reads of its target.

    Attributes:
        keys, values: storage [B, M, S, D].
        bound: slots that hold something.
        mask_B11S: additive, over the bound; None where all rows have all of it.
        blind_B: rows of which the target has read nothing; None for none.
    """

    keys: Tensor
    values: Tensor
    bound: int
    mask_B11S: Tensor | None = None
    blind_B: Tensor | None = None


class _Kind(NamedTuple):
    """What a graph is compiled for: one row, one token a row, rings of one length, caches of unlike lengths."""

    single: bool
    narrow: bool
    aligned: bool
    masked: bool


class CompiledBlock:
    """Stands in for the forward of a block where only the last token's logits are wanted.

    Args:
        engine: whose block is compiled, with the target's embedding and head; their weights must not change afterwards.

    Attributes:
        graphs: made so far.
    """

    def __init__(self, engine: BlockEngine) -> None:
        self._engine = engine
        self.graphs: dict[_Kind, Callable[..., tuple[Tensor, Tensor]]] = {}

    def fits(self, seen: Seen | None) -> bool:
        """Whether graphs can read what is seen of the target; a size of one would be none of their symbols."""
        return seen is not None and seen.bound > 1 and seen.blind_B is None

    @torch.inference_mode()
    def __call__(self, ring: Slots, tokens_BQ: Tensor, positions_BQ: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """Put tokens into a ring and read the last of every row.

        Args:
            ring: whose slots are written; its lengths are left to the caller.
            tokens_BQ: int64 [B, Q].
            positions_BQ: theirs, [B, Q], or [1, Q] where all rows agree.
            seen: of the target.

        Returns:
            hidden [B, 1, H] and logits [B, 1, V].

        Raises:
            UserError: there is no compiler, or the block cannot be captured.
        """
        rows, width = tokens_BQ.shape
        kind = _Kind(rows == 1, width == 1, len(positions_BQ) == 1, seen.mask_B11S is not None)
        graph = self.graphs.get(kind)
        if graph is None:
            graph = self.graphs[kind] = self._compile(kind)
        if tokens_BQ.stride() != (width, 1):  # of a slice; graphs take strides for sizes
            tokens_BQ = tokens_BQ.clone(memory_format=torch.contiguous_format)
        return graph(tokens_BQ, positions_BQ, ring.keys, ring.values, ring.positions_BR, seen)

    def _compile(self, kind: _Kind) -> Callable[..., tuple[Tensor, Tensor]]:
        """Make a graph and run it once on stand-in arguments."""
        engine, window = self._engine, self._engine.config.window

        def forward(
            tokens_BQ: Tensor, positions_BQ: Tensor, keys: Tensor, values: Tensor, positions_BR: Tensor, seen: Seen
        ) -> tuple[Tensor, Tensor]:
            states_B1H = engine.states(Slots(keys, values, positions_BR, window), tokens_BQ, positions_BQ, seen)
            return states_B1H, engine.target.logits(states_B1H)

        return compiled_or_refused(forward, self._stand_ins(kind), engine.model)

    def _stand_ins(self, kind: _Kind) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Seen]:
        engine, config = self._engine, self._engine.target.config
        heads = config.num_attention_heads // engine.target.groups
        rows, width = 1 if kind.single else STAND_IN_ROWS, 1 if kind.narrow else STAND_IN_WIDTH
        ring = engine.new_cache(rows)
        keys, values = (
            torch.zeros(rows, heads, STAND_IN_SLOTS, engine.config.head_dim, dtype=engine.dtype) for _ in range(2)
        )
        mask = torch.zeros(rows, 1, 1, STAND_IN_BOUND, dtype=engine.dtype) if kind.masked else None
        positions = torch.arange(STAND_IN_BOUND, STAND_IN_BOUND + width).repeat(1 if kind.aligned else rows, 1)
        tokens = torch.zeros(rows, width, dtype=torch.int64)
        return tokens, positions, ring.keys, ring.values, ring.positions_BR, Seen(keys, values, STAND_IN_BOUND, mask)
