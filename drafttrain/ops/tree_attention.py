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
        return _flash_cpu(query, key, value, scale=scale)
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[3] % 8 == 0:
        out, lse, *_ = _flash_cuda(query, key, value, scale=scale)
        return out, lse
    out, lse, *_ = _efficient_cuda(query, key, value, None, True, scale=scale)
    return out, lse[:, :, : query.shape[2]]
