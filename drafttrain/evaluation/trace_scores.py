"""Scores of stopping rules along traces: how a rule would have judged every drafted token.

Confidence, entropy and the largest q are in every trace. An acceptance head is usually trained after the traces were
made; its scores are then computed here, from the drafter alone: the target is not needed again.

A score has one column, or, for a head that knows the step of a token within its round, one column a step: a trace does
not know at which step a token would be drafted, so it keeps them all.
"""

# T response tokens, M rejected positions, R tokens of a run, C columns, H hidden

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.models.branch_states import BranchStates, batch_branch_states

RULES = ("confidence", "entropy", "max_q")
"""Scores that every trace holds, in this order: q(Y), and the entropy in nats and the maximum of the q that drew Y."""


class Scores(NamedTuple):
    """A rule's scores of the drafted tokens [T, C] and of the runs' tokens [M, R, C], of one response or of many."""

    values_TC: np.ndarray
    run_values_MRC: np.ndarray

    def column(self, step: int) -> np.ndarray:
        """[T + M * R] scores of a token drafted `step` tokens into its round (from 0), positions first, then runs."""
        column = min(step, self.values_TC.shape[1] - 1)
        return np.concatenate([self.values_TC[:, column], self.run_values_MRC[:, :, column].ravel()])


def join_scores(scores: Sequence[Scores]) -> Scores:
    """The scores of many responses as one."""
    values, run_values = zip(*scores, strict=True)
    return Scores(np.concatenate(values), np.concatenate(run_values))


def score_rows(
    model: PreTrainedModel, head: AcceptanceHead, rows: Sequence[Mapping[str, Any]], batch_size: int = 8
) -> list[Scores]:
    """An acceptance head's scores of the tokens of trace rows.

    Args:
        model: the drafter.
        head: trained for it.
        rows: trace records, with the entropy of the runs' tokens under "run_entropy" (`with_run_entropy`).
        batch_size: rows that the drafter reads together.

    Returns:
        scores a row, in order; columns are the steps 1 .. max_length if the head knows the step, else one.
    """
    scored = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        names = ("prompt_ids", "response_ids", "draft_ids", "run_ids")
        states = batch_branch_states(model, [[np.ravel(row[name]).tolist() for name in names] for row in part])
        scored += [_score_row(head, row, found) for row, found in zip(part, states, strict=True)]
    return scored


def known_probabilities(rows: Sequence[Mapping[str, Any]]) -> list[Scores]:
    """The true acceptance probability min(1, p / q) of the drafted tokens of rows.

    Behind a rejection it is zero: nothing is accepted there. A rule that stops by these scores knows what no head can,
    so it bounds what a head of any kind gains; unlike perfect stopping it does not know how the coins will fall.
    """
    found = []
    for row in rows:
        log_ratio_T = np.asarray(row["log_p"], np.float64) - np.asarray(row["log_q"], np.float64)
        values_TC = np.exp(np.minimum(log_ratio_T, 0.0)).astype(np.float32)[:, None]
        found.append(Scores(values_TC, np.zeros((*np.shape(row["run_entropy"])[:2], 1), np.float32)))
    return found


def with_run_entropy(rows: Iterable[Mapping[str, Any]], manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows as `score_rows` wants them, from records as they lie on disk."""
    return [{**row, "run_entropy": unpack(row, manifest)["entropy"].run_values_MRC} for row in rows]


def score_names(name: str, head: AcceptanceHead) -> list[str]:
    """Names in the manifest of a head's columns: its own, or name@1, name@2, ... of the steps."""
    columns = _columns(head)
    return [name] if columns == 1 else [f"{name}@{step + 1}" for step in range(columns)]


def flat_scores(scores: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    """The columns `scores` [rules * T] and `run_scores` [rules * M * R] of a trace row, rules in order."""
    values = [np.moveaxis(values, -1, 0).ravel() for values, _ in scores]
    run_values = [np.moveaxis(run_values, -1, 0).ravel() for _, run_values in scores]
    return np.concatenate(values).astype(np.float32), np.concatenate(run_values).astype(np.float32)


def unpack(row: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Scores]:
    """The scores of a trace record by name, the steps of a head together as columns."""
    names, run_length = list(manifest["scores"]), manifest["run_length"]
    values_CT = np.asarray(row["scores"], dtype=np.float32).reshape(len(names), len(row["response_ids"]))
    run_values_CMR = np.asarray(row["run_scores"], dtype=np.float32).reshape(len(names), _rejections(row), run_length)
    rules = [name.rpartition("@")[0] if name.rpartition("@")[2].isdigit() else name for name in names]
    found = {}
    for rule in dict.fromkeys(rules):
        places = [place for place, name in enumerate(rules) if name == rule]
        found[rule] = Scores(np.moveaxis(values_CT[places], 0, -1), np.moveaxis(run_values_CMR[places], 0, -1))
    return found


def _rejections(row: Mapping[str, Any]) -> int:
    return int(np.count_nonzero(np.asarray(row["response_ids"]) != np.asarray(row["draft_ids"])))


def _columns(head: AcceptanceHead) -> int:
    return head.config.max_length if "step" in head.features else 1


def _score_row(head: AcceptanceHead, row: Mapping[str, Any], states: BranchStates) -> Scores:
    consumed = head.state == "consumed"
    hidden_TH = states.consumed_TH if consumed else states.producing_TH
    run_hidden_MRH = states.run_consumed_MRH if consumed else states.run_producing_MRH
    values_TC = _score(head, hidden_TH, row["log_q"], row["entropy"], row["draft_ids"])
    runs = (row["run_log_q"], row["run_entropy"], row["run_ids"])
    run_values_NC = _score(head, run_hidden_MRH.flatten(0, 1), *runs)
    shape = (*np.shape(row["run_entropy"])[:2], _columns(head))  # states of no rejections do not know R
    return Scores(values_TC, run_values_NC.reshape(shape))


def _score(head: AcceptanceHead, hidden_NH: Tensor, log_q: Any, entropy: Any, tokens: Any) -> np.ndarray:
    """Scores [N, C] of tokens with these states and features (any shape of N entries)."""
    count = len(hidden_NH)
    if count == 0:
        return np.zeros((0, _columns(head)), dtype=np.float32)
    device = hidden_NH.device
    q_N = torch.tensor(np.exp(np.ravel(log_q)), dtype=torch.float32, device=device)
    entropy_N = torch.tensor(np.ravel(entropy), dtype=torch.float32, device=device)
    tokens_N = torch.tensor(np.ravel(tokens), dtype=torch.long, device=device)
    steps = [torch.full((count,), float(step + 1), device=device) for step in range(_columns(head))]
    scores = [head.score(hidden_NH, q_N, entropy_N, step_N, tokens_N) for step_N in steps]
    return torch.stack(scores, 1).cpu().numpy()
