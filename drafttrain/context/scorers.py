"""Who says what matters: importance per layer, key head and prompt token.

All look at one layer of the target's prefill. The queries they are given are those of the last prompt tokens and of the
lookahead, which stands behind the prompt; keys of the lookahead and of the window are never scored, only kept.
"""

# N query heads, M key heads, R query rows, S tokens of a prompt, L tokens of the lookahead, D head size

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.context.scoring import Looked, Pooling, Reduction, attention_mass, pooled
from drafttrain.ops.random import uniform


class Scorer(Protocol):
    """Scores the tokens of a prompt in one layer.

    Attributes:
        window: last prompt tokens whose queries it looks at; they should be protected.
        ahead: whether it looks at the lookahead's queries, too.
    """

    window: int
    ahead: bool

    def score(self, layer: int, looked: Looked, text: int, sample_id: int) -> Tensor:
        """Importance of the first ``text`` keys: [M, S].

        Args:
            layer: which one.
            looked: queries of the last ``window`` tokens of the text and of the lookahead, keys of all.
            text: S, tokens of the prompt.
            sample_id: of the row, for scorers that draw.
        """
        ...


def rows_before(looked: Looked, count: int) -> Looked:
    """The first queries alone."""
    return replace(looked, query=looked.query[:, :count], rows=looked.rows[:count])


def rows_from(looked: Looked, start: int) -> Looked:
    """The queries but the first."""
    return replace(looked, query=looked.query[:, start:], rows=looked.rows[start:])


@dataclass(frozen=True)
class LookaheadAttention:
    """KV dropping by draft lookahead (Galim et al. 2025): attention of the last window and of what was drafted.

    Attributes:
        window: W, last prompt tokens that are looked at.
        reduction: over rows and query heads of a key head; the paper takes the maximum.
        pool: width of the smoothing.
        pooling: its kind.
    """

    window: int = 32
    reduction: Reduction = "mean"
    pool: int = 7
    pooling: Pooling = "max"
    ahead: bool = True

    def score(self, layer: int, looked: Looked, text: int, sample_id: int) -> Tensor:
        """See `Scorer`."""
        mass = attention_mass(looked, self.reduction)[:, :text]
        return pooled(_candidates(mass, text - self.window), self.pool, self.pooling)


@dataclass(frozen=True)
class LastWindow:
    """SnapKV (Li et al. 2024): mean attention of the last window, smoothed; per key head, so no key is repeated.

    Attributes: as of `LookaheadAttention`.
    """

    window: int = 32
    reduction: Reduction = "mean"
    pool: int = 7
    pooling: Pooling = "max"
    ahead: bool = False

    def score(self, layer: int, looked: Looked, text: int, sample_id: int) -> Tensor:
        """See `Scorer`."""
        mass = attention_mass(rows_before(looked, min(self.window, text)), self.reduction)[:, :text]
        return pooled(_candidates(mass, text - self.window), self.pool, self.pooling)


def _candidates(mass_MS: Tensor, count: int) -> Tensor:
    """Scores of the tokens before the window, which is not to leak into its neighbours when they are smoothed."""
    mass_MS[:, max(0, count) :] = 0
    return mass_MS


@dataclass(frozen=True)
class Recency:
    """StreamingLLM (Xiao et al. 2024): the first tokens (protect as many as wanted) and the last ones."""

    window: int = 0
    ahead: bool = False

    def score(self, layer: int, looked: Looked, text: int, sample_id: int) -> Tensor:
        """See `Scorer`."""
        order = torch.arange(text, device=looked.key.device, dtype=torch.float32)
        return order.expand(len(looked.key), text)


@dataclass(frozen=True)
class Random:
    """Tokens by lot, other ones in every layer and head: what any method must beat."""

    seed: int = 0
    window: int = 0
    ahead: bool = False

    def score(self, layer: int, looked: Looked, text: int, sample_id: int) -> Tensor:
        """See `Scorer`."""
        heads = len(looked.key)
        ids = torch.full((heads, 1), sample_id, device=looked.key.device)
        at = torch.arange(heads * text, device=looked.key.device).reshape(heads, text)
        return uniform(self.seed, f"context/{layer}", ids, at)


@dataclass(frozen=True)
class Oracle:
    """Mean attention of the true output, which must be given as the lookahead: no method can know it."""

    reduction: Reduction = "mean"
    pool: int = 1
    pooling: Pooling = "max"
    window: int = 1
    ahead: bool = True

    def score(self, layer: int, looked: Looked, text: int, sample_id: int) -> Tensor:
        """See `Scorer`; the last prompt token writes the first token of the output, so it counts."""
        return pooled(attention_mass(looked, self.reduction)[:, :text], self.pool, self.pooling)
