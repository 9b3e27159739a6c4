"""Attention for decoding, registered with transformers under the name in ``NAME``.

Grouped-query heads are folded into query rows: the G query heads that share a key head become G * Q rows of one
attention over that key head, so keys and values are read once and never repeated. What may be seen is prepared once a
forward pass (`prepare_mask`) and shared by all layers; keys arrive cut to the live range by the cache.
"""

# B batch, Q query width, S slots, N query heads, M key heads, G = N / M, D head size

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from drafttrain.errors import UserError
from drafttrain.ops.cache import DenseCache, Span
from drafttrain.ops.tree import TreeBlock
from drafttrain.ops.tree_attention import TreeMask, tree_attention
from drafttrain.ops.upload import upload

NAME = "drafttrain"

FOLDED = "drafttrain-folded"
"""The same for graphs: always folded, no choices to be made inside."""

# Up to this many folded rows the mask is tiled and the heads folded; above (prefill) the kernel shares the mask.
FOLD_ROWS = 256

# From this many slots on a tree attends in two parts, which by then take no longer than a dense mask and need no
# memory that grows with the context.
HYBRID_SLOTS = 2048

# Two masks that need no mask: empty 4-D tensors, which every model passes on to its layers untouched.
SEE_ALL = (1, 1, 1, 0)
_CAUSAL_SHAPE = (1, 1, 2, 0)


@contextmanager
def attending(config: PreTrainedConfig, name: str = NAME) -> Iterator[None]:
    """Have a model use an attention inside the block, and its own again afterwards: others hold the same model.

    The configuration's setter costs 0.1 ms (it validates every field), more than the loop around a forward, so the
    field behind it is set.
    """
    usual = config._attn_implementation
    object.__setattr__(config, "_attn_implementation_internal", name)
    try:
        yield
    finally:
        object.__setattr__(config, "_attn_implementation_internal", usual)


Attend = Callable[..., tuple[Tensor, None]]
"""A function with the parameters and the result of `attention`."""

CALLED = "drafttrain-called"
"""The name that stands for the function given to `attending_by`."""

_CALLED: ContextVar[Attend] = ContextVar("drafttrain attention")


@contextmanager
def attending_by(config: PreTrainedConfig, function: Attend) -> Iterator[None]:
    """Have a model attend by a function of the caller's inside the block; nothing of it is left behind."""
    token = _CALLED.set(function)
    try:
        with attending(config, CALLED):
            yield
    finally:
        _CALLED.reset(token)


def _called(*args: object, **kwargs: object) -> tuple[Tensor, None]:
    return _CALLED.get()(*args, **kwargs)


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The sliding window of every kind of layer of a model, None for full attention.

    Raises:
        UserError: a layer kind whose state cannot be rolled back by length.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        return {"full_attention": window}
    windows = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(kinds) - set(windows))
    if unknown:
        raise UserError(
            f"{config.model_type} has {unknown[0]} layers, which cannot be rolled back after a rejected draft; "
            "use a model whose layers are full or sliding-window attention"
        )
    return {kind: windows[kind] for kind in sorted(set(kinds))}


def windows_by_layer(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer, None for full attention. Raises as `layer_windows`."""
    windows = layer_windows(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [windows[kind] for kind in kinds]


def prepare_mask(
    cache: DenseCache, positions_BQ: Tensor, dtype: torch.dtype, groups: int, window: int | None, softcap: bool = False
) -> Tensor:
    """What the tokens of the cache's open span may attend to, in the form that `attention` takes.

    Args:
        cache: with an open span.
        positions_BQ: the queries' positions, [B or 1, Q].
        dtype: of the model's activations; the mask is additive, 0 or -inf.
        groups: G, query heads a key head.
        window: the layers' sliding window or None.
        softcap: whether the layers cap their scores (they always take the folded form).

    Returns:
        [B or 1, 1, G * Q or Q or 1, S], or an empty tensor that stands for "everything" or "causal from slot 0".
    """
    span = cache.span
    windowed = window_binds(cache, window)
    if span.start is not None and not windowed:
        if span.width == 1:
            return stand_in(SEE_ALL, positions_BQ.device)
        if span.start == 0 and not softcap:
            return stand_in(_CAUSAL_SHAPE, positions_BQ.device)
    if span.width > 1 and groups > 1 and (softcap or groups * span.width <= FOLD_ROWS):
        positions_BQ = positions_BQ.repeat(1, groups)
    elif span.start is not None and not windowed and cache.in_order:
        return _behind(span, dtype, positions_BQ.device)
    return _additive(cache.visible(positions_BQ, window if windowed else None), dtype)


def prepare_tree_mask(
    cache: DenseCache, tree: TreeBlock, dtype: torch.dtype, groups: int, window: int | None, hybrid: bool
) -> Tensor:
    """What the tokens of the open span may attend to where they are nodes of a tree, in the form `attention` takes.

    Args:
        cache: with an open span; nodes see all that it holds before the tree, as far as a window lets them.
        tree: whose last nodes the span holds.
        dtype, groups, window: as of `prepare_mask`.
        hybrid: attend in two parts (`tree_attention`) where no window binds.

    Returns:
        a `TreeMask` [B, 1, G * Q, T], or a mask over all slots [B, 1, G * Q, S].
    """
    starts = [length - tree.before for length in cache.lengths]
    seen_BQT = tree.seen_BQT
    if hybrid and not window_binds(cache, window):
        return TreeMask.of(_additive(seen_BQT.repeat(1, groups, 1), dtype), starts)
    slots_BT = upload(starts, cache.device).unsqueeze(1) + torch.arange(tree.size, device=cache.device)
    positions_BS = cache.positions_BS[: cache.rows, : cache.span.bound].expand(cache.rows, -1)
    first_B1 = positions_BS.gather(1, slots_BT[:, :1])
    node_BQ1 = (first_B1 + tree.depth_BT[:, tree.before :]).unsqueeze(2)
    visible_BQS = (positions_BS < first_B1).unsqueeze(1).expand(-1, node_BQ1.shape[1], -1)
    if window is not None:
        visible_BQS = visible_BQS & (positions_BS.unsqueeze(1) > node_BQ1 - window)
        seen_BQT = seen_BQT & ((first_B1 + tree.depth_BT).unsqueeze(1) > node_BQ1 - window)
    index_BQT = slots_BT.unsqueeze(1).expand_as(seen_BQT)
    return _additive(visible_BQS.scatter(2, index_BQT, seen_BQT).repeat(1, groups, 1), dtype)


def _behind(span: Span, dtype: torch.dtype, device: torch.device) -> Tensor:
    """All that stands before the span is seen, and the span causally: [1, 1, Q, S]; of a prompt's piece, thus cheap."""
    mask_QS = torch.zeros(span.width, span.bound, dtype=dtype, device=device)
    mask_QS[:, span.start :] = torch.full((span.width, span.width), -torch.inf, dtype=dtype, device=device).triu_(1)
    return mask_QS[None, None]


def _additive(visible_BQS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where something is seen, else -inf: [B, 1, Q, S]."""
    mask_BQS = torch.zeros(visible_BQS.shape, dtype=dtype, device=visible_BQS.device)
    return mask_BQS.masked_fill_(~visible_BQS, -torch.inf).unsqueeze(1)


def window_binds(cache: DenseCache, window: int | None) -> bool:
    """Whether a sliding window may hide anything from the tokens of the open span."""
    return window is not None and (cache.span.bound > window or not cache.in_order)


@functools.cache
def stand_in(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A mask that needs no mask, of one of the shapes above."""
    return torch.empty(shape, device=device)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of Q tokens a row over S slots.

    Args:
        module: the layer, unused.
        query: [B, N, Q, D].
        key: [B, M, S, D].
        value: [B, M, S, D].
        attention_mask: from `prepare_mask` or `prepare_tree_mask`, or an additive one [B, 1, Q, S].
        scaling: multiplies the scores; None is 1 / sqrt(D).
        softcap: scores are squashed to softcap * tanh(score / softcap) (Gemma 2).

    Returns:
        [B, Q, N, D], and None for the weights.

    Raises:
        ValueError: no mask, or attention sinks, which this function does not implement.
    """
    if attention_mask is None or kwargs.get("s_aux") is not None:
        raise ValueError("drafttrain's attention needs a mask and does not implement attention sinks")
    if isinstance(attention_mask, TreeMask):
        return tree_attention(query, key, value, attention_mask, scaling), None
    _, heads, width, _ = query.shape
    key_heads = key.shape[1]
    causal = attention_mask.numel() == 0 and attention_mask.shape == _CAUSAL_SHAPE
    mask = None if attention_mask.numel() == 0 else attention_mask
    groups = heads // key_heads
    rows = groups * width
    folded = width == 1 or (mask is not None and mask.shape[2] == rows) or softcap is not None
    if folded:
        if mask is not None and mask.shape[2] not in (1, rows):
            mask = mask.repeat(1, 1, groups, 1)
        return folded_attention(module, query, key, value, mask, scaling, softcap)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=groups > 1
    )
    return out.transpose(1, 2), None


def folded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`attention` with the query heads of a key head as rows.

    The mask is additive, [B or 1, 1, G * Q or 1, S]; None or an empty one lets everything be seen.
    """
    mask = None if attention_mask is None or attention_mask.shape[3] == 0 else attention_mask
    batch, heads, width, size = query.shape
    key_heads = key.shape[1]
    query = query.reshape(batch, key_heads, heads // key_heads * width, size)
    if softcap is not None:
        out = _capped_attention(query, key, value, mask, scaling or size**-0.5, softcap)
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, width, value.shape[3]).transpose(1, 2), None


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """Folded attention with capped scores, which the fused kernels lack; the softmax is taken in float32 at least."""
    scores = query @ key.transpose(2, 3) * scaling
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return scores.softmax(-1, dtype=wide).to(query.dtype) @ value


AttentionInterface.register(NAME, attention)
AttentionInterface.register(FOLDED, folded_attention)
AttentionInterface.register(CALLED, _called)
