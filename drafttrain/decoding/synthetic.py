"""Synthetic acceptance: drafted tokens are accepted at given rates, so that speed can be measured without good models.

Speed depends on a drafter through its cost and through how many of its tokens are accepted. With random weights nothing
is; here that is decided by draws instead. All else is the real loop: drafts, forwards, logits and the verification of
the real method run in full, the host reads what it always reads, and only the verdict is exchanged, in a few operations
on [B, K]. What is emitted is whatever was drafted, and behind it what the target chose: no text of the target, and a
`Completion` says so.
"""

# B batch, K drafted tokens

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.decoding.draft import Draft
from drafttrain.decoding.verify import Verdict, leading
from drafttrain.errors import UserError

_PLACES = 64
"""Places of a draft that rates are laid out for; longer drafts make them grow."""


class SyntheticAcceptance:
    """Accepts the k-th token of a draft, where all before it were accepted, with probability r_k.

    Args:
        rates: r_1, r_2, ...; the last one holds for every place behind it.

    Raises:
        UserError: no rate, or one outside 0 .. 1.

    Example:
        >>> SyntheticAcceptance([0.8, 0.5]).tau(3)
        2.4
    """

    def __init__(self, rates: Sequence[float]) -> None:
        if not rates:
            raise UserError("synthetic acceptance needs at least one rate, e.g. [0.8, 0.7]")
        for rate in rates:
            if not 0 <= rate <= 1:
                raise UserError(f"a rate of synthetic acceptance is {rate}, but it must be between 0 and 1")
        self.rates = tuple(float(rate) for rate in rates)
        self._rates_K: Tensor | None = None

    def rate(self, place: int) -> float:
        """r of a place, counted from 0."""
        return self.rates[min(place, len(self.rates) - 1)]

    def tau(self, length: int) -> float:
        """Expected tokens of a round that drafts ``length`` of them: 1 + sum_k r_1 ... r_k."""
        return 1 + sum(accumulate(map(self.rate, range(length)), mul))

    def exchange(self, verdict: Verdict, draft: Draft, u_BK: Tensor) -> Verdict:
        """The synthetic verdict in place of the real one.

        Args:
            verdict: of the method's own verification.
            draft: K tokens a row, at least one.
            u_BK: uniforms in [0, 1), of a purpose of their own.

        Returns:
            accepted tokens by the rates; emitted are these and the token that the target added in the real verdict.

        Raises:
            UserError: the draft is a tree.
        """
        if draft.parents_BK is not None:
            raise UserError("synthetic acceptance goes by places of a chain and cannot judge a tree; give it a length.")
        accepted_B = leading(u_BK < self._on(u_BK.device, draft.width), draft)
        next_B1 = verdict.emitted.gather(1, verdict.accepted_B.unsqueeze(1))
        return Verdict(accepted_B, pad(draft.tokens_BK, (0, 1)).scatter_(1, accepted_B.unsqueeze(1), next_B1))

    def _on(self, device: torch.device, width: int) -> Tensor:
        """Rates of the first places: float64 [width]."""
        rates_K = self._rates_K
        if rates_K is None or len(rates_K) < width or rates_K.device != device:
            rates = [self.rate(place) for place in range(max(width, _PLACES))]
            self._rates_K = rates_K = torch.tensor(rates, dtype=torch.float64, device=device)
        return rates_K[:width]
