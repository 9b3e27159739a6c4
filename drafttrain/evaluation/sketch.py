"""Methods counted on recorded answers without running a model: what every member would have proposed is looked up.

For a recorded answer each model's next token is known at every place of it: greedy the argmax, else a draw coupled to
the answer as in traces (guesses.py). So any combination of members runs for real, with look-ups in place of forwards,
and gives rounds, accepted tokens and forwards by width; measured costs make a speed-up of them.

Where a model's draft leaves the answer's path it is followed; behind what others wrote there it is taken to say what it
says at the same place of the answer. The target rejects that anyway; it decides only how wide a wrong draft becomes.
Reviews are those without lenience.
"""

# B batch of one, K drafted tokens, T answer tokens, V vocabulary

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.expression import StandIn, build
from drafttrain.decoding.joining import common
from drafttrain.decoding.stopping import StoppingRule
from drafttrain.errors import UserError
from drafttrain.evaluation.guesses import Answer
from drafttrain.evaluation.policies import FixedPolicy, Policy, ThresholdPolicy, policy_of
from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.ops.random import Draws
from drafttrain.ops.sampling import Sampling

_BEYOND = 0
"""Proposed behind the answer's end."""


# ---- the stand-ins ----


class Sketched(StandIn):
    """A model in a method that is counted.

    Args:
        name: of the model.
        vocabulary: the target's.
        heads: acceptance heads by name, whose scores the answers have.

    Attributes:
        now: the answer that is being drafted along.
        reads: forwards so far by width.
        judged: tokens that a stopping rule was asked about.
        seconds: spent in here, which no real drafter spends.
    """

    def __init__(self, name: str, vocabulary: int, heads: Mapping[str, AcceptanceHead]) -> None:
        self.name, self.vocabulary, self.heads = name, vocabulary, heads
        self.begin(None)

    def begin(self, answer: Answer | None) -> None:
        """Count anew, along an answer."""
        self.now, self.reads, self.judged, self.seconds = answer, Counter(), 0, 0.0

    def drafter(self, length: int | None, stop: StoppingRule | None, name: str) -> Drafter:
        """A drafter that looks up.

        Raises:
            UserError: a rule of which recorded answers say nothing.
        """
        if stop is None:
            return _LookUp(self, FixedPolicy(length), name)
        head = next((own for own, each in self.heads.items() if each is getattr(stop, "head", None)), "")
        try:
            policy = policy_of(stop, head, length or stop.max_length)
        except TypeError:
            raise UserError(f"{type(stop).__name__} cannot be counted on recorded answers") from None
        if not getattr(policy, "score", "none"):
            raise UserError(f"recorded answers hold no scores of {type(stop).__name__}'s head for {name}")
        return _LookUp(self, policy, name)


class _LookUp(Drafter):
    """Proposes and reviews by the table; what it would have read is counted."""

    def __init__(self, member: Sketched, policy: Policy, name: str) -> None:
        self.member, self.policy, self.name = member, policy, name
        self.max_length = policy.maximum
        self._ends: frozenset[int] = frozenset()
        self._at = 0  # tokens of the text when it was last asked, all read
        self._ahead: list[int] = []  # and what was read behind them

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """All of the prompt but its last token is read."""
        self._ends = setting.eos_ids
        self._at, self._ahead = len(committed.tokens[0]) - 1, []

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: object | None = None,
    ) -> Draft:
        """The guesses, as far as they are known."""
        started = time.perf_counter()
        place, more = self._place(committed, prefix)
        most = min(self.max_length, budget[0])
        tokens: list[int] = []
        known: list[int | None] = []
        pending = self._pending(committed, more)
        while len(tokens) < most:
            self.member.reads[pending] += 1
            pending = 1
            token, index = self._next(place, more + tokens)
            tokens.append(token)
            known.append(index)
            if isinstance(self.policy, ThresholdPolicy) and len(tokens) < most:
                self.member.judged += 1
                if token in self._ends or self._stops(known):
                    break
        self._ahead = more + tokens[:-1]
        drafted = torch.tensor([tokens], dtype=torch.int64).reshape(1, -1)
        draft = Draft(drafted, source=self.name, forwards={self.name: len(tokens)})
        self.member.seconds += time.perf_counter() - started
        return draft

    def score(self, committed: Committed, prefix: Draft | None, draft: Draft) -> Tensor:
        """One-hot at the guesses."""
        started = time.perf_counter()
        place, more = self._place(committed, prefix)
        rows = draft.rows()[0]
        self.member.reads[self._pending(committed, more) + len(rows)] += 1
        logits = torch.zeros(1, len(rows) + 1, self.member.vocabulary)
        for column in range(len(rows) + 1):
            logits[0, column, self._next(place, more + rows[:column])[0]] = 1.0
        self._ahead = more + rows
        self.member.seconds += time.perf_counter() - started
        return logits

    def _place(self, committed: Committed, prefix: Draft | None) -> tuple[int, list[int]]:
        """How much of the answer is text, and the prefix."""
        more = [] if prefix is None or prefix.width == 0 else prefix.rows()[0]
        return len(committed.tokens[0]) - len(self.member.now.prompt), more

    def _next(self, place: int, ahead: list[int]) -> tuple[int, int | None]:
        """The model's token behind some of the answer and others, and which of its guesses that is."""
        guesses = self.member.now.guesses[self.name]
        index = guesses.index(self.member.now.tokens, place, ahead)
        return (_BEYOND if index is None else guesses.tokens[index]), index

    def _stops(self, known: Sequence[int | None]) -> bool:
        """Whether the rule ends a draft of these guesses (`policies.py`); of an unknown one it thinks the worst."""
        policy, step = self.policy, len(known)
        if step < policy.minimum:
            return False
        judged = range(policy.first_judged - 1, step - policy.lag)
        guesses, bound = self.member.now.guesses[self.name], policy.kind == "bound"
        scores = [
            (math.inf if bound else 0.0) if known[each] is None else guesses.score(policy.score, known[each], each)
            for each in judged
        ]
        if not scores:
            return False
        value = max(scores) if bound else 1 - (math.prod(scores) if policy.kind == "product" else min(scores))
        return value > policy.threshold

    def _pending(self, committed: Committed, more: list[int]) -> int:
        """Tokens of text and prefix that have not been read; from then on they have."""
        text = committed.tokens[0]
        total = len(text) + len(more)
        held = min(self._at + common(self._ahead, [*text[self._at :], *more]), total - 1)
        self._at = len(text)
        return total - held


# ---- counting ----


@dataclass
class Sketch:
    """What a method would have done on recorded answers.

    Attributes:
        tokens: emitted.
        rounds: target forwards by width.
        reads: forwards of every model by width.
        judged: drafted tokens that a stopping rule was asked about.
        host_seconds: spent in drafting beside the models.
        accepted, drafted: tokens by who proposed them.
    """

    tokens: int = 0
    rounds: Counter[int] = field(default_factory=Counter)
    reads: dict[str, Counter[int]] = field(default_factory=dict)
    judged: int = 0
    host_seconds: float = 0.0
    accepted: Counter[str] = field(default_factory=Counter)
    drafted: Counter[str] = field(default_factory=Counter)

    def add(self, other: Sketch) -> None:
        """Take in another's counts."""
        self.tokens += other.tokens
        self.rounds += other.rounds
        self.judged += other.judged
        self.host_seconds += other.host_seconds
        self.accepted += other.accepted
        self.drafted += other.drafted
        for name, widths in other.reads.items():
            self.reads[name] = self.reads.get(name, Counter()) + widths


def count(method: str, answers: Sequence[Answer], vocabulary: int, ends: frozenset[int], more: Mapping) -> list[Sketch]:
    """Run a method along recorded answers.

    Args:
        method: an expression; a drafter's name stands for the guesses of that name.
        answers: with guesses of all its models.
        vocabulary: the target's.
        ends: end tokens.
        more: members that are no models, such as a bigram table or an acceptance head.

    Returns:
        one sketch an answer.
    """
    members = {}
    for name, guesses in answers[0].guesses.items() if answers else ():
        heads = {head: more[head] for head in guesses.scores.keys() & more.keys()}
        members[name] = Sketched(name, vocabulary, heads)
    drafter = build(method, {**more, **members})
    return [_along(drafter, members, answer, vocabulary, ends) for answer in answers]


def _along(
    drafter: Drafter | None, members: Mapping[str, Sketched], answer: Answer, vocabulary: int, ends: frozenset[int]
) -> Sketch:
    found = Sketch()
    if drafter is None:
        found.tokens, found.rounds[1] = len(answer.tokens), len(answer.tokens)
        return found
    for member in members.values():
        member.begin(answer)
    committed = Committed([list(answer.prompt)], [0])
    capacity = len(answer.prompt) + answer.limit
    drafter.start(committed, Setting(Sampling(0.0), ends, vocabulary, capacity))
    place = 0
    while place < len(answer.tokens):
        started = time.perf_counter()
        budget = answer.limit - place - 1
        drafted: list[int] = []
        if budget > 0:
            draft = drafter.propose(committed, None, [budget], None)
            drafted = draft.rows()[0]
        accepted = common(drafted, answer.tokens[place:])
        for k in range(len(drafted)):
            found.drafted[draft.label(0, k)] += 1
            found.accepted[draft.label(0, k)] += k < accepted
        emitted = answer.tokens[place : place + accepted + 1]
        committed.grow([list(emitted)])
        drafter.commit([min(accepted, len(emitted))])
        place += len(emitted)
        found.rounds[1 + len(drafted)] += 1
        found.host_seconds += time.perf_counter() - started
    found.tokens = len(answer.tokens)
    found.reads = {name: member.reads for name, member in members.items() if member.reads}
    found.judged = sum(member.judged for member in members.values())
    found.host_seconds = max(0.0, found.host_seconds - sum(member.seconds for member in members.values()))
    return found
