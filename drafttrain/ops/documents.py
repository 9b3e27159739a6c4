"""Causal attention of documents that lie end to end in one row: each sees itself alone, and nothing is padded.

Every document is attended to by a call of its own, so that the work is the sum of squares of their lengths, not the
square of the sum, and no mask of the row is made.
"""

# B batch, T time, N query heads, M key heads, D head size

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig

from drafttrain.errors import UserError
from drafttrain.ops.attention import SEE_ALL, Attend, attending_by, folded_attention, layer_windows, stand_in


@contextmanager
def documents_apart(
    config: PreTrainedConfig, lengths: Sequence[int], device: torch.device
) -> Iterator[Tensor | dict[str, Tensor]]:
    """Inside, a model reads a row of documents as it reads each alone; what is given is the mask that it takes.

    Positions are the caller's: those of each document begin where it says.

    Args:
        config: of the model.
        lengths: of the documents, in tokens; the row has no others.
        device: of the row.

    Raises:
        UserError: the model has layers of another kind than full or sliding-window attention, or attention sinks.
    """
    kinds = layer_windows(config)
    mask = stand_in(SEE_ALL, device)
    with attending_by(config, document_attention(lengths)):
        yield dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask


def document_attention(lengths: Sequence[int]) -> Attend:
    """Attention of a row of documents, for `attending_by`."""
    lengths = list(lengths)

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        if kwargs.get("s_aux") is not None:
            raise UserError(
                "rows of a target with attention sinks cannot be laid end to end; set training.packing false."
            )
        parts = zip(*(states.split(lengths, 2) for states in (query, key, value)), strict=True)
        found = [_causal(module, *part, scaling, softcap, sliding_window) for part in parts]
        return torch.cat(found, 1), None

    return attend


def _causal(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """One document: [B, T, N, D]."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    if softcap is None and (window is None or length <= window):
        found = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        return found.transpose(1, 2)
    seen_TT = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    if window is not None:
        seen_TT = seen_TT.triu(1 - window)
    mask_TT = torch.zeros(length, length, dtype=query.dtype, device=query.device).masked_fill_(~seen_TT, -torch.inf)
    mask_11RT = mask_TT.repeat(groups, 1)[None, None]
    return folded_attention(module, query, key, value, mask_11RT, scaling, softcap)[0]
