"""How much attention some queries pay to each key, in bounded memory, and the smoothing of such scores."""

# N query heads, M key heads, G = N / M, R query rows, S keys, D head size, C keys of a chunk

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

Reduction = Literal["max", "mean"]
Pooling = Literal["max", "mean"]

CHUNK_SCORES = 1 << 22
"""Scores computed at once; with float32 and the few temporaries of a softmax some 70 MB."""


@dataclass(frozen=True)
class Looked:
    """Queries of one layer and the keys that they may see.

    Attributes:
        query: [N, R, D], with their rotation.
        key: [M, S, D], likewise.
        rows: int64 [R], positions of the queries.
        positions: int64 [S], of the keys.
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
    def at_once(self) -> bool:
        """Whether one chunk holds all scores."""
        return self._step() >= self.key.shape[1]

    def _step(self) -> int:
        """Keys of a chunk."""
        heads, rows, _ = self.query.shape
        return max(64, CHUNK_SCORES // (heads * rows))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Scores before the softmax, [M, G * R, C] in float32 (or float64), -inf where a query may not look."""
        heads, _, size = self.query.shape
        folded = self.query.reshape(len(self.key), -1, size)
        wide = torch.float64 if folded.dtype == torch.float64 else torch.float32
        step = self._step()
        scaling = size**-0.5 if self.scaling is None else self.scaling
        for start in range(0, self.key.shape[1], step):
            part = slice(start, start + step)
            scores = (folded @ self.key[:, part].transpose(1, 2)).to(wide).mul_(scaling)
            if self.softcap is not None:
                scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
            hidden = self._hidden(part)
            if hidden is not None:
                scores.masked_fill_(hidden.repeat(heads // len(self.key), 1), -torch.inf)
            yield part, scores

    def _hidden(self, part: slice) -> Tensor | None:
        """Keys of a chunk that a row may not see: bool [R, C], None where it may see all."""
        keys, rows = self.positions[part], self.rows.unsqueeze(1)
        hidden = keys > rows
        if self.window is not None:
            hidden |= keys <= rows - self.window
        return hidden if bool(hidden.any()) else None


def attention_mass(
    looked: Looked, reduction: Reduction = "max", weights_R: Tensor | None = None, per_head: bool = False
) -> Tensor:
    """Attention that each key gets, over the query rows and the query heads of its key head.

    Two passes over chunks of keys: the softmax's normaliser first, then the probabilities, reduced at once. The scores
    are computed again for the second, unless one chunk holds them all.

    Args:
        looked: queries and keys.
        reduction: of rows and heads together.
        weights_R: factor of each row's probabilities.
        per_head: keep the query heads apart.

    Returns:
        [M, S], or [N, S] per head; float32, float64 where the queries are.
    """
    kept = list(looked.chunks()) if looked.at_once else None
    norm = None
    for _, scores in kept or looked.chunks():
        part = scores.logsumexp(2, keepdim=True)
        norm = part if norm is None else torch.logaddexp(norm, part)
    heads, rows, _ = looked.query.shape
    key_heads, size = looked.key.shape[:2]
    groups = heads if per_head else key_heads
    mass = norm.new_empty(groups, size)
    for part, scores in kept or looked.chunks():
        shares = scores.sub_(norm).exp_()
        if weights_R is not None:
            shares = shares.unflatten(1, (-1, rows)).mul_(weights_R.to(shares).unsqueeze(1)).flatten(1, 2)
        shares = shares.reshape(groups, -1, shares.shape[2])
        mass[:, part] = shares.amax(1) if reduction == "max" else shares.mean(1)
    return mass


def pooled(scores: Tensor, width: int, how: Pooling = "max") -> Tensor:
    """Scores [..., S] smoothed along their last axis by a centred window of odd or even width, zero beyond the ends."""
    if width == 1:
        return scores
    flat = pad(scores.reshape(-1, 1, scores.shape[-1]), ((width - 1) // 2, width // 2))
    out = max_pool1d(flat, width, 1) if how == "max" else avg_pool1d(flat, width, 1)
    return out.reshape(scores.shape)
