"""How many tokens each layer keeps, and which ones it keeps whatever their score."""

# M key heads, S tokens of a prompt

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

from drafttrain.errors import UserError


@dataclass(frozen=True)
class Budget:
    """Tokens of a prompt that a layer and head keep.

    Attributes:
        amount: a number of tokens (int) or a share of the prompt (float).
        shape: "uniform", or "pyramid": more in the first layers than in the last, falling linearly, the same in all.
        steepness: of the pyramid; beyond what is kept anyway the last layer gets 1 / steepness of the mean (PyramidKV's
            beta).

    Raises:
        UserError: a share outside (0, 1], fewer than one token, an unknown shape.
    """

    amount: int | float
    shape: Literal["uniform", "pyramid"] = "uniform"
    steepness: float = 20.0

    def __post_init__(self) -> None:
        if isinstance(self.amount, float) and not 0 < self.amount <= 1:
            raise UserError(f"a budget of {self.amount} of the prompt is impossible; give a share above 0, at most 1")
        if isinstance(self.amount, int) and self.amount < 1:
            raise UserError(f"a budget of {self.amount} tokens is impossible; give at least 1, or a share like 0.25")
        if self.shape not in ("uniform", "pyramid"):
            raise UserError(f"a budget's shape is uniform or pyramid, not {self.shape}")
        if self.steepness < 1:
            raise UserError(f"a pyramid's steepness is {self.steepness}, but it must be at least 1 (1 is uniform)")

    def tokens(self, length: int) -> int:
        """Kept of a prompt of this many tokens, a layer and head on average."""
        wanted = math.ceil(self.amount * length - 1e-9) if isinstance(self.amount, float) else self.amount
        return min(length, wanted)

    def by_layer(self, length: int, layers: int, protected: int) -> list[int]:
        """Kept in each layer.

        Args:
            length: of the prompt.
            layers: of the model.
            protected: tokens that are kept in any case, part of the budget.

        Raises:
            UserError: it does not hold even those.
        """
        mean = self.tokens(length)
        if mean == length:
            return [length] * layers
        if mean < protected:
            raise UserError(
                f"a budget of {mean} tokens for a prompt of {length} is less than the {protected} that are kept in any "
                "case (the last window, sinks and protected spans); raise it or protect less"
            )
        if self.shape == "uniform" or layers == 1:
            return [mean] * layers
        free = mean - protected
        least = free / self.steepness
        step = 2 * (free - least) / (layers - 1)
        return [min(length, protected + round(2 * free - least - layer * step)) for layer in range(layers)]


@dataclass(frozen=True)
class Protected:
    """Tokens of a prompt that are kept whatever their score.

    Attributes:
        sinks: this many first ones: models park attention there.
        window: this many last ones.
        spans: half-open ranges of token indices, e.g. a system prompt, chat markup, the question.
    """

    sinks: int = 4
    window: int = 32
    spans: tuple[tuple[int, int], ...] = ()

    def mask(self, length: int) -> Tensor:
        """bool [S]."""
        kept = torch.zeros(length, dtype=torch.bool)
        kept[: self.sinks] = True
        kept[max(0, length - self.window) :] = True
        for start, end in self.spans:
            kept[start:end] = True
        return kept


def chat_spans(ids: Sequence[int], tokenizer: object, question: str | None = None) -> tuple[tuple[int, int], ...]:
    """Spans worth protecting in a rendered chat: its markup, the system prompt, and the question.

    Markup is every special token of the tokenizer. The system prompt is what follows a special token that names a
    system turn, or has that name behind it. The question is found by its text in the last turn that has it; None takes
    the last paragraph of the last turn of several, or all of the last turn. An answer prefix behind the assistant's
    header is no turn of several paragraphs, so the question before it is found.

    Args:
        ids: the prompt, or what is left of it.
        tokenizer: of the prompt.
        question: its text.

    Returns:
        half-open ranges of indices into ``ids``.
    """
    special = set(tokenizer.all_special_ids)
    marks = [at for at, token in enumerate(ids) if token in special]
    spans = [(at, at + 1) for at in marks]
    ends = [*marks[1:], len(ids), len(ids)]
    for number, at in enumerate(marks):
        end = ends[number]
        role = tokenizer.decode(list(ids[at + 1 : min(end, at + 12)]))
        if role == "system":  # the header is closed by a token of its own
            spans.append((at, ends[number + 1] + 1))
        elif role.startswith("system\n") or "system" in tokenizer.convert_ids_to_tokens(int(ids[at])).lower():
            spans.append((at, end + 1))
    bodies = [(a + 1, b) for a, b in zip([-1, *marks], [*marks, len(ids)], strict=True) if b - a > 1]
    found = (_question(ids, tokenizer, body, question) for body in reversed(bodies))
    last = bodies[-1:] if question is None else []
    spans += next(([each] for each in found if each), last)
    return tuple(spans)


def _question(
    ids: Sequence[int], tokenizer: object, body: tuple[int, int], question: str | None
) -> tuple[int, int] | None:
    """The shortest end of a turn that holds the question's text, or that begins at its last blank line."""
    start, end = body
    text = tokenizer.decode(list(ids[start:end]))
    wanted = "\n\n" if question is None else question
    if wanted not in text.strip():
        return None
    low, high = start, end - 1  # ends that begin at low hold it; halved, for a turn may be a book
    while low < high:
        middle = (low + high + 1) // 2
        holds = wanted in tokenizer.decode(list(ids[middle:end])).rstrip()
        low, high = (middle, high) if holds else (low, middle - 1)
    return low, end


def document_spans(ids: Sequence[int], tokenizer: object, between: str) -> tuple[tuple[int, int], ...]:
    """Spans of the documents of a prompt.

    Args:
        ids: the prompt.
        tokenizer: of the prompt.
        between: regular expression of what ends one document, e.g. a blank line; a look-ahead finds where one begins.

    Returns:
        half-open ranges of indices into ``ids``, which together are all of it.
    """
    pieces = [tokenizer.decode([token]) for token in ids]
    ends = list(accumulate(map(len, pieces)))
    cuts = {bisect_left(ends, found.end()) + 1 for found in re.finditer(between, "".join(pieces)) if found.end()}
    return tuple(pairwise(sorted({0, *cuts, len(ids)})))


def keep_top(scores_MS: Tensor, count: int, protected_S: Tensor) -> Tensor:
    """The best-scored tokens of every head, protected ones first: int64 [M, count], ascending."""
    scores_MS = scores_MS.masked_fill(protected_S.to(scores_MS.device), torch.inf)
    return scores_MS.topk(count, dim=1).indices.sort(dim=1).values
