"""How much attention some queries pay to each key, in bounded memory, and the smoothing of such scores."""

# N query heads, M key heads, G = N / M, R query rows, S keys, D head size

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

Reduction = Literal["max", "mean"]
Pooling = Literal["max", "mean"]

SCORES = 1 << 22
"""Scores computed at once; with their softmax some 50 MB."""


@dataclass(frozen=True)
class Looked:
    """Queries of one layer and the keys that they may see.

    Attributes:
        query: [N, R, D], with their rotation.
        key: [M, S, D], likewise.
        rows: int64 [R], positions of the queries, ascending.
        positions: int64 [S], of the keys, ascending.
        window: the layer's sliding window or None.
        scaling: multiplies the products; None is 1 / sqrt(D).
        softcap: products are squashed to softcap * tanh(product / softcap), None leaves them.
    """

    query: Tensor
    key: Tensor
    rows: Tensor
    positions: Tensor
    window: int | None = None
    scaling: float | None = None
    softcap: float | None = None

    @property
    def groups(self) -> int:
        """G."""
        return len(self.query) // len(self.key)

    def shares(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Attention by parts: query heads, rows, and their softmax over all keys, [n, r, S] in float32 (or float64)."""
        size = self.query.shape[2]
        wide = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        scaling = size**-0.5 if self.scaling is None else self.scaling
        first, hidden_RS = self._hidden()
        for heads, rows in self._parts():
            query, key = self.query[heads, rows], self.key[heads.start // self.groups : -(-heads.stop // self.groups)]
            products = query.reshape(len(key), -1, size) @ key.transpose(1, 2)
            scores = products.to(wide).mul_(scaling).reshape(*query.shape[:2], -1)
            if self.softcap is not None:
                scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
            scores[..., first:].masked_fill_(hidden_RS[rows], -torch.inf)
            yield heads, rows, scores.softmax(2)

    def _parts(self) -> Iterator[tuple[slice, slice]]:
        """Heads and rows to be looked at together: all heads of some key heads, or else rows of one query head."""
        heads, rows, _ = self.query.shape
        fitting = max(1, SCORES // self.key.shape[1])
        if fitting >= self.groups * rows:
            step = fitting // (self.groups * rows) * self.groups
            yield from ((slice(head, min(heads, head + step)), slice(0, rows)) for head in range(0, heads, step))
        else:
            for head in range(heads):
                for row in range(0, rows, fitting):
                    yield slice(head, head + 1), slice(row, row + fitting)

    def _hidden(self) -> tuple[int, Tensor]:
        """The first key that may be hidden from a row, and from there on which are: bool [R, S - first]."""
        first = 0
        if self.window is None:
            first = int(torch.searchsorted(self.positions, self.rows[0], right=True))
        keys, rows = self.positions[first:], self.rows.unsqueeze(1)
        hidden = keys > rows
        if self.window is not None:
            hidden |= keys <= rows - self.window
        return first, hidden


def attention_mass(
    looked: Looked, reduction: Reduction = "max", weights_R: Tensor | None = None, per_head: bool = False
) -> Tensor:
    """Attention that each key gets, over the query rows and the query heads of its key head.

    Args:
        looked: queries and keys.
        reduction: of rows and heads together.
        weights_R: factor of each row's probabilities, none below zero.
        per_head: keep the query heads apart.

    Returns:
        [M, S], or [N, S] per head; float32, float64 where the queries are.
    """
    heads, rows, _ = looked.query.shape
    mass_NS = None
    for own, part, shares in looked.shares():
        if mass_NS is None:
            mass_NS = shares.new_zeros(heads, shares.shape[2])
        if weights_R is not None:
            shares.mul_(weights_R[part].to(shares).unsqueeze(1))
        if reduction == "max":
            mass_NS[own] = torch.maximum(mass_NS[own], shares.amax(1))
        else:
            mass_NS[own] += shares.sum(1) / rows
    if per_head:
        return mass_NS
    mass_MGS = mass_NS.unflatten(0, (-1, looked.groups))
    return mass_MGS.amax(1) if reduction == "max" else mass_MGS.mean(1)


def pooled(scores: Tensor, width: int, how: Pooling = "max") -> Tensor:
    """Scores [..., S] smoothed along their last axis by a centred window of odd or even width, zero beyond the ends."""
    if width == 1:
        return scores
    flat = pad(scores.reshape(-1, 1, scores.shape[-1]), ((width - 1) // 2, width // 2))
    out = max_pool1d(flat, width, 1) if how == "max" else avg_pool1d(flat, width, 1)
    return out.reshape(scores.shape)
