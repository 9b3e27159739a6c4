"""Causal attention for training on a CPU, registered with transformers as `drafttrain_causal`.

The CPU's fused attention spends most of its time outside matrix products when heads are few and small. Blocks of
query rows over plain batched products are faster and compile well; grouped-query heads are folded into the rows.
"""

# B batch, N query heads, G query heads per key head, T time, S keys seen, D head size

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "drafttrain_causal"
BLOCK = 512


def causal_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal self-attention without padding: [B, N, T, D] queries, [B, N/G, T, D] keys and values -> [B, T, N, D]."""
    batch, heads, time, size = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    query = (query * scaling).view(batch, key_heads, groups, time, size)
    blocks = []
    for start in range(0, time, BLOCK):
        end = min(time, start + BLOCK)
        rows = query[:, :, :, start:end].reshape(batch * key_heads, groups * (end - start), size)
        keys = key[:, :, :end].reshape(batch * key_heads, end, size)
        values = value[:, :, :end].reshape(batch * key_heads, end, size)
        scores = torch.bmm(rows, keys.transpose(1, 2)).view(-1, groups, end - start, end)
        seen = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
        weights = torch.softmax(scores.float().masked_fill(~seen, float("-inf")), dim=-1).to(value.dtype)
        mixed = torch.bmm(weights.view(-1, groups * (end - start), end), values)
        blocks.append(mixed.view(batch, key_heads, groups, end - start, size))
    joined = torch.cat(blocks, dim=3) if len(blocks) > 1 else blocks[0]
    return joined.reshape(batch, heads, time, size).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, causal_attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
