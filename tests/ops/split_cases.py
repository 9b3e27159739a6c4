"""Inputs of split attention and its plain definition in float64, for all the tests of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drafttrain.ops.split_attention import reach_of


class Case(NamedTuple):
    """One problem: grouped heads, a block of tokens behind rows of unequal lengths, a storage larger than they are."""

    groups: int = 2
    key_heads: int = 2
    size: int = 16
    width: int = 3
    first: tuple[int, ...] = (5, 0, 29)
    slots: int = 64
    window: int | None = None
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32


def inputs(case: Case, device: str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, float, float]:
    """Arguments of `split_attention`, the queries laid out as models lay them out. What is not live is NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads = len(case.first), case.groups * case.key_heads
    query = torch.randn(batch, case.width, heads, case.size, generator=generator).transpose(1, 2)
    keys, values = torch.randn(2, batch, case.key_heads, case.slots, case.size, generator=generator)
    for row, first in enumerate(case.first):
        for storage in (keys, values):
            storage[row, :, first + case.width :] = torch.nan
    first_B = torch.tensor(case.first)
    tensors = [x.to(device, case.dtype) for x in (query, keys, values)]
    return *tensors, reach_of(first_B, case.window).to(device), case.size**-0.5, case.softcap


def definition(query: Tensor, keys: Tensor, values: Tensor, reach: Tensor, scale: float, softcap: float) -> Tensor:
    """Softmax attention, one row, head and token at a time: float64 [B, Q, N, D]."""
    query, keys, values = (x.double().cpu() for x in (query, keys, values))
    batch, heads, width, _ = query.shape
    out = torch.zeros(batch, width, heads, values.shape[3], dtype=torch.float64)
    for row in range(batch):
        first, window = reach[row, 0, 0].tolist()
        for token in range(width):
            seen = slice(max(0, first + token - window + 1), first + token + 1)
            for head in range(heads):
                key_head = head * keys.shape[1] // heads
                scores = keys[row, key_head, seen] @ query[row, head, token] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[row, token, head] = scores.softmax(0) @ values[row, key_head, seen]
    return out


CASES = {
    "multi-head": Case(groups=1),
    "groups-of-8": Case(groups=8, key_heads=1),
    "groups-of-3": Case(groups=3),
    "head-80": Case(size=80),
    "head-128": Case(size=128, key_heads=1),
    "one-token": Case(width=1),
    "16-tokens": Case(width=16),
    "many-folded-rows": Case(groups=8, width=16, key_heads=1),
    "empty-rows": Case(first=(0, 0), width=1),
    "short-in-a-large-storage": Case(first=(3, 1), slots=1024, width=2),
    "all-slots": Case(first=(61, 40), slots=64),
    "window": Case(window=7),
    "window-of-one": Case(window=1, width=5),
    "window-long-past": Case(window=9, first=(150, 3, 77), slots=192),
    "wide-window": Case(window=500),
    "capped": Case(softcap=0.5),
    "capped-window": Case(softcap=2.0, window=6, first=(100, 4), slots=128),
    "long": Case(first=(700, 13), slots=1024, width=4),
}
