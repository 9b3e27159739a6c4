"""Verification by itself, against distributions that are known exactly: chi-square, with negative controls."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drafttrain.decoding.draft import Draft
from drafttrain.decoding.verify import accepted_greedily, verify_greedy, verify_sampled
from drafttrain.ops.random import sample, uniform
from tests.decoding.support import FALSE_ALARM, p_value

ROUNDS = 20_000
V = 5
P = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0], [0.1, 0.1, 0.1, 0.3, 0.4], [0.2, 0.2, 0.2, 0.2, 0.2]]).double()
Q = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4], [0.5, 0.1, 0.1, 0.3, 0.0]]).double()


def draws(purpose: str, width: int, seed: int = 0) -> Tensor:
    return uniform(seed, purpose, torch.arange(ROUNDS).unsqueeze(1), torch.arange(width))


def drafted(q: Tensor, proposed_from: Tensor | None = None) -> Draft:
    """Two tokens a row, drawn independently from ``proposed_from`` (by default what is declared: q)."""
    tokens = sample((q if proposed_from is None else proposed_from).expand(ROUNDS, 2, -1), draws("draft", 2))
    return Draft(tokens, probs_BKV=q.expand(ROUNDS, 2, -1))


def verified(draft: Draft, p: Tensor = P):
    return verify_sampled(p.expand(ROUNDS, 3, -1), draft, draws("accept", 2), draws("target", 3))


def emitted_pairs(verdict) -> Tensor:
    """Counts of the first two tokens [V, V]; where a round emitted one, the second comes straight from the target."""
    first = verdict.emitted[:, 0]
    second = sample(P[1].expand(ROUNDS, V), uniform(9, "next", torch.arange(ROUNDS), torch.tensor(0)))
    second = torch.where(verdict.accepted_B >= 1, verdict.emitted[:, 1], second)
    return torch.bincount(first * V + second, minlength=V * V)


def pairs_p_value(verdict) -> float:
    return p_value(emitted_pairs(verdict), (P[0][:, None] * P[1][None, :]).flatten())


def test_dense_proposals_leave_the_targets_distribution():
    assert pairs_p_value(verified(drafted(Q))) > FALSE_ALARM


def test_the_bonus_comes_from_the_target():
    verdict = verified(drafted(Q))
    full = verdict.accepted_B == 2
    assert p_value(torch.bincount(verdict.emitted[full, 2], minlength=V), P[2]) > FALSE_ALARM


def test_acceptance_is_one_minus_the_total_variation():
    accepted = (verified(drafted(Q)).accepted_B >= 1).double().mean()
    assert abs(accepted - torch.minimum(P[0], Q[0]).sum()) < 0.015


def test_another_distribution_than_the_declared_is_caught():
    """Negative control: proposals from a slightly sharper q than declared."""
    sharper = Q**1.3 / (Q**1.3).sum(1, keepdim=True)
    assert pairs_p_value(verified(drafted(Q, proposed_from=sharper))) < FALSE_ALARM


def test_a_greedy_draft_declared_as_sampled_is_caught():
    """Negative control: the commonest bug in public decoders."""
    tokens = Q.argmax(1).expand(ROUNDS, 2)
    assert pairs_p_value(verified(Draft(tokens, probs_BKV=Q.expand(ROUNDS, 2, V)))) < FALSE_ALARM
    assert pairs_p_value(verified(Draft(tokens))) > FALSE_ALARM


def test_an_omitted_residual_is_caught():
    """Negative control: after a rejection draw from p instead of (p - q)+."""
    draft = drafted(Q)
    verdict = verified(draft)
    u_next = draws("target", 3).gather(1, verdict.accepted_B.unsqueeze(1)).squeeze(1)
    wrong = sample(P[verdict.accepted_B], u_next)
    emitted = verdict.emitted.scatter(1, verdict.accepted_B.unsqueeze(1), wrong.unsqueeze(1))
    assert pairs_p_value(verdict._replace(emitted=emitted)) < FALSE_ALARM


def test_dropping_a_drawn_token_for_its_value_is_caught():
    """Negative control: a draft cut *before* an unlikely token, which rule 4.2 forbids."""
    draft = drafted(Q)
    unlikely = draft.probs_BKV.gather(2, draft.tokens_BK.unsqueeze(2)).squeeze(2) < 0.25
    length = (~unlikely).long().cumprod(1).sum(1)
    assert pairs_p_value(verified(Draft(draft.tokens_BK, length, draft.probs_BKV))) < FALSE_ALARM


def test_stopping_behind_a_drawn_token_is_exact():
    """What a stopping rule may do: the unlikely token is kept, and ends the draft."""
    draft = drafted(Q)
    unlikely = draft.probs_BKV[:, 0].gather(1, draft.tokens_BK[:, :1]).squeeze(1) < 0.25
    assert pairs_p_value(verified(Draft(draft.tokens_BK, 2 - unlikely.long(), draft.probs_BKV))) > FALSE_ALARM


@pytest.mark.parametrize("token", range(V))
def test_deterministic_proposals_leave_the_targets_distribution(token):
    verdict = verified(Draft(torch.full((ROUNDS, 2), token)))
    assert pairs_p_value(verdict) > FALSE_ALARM
    accepted = (verdict.accepted_B >= 1).double().mean()
    assert abs(accepted - P[0, token]) < 0.015


def test_chains_that_mix_sampled_and_deterministic_tokens_are_exact():
    draft = drafted(Q)
    for sampled in ([True, False], [False, True]):
        tokens = torch.where(torch.tensor(sampled), draft.tokens_BK, torch.tensor([3, 1]))
        mixed = Draft(tokens, probs_BKV=draft.probs_BKV, sampled_BK=torch.tensor(sampled).expand(ROUNDS, 2))
        assert pairs_p_value(verified(mixed)) > FALSE_ALARM


def test_a_smaller_vocabulary_of_the_drafter_is_exact():
    q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).double()
    assert pairs_p_value(verified(drafted(q))) > FALSE_ALARM


def test_rows_without_draft_among_rows_with_one_are_exact():
    length = torch.arange(ROUNDS) % 3
    draft = drafted(Q)
    assert pairs_p_value(verified(Draft(draft.tokens_BK, length, draft.probs_BKV))) > FALSE_ALARM


def test_equal_distributions_always_accept_and_never_divide_by_zero():
    draft = drafted(P[:2])
    verdict = verified(draft)
    assert torch.all(verdict.accepted_B == 2)


def test_a_residual_without_mass_falls_back_to_the_target():
    """p = q up to rounding, and a draw that rejects all the same."""
    p = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]])
    q = torch.tensor([[[0.5, 0.5]]]) + 1e-7
    verdict = verify_sampled(p, Draft(torch.tensor([[1]]), probs_BKV=q), torch.ones(1, 1), torch.full((1, 2), 0.1))
    assert verdict.accepted_B.tolist() == [0]
    assert verdict.emitted[0, 0] == 0


def test_filters_that_leave_target_and_drafter_nothing_in_common_reject_every_draft():
    """p = 0 wherever q > 0, after top-k or top-p in both: what is emitted is the target's alone."""
    p = torch.tensor([[0.7, 0.3, 0.0, 0.0, 0.0]]).double().expand(3, -1)
    q = torch.tensor([[0.0, 0.0, 0.2, 0.3, 0.5]]).double().expand(2, -1)
    verdict = verified(drafted(q), p)
    assert torch.all(verdict.accepted_B == 0)
    assert p_value(torch.bincount(verdict.emitted[:, 0], minlength=V), p[0]) > FALSE_ALARM


@pytest.mark.parametrize(("p_token", "accepted"), [(0.3, 1), (0.0, 0)])
def test_a_token_that_its_own_q_excludes_is_judged_without_a_division(p_token, accepted):
    p = torch.tensor([[[p_token, 1 - p_token], [0.5, 0.5]]])
    draft = Draft(torch.tensor([[0]]), probs_BKV=torch.tensor([[[0.0, 1.0]]]))
    verdict = verify_sampled(p, draft, torch.tensor([[0.999]]), torch.tensor([[0.5, 0.5]]))
    assert verdict.accepted_B.tolist() == [accepted]


@pytest.mark.parametrize(
    ("drafted_tokens", "length", "accepted"),
    [
        ([[3, 1, 2]], None, 3),
        ([[3, 1, 0]], None, 2),
        ([[0, 1, 2]], None, 0),
        ([[3, 0, 2]], None, 1),
        ([[3, 1, 2]], [2], 2),
        ([[3, 1, 2]], [0], 0),
    ],
)
def test_greedy_accepts_the_longest_common_prefix(drafted_tokens, length, accepted):
    choice = torch.tensor([[3, 1, 2, 4]])
    draft = Draft(torch.tensor(drafted_tokens), None if length is None else torch.tensor(length))
    verdict = verify_greedy(choice, draft)
    assert verdict.accepted_B.tolist() == [accepted]
    assert torch.equal(verdict.emitted, choice)
    assert accepted_greedily(drafted_tokens[0][: 3 if length is None else length[0]], choice[0].tolist()) == accepted


def test_a_round_without_draft_is_one_target_token():
    empty = Draft.empty(2, torch.device("cpu"))
    assert verify_greedy(torch.tensor([[4], [2]]), empty).emitted.tolist() == [[4], [2]]
    p = torch.eye(5).double()[torch.tensor([[1], [3]])]
    u = torch.full((2, 1), 0.5, dtype=torch.float64)
    verdict = verify_sampled(p, empty, u[:, :0], u)
    assert (verdict.accepted_B.tolist(), verdict.emitted.tolist()) == ([0, 0], [[1], [3]])
