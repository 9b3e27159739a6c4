"""KV dropping: the target reads the whole prompt and keeps a part of its keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from drafttrain.context.budgets import Budget, Protected
from drafttrain.context.scorers import LookaheadAttention, Scorer

Protect = Protected | Callable[[Sequence[int]], Protected]
"""Protected tokens, or a function that finds them in a prompt's token ids."""


def protected_of(protect: Protect, tokens: Sequence[int], window: int) -> Tensor:
    """Which tokens of a prompt are kept in any case, its last ``window`` among them: bool [S]."""
    found = protect if isinstance(protect, Protected) else protect(tokens)
    return replace(found, window=max(found.window, window)).mask(len(tokens))


@dataclass(frozen=True)
class KVDropping:
    """Keep the keys that the last prompt tokens and a lookahead attend to (the paper's KV cache dropping).

    Attributes:
        budget: tokens that each layer and head keeps.
        scorer: says which; the default looks at the lookahead. The baselines are other scorers.
        protect: kept in any case, along with the scorer's window.
    """

    budget: Budget
    scorer: Scorer = field(default_factory=LookaheadAttention)
    protect: Protect = field(default_factory=lambda: Protected(sinks=4, window=0))

    def protected(self, tokens: Sequence[int]) -> Tensor:
        """bool [S]."""
        return protected_of(self.protect, tokens, self.scorer.window)

    def counts(self, tokens: Sequence[int], layers: int) -> list[int]:
        """Tokens that each layer keeps; all of them where the prompt is no longer than what is protected.

        Raises:
            UserError: the budget does not hold what is protected.
        """
        protected = int(self.protected(tokens).sum())
        if protected == len(tokens):
            return [len(tokens)] * layers
        return self.budget.by_layer(len(tokens), layers, protected)
