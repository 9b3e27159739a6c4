"""Verification of trees: the path that the target accepts.

Greedy, or with tokens drawn from the target at every node: the path is followed as long as some child is the token that
the target chose (`matching_path`). With deterministic children this is exact sampling: the target draws from p whatever
the children are, and their being there only saves a forward. A child is accepted with all the mass that p gives it.

Children that were drawn from q without replacement are judged one after another (`verify_tree`; recursive rejection,
Jeon et al. 2024, Chen et al. 2024): the i-th with min(1, p_i / q_i), where q_i is q without those before it and
p_(i + 1) the normalised (p_i - q_i)+. The first accepted one is gone on from; if there is none, the target draws from
what is left of p.
"""

# B batch, K drafted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.decoding.draft import Draft
from drafttrain.decoding.verify import Verdict
from drafttrain.ops.random import sample
from drafttrain.ops.tree import ROOT


def matching_path(parents: Sequence[int], drafted: Sequence[int], choice: Sequence[int]) -> list[int]:
    """The deepest path of a row's tree all of whose tokens the target chose.

    Args:
        parents: of every node, an earlier one, `ROOT` or `ABSENT`.
        drafted: their tokens; siblings are distinct.
        choice: the target's token behind the root and behind every node.

    Returns:
        the nodes of the path.
    """
    path, node = [], ROOT
    for child, (parent, token) in enumerate(zip(parents, drafted, strict=True)):
        if parent == node and token == choice[node + 1]:  # children come after their parents
            node = child
            path.append(child)
    return path


def verify_tree(p: Tensor, draft: Draft, u_accept_BK: Tensor, u_next: Tensor) -> Verdict:
    """Recursive rejection sampling.

    One uniform serves all siblings: where u >= a has rejected one, (u - a) / (1 - a) is uniform again. The host is
    asked before every step whether some row still has a child to judge.

    Args:
        p: [B, K + 1, V], the target's distribution behind the root and behind every node.
        draft: a tree, with q of every parent, or None where all tokens are deterministic.
        u_accept_BK: uniforms that decide acceptance, by depth.
        u_next: uniforms [B, K + 1] for the token the target adds, by depth.
    """
    batch, width = draft.tokens_BK.shape
    rows_B, columns_K = (torch.arange(size, device=p.device) for size in (batch, width))
    depth_B = torch.zeros(batch, dtype=torch.int64, device=p.device)
    node_B, judged_B = depth_B + ROOT, depth_B - 1
    path_BK = torch.zeros_like(draft.tokens_BK)
    rest_BV, u_B = p[:, 0].clone(), u_accept_BK[:, 0]
    q_BV = _proposal(draft, node_B, p)
    while True:
        children_BK = (draft.parents_BK == node_B.unsqueeze(1)) & (columns_K > judged_B.unsqueeze(1))
        child_B = torch.where(children_BK, columns_K, width).amin(1)
        going_B = child_B < width
        if not going_B.any():
            break
        child_B = child_B.clamp(max=width - 1)
        token_B1 = draft.tokens_BK.gather(1, child_B.unsqueeze(1))
        now_BV = rest_BV / rest_BV.sum(1, keepdim=True)
        if q_BV is None:
            drawn_BV = torch.zeros_like(now_BV).scatter_(1, token_B1, 1.0)
        else:
            drawn_BV = q_BV / q_BV.sum(1, keepdim=True).clamp(min=torch.finfo(q_BV.dtype).tiny)
        p_B, q_B = (x.gather(1, token_B1).squeeze(1).double() for x in (now_BV, drawn_BV))
        accepted_B = going_B & (u_B * q_B < p_B)
        rejected_B = going_B & ~accepted_B

        a_B = (p_B / q_B).clamp(max=1.0)
        recycled_B = ((u_B - a_B) / (1 - a_B)).clamp(0.0, 1 - 2.0**-53)
        residual_BV = (now_BV - drawn_BV).clamp_(min=0)
        usable_B1 = (rejected_B & (residual_BV.sum(1) > 0)).unsqueeze(1)  # p = q up to rounding is never rejected
        rest_BV = torch.where(usable_B1, residual_BV, rest_BV)
        if q_BV is not None:
            q_BV = torch.where(rejected_B.unsqueeze(1), q_BV.scatter(1, token_B1, 0.0), q_BV)

        place_B = depth_B.clamp(max=width - 1)
        path_BK[rows_B, place_B] = torch.where(accepted_B, child_B, path_BK[rows_B, place_B])
        depth_B = depth_B + accepted_B
        node_B = torch.where(accepted_B, child_B, node_B)
        judged_B = torch.where(going_B, child_B, judged_B)
        rest_BV = torch.where(accepted_B.unsqueeze(1), p[rows_B, node_B + 1], rest_BV)
        if q_BV is not None:
            q_BV = torch.where(accepted_B.unsqueeze(1), _proposal(draft, node_B, p), q_BV)
        u_B = torch.where(accepted_B, u_accept_BK[rows_B, depth_B.clamp(max=width - 1)], u_B)
        u_B = torch.where(rejected_B, recycled_B, u_B)
    next_B = sample(rest_BV, u_next[rows_B, depth_B])
    emitted = pad(draft.tokens_BK.gather(1, path_BK), (0, 1)).scatter_(1, depth_B.unsqueeze(1), next_B.unsqueeze(1))
    return Verdict(depth_B, emitted, path_BK)


def _proposal(draft: Draft, node_B: Tensor, p: Tensor) -> Tensor | None:
    """q of the nodes' children, [B, V]; of nodes without children anything."""
    if draft.probs_BKV is None:
        return None
    row_B = (node_B + 1).clamp(max=draft.probs_BKV.shape[1] - 1)
    q_BV = draft.probs_BKV[torch.arange(len(row_B), device=p.device), row_B]
    missing = p.shape[2] - q_BV.shape[1]
    return pad(q_BV, (0, missing)) if missing else q_BV
