"""Attention of a few tokens over a static storage of keys, for graphs on a GPU.

A captured graph always does the same work at the same addresses, but sequences grow. Here how far a row has come is
read on the device, so one graph serves every length, and reads only the keys that are live. `split_attention` is an
operator of its own: the Triton kernels where there are any, plain torch with the same arithmetic on a CPU.
"""

# B batch, Q query width, S slots, N query heads, M key heads, G = N / M, R = G * Q folded rows, D head size

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import AttentionInterface

SPLIT = "drafttrain-split"
"""The name under which transformers knows it; the mask it takes is made by `reach_of`."""

_ENDLESS = 1 << 30
"""The window of layers without one."""

_LARGEST_HEAD = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(device: torch.device, storages: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Whether the kernels can read these keys and values [B, M, S, D]."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return all(
        keys.dtype in _DTYPES and keys.shape == values.shape and keys.shape[3] <= _LARGEST_HEAD
        for keys, values in storages
    )


def reach_of(first_B: Tensor, window: int | None) -> Tensor:
    """What the tokens of a block may attend to: int32 [B, 1, 1, 2], a 4-D "mask" that every model hands through.

    Args:
        first_B: the slot of each row's first token, int64; the others follow.
        window: sliding window, counting the query itself, or None.
    """
    window_B = torch.full_like(first_B, _ENDLESS if window is None else window)
    return torch.stack([first_B, window_B], 1).to(torch.int32)[:, None, None]


@torch.library.custom_op("drafttrain::split_attention", mutates_args=(), device_types=("cpu", "cuda"))
def split_attention(query: Tensor, keys: Tensor, values: Tensor, reach: Tensor, scale: float, softcap: float) -> Tensor:
    """Causal attention over the slots that are live.

    Query j of row b sees slot s where s <= first_b + j and s > first_b + j - window_b; of the rest nothing is read
    beyond slot first_b + Q - 1.

    Args:
        query: [B, N, Q, D].
        keys: [B, M, S, D].
        values: [B, M, S, D].
        reach: from `reach_of`.
        scale: multiplies the scores.
        softcap: scores are squashed to softcap * tanh(score / softcap); 0 leaves them.

    Returns:
        [B, Q, N, D].
    """
    if query.device.type == "cpu":
        return split_attention_reference(query, keys, values, reach, scale, softcap)
    from drafttrain.ops.split_kernels import launch

    return launch(query, keys, values, reach, scale, softcap)


@split_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, reach: Tensor, scale: float, softcap: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])


def split_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    reach: Tensor,
    scale: float,
    softcap: float = 0.0,
    splits: int = 3,
    block: int = 16,
) -> Tensor:
    """What the kernels compute, in the same steps: a softmax over each split of a row's live slots, then merged.

    Partial results are float32, or float64 where the queries are.

    Args:
        query, keys, values, reach, scale, softcap: as of `split_attention`.
        splits: parts that the live slots of a row are divided into.
        block: a part is a multiple of so many slots.
    """
    batch, heads, width, size = query.shape
    key_heads, slots = keys.shape[1], keys.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    first_B1, window_B1 = reach[:, 0, 0, 0, None], reach[:, 0, 0, 1, None]
    end_B1 = first_B1 + width
    begin_B1 = (first_B1 - window_B1 + 1).clamp(min=0) // block * block
    share_B1 = _ceil(_ceil(end_B1 - begin_B1, block), splits) * block

    slots_S = torch.arange(slots, device=query.device)
    live_BS = (slots_S >= begin_B1) & (slots_S < end_B1)
    split_BS = torch.where(live_BS, (slots_S - begin_B1) // share_B1, -1)
    token_R = torch.arange(heads // key_heads * width, device=query.device) % width
    position_BR1 = (first_B1 + token_R).unsqueeze(2)
    seen_BRS = (slots_S <= position_BR1) & (slots_S > position_BR1 - window_B1.unsqueeze(2))

    q, k, v = (x.to(wide) for x in (query, keys, values.where(live_BS[:, None, :, None], 0)))
    q = q.reshape(batch, key_heads, -1, size)
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    total = mass = top = None
    for split in range(splits):
        hidden = ~(seen_BRS & (split_BS == split).unsqueeze(1)).unsqueeze(1)
        part = _partial(scores.masked_fill(hidden, -torch.inf), v)
        total, mass, top = part if total is None else _merged((total, mass, top), part)
    out = (total / mass).to(query.dtype)
    return out.reshape(batch, heads, width, size).transpose(1, 2).contiguous()


Partial = tuple[Tensor, Tensor, Tensor]
"""An unfinished softmax: unnormalised sum of values [..., R, D], mass [..., R, 1], greatest score [..., R, 1]."""


def _partial(scores: Tensor, values: Tensor) -> Partial:
    """One split; -inf scores throughout leave sum and mass zero."""
    top = scores.amax(-1, keepdim=True)
    weight = torch.exp(scores - _finite(top))
    return weight @ values, weight.sum(-1, keepdim=True), top


def _merged(one: Partial, other: Partial) -> Partial:
    """Two parts as one: each is rescaled to the greater of their greatest scores."""
    top = torch.maximum(one[2], other[2])
    fades = [torch.exp(part[2] - _finite(top)) for part in (one, other)]
    total, mass = (sum(part[place] * fade for part, fade in zip((one, other), fades, strict=True)) for place in (0, 1))
    return total, mass, top


def _finite(top: Tensor) -> Tensor:
    """The greatest score, 0 where nothing was seen."""
    return top.masked_fill(top == -torch.inf, 0)


def _ceil(value: Tensor, by: int) -> Tensor:
    return (value + by - 1) // by


def split_attention_layer(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """`split_attention` as transformers calls it.

    Raises:
        ValueError: attention sinks, which it does not implement.
    """
    if kwargs.get("s_aux") is not None:
        raise ValueError("drafttrain's attention does not implement attention sinks")
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    return split_attention(query, key, value, attention_mask, scale, softcap or 0.0), None


AttentionInterface.register(SPLIT, split_attention_layer)
