"""Attention of a few query rows over many keys on a CPU, in C++ that is compiled where it is used.

Torch's kernel for CPUs is made for many queries: with one to sixteen rows over thousands of keys most of its time does
not go into reading them. This one reads keys and values once, at nearly the speed of memory, so that a verified draft
costs little more than one token. It needs the compiler that graphs need, and is made for them.
"""

# B batch, M key heads, R query rows (query heads of a key head times query width), S slots, T masked slots, D head size

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface

from drafttrain.distributed import say
from drafttrain.ops.attention import folded_attention

NAME = "drafttrain-narrow"
"""Under which it is registered with transformers, for graphs."""

SOURCE = Path(__file__).with_suffix(".cpp")
TYPES = (torch.float32, torch.bfloat16)
LARGEST = 512
"""Head size; an even number."""


_loaded: bool | None = None


def load() -> bool:
    """Compile the operator and register it; what is compiled is kept where `torch.compile` keeps its own.

    Returns:
        False where that cannot be done: graphs then attend by torch's kernel. A line has said why.
    """
    global _loaded
    if _loaded is None:
        from torch._inductor.codecache import CppCodeCache

        try:
            CppCodeCache.load(SOURCE.read_text(encoding="utf-8"))
            torch.library.register_fake("drafttrain::narrow_attention")(lambda query, *others: torch.empty_like(query))
            _loaded = True
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            say(f"a kernel for attention cannot be compiled here ({reason}); graphs use torch's, which is slower")
            _loaded = False
    return _loaded


def narrow_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(query key^T * scale + mask) value, scores and sums in float32; to be called behind `load`.

    Args:
        query: [B, M, R, D], D even and no larger than `LARGEST`; of one of `TYPES`, as the others.
        key: [B, M, S, D], each key in one piece.
        value: likewise.
        mask: additive, of the last T slots, [B or 1, 1, R or 1, T]; slots before them are seen by all rows.
        scale: multiplies the scores; None is 1 / sqrt(D).

    Returns:
        [B, M, R, D]; zeros where a row sees nothing.
    """
    mask = query.new_empty(1, 1, 1, 0) if mask is None else mask.contiguous()
    scale = query.shape[3] ** -0.5 if scale is None else scale
    return torch.ops.drafttrain.narrow_attention(query.contiguous(), key, value, mask, scale)


def graph_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`folded_attention` in graphs for CPUs, with a mask that may speak of the last slots alone."""
    batch, size = query.shape[0], query.shape[3]
    mask = None if attention_mask is None or attention_mask.shape[3] == 0 else attention_mask
    types = {query.dtype, key.dtype, value.dtype} | (set() if mask is None else {mask.dtype})
    known = len(types) == 1 and query.dtype in TYPES and size % 2 == 0 and size <= LARGEST and value.shape[3] == size
    if not known or softcap is not None or not _loaded:
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (key.shape[2] - mask.shape[3], 0))
        return folded_attention(module, query, key, value, mask, scaling, softcap)
    out = narrow_attention(query.reshape(batch, key.shape[1], -1, size), key, value, mask, scaling)
    return out.reshape(query.shape).transpose(1, 2), None


AttentionInterface.register(NAME, graph_attention)
