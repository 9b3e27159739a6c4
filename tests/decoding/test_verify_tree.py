"""Verification of trees by itself, against distributions that are known exactly: chi-square, with negative controls."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from drafttrain.decoding.draft import Draft
from drafttrain.decoding.verify_tree import matching_path, verify_tree
from drafttrain.ops.random import sample, sample_apart, uniform
from drafttrain.ops.tree import ABSENT, ROOT
from tests.decoding.support import FALSE_ALARM, p_value

ROUNDS = 20_000
V = 4
P = torch.tensor([[0.45, 0.3, 0.2, 0.05], [0.1, 0.1, 0.3, 0.5], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.2, 0.0]])
Q = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.4, 0.1]])
P, Q = P.double(), Q.double()
"""Distributions behind each token: the target's and the drafter's next token depend on the last one alone; 0 begins."""

PARENTS = [ROOT, ROOT, ROOT, 0, 0, 1]


def draws(purpose: str, width: int) -> Tensor:
    return uniform(0, purpose, torch.arange(ROUNDS).unsqueeze(1), torch.arange(width))


def drawn(pick=sample_apart) -> Draft:
    """Three children of the root, two of the first, one of the second, drawn without replacement."""
    u = draws("draft", 6)
    root_q = Q[0].expand(ROUNDS, 1, V)
    first, _ = pick(root_q, torch.zeros(ROUNDS, 3, dtype=torch.int64), u[:, :3])
    second, _ = pick(Q[first], torch.tensor([[0, 0, 1]]).expand(ROUNDS, -1), u[:, 3:])
    return Draft(
        torch.cat([first, second], 1),
        probs_BKV=torch.cat([root_q, Q[first]], 1),
        parents_BK=torch.tensor([PARENTS]).expand(ROUNDS, -1),
    )


def targets(tokens_BK: Tensor) -> Tensor:
    """p behind the root and behind every node."""
    return torch.cat([P[0].expand(len(tokens_BK), 1, V), P[tokens_BK]], 1)


def verified(draft: Draft, p: Tensor | None = None, u: Tensor | None = None):
    p = targets(draft.tokens_BK) if p is None else p
    return verify_tree(p, draft, draws("accept", 6) if u is None else u, draws("target", 7))


def pairs_p_value(emitted: Tensor, accepted_B: Tensor) -> float:
    """The first two tokens of every round; where it gave one, the second comes straight from the target."""
    first = emitted[:, 0]
    alone = sample(P[first], uniform(9, "next", torch.arange(ROUNDS), torch.tensor(0)))
    second = torch.where(accepted_B >= 1, emitted[:, 1], alone)
    counts = torch.bincount(first * V + second, minlength=V * V)
    return p_value(counts, (P[0][:, None] * P).flatten())


def test_drawn_children_leave_the_targets_distribution():
    verdict = verified(drawn())
    assert pairs_p_value(verdict.emitted, verdict.accepted_B) > FALSE_ALARM
    assert (verdict.accepted_B == 2).float().mean() > 0.1


def test_the_token_behind_a_whole_path_is_the_targets():
    verdict = verified(drawn())
    full = verdict.accepted_B == 2
    for token in range(V):
        chosen = full & (verdict.emitted[:, 1] == token)
        assert p_value(torch.bincount(verdict.emitted[chosen, 2], minlength=V), P[token]) > FALSE_ALARM


def test_paths_are_of_children_and_their_tokens_are_emitted():
    draft = drawn()
    verdict = verified(draft)
    for row in range(300):
        path = verdict.path_BK[row, : verdict.accepted_B[row]].tolist()
        assert [PARENTS[node] for node in path] == [ROOT, *path[:-1]][: len(path)]
        assert draft.tokens_BK[row, path].tolist() == verdict.emitted[row, : len(path)].tolist()


def test_more_children_are_accepted_more_often_and_all_of_them_always():
    rates = []
    for children in range(1, V + 1):
        tokens, _ = sample_apart(
            Q[0].expand(ROUNDS, 1, V), torch.zeros(ROUNDS, children, dtype=torch.int64), draws("draft", children)
        )
        parents = torch.full((ROUNDS, children), ROOT)
        verdict = verified(Draft(tokens, probs_BKV=Q[0].expand(ROUNDS, 1, V), parents_BK=parents))
        rates.append((verdict.accepted_B > 0).double().mean().item())
    assert abs(rates[0] - torch.minimum(P[0], Q[0]).sum()) < 0.015
    assert rates[0] < rates[1] < rates[2] < rates[3] == 1.0


def test_one_uniform_serves_all_siblings():
    """As if each had its own: the first token's distribution is exact, however many were rejected before it."""
    verdict = verified(drawn())
    assert p_value(torch.bincount(verdict.emitted[:, 0], minlength=V), P[0]) > FALSE_ALARM
    later = verdict.path_BK[:, 0] > 0
    assert (later & (verdict.accepted_B > 0)).float().mean() > 0.1


@pytest.mark.parametrize("children", [*itertools.permutations(range(V), 2), (3, 1, 0)])
def test_deterministic_children_leave_the_targets_distribution(children):
    first = torch.tensor([children]).expand(ROUNDS, -1)
    second = torch.tensor([[2, 3]]).expand(ROUNDS, -1)
    width = len(children)
    parents = torch.tensor([[ROOT] * width + [0, width - 1]]).expand(ROUNDS, -1)
    draft = Draft(torch.cat([first, second], 1), parents_BK=parents)
    verdict = verify_tree(targets(draft.tokens_BK), draft, draws("accept", width + 2), draws("target", width + 3))
    assert pairs_p_value(verdict.emitted, verdict.accepted_B) > FALSE_ALARM
    mass = P[0][list(children)].sum()
    assert abs((verdict.accepted_B > 0).double().mean() - mass) < 0.015


def test_absent_nodes_and_rows_without_a_tree_are_exact():
    draft = drawn()
    parents = draft.parents_BK.clone()
    parents[::3] = ABSENT
    parents[1::3, 3:] = ABSENT
    verdict = verified(Draft(draft.tokens_BK, probs_BKV=draft.probs_BKV, parents_BK=parents))
    assert pairs_p_value(verdict.emitted, verdict.accepted_B) > FALSE_ALARM
    assert verdict.accepted_B[::3].sum() == 0 and verdict.accepted_B[1::3].max() == 1


def test_a_smaller_vocabulary_of_the_drafter_is_exact():
    q = torch.tensor([0.2, 0.5, 0.3]).double().expand(ROUNDS, 1, 3)
    tokens, _ = sample_apart(q, torch.zeros(ROUNDS, 2, dtype=torch.int64), draws("draft", 2))
    verdict = verified(Draft(tokens, probs_BKV=q, parents_BK=torch.full((ROUNDS, 2), ROOT)))
    assert pairs_p_value(verdict.emitted, verdict.accepted_B) > FALSE_ALARM


# ---- negative controls ----


def test_probabilities_indexed_by_node_number_are_caught():
    """The public bug: p and q of the node's number in place of its token's."""
    draft = drawn()
    numbers = torch.arange(6).expand(ROUNDS, -1) % V
    wrong = Draft(numbers, probs_BKV=draft.probs_BKV, parents_BK=draft.parents_BK)
    verdict = verified(wrong, targets(draft.tokens_BK))
    last = verdict.emitted.gather(1, verdict.accepted_B.unsqueeze(1))
    emitted = torch.cat([draft.tokens_BK.gather(1, verdict.path_BK), last], 1)
    emitted.scatter_(1, verdict.accepted_B.unsqueeze(1), last)
    assert pairs_p_value(emitted, verdict.accepted_B) < FALSE_ALARM


def test_likeliest_children_declared_as_drawn_are_caught():
    first = Q[0].argsort(descending=True)[:3].expand(ROUNDS, -1)
    draft = Draft(first, probs_BKV=Q[0].expand(ROUNDS, 1, V), parents_BK=torch.full((ROUNDS, 3), ROOT))
    verdict = verified(draft)
    assert pairs_p_value(verdict.emitted, verdict.accepted_B) < FALSE_ALARM


def test_children_drawn_with_replacement_are_caught():
    def independent(probs_BWV: Tensor, from_BN: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(from_BN)).unsqueeze(1)
        return sample(probs_BWV[rows, from_BN], u_BN), torch.ones_like(from_BN, dtype=torch.bool)

    verdict = verified(drawn(independent))
    assert pairs_p_value(verdict.emitted, verdict.accepted_B) < FALSE_ALARM


def test_sampled_beams_pruned_by_their_values_are_caught():
    """Four drawn, the two likeliest kept: presence depends on the value."""
    four, _ = sample_apart(Q[0].expand(ROUNDS, 1, V), torch.zeros(ROUNDS, 3, dtype=torch.int64), draws("draft", 3))
    kept = four.gather(1, Q[0][four].argsort(1, descending=True)[:, :2].sort(1).values)
    draft = Draft(kept, probs_BKV=Q[0].expand(ROUNDS, 1, V), parents_BK=torch.full((ROUNDS, 2), ROOT))
    verdict = verified(draft)
    assert pairs_p_value(verdict.emitted, verdict.accepted_B) < FALSE_ALARM


# ---- matching ----


@pytest.mark.parametrize(
    ("choice", "path"),
    [
        ([7, 0, 0, 0, 0, 0], []),
        ([5, 9, 0, 0, 0, 0], [0]),
        ([6, 9, 8, 0, 0, 0], [1, 3]),
        ([6, 9, 8, 0, 3, 0], [1, 3, 4]),
        ([6, 9, 4, 0, 3, 0], [1]),
    ],
)
def test_the_deepest_match_is_followed(choice, path):
    assert matching_path([ROOT, ROOT, 0, 1, 3], [5, 6, 8, 8, 3], choice) == path
    assert matching_path([ABSENT, ROOT, 0, 1, 3], [5, 6, 8, 8, 3], choice) == (path if path != [0] else [])
