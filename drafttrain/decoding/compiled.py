"""The compiled forward of a model on a CPU: most of a small model's step is Python and dispatch, and this removes it.

`torch.compile` with frozen, prepacked weights. Widths, key ranges, storage sizes and batches are symbols of a graph, so
a few graphs serve everything and nothing is compiled again while decoding: one for each combination of single or
several rows, one or several tokens, rows of equal or of different length, and whether a sliding window binds; for trees
one for each of the first three, which is given masks. A graph is made when it is first needed, on arguments of odd
sizes that coincide with nothing.

Prompts are read by the uncompiled path: there the arithmetic counts.
"""

# B batch, Q query width, S slots, N heads, D head size, K kept positions, H hidden, V vocabulary

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from drafttrain.errors import UserError
from drafttrain.ops import narrow_attention
from drafttrain.ops.attention import FOLD_ROWS, attending, window_binds
from drafttrain.ops.cache import DenseCache, GraphLayer

if TYPE_CHECKING:
    from drafttrain.decoding.engine import Engine

STAND_IN_ROWS, STAND_IN_WIDTH, STAND_IN_BOUND, STAND_IN_SLOTS = 3, 5, 37, 256
"""Sizes that a graph is made on: different from each other, from 1, and from any that the model has."""


_TREE_ROWS = 2048
"""Folded query rows of the largest tree that is read by a graph."""

_numbers = itertools.count()


class Graph(NamedTuple):
    """What a graph is compiled for; everything else about a forward is symbolic.

    Attributes:
        single: one row.
        narrow: one token a row.
        aligned: all rows write the same slots.
        binds: of every kind of layer, whether its window may hide something.
        last: whether the head reads the last position of each row alone (all rows have equal counts).
        tree: whether positions and masks are given.
    """

    single: bool
    narrow: bool
    aligned: bool
    binds: tuple[bool, ...]
    last: bool
    tree: bool = False


class Given(NamedTuple):
    """What a graph cannot know of the tokens of a tree.

    Attributes:
        positions_BQ: int64, their positions.
        masks: additive, of every kind of layer, [B, 1, G * Q, bound].
    """

    positions_BQ: Tensor
    masks: list[Tensor]


class CompiledForward:
    """Stands in for an engine's forward where that is short.

    Args:
        engine: whose model is compiled; its weights must not change afterwards, they become part of the graphs.

    Attributes:
        graphs: made so far.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.device.type != "cpu":
            raise UserError("models are compiled for CPUs and CUDA devices only; leave evaluate.compile out here.")
        self._engine = engine
        self._windows = dict(engine.windows)
        self.graphs: dict[Graph, Callable[..., tuple[Tensor, Tensor]]] = {}

    def fits(self, cache: DenseCache, keep: str | None, tree: bool = False) -> bool:
        """Whether the open span of a cache can be read by a graph."""
        short = self._engine.groups * cache.span.width <= (_TREE_ROWS if tree else FOLD_ROWS)
        return keep is not None and short and cache.in_order and cache.layers[-1].is_initialized

    @torch.inference_mode()
    def __call__(
        self, cache: DenseCache, tokens_BQ: Tensor, last: bool, given: Given | None = None
    ) -> tuple[Tensor, Tensor]:
        """Read tokens into the open span of a cache.

        Args:
            cache: with an open span that `fits`.
            tokens_BQ: int64 [B, Q].
            last: compute only the last position.
            given: for the tokens of a tree.

        Returns:
            hidden [B, K, H] and logits [B, K, V], K = 1 or Q.
        """
        span = cache.span
        single, narrow = span.rows == 1, span.width == 1
        binds = () if given else tuple(window_binds(cache, window) for window in self._windows.values())
        kind = Graph(single, narrow, span.start is not None, binds, last and not narrow, given is not None)
        graph = self.graphs.get(kind)
        if graph is None:
            graph = self.graphs[kind] = self._compile(kind)
        slots = span.slots_BQ
        if slots is None:
            slots = torch.arange(span.start, span.start + span.width)
        if tokens_BQ.stride() != (span.width, 1):  # of a slice; graphs take strides for sizes
            tokens_BQ = tokens_BQ.clone(memory_format=torch.contiguous_format)
        return graph(tokens_BQ, slots, span.bound, cache.storages(), given)

    def _compile(self, kind: Graph) -> Callable[..., tuple[Tensor, Tensor]]:
        """Make a graph and run it once on stand-in arguments.

        Raises:
            UserError: there is no compiler, or the model cannot be captured.
        """
        engine = self._engine
        windows = {
            name: window if binds else None
            for (name, window), binds in zip(self._windows.items(), kind.binds, strict=not kind.tree)
        }

        def forward(
            tokens_BQ: Tensor,
            slots: Tensor,
            bound: int,
            storages: Sequence[tuple[Tensor, Tensor]],
            given: Given | None,
        ) -> tuple[Tensor, Tensor]:
            cache = Cache(layers=[GraphLayer(keys, values, slots, bound) for keys, values in storages])
            if kind.tree:
                masks = dict(zip(engine.windows, given.masks, strict=True))
                return read_block(engine, tokens_BQ, given.positions_BQ, masks, cache, kind.last)
            positions_BQ = slots.unsqueeze(0) if kind.aligned else slots
            masks = {name: _mask(positions_BQ, bound, window, kind, engine) for name, window in windows.items()}
            return read_block(engine, tokens_BQ, positions_BQ, masks, cache, kind.last)

        with attending(engine.config, narrow_attention.NAME):
            return compiled_or_refused(forward, self._stand_ins(kind), engine.model)

    def _stand_ins(self, kind: Graph) -> tuple[Tensor, Tensor, int, list[tuple[Tensor, Tensor]], Given | None]:
        engine = self._engine
        rows, width = 1 if kind.single else STAND_IN_ROWS, 1 if kind.narrow else STAND_IN_WIDTH
        cache = engine.new_cache(rows, STAND_IN_SLOTS)
        engine.forward(cache, torch.zeros(rows, 1, dtype=torch.int64), keep=None)  # allocates, without a graph
        slots = torch.arange(STAND_IN_BOUND - width, STAND_IN_BOUND)
        if not kind.aligned:
            slots = slots.repeat(rows, 1)
        given = None
        if kind.tree:
            shape = rows, 1, engine.groups * width, STAND_IN_BOUND
            masks = [torch.zeros(shape, dtype=engine.dtype) for _ in self._windows]
            given = Given(torch.zeros(rows, width, dtype=torch.int64), masks)
        return torch.zeros(rows, width, dtype=torch.int64), slots, STAND_IN_BOUND, cache.storages(), given


def read_block(
    engine: Engine, tokens_BQ: Tensor, positions_BQ: Tensor, masks: dict[str, Tensor], cache: Cache, last: bool
) -> tuple[Tensor, Tensor]:
    """What graphs of either kind are made of: the model's layers and head over a block.

    Args:
        engine: whose model reads.
        tokens_BQ: int64 [B, Q].
        positions_BQ: int64 [B or 1, Q].
        masks: by kind of layer.
        cache: of `GraphLayer`s.
        last: keep only the last position.

    Returns:
        hidden [B, K, H] and logits [B, K, V], K = 1 or Q.
    """
    hidden_BKH = engine.body(
        input_ids=tokens_BQ,
        attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        position_ids=positions_BQ,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    if last:
        hidden_BKH = hidden_BKH[:, -1:]
    return hidden_BKH, engine.logits(hidden_BKH)


def _mask(positions_BQ: Tensor, bound: int, window: int | None, kind: Graph, engine: Engine) -> Tensor:
    """An additive mask for folded queries and the last T slots [B or 1, 1, G * Q, T], empty where nothing is hidden."""
    if kind.narrow and kind.aligned and window is None:
        return positions_BQ.new_empty(1, 1, 1, 0, dtype=engine.dtype)
    first = bound - positions_BQ.shape[1] if kind.aligned and window is None else 0  # what is before, all see
    if not kind.narrow:
        positions_BQ = positions_BQ.repeat(1, engine.groups)
    slots_S, query_BQ1 = torch.arange(first, bound, device=positions_BQ.device), positions_BQ.unsqueeze(2)
    visible_BQS = slots_S <= query_BQ1
    if window is not None:
        visible_BQS = visible_BQS & (slots_S > query_BQ1 - window)
    mask_BQS = torch.zeros(visible_BQS.shape, dtype=engine.dtype, device=positions_BQ.device)
    return mask_BQS.masked_fill(~visible_BQS, -torch.inf).unsqueeze(1)


def compiled(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A copy of a function, compiled whole, sizes being symbols.

    Graphs are kept with the code object, which all copies would share; each gets one of its own.
    """
    code = function.__code__.replace(co_name=f"forward_{next(_numbers)}")
    copy = types.FunctionType(code, function.__globals__, closure=function.__closure__)
    return torch.compile(copy, dynamic=True, fullgraph=True, options={"guard_filter_fn": _guards_of_shapes})


def compiled_or_refused(
    function: Callable[..., tuple[Tensor, Tensor]], stand_ins: Sequence[object], model: nn.Module
) -> Callable[..., tuple[Tensor, Tensor]]:
    """`compiled`, with frozen weights, once it has run on stand-in arguments.

    Args:
        function: of the stand-ins' kinds of arguments.
        stand_ins: arguments of odd sizes.
        model: that it runs, for the message.

    Raises:
        UserError: there is no compiler, or the model cannot be captured.
    """
    graph = compiled(function)
    try:
        narrow_attention.load()  # before anything is traced
        # Equal sizes are no reason for one symbol: a stand-in's may happen to be one of the model's.
        with torch._inductor.config.patch(freezing=True), torch.fx.experimental._config.patch(use_duck_shape=False):
            graph(*stand_ins)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        name = type(model).__name__
        raise UserError(f"{name} cannot be compiled here ({reason}); leave evaluate.compile out.") from error
    return graph


def _guards_of_shapes(guards: Sequence[object]) -> list[bool]:
    """Only shapes are checked: all else is settled by the kind of a graph, and checking it costs a tenth of it."""
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]
