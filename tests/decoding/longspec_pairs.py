"""Tiny pairs of a target and a LongSpec drafter that often agree."""

from __future__ import annotations

import torch

from drafttrain.config import BlockConfig
from drafttrain.models.longspec import LongSpecDrafter
from drafttrain.models.longspec_new import new_block
from tests.conftest import build_llama


def block_of(target: torch.nn.Module, window: int = 6, dtype: torch.dtype | None = None, **wishes) -> LongSpecDrafter:
    """A drafter that starts as the target's last layer does."""
    layer = target.config.num_hidden_layers - 1
    block = BlockConfig(window=window, **{"warm_start": layer} | wishes)
    return new_block(target, block, dtype=dtype or target.dtype, seed=1).requires_grad_(False)


def longspec_pair(vocabulary: int = 24, window: int = 6, **config) -> tuple[torch.nn.Module, LongSpecDrafter]:
    """A float64 target of two layers and a drafter with a window short enough to matter.

    The target's embeddings are drawn wider, so that its layers change the next token less and the two often agree.
    """
    target = build_llama(vocabulary, layers=2, hidden=16, seed=3, **config).double()
    with torch.no_grad():
        target.get_input_embeddings().weight *= 3
    return target, block_of(target, window)
