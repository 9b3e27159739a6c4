"""Methods counted on recorded answers without running a model: what every member would have proposed is looked up.

For a recorded answer each model's next token is known at every place of it: greedy the argmax, else a draw coupled to
the answer as in traces (tracing.py). So any combination of members runs for real, with look-ups in place of forwards,
and gives rounds, accepted tokens and forwards by width; measured costs make a speed-up of them.

Where drafts leave the answer's path the models are taken to say what they say at the same place of it. The target
rejects that anyway; it decides only how wide a wrong draft becomes. Reviews are those without lenience.
"""

# B batch of one, K drafted tokens, T answer tokens, V vocabulary

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import StandIn, build
from drafttrain.decoding.joining import common
from drafttrain.decoding.stopping import Confidence, FixedLength, StoppingRule
from drafttrain.errors import UserError
from drafttrain.ops.random import Draws, sample, uniform
from drafttrain.ops.sampling import Sampling

_BEYOND = 0
"""Proposed behind the answer's end."""


@dataclass(frozen=True)
class Answer:
    """A recorded answer.

    Attributes:
        task: what it was asked for.
        prompt, tokens: context and answer.
        guesses: by model, its token at every place of the answer, given what stands before.
        confidence: by model, the probability of that token.
    """

    task: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    guesses: Mapping[str, Sequence[int]] = field(default_factory=dict)
    confidence: Mapping[str, Sequence[float]] = field(default_factory=dict)


@torch.inference_mode()
def look_up(
    engines: Mapping[str, Engine],
    target: Engine,
    prompt: Sequence[int],
    tokens: Sequence[int],
    sampling: Sampling,
    task: str,
    key: int,
) -> Answer:
    """What every model would have proposed along an answer.

    Args:
        engines: by name.
        target: whose answer it is.
        prompt, tokens: context and answer.
        sampling: how it was drawn; a repetition penalty is not taken into account.
        task: of the question.
        key: keys the draws.
    """
    text = torch.tensor([[*prompt, *tokens]])
    places = slice(len(prompt) - 1, -1)
    answer_T = text[0, len(prompt) :]
    p_T = None
    guesses, confidence = {}, {}
    for name, engine in engines.items():
        read = text.clamp(max=engine.entries - 1).to(engine.device)
        logits_TV = engine.forward(engine.new_cache(1, text.shape[1]), read).logits[0, places].cpu()
        scores_TV = sampling.scoring.probabilities(logits_TV)
        if sampling.greedy:
            guess_T = sampling.choose(logits_TV)
        else:
            if p_T is None:
                p_T = _probabilities(target, text, places, sampling)
            guess_T = _coupled(scores_TV, p_T, answer_T, name, key)
        guesses[name] = guess_T.tolist()
        confidence[name] = scores_TV.gather(1, guess_T.unsqueeze(1)).squeeze(1).tolist()
    return Answer(task, tuple(prompt), tuple(tokens), guesses, confidence)


def _probabilities(target: Engine, text: Tensor, places: slice, sampling: Sampling) -> Tensor:
    logits = target.forward(target.new_cache(1, text.shape[1]), text.to(target.device)).logits[0, places].cpu()
    return sampling.probabilities(logits)


def _coupled(q_TV: Tensor, p_TV: Tensor, answer_T: Tensor, name: str, key: int) -> Tensor:
    """Draws from q that equal the answer as often as they can."""
    answer_T1 = answer_T.unsqueeze(1)
    q_TV = torch.nn.functional.pad(q_TV, (0, p_TV.shape[1] - q_TV.shape[1]))
    positions_T = torch.arange(len(answer_T))
    u_T, v_T = (uniform(0, f"{purpose} {name}", torch.tensor(key), positions_T) for purpose in ("keep", "else"))
    keep_T = u_T * p_TV.gather(1, answer_T1).squeeze(1) < q_TV.gather(1, answer_T1).squeeze(1)
    rest_TV = (q_TV - p_TV).clamp(min=0)
    rest_TV = torch.where(rest_TV.sum(1, keepdim=True) > 0, rest_TV, q_TV)
    return torch.where(keep_T, answer_T, sample(rest_TV, v_T))


# ---- the stand-ins ----


class Sketched(StandIn):
    """A model in a method that is counted.

    Attributes:
        now: the answer that is being drafted along.
        reads: forwards so far by width.
        seconds: spent in here, which no real drafter spends.
    """

    def __init__(self, name: str, vocabulary: int) -> None:
        self.name, self.vocabulary = name, vocabulary
        self.now: Answer | None = None
        self.reads: Counter[int] = Counter()
        self.seconds = 0.0

    def drafter(self, length: int | None, stop: StoppingRule | None, name: str) -> Drafter:
        """A drafter that looks up.

        Raises:
            UserError: a rule that needs more than confidence.
        """
        if stop is not None and not isinstance(stop, Confidence | FixedLength):
            raise UserError(f"{type(stop).__name__} cannot be counted on recorded answers; use Confidence or a length")
        return _LookUp(self, length, stop, name)


class _LookUp(Drafter):
    """Proposes and reviews by the table; what it would have read is counted."""

    def __init__(self, member: Sketched, length: int | None, stop: StoppingRule | None, name: str) -> None:
        self.member, self.stop, self.name = member, stop, name
        self.max_length = length if stop is None else min(length or stop.max_length, stop.max_length)
        self._at = 0  # tokens of the text when it was last asked, all read
        self._ahead: list[int] = []  # and what was read behind them

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """All of the prompt but its last token is read."""
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
        answer, name = self.member.now, self.name
        tokens: list[int] = []
        product = 1.0
        pending = self._pending(committed, more)
        while len(tokens) < min(self.max_length, budget[0]):
            self.member.reads[pending] += 1
            pending = 1
            inside = place < len(answer.tokens)
            tokens.append(answer.guesses[name][place] if inside else _BEYOND)
            sure = answer.confidence[name][place] if inside else 0.0
            place += 1
            if isinstance(self.stop, Confidence):
                product = sure if self.stop.per_token else product * sure
                if len(tokens) >= self.stop.min_length and 1 - product > self.stop.threshold:
                    break
        self._ahead = more + tokens[:-1]
        draft = Draft(
            torch.tensor([tokens], dtype=torch.int64).reshape(1, -1), source=name, forwards={name: len(tokens)}
        )
        self.member.seconds += time.perf_counter() - started
        return draft

    def score(self, committed: Committed, prefix: Draft | None, draft: Draft) -> Tensor:
        """One-hot at the guesses."""
        started = time.perf_counter()
        place, more = self._place(committed, prefix)
        answer = self.member.now
        rows = draft.rows()[0]
        self.member.reads[self._pending(committed, more) + len(rows)] += 1
        logits = torch.zeros(1, len(rows) + 1, self.member.vocabulary)
        for column in range(len(rows) + 1):
            inside = place + column < len(answer.tokens)
            logits[0, column, answer.guesses[self.name][place + column] if inside else _BEYOND] = 1.0
        self._ahead = more + rows
        self.member.seconds += time.perf_counter() - started
        return logits

    def _place(self, committed: Committed, prefix: Draft | None) -> tuple[int, list[int]]:
        """Where in the answer the prefix ends, and the prefix."""
        more = [] if prefix is None or prefix.width == 0 else prefix.rows()[0]
        return len(committed.tokens[0]) - len(self.member.now.prompt) + len(more), more

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
        host_seconds: spent in drafting beside the models.
        accepted, drafted: tokens by who proposed them.
    """

    tokens: int = 0
    rounds: Counter[int] = field(default_factory=Counter)
    reads: dict[str, Counter[int]] = field(default_factory=dict)
    host_seconds: float = 0.0
    accepted: Counter[str] = field(default_factory=Counter)
    drafted: Counter[str] = field(default_factory=Counter)

    def add(self, other: Sketch) -> None:
        """Take in another's counts."""
        self.tokens += other.tokens
        self.rounds += other.rounds
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
        more: members that are no models, such as a bigram table.

    Returns:
        one sketch an answer.
    """
    names = set(answers[0].guesses) if answers else set()
    members = {name: Sketched(name, vocabulary) for name in names}
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
        member.now, member.reads, member.seconds = answer, Counter(), 0.0
    committed = Committed([list(answer.prompt)], [0])
    capacity = len(answer.prompt) + len(answer.tokens)
    drafter.start(committed, Setting(Sampling(0.0), ends, vocabulary, capacity))
    place = 0
    while place < len(answer.tokens):
        started = time.perf_counter()
        budget = len(answer.tokens) - place - 1
        drafted: list[int] = []
        if budget > 0:
            draft = drafter.propose(committed, None, [budget], None)
            drafted = draft.rows()[0]
        accepted = next((k for k, token in enumerate(drafted) if token != answer.tokens[place + k]), len(drafted))
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
    found.host_seconds = max(0.0, found.host_seconds - sum(member.seconds for member in members.values()))
    return found
