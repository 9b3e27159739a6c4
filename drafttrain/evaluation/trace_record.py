"""The traces of many responses as flat arrays, laid out for replay.

Let X be a recorded response and Y the drafter's token at every position, drawn coupled to X (data_prep/traces.py). A
round that starts at position s drafts Y_s, Y_s+1, ...; as long as Y_i = X_i the draft *is* the response. At the first
rejection f (Y_f != X_f) it leaves it, and what the drafter would say after X_<f, Y_f is the recorded run of f. So the
draft of a round, and whatever a stopping rule reads along it, is a function of s alone:

    X_s ... X_f-1,  Y_f,  run_f[0] ... run_f[R-1]
"""

# S responses, N response tokens of all of them, M rejected positions, R length of the runs, C columns of a score (one,
# or one per step of a round for scores that know the step), G groups

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drafttrain.evaluation.trace_scores import Scores, join_scores, unpack

LONGEST = 250
"""Drafted tokens per round that replay can count: lengths are kept as bytes."""

_NEVER = 2**40


@dataclass(frozen=True)
class Record:
    """Flat traces; build it with `Record.make` or `record_of`.

    Attributes:
        groups: names that tallies are kept apart by (tasks, as a rule).
        tokens_G: response tokens of each group.
        group_N: group of every position.
        ahead_N: accepted tokens ahead of a round that starts here, f - s.
        more_N: a round here leaves tokens for another round of this stretch if it drafts fewer than this.
        limit_N: most tokens that may be drafted here under the length limit.
        cap_N: the same for adaptive rules, which also end a draft at the drafter's own end of sequence.
        seen_N: drafted tokens that the record knows, f - s + 1 + R; no limit where nothing is rejected any more.
        run_row_N: row of the run at the first rejection ahead; -1 where there is none.
        first: positions where every policy starts a round: where a response starts, and after every rejection.
        run_length: R.
        scores: by name.
    """

    groups: tuple[str, ...]
    tokens_G: np.ndarray
    group_N: np.ndarray
    ahead_N: np.ndarray
    more_N: np.ndarray
    limit_N: np.ndarray
    cap_N: np.ndarray
    seen_N: np.ndarray
    run_row_N: np.ndarray
    first: np.ndarray
    run_length: int
    scores: dict[str, Scores] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Recorded response tokens, N."""
        return len(self.ahead_N)

    @classmethod
    def make(
        cls,
        lengths_S: Sequence[int],
        accepted_N: np.ndarray,
        draft_ends_N: np.ndarray,
        run_ends_MR: np.ndarray,
        finished_S: Sequence[bool],
        limit_S: Sequence[int] | None = None,
        group_S: Sequence[str] | None = None,
        scores: Mapping[str, Scores] | None = None,
    ) -> Record:
        """Derive the layout from what the rows say.

        Args:
            lengths_S: tokens of every response, end of sequence included.
            accepted_N: whether Y = X.
            draft_ends_N: whether Y is an end-of-sequence token.
            run_ends_MR: whether a run's tokens are.
            finished_S: whether the response ends in an end-of-sequence token; else the length limit ended it.
            limit_S: most tokens that every response could have had; no limit by default.
            group_S: group of every response; all in one by default.
            scores: of stopping rules, over the same positions and runs.

        Raises:
            ValueError: the arrays do not fit together.
        """
        lengths_S, accepted_N = np.asarray(lengths_S, dtype=np.int64), np.asarray(accepted_N, dtype=bool)
        rejected = np.flatnonzero(~accepted_N)
        size, run_length = len(accepted_N), run_ends_MR.shape[1]
        if lengths_S.sum() != size or len(draft_ends_N) != size or len(run_ends_MR) != len(rejected):
            raise ValueError("responses, drafted tokens and runs do not have matching lengths")
        group_S = group_S or ["all"] * len(lengths_S)
        groups = tuple(dict.fromkeys(group_S))
        group_index_S = np.array([groups.index(name) for name in group_S], dtype=np.int64)
        sequence_N = np.repeat(np.arange(len(lengths_S)), lengths_S)
        starts_S = np.cumsum(lengths_S) - lengths_S

        left_N = (starts_S + lengths_S)[sequence_N] - np.arange(size)  # tokens from here to the response's end
        rejection_N = _next(rejected, size) - np.arange(size)
        meets_N = rejection_N < left_N
        ahead_N = np.minimum(rejection_N, left_N)
        run_row_N = np.where(meets_N, np.searchsorted(rejected, np.arange(size)), -1)

        finished_N = np.asarray(finished_S, dtype=bool)[sequence_N]
        limit_S = np.full(len(lengths_S), _NEVER) if limit_S is None else np.asarray(limit_S, dtype=np.int64)
        room_N = (limit_S - lengths_S)[sequence_N] + left_N
        limit_N = np.where(finished_N, room_N, left_N) - 1
        ends_M = np.append(_first_end(np.asarray(draft_ends_N, dtype=bool)[rejected], run_ends_MR), 0)
        cap_N = np.minimum(limit_N, np.where(meets_N, ahead_N + ends_M[run_row_N], left_N))
        return cls(
            groups=groups,
            tokens_G=np.bincount(group_index_S, weights=lengths_S, minlength=len(groups)).astype(np.int64),
            group_N=group_index_S[sequence_N],
            ahead_N=_bytes(ahead_N),
            more_N=_bytes(np.where(meets_N, ahead_N, ahead_N - 1)),
            limit_N=_bytes(limit_N),
            cap_N=_bytes(cap_N),
            seen_N=_bytes(np.where(meets_N, ahead_N + 1 + run_length, LONGEST)),
            run_row_N=run_row_N,
            first=_after(rejected, starts_S[lengths_S > 0], size),
            run_length=run_length,
            scores=dict(scores or {}),
        )

    def path(self, step: int, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the token drafted `step` tokens into a round lies, for rounds at the positions `starts` [n].

        Returns:
            known [m], which of the rounds draft that far as far as the record goes, and the index [m] of their token
            into `Scores.column`.
        """
        known = np.flatnonzero(step < np.minimum(self.cap_N, self.seen_N).take(starts))
        starts = starts[known]
        ahead = self.ahead_N[starts].astype(np.int64)
        beyond = self.size + self.run_row_N[starts] * self.run_length + (step - ahead - 1)
        return known, np.where(step <= ahead, starts + step, beyond)


def record_of(
    rows: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    added: Mapping[str, Sequence[Scores]] | None = None,
    group: str = "task",
) -> Record:
    """The record of trace rows.

    Args:
        rows: records of the schema `traces`.
        manifest: of their data set.
        added: scores that are not in the traces, by name: one `Scores` a row (trace_scores.score_rows).
        group: the field that tallies are kept apart by.
    """
    ends = np.array(manifest["eos_ids"])
    draft_N, response_N = (_flat([row[name] for row in rows]) for name in ("draft_ids", "response_ids"))
    rejected = np.count_nonzero(draft_N != response_N)
    runs_MR = _flat([row["run_ids"] for row in rows]).reshape(rejected, manifest["run_length"])
    by_row = [unpack(row, manifest) for row in rows]
    scored = {name: [row[name] for row in by_row] for name in (by_row[0] if by_row else ())} | dict(added or {})
    return Record.make(
        lengths_S=[len(row["response_ids"]) for row in rows],
        accepted_N=draft_N == response_N,
        draft_ends_N=np.isin(draft_N, ends),
        run_ends_MR=np.isin(runs_MR, ends),
        finished_S=[len(row["response_ids"]) > 0 and row["response_ids"][-1] in ends for row in rows],
        limit_S=[min(manifest["max_new_tokens"], manifest["context"] - len(row["prompt_ids"])) for row in rows],
        group_S=[row[group] for row in rows],
        scores={name: join_scores(values) for name, values in scored.items()},
    )


def _flat(lists: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(values, dtype=np.int64) for values in lists] or [np.zeros(0, dtype=np.int64)])


def _next(marks: np.ndarray, size: int) -> np.ndarray:
    """The first of the sorted `marks` at or after every position; far beyond the end where there is none."""
    return np.append(marks, _NEVER)[np.searchsorted(marks, np.arange(size))]


def _after(rejected: np.ndarray, starts: np.ndarray, size: int) -> np.ndarray:
    """Sorted positions that start a response or follow a rejection."""
    is_first = np.zeros(size + 1, dtype=bool)
    is_first[starts] = is_first[rejected + 1] = True
    return np.flatnonzero(is_first[:size]).astype(np.int32)


def _first_end(draft_ends_M: np.ndarray, run_ends_MR: np.ndarray) -> np.ndarray:
    """[M] tokens drafted from a rejected position on until the drafter ends the sequence; very many if it does not."""
    ends_MR1 = np.concatenate([draft_ends_M[:, None], run_ends_MR], axis=1)
    return np.where(ends_MR1.any(axis=1), ends_MR1.argmax(axis=1) + 1, _NEVER)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, LONGEST).astype(np.uint8)
