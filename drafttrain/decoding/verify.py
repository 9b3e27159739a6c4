"""Verification: which drafted tokens the target accepts, and the token it adds. One implementation for all drafters.

Greedy: the longest prefix that equals the target's argmax. Sampling: exact rejection sampling (Leviathan et al. 2023;
Chen et al. 2023). A token drawn from q is accepted with probability min(1, p/q), and at the first rejection the target
draws from the normalised (p - q)+. A deterministic token is a draw from the one-hot distribution at itself: accepted
with probability p(x), else p without x. If all are accepted the target draws a bonus token from p.
"""

# B batch, K drafted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.decoding.draft import Draft
from drafttrain.ops.random import sample


class Verdict(NamedTuple):
    """The outcome of a round.

    Attributes:
        accepted_B: int64, leading drafted tokens that the target accepts.
        emitted: int64 [B, K + 1]; the first accepted + 1 are the round's tokens, the rest is padding.
        path_BK: int64, of a tree: the accepted nodes, the rest is padding; None for a chain.
    """

    accepted_B: Tensor
    emitted: Tensor
    path_BK: Tensor | None = None


def verify_greedy(choice: Tensor, draft: Draft) -> Verdict:
    """Accept what equals the target's argmax.

    Args:
        choice: int64 [B, K + 1], the target's argmax at each drafted position and after the last.
        draft: K tokens a row.
    """
    if draft.width == 0:
        return Verdict(choice.new_zeros(len(choice)), choice)
    return Verdict(leading(draft.tokens_BK == choice[:, :-1], draft), choice)


def accepted_greedily(drafted: Sequence[int], choice: Sequence[int]) -> int:
    """`verify_greedy` of a row that has been read: how many leading drafted tokens the target chose too."""
    return next((place for place, token in enumerate(drafted) if token != choice[place]), len(drafted))


def verify_sampled(p: Tensor, draft: Draft, u_accept_BK: Tensor, u_next: Tensor) -> Verdict:
    """Exact rejection sampling.

    Args:
        p: [B, K + 1, V], the target's distribution at each drafted position and after the last.
        draft: K tokens a row, with the dense q of its sampled tokens; q may have a smaller vocabulary than p.
        u_accept_BK: uniforms that decide acceptance.
        u_next: uniforms [B, K + 1] for the token the target adds, by its place in the block.
    """
    if draft.width == 0:
        return Verdict(draft.tokens_BK.new_zeros(len(p)), sample(p, u_next))
    tokens_BK1 = draft.tokens_BK.unsqueeze(2)
    p_BK = p[:, :-1].gather(2, tokens_BK1).squeeze(2)
    threshold_BK = u_accept_BK
    if draft.probs_BKV is not None:
        q_BK = draft.probs_BKV.gather(2, tokens_BK1).squeeze(2)
        if draft.sampled_BK is not None:
            q_BK = q_BK.masked_fill(~draft.sampled_BK, 1.0)
        threshold_BK = u_accept_BK * q_BK
    accepted_B = leading(threshold_BK < p_BK, draft)
    p_BV = _at(p, accepted_B)
    next_B = sample(_residual(p_BV, draft, accepted_B), _at(u_next, accepted_B))
    emitted = pad(draft.tokens_BK, (0, 1)).scatter_(1, accepted_B.unsqueeze(1), next_B.unsqueeze(1))
    return Verdict(accepted_B, emitted)


def leading(accepted_BK: Tensor, draft: Draft) -> Tensor:
    """How many leading tokens were accepted: int64 [B]."""
    inside_BK = draft.inside()
    if inside_BK is not None:
        accepted_BK = accepted_BK & inside_BK
    return accepted_BK.cumprod(1).sum(1)


def _at(x: Tensor, index_B: Tensor) -> Tensor:
    """x[b, index[b]] of [B, K, ...]; a plain selection for a single row, where advanced indexing costs more."""
    if len(x) == 1:
        return x[0].index_select(0, index_B)
    return x[torch.arange(len(x), device=x.device), index_B]


def _residual(p_BV: Tensor, draft: Draft, accepted_B: Tensor) -> Tensor:
    """What the target draws from after the accepted tokens: (p - q)+ at a rejected token, p after the last one.

    A residual without mass means p = q up to rounding, where a rejection has probability zero: then it is p.
    """
    length = draft.width if draft.length_B is None else draft.length_B
    rejected_B = accepted_B < length
    column_B = accepted_B.clamp(max=draft.width - 1)
    residual_BV = (p_BV - _proposal(draft, column_B, p_BV)).clamp_(min=0)
    usable_B = rejected_B & (residual_BV.sum(1) > 0)
    return torch.where(usable_B.unsqueeze(1), residual_BV, p_BV)


def _proposal(draft: Draft, column_B: Tensor, like_BV: Tensor) -> Tensor:
    """The distribution that one token of each row was proposed from: [B, V], one-hot for deterministic tokens."""
    q_BV = one_hot_BV = None
    if draft.probs_BKV is not None:
        q_BV = _at(draft.probs_BKV, column_B)
        missing = like_BV.shape[1] - q_BV.shape[1]
        q_BV = pad(q_BV, (0, missing)) if missing else q_BV
    if draft.probs_BKV is None or draft.sampled_BK is not None:
        token_B1 = _at(draft.tokens_BK, column_B).unsqueeze(1)
        one_hot_BV = torch.zeros_like(like_BV).scatter_(1, token_B1, 1.0)
    if q_BV is None:
        return one_hot_BV
    if one_hot_BV is None:
        return q_BV
    return torch.where(_at(draft.sampled_BK, column_B).unsqueeze(1), q_BV, one_hot_BV)
