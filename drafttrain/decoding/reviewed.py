"""The vertical cascade (Chen et al. 2023, section 4.1): a model reviews what a cheaper drafter proposes.

The model reads the inner draft in one forward, keeps its longest valid prefix and adds a token of its own, so it never
generates token by token. What comes out goes to the target, or to the next reviewer, as the model's own proposal.
"""

# B batch, K drafted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.decoding.combined import Combined, depth_of
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting, seen_with
from drafttrain.decoding.joining import cut
from drafttrain.decoding.verify import Verdict, leading, verify_sampled
from drafttrain.errors import UserError
from drafttrain.ops.random import Draws
from drafttrain.ops.sampling import seen_along


class Reviewed(Combined):
    """A model that reviews an inner drafter's tokens and adds one of its own.

    With a lenience of 1 a review is the verification that the target does, so what comes out is drawn from the model's
    distribution q and declared with it. A larger lenience l also keeps a token with q(x) > r(x) / l, where r is what
    the inner drafter drew it from (1 for a deterministic token). Then what comes out has no distribution that could be
    declared: the model adds its most probable token, and all go up as deterministic. The target is never lenient.

    Args:
        model: has logits of its own (`Drafter.score`).
        inner: whose tokens it reviews.
        lenience: l, at least 1.
    """

    def __init__(self, model: Drafter, inner: Drafter, lenience: float = 1.0) -> None:
        if not lenience >= 1:
            raise UserError(f"Reviewed's lenience is {lenience}, but it must be at least 1 (1 is an exact review)")
        super().__init__([model, inner], inner.max_length + 1)
        self.model, self.inner = self.members
        self.lenience = lenience
        self._setting: Setting | None = None

    @property
    def depth(self) -> int:
        """One review more than inside."""
        return 1 + depth_of(self.inner.drafter)

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """Model and inner drafter take up the batch."""
        super().start(committed, setting, resume)
        self._setting = setting

    def combine(
        self, committed: Committed, prefix: Draft | None, budget: Sequence[int], random: Draws, *more: Any, **named: Any
    ) -> Draft:
        """The inner draft as far as the model keeps it, and one token of the model."""
        room = [max(0, most - 1) for most in budget]
        draft = Draft.empty(len(budget), torch.device("cpu"))
        if any(room):
            draft = self.inner.propose(committed, prefix, room, random, *more, **named)
        logits = self.model.drafter.score(committed, prefix, draft)
        self.model.saw(prefix, draft)
        draft = draft.to(logits.device)
        logits = pad(logits, (0, self._setting.vocabulary - logits.shape[-1]), value=-torch.inf)
        seen = None
        if self._setting.sampling.penalised:
            seen = seen_along(seen_with(committed, prefix).to(logits.device), draft.tokens_BK)
        if self._setting.sampling.greedy or self.lenience > 1:
            probs_BKV, verdict = None, self._choose(logits, seen, draft)
        else:
            starts = committed.lengths
            if prefix is not None:
                starts = [length + own for length, own in zip(starts, prefix.lengths(), strict=True)]
            probs_BKV, verdict = self._sample(logits, seen, draft, random, starts)
        kept = verdict.accepted_B.tolist()
        lengths = [count + 1 if most else 0 for count, most in zip(kept, budget, strict=True)]
        return self._emitted(draft, verdict.emitted, probs_BKV, kept, lengths)

    def _choose(self, logits: Tensor, seen: Tensor | None, draft: Draft) -> Verdict:
        """The most probable tokens, and what is probable enough."""
        choice = self._setting.sampling.choose(logits, seen)
        if draft.width == 0:
            return Verdict(choice.new_zeros(len(choice)), choice)
        fine_BK = draft.tokens_BK == choice[:, :-1]
        if self.lenience > 1:
            fine_BK |= self._likely(logits[:, :-1], None if seen is None else seen[:, :-1], draft)
        accepted_B = leading(fine_BK, draft)
        own_B1 = choice.gather(1, accepted_B.unsqueeze(1))
        return Verdict(accepted_B, pad(draft.tokens_BK, (0, 1)).scatter(1, accepted_B.unsqueeze(1), own_B1))

    def _likely(self, logits_BKV: Tensor, seen_BKV: Tensor | None, draft: Draft) -> Tensor:
        """Where the model's probability is more than the proposal's over the lenience: bool [B, K]."""
        tokens_BK1 = draft.tokens_BK.unsqueeze(2)
        q_BK = self._setting.sampling.scoring.probabilities(logits_BKV, seen_BKV).gather(2, tokens_BK1).squeeze(2)
        r_BK = torch.ones_like(q_BK)
        if draft.probs_BKV is not None:
            r_BK = draft.probs_BKV.gather(2, tokens_BK1).squeeze(2)
            if draft.sampled_BK is not None:
                r_BK = r_BK.masked_fill(~draft.sampled_BK, 1.0)
        return q_BK > r_BK / self.lenience

    def _sample(
        self, logits: Tensor, seen: Tensor | None, draft: Draft, random: Draws, starts: Sequence[int]
    ) -> tuple[Tensor, Verdict]:
        """An exact review, with draws of its own: nested reviews may look at the same position."""
        probs_BKV = self._setting.sampling.probabilities(logits, seen)
        u_next = random.at(f"review {self.depth}", starts, draft.width + 1).to(logits.device)
        u_accept_BK = random.at(f"review {self.depth} accept", starts, max(1, draft.width)).to(logits.device)
        return probs_BKV, verify_sampled(probs_BKV, draft, u_accept_BK[:, : draft.width], u_next)

    def _emitted(
        self, draft: Draft, tokens_BK: Tensor, probs_BKV: Tensor | None, kept: list[int], lengths: list[int]
    ) -> Draft:
        """The reviewed tokens, each labelled with who proposed it first."""
        own = self.model.drafter.name
        labels = [[*(draft.label(row, place) for place in range(count)), own] for row, count in enumerate(kept)]
        origins = None
        if draft.origins is not None:
            origins = [[*(draft.origin(row, place) for place in range(count)), None] for row, count in enumerate(kept)]
        used = torch.tensor([int(length > 0) for length in lengths], device=tokens_BK.device)
        forwards = dict(draft.forwards)
        forwards[own] = forwards.get(own, 0) + (1 if len(lengths) == 1 else used)
        return cut(Draft(tokens_BK, None, probs_BKV, None, labels, forwards, origins), lengths)
