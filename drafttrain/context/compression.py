"""Prompt compression: the target reads only the tokens of a prompt that the drafter attends to."""

# N query heads of the drafter, R query rows, S tokens of a prompt, C tokens kept

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from drafttrain.context.budgets import Budget, Protected
from drafttrain.context.cost import CompressionCost
from drafttrain.context.dropping import Protect, protected_of
from drafttrain.context.scorers import rows_before, rows_from
from drafttrain.context.scoring import Looked, Reduction, attention_mass, pooled
from drafttrain.errors import UserError


class TokenScorer(Protocol):
    """Scores the tokens of a prompt by a drafter's attention, and says in which order they are taken.

    Attributes:
        window: last prompt tokens whose queries it looks at.
    """

    window: int

    def score(self, layers: Sequence[Looked], text: int) -> Tensor:
        """Importance of each prompt token: [S].

        Args:
            layers: the drafter's, each with the queries of the last ``window`` prompt tokens and of drafted ones.
            text: S.
        """
        ...

    def order(self, scores: Tensor) -> Tensor:
        """Tokens in the order in which they are taken, int64; one may come again, and then counts no more."""
        ...


def _upper(layers: Sequence[Looked], skip: float) -> Sequence[Looked]:
    return layers[min(len(layers) - 1, int(skip * len(layers))) :]


@dataclass(frozen=True)
class DraftAttention:
    """Attention of the last window, later tokens weighing more, over the upper layers (the paper's prompt compression).

    Attributes:
        window: W.
        skip: share of the drafter's layers, from the first, that are not looked at.
        weighted: rows of the window are weighted from 0 (the oldest) to 1.
        reduction: over heads and rows; layers are joined by their maximum.
        pool: width of the smoothing of scores; the paper takes 32 or 64, for budgets of a thousand tokens and more.
        neighbours: tokens taken around each chosen one, itself included; likewise.
    """

    window: int = 64
    skip: float = 0.5
    weighted: bool = True
    reduction: Reduction = "max"
    pool: int = 16
    neighbours: int = 8

    def score(self, layers: Sequence[Looked], text: int) -> Tensor:
        """See `TokenScorer`."""
        rows = len(layers[0].rows)
        window = min(self.window, text)
        weights = torch.ones(rows)
        if self.weighted:
            weights[:window] = torch.linspace(0, 1, window) if window > 1 else 1.0
        masses = [attention_mass(looked, self.reduction, weights)[:, :text] for looked in _upper(layers, self.skip)]
        joined = torch.stack([mass.amax(0) if self.reduction == "max" else mass.mean(0) for mass in masses]).amax(0)
        return pooled(joined, self.pool)

    def order(self, scores: Tensor) -> Tensor:
        """The best first, each followed by its neighbours, the nearest first."""
        best = scores.argsort(descending=True, stable=True)
        first = -((self.neighbours - 1) // 2)
        offsets = sorted(range(first, first + self.neighbours), key=abs)
        around = best.unsqueeze(1) + torch.tensor(offsets, device=best.device)
        return around.clamp_(0, len(scores) - 1).flatten()


@dataclass(frozen=True)
class ChunkAttention:
    """Whole chunks by the attention of the last and the drafted tokens (SpecPrefill, Liu et al. 2025).

    Attributes:
        chunk: tokens of a chunk.
        pool: width of the smoothing, by the mean.
    """

    chunk: int = 32
    pool: int = 13
    window: int = 1

    def score(self, layers: Sequence[Looked], text: int) -> Tensor:
        """The mean over query rows of the maximum over layers and heads; then each token gets the mean of its chunk."""
        rows = []
        for row in range(len(layers[0].rows)):
            own = [rows_before(rows_from(each, row), 1) for each in layers]
            heads = [attention_mass(looked, per_head=True)[:, :text] for looked in own]
            rows.append(pooled(torch.cat(heads), self.pool, "mean").amax(0))
        scores = torch.stack(rows).mean(0)
        return torch.cat([part.mean().expand(len(part)) for part in scores.split(self.chunk)])

    def order(self, scores: Tensor) -> Tensor:
        """The best chunk first, its tokens in their order."""
        return scores.argsort(descending=True, stable=True)


@dataclass(frozen=True)
class WindowAttention:
    """Mean attention of the last window over all layers, smoothed: what SnapKV keeps, told by the drafter."""

    window: int = 32
    pool: int = 7

    def score(self, layers: Sequence[Looked], text: int) -> Tensor:
        """See `TokenScorer`."""
        masses = [attention_mass(looked, "mean")[:, :text].mean(0) for looked in layers]
        return pooled(torch.stack(masses).mean(0), self.pool)

    def order(self, scores: Tensor) -> Tensor:
        """The best first."""
        return scores.argsort(descending=True, stable=True)


Spans = Sequence[tuple[int, int]]
"""Half-open ranges of token indices."""


@dataclass(frozen=True)
class PromptCompression:
    """Have the target read only what the drafter attends to.

    Attributes:
        budget: tokens of the prompt that are read; uniform.
        scorer: says which.
        positions: "compact" (0, 1, ... without gaps) or "original".
        protect: read in any case, along with the scorer's window.
        documents: spans of which each keeps at least ``min_per_document`` tokens, or a function that finds them in a
            prompt's token ids.
        min_per_document: see there.
        costs: where by them compressing a prompt does not pay, it is read as it is and the drafter is not asked. None
            always compresses.

    Raises:
        UserError: an impossible setting.
    """

    budget: Budget
    scorer: TokenScorer = field(default_factory=DraftAttention)
    positions: Literal["compact", "original"] = "compact"
    protect: Protect = field(default_factory=lambda: Protected(sinks=4, window=64))
    documents: Spans | Callable[[Sequence[int]], Spans] = ()
    min_per_document: int = 0
    costs: CompressionCost | None = None

    def __post_init__(self) -> None:
        if self.positions not in ("compact", "original"):
            raise UserError(f"positions of a compressed prompt are compact or original, not {self.positions}")
        if self.budget.shape != "uniform":
            raise UserError("a prompt is compressed for all layers alike; give a uniform budget")
        if self.min_per_document < 0:
            raise UserError(f"a minimum of {self.min_per_document} tokens a document is impossible; give at least 0")

    def count(self, tokens: Sequence[int]) -> int:
        """Tokens of a prompt that will be read; all where it is short or compressing it does not pay.

        Raises:
            UserError: the budget does not hold what is protected, or not every document's minimum beside it.
        """
        length = len(tokens)
        protected = self.protected(tokens)
        kept = int(protected.sum())
        if kept == length or (self.costs is not None and not self.costs.pays(length, self.budget.tokens(length))):
            return length
        count = self.budget.by_layer(length, 1, kept)[0]
        least = kept + sum(missing for _, missing in self._documents(tokens, protected))
        if least > count:
            raise UserError(
                f"a budget of {count} tokens for a prompt of {length} is less than the {least} that are protected or "
                f"the {self.min_per_document} of each document; raise it or lower min_per_document"
            )
        return count

    def protected(self, tokens: Sequence[int]) -> Tensor:
        """bool [S]."""
        return protected_of(self.protect, tokens, self.scorer.window)

    def choose(self, layers: Sequence[Looked], tokens: Sequence[int], count: int) -> Tensor:
        """Indices of the tokens that the target will read: int64 [C], ascending.

        Args:
            layers: the drafter's attention, as of `TokenScorer`.
            tokens: of the prompt.
            count: C.
        """
        scores, protected = self.scorer.score(layers, len(tokens)).cpu(), self.protected(tokens)
        free = scores.masked_fill(protected, -torch.inf)
        best = [span.start + free[span].topk(missing).indices for span, missing in self._documents(tokens, protected)]
        return first_distinct(torch.cat([*best, self.scorer.order(scores)]), protected, count)

    def _documents(self, tokens: Sequence[int], protected_S: Tensor) -> list[tuple[slice, int]]:
        """Documents, and how many of their tokens must be read beside what is protected."""
        if self.min_per_document < 1:
            return []
        spans = self.documents(tokens) if callable(self.documents) else self.documents
        kept = [int(protected_S[start:end].sum()) for start, end in spans]
        return [
            (slice(start, end), max(0, min(self.min_per_document, end - start) - own))
            for (start, end), own in zip(spans, kept, strict=True)
        ]


def first_distinct(order: Tensor, kept_S: Tensor, count: int) -> Tensor:
    """Indices already kept and as many more, in order, as make ``count`` in all: int64 [count], ascending."""
    first_S = torch.full((len(kept_S),), len(order)).scatter_reduce(0, order, torch.arange(len(order)), "amin")
    first_S = first_S.masked_fill(kept_S, -1)
    return first_S.argsort(stable=True)[:count].sort().values
