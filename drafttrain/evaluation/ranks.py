"""Chi-square of emitted tokens against exact distributions that change from token to token.

Every token has a context of its own, so its own distribution p. What all of them have in common is their rank: with the
vocabulary in some order, F(x) the mass of the tokens before x, and v uniform, u = F(x) + v p(x) is uniform in [0, 1) if
x was drawn from p, whatever came before (Rosenblatt 1952). So the ranks of all tokens can be counted together, in cells
that are equally likely.

Tokens are ranked twice. By p, where text from another context or temperature shows. And, within each quarter of that
rank, by p / q, where q is a drafter's: there a wrong verification shows, which emits too much of what the drafter
over-rates. The two ranks are independent; the quarter of the token before makes strata, in which a dependence between
draws shows.
"""

# T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from drafttrain.evaluation.statistics import ChiSquare, chi_square_tail

PARTS = 4
"""Parts of each rank, and strata."""

_LEAST = 5.0  # expected in a cell, else strata are pooled


@dataclass
class Ranks:
    """How many tokens fell into each cell.

    Attributes:
        counts: [stratum, part by p, part by p / q].
        impossible: tokens without probability, or behind an end.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros((PARTS, PARTS, PARTS), dtype=np.int64))
    impossible: int = 0

    def add(
        self,
        tokens: Sequence[int],
        p_TV: np.ndarray,
        q_TV: np.ndarray,
        ends: Collection[int],
        limit: int,
        random: np.random.Generator,
    ) -> None:
        """Count an answer.

        Args:
            tokens: emitted.
            p_TV: exact distribution of each, [T, V] at least.
            q_TV: a drafter's; any will do, for it only orders the tokens.
            ends: tokens behind which nothing follows.
            limit: tokens of an answer that meets no end.
            random: breaks ties.
        """
        ended = next((place for place, token in enumerate(tokens) if token in ends), limit - 1)
        self.impossible += len(tokens) != ended + 1
        stratum = 0
        for token, p_V, q_V in zip(tokens, p_TV, q_TV, strict=False):
            if p_V[token] <= 0:
                self.impossible += 1
                continue
            part, inner = _parts(token, p_V, q_V, random)
            self.counts[stratum, part, inner] += 1
            stratum = part

    def test(self) -> ChiSquare:
        """Whether the cells of each stratum are equally full; an impossible token is never forgiven."""
        counts = self.counts.reshape(PARTS, -1)
        cells = counts.shape[1]
        if counts.sum(1).min() < _LEAST * cells:
            counts = counts.sum(0, keepdims=True)
        expected = counts.sum(1, keepdims=True) / cells
        statistic, degrees = float(((counts - expected) ** 2 / expected).sum()), len(counts) * (cells - 1)
        p_value = 0.0 if self.impossible else chi_square_tail(statistic, degrees)
        return ChiSquare(statistic, degrees, p_value, int(counts.sum()))


def _parts(token: int, p_V: np.ndarray, q_V: np.ndarray, random: np.random.Generator) -> tuple[int, int]:
    """Part of a token's rank by p, and within it of its rank by p / q."""
    order = np.argsort(-p_V, kind="stable")
    before_V = np.empty_like(p_V)
    before_V[order] = np.cumsum(p_V[order]) - p_V[order]
    rank = before_V[token] + random.random() * p_V[token]
    part = min(int(PARTS * rank), PARTS - 1)
    low, high = part / PARTS, (part + 1) / PARTS if part < PARTS - 1 else np.inf
    share_V = np.clip(np.minimum(before_V + p_V, high) - np.maximum(before_V, low), 0, None)
    ratio_V = p_V / (q_V + 1e-12)
    first_V = (ratio_V > ratio_V[token]) | ((ratio_V == ratio_V[token]) & (np.arange(len(p_V)) < token))
    inner = (share_V[first_V].sum() + random.random() * share_V[token]) / share_V.sum()
    return part, min(int(PARTS * inner), PARTS - 1)
