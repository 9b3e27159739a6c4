"""Replay: what a stopping rule would have done on recorded traces, exactly and by the thousand.

Why it is exact: a trace couples the drafter's tokens to the recorded response, so the draft of a round that starts at
s, and everything a stopping rule reads along it, is a function of s (trace_record.py). Why it is fast:

* After a rejected position a round starts under *every* policy, for no draft is accepted across its first rejection. So
  the stretches between rejections are independent, and all are walked at once, one round of each at a time.
* A rule's running value only falls along a draft, and a laxer threshold only lengthens drafts. So per score the rounds
  are sorted once by the threshold from which they go on after their k-th token; sweeping the thresholds from strict to
  lax then touches every (round, token) pair once, however many thresholds there are.

A thousand policies over a million tokens take seconds (benchmarks/replay.py).
"""

# P policies, G groups, W lengths 0, 1, ... of a draft, N positions

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from drafttrain.decoding.counts import Counts
from drafttrain.evaluation.policies import FixedPolicy, OraclePolicy, Policy, ThresholdPolicy
from drafttrain.evaluation.trace_record import LONGEST, Record


@dataclass(frozen=True)
class Tally:
    """What a policy did, as a histogram of its rounds from which every count follows.

    Attributes:
        groups: names of the groups.
        rounds_GWW: rounds by group, drafted tokens and accepted tokens.
        past_end_GW: of these, by group and accepted tokens, rounds that drafted on behind an accepted end of sequence,
            as a fixed length does.
        tokens_G: emitted tokens.
        unobserved: rounds that an adaptive rule carried beyond what the traces hold; it is taken to stop there. Zero
            means exact; a larger `traces.run_length` lowers it. Rounds and accepted tokens are exact anyway.
    """

    groups: tuple[str, ...]
    rounds_GWW: np.ndarray
    past_end_GW: np.ndarray
    tokens_G: np.ndarray
    unobserved: int = 0

    def of(self, group: str) -> Tally:
        """The tally of one group (`unobserved` stays that of all)."""
        part = slice(index := self.groups.index(group), index + 1)
        return Tally((group,), self.rounds_GWW[part], self.past_end_GW[part], self.tokens_G[part], self.unobserved)

    @property
    def tokens(self) -> int:
        """Emitted tokens."""
        return int(self.tokens_G.sum())

    @property
    def rounds(self) -> int:
        """Rounds, each with one target forward."""
        return int(self.rounds_GWW.sum())

    @property
    def drafted_W(self) -> np.ndarray:
        """Rounds by number of drafted tokens; the width of the target's forward is one more."""
        return self.rounds_GWW.sum(axis=(0, 2))

    @property
    def accepted_W(self) -> np.ndarray:
        """Rounds by number of accepted tokens."""
        return self.rounds_GWW.sum(axis=(0, 1))

    @property
    def drafted(self) -> int:
        """Drafted tokens, which is also how many forwards the drafter made."""
        return int(self.drafted_W @ np.arange(len(self.drafted_W)))

    @property
    def accepted(self) -> int:
        """Drafted tokens that were emitted."""
        return int(self.accepted_W @ np.arange(len(self.accepted_W)))

    @property
    def discarded(self) -> int:
        """Drafted tokens that were not."""
        return self.drafted - self.accepted

    @property
    def drafted_at(self) -> list[int]:
        """Rounds that drafted a 1st, 2nd, ... token."""
        return _at_least(self.drafted_W)

    @property
    def reached_at(self) -> list[int]:
        """Rounds that judged the 1st, 2nd, ... drafted token: those before it were accepted, and none was the end."""
        lengths = np.arange(self.rounds_GWW.shape[1])
        judged_WW = np.minimum(lengths[:, None], lengths + 1)
        rounds_W = np.bincount(judged_WW.ravel(), weights=self.rounds_GWW.sum(0).ravel()).astype(np.int64)
        past_end_W = self.past_end_GW.sum(0)[:-1]
        rounds_W[: len(past_end_W)] += past_end_W
        rounds_W[1 : len(past_end_W) + 1] -= past_end_W
        return _at_least(rounds_W)

    @property
    def accepted_at(self) -> list[int]:
        """Rounds in which the 1st, 2nd, ... drafted token was emitted."""
        return _at_least(self.accepted_W)

    def counts(self, member: str = "drafter") -> Counts:
        """The same as the decoder counts it, without times; `member` names the drafter."""
        drafted_at = self.drafted_at
        opened = drafted_at[0] if drafted_at else 0
        alone = self.rounds - opened  # rounds without a draft are one token each
        return Counts(
            tokens=self.tokens,
            rounds=self.rounds,
            target_forwards=self.rounds,
            draft_forwards=_named(member, self.drafted),
            drafted=self.drafted,
            accepted=self.accepted,
            discarded=self.discarded,
            drafted_at=drafted_at,
            reached_at=_padded(self.reached_at, len(drafted_at)),
            accepted_at=_padded(self.accepted_at, len(drafted_at)),
            drafted_by=_named(member, self.drafted),
            accepted_by=_named(member, self.accepted),
            rounds_by=_named("", alone) | _named(member, opened),
            tokens_by=_named("", alone) | _named(member, self.tokens - alone),
        )


def _named(name: str, count: int) -> dict[str, int]:
    return {name: count} if count else {}


def replay(record: Record, policies: Sequence[Policy], threads: int | None = None) -> list[Tally]:
    """Run every policy over every response of the record.

    Args:
        record: the traces.
        policies: any mixture of rules; those that share a score are replayed together.
        threads: NumPy works outside the interpreter lock; default one per processor, at most four.

    Returns:
        one `Tally` a policy, in their order.

    Raises:
        KeyError: a policy reads a score that the record does not hold.
        ValueError: a policy drafts more than 250 tokens a round.
    """
    longest = max((policy.maximum for policy in policies), default=0)
    if longest > LONGEST:
        raise ValueError(f"replay counts at most {LONGEST} drafted tokens a round, not {longest}")
    fixed, adaptive = _Walker(record, record.limit_N, longest), _Walker(record, record.cap_N, longest)
    threads = threads or min(4, os.cpu_count() or 1)
    tallies: dict[int, Tally] = {}
    with ThreadPoolExecutor(threads) as pool:
        plain = [i for i, policy in enumerate(policies) if not isinstance(policy, ThresholdPolicy)]
        tallies.update(zip(plain, pool.map(lambda i: fixed.plain(policies[i]), plain), strict=True))
        for family in _families(policies):
            sweep = _Sweep(record, [policies[i] for i in family], pool)
            for part in pool.map(partial(sweep.walk, adaptive), np.array_split(np.arange(len(family)), threads)):
                tallies.update((family[member], tally) for member, tally in part)
    return [tallies[i] for i in range(len(policies))]


def _families(policies: Sequence[Policy]) -> list[list[int]]:
    """Indices of the threshold policies whose running values are the same."""
    families: dict[tuple[str, str, int], list[int]] = {}
    for index, policy in enumerate(policies):
        if isinstance(policy, ThresholdPolicy):
            families.setdefault((policy.score, policy.kind, policy.first_judged), []).append(index)
    return list(families.values())


class _Sweep:
    """All rounds at all thresholds of one score.

    `_events[k]` lists the positions sorted by the first threshold (strict to lax) under which a round that starts there
    goes on after its k-th token, and how many go on under each threshold.
    """

    def __init__(self, record: Record, policies: Sequence[ThresholdPolicy], pool: ThreadPoolExecutor) -> None:
        self._record = record
        self._policies = policies
        self._order = sorted(range(len(policies)), key=lambda i: -policies[i].floor)
        floors_P = np.array([policies[i].floor for i in self._order])
        longest = max(policy.maximum for policy in policies)
        running = _running(record, policies[0], longest, floors_P[-1])
        self._events = list(pool.map(lambda found: _sort_by_threshold(*found, floors_P), running))

    def walk(self, walker: _Walker, part: np.ndarray) -> list[tuple[int, Tally]]:
        """Tallies of a contiguous part of the thresholds, with the index of their policy."""
        goes_on_N = np.zeros(self._record.size, dtype=np.uint8)
        done = [0] * len(self._events)
        tallies = []
        for rank in part:
            for step, (positions, bounds) in enumerate(self._events):
                goes_on_N[positions[done[step] : bounds[rank]]] += 1
                done[step] = bounds[rank]
            member = self._order[rank]
            tallies.append((member, walker.threshold(goes_on_N, self._policies[member])))
        return tallies


def _running(record: Record, policy: ThresholdPolicy, longest: int, laxest: float) -> Iterator[tuple[np.ndarray, ...]]:
    """After the 1st, 2nd, ... drafted token: the rounds [n] that still go on, and the rule's running value [n].

    A round that has fallen below the laxest threshold stops under all of them and is followed no further.
    """
    starts = np.arange(record.size)
    running = np.full(record.size, 1.0 if policy.kind == "product" else np.inf)
    for step in range(longest):
        known, index = record.path(step, starts)
        starts, running = starts[known], running[known]
        if step + 1 >= policy.first_judged:
            score = record.scores[policy.score].column(step)[index].astype(np.float64)
            if policy.kind == "product":
                running = running * score
            else:
                running = np.minimum(running, -score if policy.kind == "bound" else score)
        goes_on = np.flatnonzero(running >= laxest)
        starts, running = starts[goes_on], running[goes_on]
        yield starts, running


def _sort_by_threshold(starts: np.ndarray, running: np.ndarray, floors_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds sorted by the first of the falling `floors_P` that lets them go on; how many go on at each of them."""
    rank = np.searchsorted(-floors_P, -running).astype(np.uint16 if len(floors_P) < 2**16 else np.int64)
    order = np.argsort(rank, kind="stable")
    return starts[order].astype(np.int32), np.bincount(rank, minlength=len(floors_P)).cumsum()


class _Rounds(NamedTuple):
    """Rounds that are walked together: where they start and what the record says of those positions."""

    start: np.ndarray
    cap: np.ndarray
    seen: np.ndarray
    ahead: np.ndarray
    more: np.ndarray
    cell: np.ndarray


class _Walker:
    """Walks the rounds of all stretches between rejections at once, given the draft length of a round at any position.

    Args:
        record: the traces.
        cap_N: most tokens that may be drafted at every position.
        longest: most tokens that any policy drafts.
    """

    def __init__(self, record: Record, cap_N: np.ndarray, longest: int) -> None:
        self._record = record
        self._cap_N = cap_N
        self._width = longest + 1
        self._cell_N = (record.group_N * self._width**2).astype(np.int32)
        self._first = self._at(record.first)

    def plain(self, policy: FixedPolicy | OraclePolicy) -> Tally:
        """Tally a policy that needs no scores."""
        record = self._record
        if isinstance(policy, OraclePolicy):
            wanted_N = np.minimum(record.ahead_N, np.uint8(policy.maximum))
        else:
            wanted_N = np.full(record.size, policy.length, dtype=np.uint8)
        return self._walk(wanted_N, 0, policy.maximum)

    def threshold(self, goes_on_N: np.ndarray, policy: ThresholdPolicy) -> Tally:
        """Tally a rule that goes on after the first `goes_on_N` tokens of a round and stops `lag` tokens after that."""
        return self._walk(goes_on_N, policy.minimum, policy.maximum, policy.lag)

    def _walk(self, wanted_N: np.ndarray, low: int, high: int, lag: int | None = None) -> Tally:
        """Tally rounds that draft `wanted` tokens (with a lag: one more, and `lag` more), kept within low..high."""
        cells = np.zeros(len(self._record.groups) * self._width**2, dtype=np.int64)
        past_end = np.zeros_like(cells)
        unobserved = 0
        rounds = self._first
        more = np.uint8(0 if lag is None else 1 + lag)
        while rounds.start.size:
            length = np.minimum(np.maximum(wanted_N.take(rounds.start) + more, np.uint8(low)), np.uint8(high))
            np.minimum(length, rounds.cap, out=length)
            if lag is not None:
                known = rounds.seen + np.uint8(lag)
                unobserved += int(np.count_nonzero(length > known))
                np.minimum(length, np.maximum(known, np.uint8(low)), out=length)
            cell = np.multiply(length, self._width, dtype=np.int32)
            cell += np.minimum(length, rounds.ahead)
            cell += rounds.cell
            cells += np.bincount(cell, minlength=len(cells))
            if lag is None:
                behind = (length > rounds.ahead) & (rounds.more < rounds.ahead)
                past_end += np.bincount(cell[behind], minlength=len(cells))
            goes_on = np.flatnonzero(length < rounds.more)
            rounds = self._at(rounds.start.take(goes_on) + length.take(goes_on) + np.int32(1))
        shape = (len(self._record.groups), self._width, self._width)
        past_end_GW = past_end.reshape(shape).sum(1)
        return Tally(self._record.groups, cells.reshape(shape), past_end_GW, self._record.tokens_G, unobserved)

    def _at(self, start: np.ndarray) -> _Rounds:
        record = self._record
        facts = (self._cap_N, record.seen_N, record.ahead_N, record.more_N, self._cell_N)
        return _Rounds(start, *(fact.take(start) for fact in facts))


def _at_least(rounds_W: np.ndarray) -> list[int]:
    """From rounds by length: rounds with a length of at least 1, 2, ..., as far as there are any."""
    counts = rounds_W[::-1].cumsum()[::-1][1:]
    return counts[: np.count_nonzero(counts)].tolist()


def _padded(counts: list[int], length: int) -> list[int]:
    return counts + [0] * (length - len(counts))
