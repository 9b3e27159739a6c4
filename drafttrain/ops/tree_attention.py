"""Attention of a tree's tokens over a long prefix, in two parts that are merged exactly (LongSpec's hybrid attention).

All tokens of a tree see the whole prefix, so that part is a fused kernel without a mask, which also returns the
log-sum-exp of its scores. Only the few tokens of the tree itself need a mask. With L_p and L_t the (natural)
log-sum-exps of both parts and w = sigmoid(L_p - L_t), the softmax over everything gives w O_p + (1 - w) O_t. What is
allocated beside keys and values does not grow with the context.
"""

# B batch, Q query width, S slots, T tree tokens, N query heads, M key heads, R = (N / M) Q folded rows, D head size

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cuda = torch.ops.aten._scaled_dot_product_flash_attention
_efficient_cuda = torch.ops.aten._scaled_dot_product_efficient_attention


# From this many folded rows on, 16-bit attention on a CPU is faster as products of its own than in torch's kernel.
_ROWS = 128

_CHUNK = 1024
"""Keys at a time, whose scores stay in a processor's cache."""


class TreeMask(Tensor):
    """An additive mask [B or 1, 1, R, T] over the tree's own slots, which begin in each row behind its ``starts``."""

    starts: Sequence[int]

    @staticmethod
    def of(mask: Tensor, starts: Sequence[int]) -> TreeMask:
        """A mask with the number of slots before the tree in each row."""
        made = mask.as_subclass(TreeMask)
        made.starts = starts
        return made


def tree_attention(query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, scale: float | None = None) -> Tensor:
    """Attention in which every token sees all slots before the tree, and of the tree what the mask lets it.

    Args:
        query: [B, N, Q, D].
        key: [B, M, S, D].
        value: [B, M, S, D].
        mask: of T slots, 0 or -inf, in which every token sees itself.
        scale: multiplies the scores; None is 1 / sqrt(D).

    Returns:
        [B, Q, N, D].
    """
    batch, heads, width, size = query.shape
    query = query.reshape(batch, key.shape[1], -1, size)
    scale = size**-0.5 if scale is None else scale
    starts, plain = mask.starts, mask.as_subclass(Tensor)
    if all(start == starts[0] for start in starts):
        out = _merged(query, key, value, starts[0], plain, scale)
    else:
        out = torch.cat(
            [
                _merged(*(part[row : row + 1] for part in (query, key, value)), start, plain[row : row + 1], scale)
                for row, start in enumerate(starts)
            ]
        )
    return out.reshape(batch, heads, width, size).transpose(1, 2)


def _merged(query: Tensor, key: Tensor, value: Tensor, start: int, mask: Tensor, scale: float) -> Tensor:
    """Rows that have equally many slots before their trees: [B, M, R, D]."""
    tree = slice(start, start + mask.shape[3])
    out_t, lse_t = _masked(query, key[:, :, tree], value[:, :, tree], mask, scale)
    if start == 0:  # kernels differ in what they make of no keys at all; torch's for CPUs ends the process
        return out_t.to(query.dtype)
    out_p, lse_p = prefix_attention(query, key[:, :, :start], value[:, :, :start], scale)
    weight = torch.sigmoid(lse_p - lse_t).unsqueeze(3)
    return torch.lerp(out_t.to(weight.dtype), out_p.to(weight.dtype), weight).to(query.dtype)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked attention and its log-sum-exp [B, M, R]; no row is masked throughout, where kernels differ too."""
    if query.device.type == "cpu":  # one operator in place of eight
        return _flash_cpu(query, key, value, attn_mask=mask, scale=scale)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = query.to(wide) @ key.to(wide).transpose(2, 3) * scale + mask
    lse = scores.logsumexp(3)
    return torch.exp(scores - lse.unsqueeze(3)) @ value.to(wide), lse


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention without a mask by a fused kernel, over at least one key.

    Args:
        query: [B, M, R, D].
        key: [B, M, S, D].
        value: [B, M, S, D].
        scale: multiplies the scores.

    Returns:
        [B, M, R, D] and the natural log-sum-exp of the scores, [B, M, R].
    """
    if query.device.type == "cpu":
        if query.dtype in (torch.float16, torch.bfloat16) and query.shape[2] >= _ROWS:
            return _by_products(query, key, value, scale)
        return _flash_cpu(query, key, value, scale=scale)
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[3] % 8 == 0:
        out, lse, *_ = _flash_cuda(query, key, value, scale=scale)
        return out, lse
    out, lse, *_ = _efficient_cuda(query, key, value, None, True, scale=scale)
    return out, lse[:, :, : query.shape[2]]


def _by_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `prefix_attention`, in plain products of all of a head's rows: torch's kernel takes 64 at a time.

    Scores are float32 products of what is exact in 16 bits; weights are rounded to 16 bits, as in the kernel, for the
    product with the values, which takes a fourth of the time then.
    """
    batch, heads, rows, size = query.shape
    slots, wide = key.shape[2], torch.float32
    out = torch.empty(query.shape, dtype=wide)
    lse = torch.empty(batch, heads, rows)
    scores_RC, keys_CD = torch.empty(rows, _CHUNK), torch.empty(_CHUNK, size)
    weights_RC = torch.empty(rows, _CHUNK, dtype=value.dtype)
    for b in range(batch):
        for m in range(heads):
            query_RD = query[b, m].to(wide) * scale
            top_R1, total_R1 = torch.full((rows, 1), -torch.inf), torch.zeros(rows, 1)
            out_RD = out[b, m].zero_()
            for start in range(0, slots, _CHUNK):
                count = min(_CHUNK, slots - start)
                part = slice(start, start + count)
                keys = keys_CD[:count].copy_(key[b, m, part])
                scores = torch.mm(query_RD, keys.T, out=scores_RC if count == _CHUNK else None)
                higher_R1 = torch.maximum(top_R1, scores.amax(1, keepdim=True))
                scores.sub_(higher_R1).exp_()
                kept_R1 = (top_R1 - higher_R1).exp_()
                total_R1.mul_(kept_R1).add_(scores.sum(1, keepdim=True))
                out_RD.mul_(kept_R1).add_(weights_RC[:, :count].copy_(scores) @ value[b, m, part])
                top_R1 = higher_R1
            out_RD.div_(total_R1)
            lse[b, m] = (top_R1 + total_R1.log()).squeeze(1)
    return out, lse
