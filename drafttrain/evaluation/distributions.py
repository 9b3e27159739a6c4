"""Sampled decoding by chi-square: hundreds of answers to one prompt, every token of them, and the negative controls.

Tokens are held against exact probabilities from an independent float64 reference (reference.py) by their ranks
(ranks.py). The decoder runs in float64 here as well: in less, a token at the very edge of a nucleus can fall on either
side of it, and a right decoder would then be accused more often than is stated.

False alarms are bounded for the whole command, not for a test: with n tests of methods, each is judged at `FAMILY` / n
(Bonferroni), so that the probability that any of them accuses a right decoder is at most `FAMILY`. So far out in the
tail Pearson's statistic is no longer distributed as chi-square. Therefore each test is made twice, on two halves of
the answers, and rejects if both do: p = (2 max(p_1, p_2))^2, in which the p-value of a half is needed near 1e-4 only
and may be wrong by the factor of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.longspec import BlockEngine
from drafttrain.decoding.loop import Decoder
from drafttrain.distributed import progress
from drafttrain.evaluation.controls import CONTROLS, is_broken
from drafttrain.evaluation.findings import Finding
from drafttrain.evaluation.names import sampling_name
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.ranks import Ranks
from drafttrain.evaluation.reference import after_prefixes, next_token
from drafttrain.models.longspec_states import BesideTarget
from drafttrain.ops.sampling import Sampling

FAMILY = 1e-6
"""At most this is the probability that a command accuses a right decoder."""

SAMPLINGS = (
    Sampling(1.0),
    Sampling(0.8, top_k=20),
    Sampling(1.0, top_p=0.9),
    Sampling(1.0, min_p=0.05),
    Sampling(0.9, repetition_penalty=1.5),
    Sampling(0.7, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
)
"""Options that are tested where the recipe names none."""

FALLBACK = "{}(drafter, length=5)"
"""What controls are made of where the method itself has no drafter that could be broken."""

TOKENS = 16
"""Most tokens of an answer."""

DTYPE = "float64"

_ENDS = 2  # frequent tokens that end an answer in the test of several end tokens
_BATCH = 100
_FEWER = 4  # times fewer answers are tried first with a control


@dataclass(frozen=True)
class Case:
    """Options of sampled decoding.

    Attributes:
        name: for people.
        sampling: not greedy.
        ends: tokens that end an answer.
    """

    name: str
    sampling: Sampling
    ends: frozenset[int]


@dataclass(frozen=True)
class Trial:
    """The same test for every method of a command.

    Attributes:
        prompt: token ids.
        cases: options; the controls run at the first.
        answers: sampled answers of each test.
        level: a p-value below this rejects.
        seed: of all draws.
    """

    prompt: Sequence[int]
    cases: Sequence[Case]
    answers: int
    level: float
    seed: int


def level_of(tests: int) -> float:
    """The level of one test among as many."""
    return FAMILY / max(1, tests)


def cases_of(models: Models, samplings: Sequence[Sampling], prompt: Sequence[int]) -> list[Case]:
    """Every setting with the target's own end tokens, and the first with a few frequent tokens as ends besides."""
    cases = [Case(sampling_name(each), each, models.ends) for each in samplings]
    target = models.engines(DTYPE)[0].model
    likely_V = (-next_token(target, prompt, samplings[0], models.vocabulary)).argsort(kind="stable").tolist()
    ends = models.ends.union([token for token in likely_V if token not in models.ends][:_ENDS])
    return [*cases, Case(f"{cases[0].name}, {len(ends)} end tokens", samplings[0], ends)]


def least_certain(models: Models, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The prompt whose next token is hardest to tell: there a wrong distribution shows best."""
    target = models.engines(DTYPE)[0].model

    def entropy(prompt: Sequence[int]) -> float:
        p_V = next_token(target, prompt, Sampling(1.0), models.vocabulary)
        return -sum(p * math.log(p) for p in p_V.tolist() if p > 0)

    return max(prompts, key=entropy)


def distribution_findings(models: Models, method: str, trial: Trial) -> list[Finding]:
    """The method at every case, and the negative controls."""
    cases = progress(trial.cases, len(trial.cases), f"{method}: distributions")
    found = [case_finding(models, method, trial, case) for case in cases]
    return found + control_findings(models, method, trial)


def case_finding(models: Models, method: str, trial: Trial, case: Case) -> Finding:
    """The method at one case."""
    drawn = draw(_decoder(models, method, case, trial.seed), trial.prompt, trial.answers)
    return _judged(models, method, case.name, trial, case, drawn, control=False)


def control_findings(models: Models, method: str, trial: Trial) -> list[Finding]:
    """Every negative control at the first case."""
    case = trial.cases[0]
    broken = broken_method(models, method)
    found = []
    for control in progress(CONTROLS, len(CONTROLS), f"{broken}: controls"):
        test = f"{case.name}, control: {control.name}" + (f" ({broken})" if broken != method else "")
        decoder = control.broken(_decoder(models, broken, case, trial.seed))
        for answers in (trial.answers // _FEWER, trial.answers):  # most are caught by few
            drawn = draw(decoder, trial.prompt, answers)
            if not is_broken(decoder):
                finding = Finding(method, test, "not applicable", "its drafter declares no q")
                break
            finding = _judged(models, method, test, trial, case, drawn, control=True)
            if finding.passed:
                break
        found.append(finding)
    return found


def broken_method(models: Models, method: str) -> str:
    """The method that controls are made of: the one under test, if it drafts."""
    return (
        method if models.decoder(method, Sampling(0.0), 0, DTYPE).drafter is not None else FALLBACK.format(models.chain)
    )


def draw(decoder: Decoder, prompt: Sequence[int], answers: int) -> list[list[int]]:
    """Many answers to one prompt, in batches, each with draws of its own."""
    found: list[list[int]] = []
    for start in range(0, answers, _BATCH):
        ids = list(range(start, min(start + _BATCH, answers)))
        completions = decoder.generate([list(prompt)] * len(ids), TOKENS, ids)
        found += [completion.token_ids for completion in completions]
    return found


def _decoder(models: Models, method: str, case: Case, seed: int) -> Decoder:
    decoder = models.decoder(method, case.sampling, seed, DTYPE)
    decoder.eos_ids = case.ends
    return decoder


def _judged(
    models: Models, method: str, test: str, trial: Trial, case: Case, drawn: Sequence[Sequence[int]], control: bool
) -> Finding:
    halves = [ranks.test() for ranks in _ranks(models, trial, case, drawn)]
    p_value = _both([half.p_value for half in halves])
    rejected = p_value < trial.level
    if control:
        result = "caught" if rejected else "NOT CAUGHT"
    else:
        result = "FAILED" if rejected else "passed"
    statistics = " and ".join(f"{half.statistic:.0f}" for half in halves)
    number = (
        f"p = {p_value:.2g} (chi-square {statistics}, {halves[0].degrees} degrees of freedom, {len(drawn)} answers)"
    )
    figures = {"p_value": p_value, "level": trial.level, "halves": [vars(half) for half in halves]}
    return Finding(method, test, result, number, figures)


def _ranks(models: Models, trial: Trial, case: Case, drawn: Sequence[Sequence[int]]) -> tuple[Ranks, Ranks]:
    """Ranks of all tokens, answers taken in turn for the first and the second half."""
    texts = [[*trial.prompt, *tokens] for tokens in drawn]
    exact, drafted = (
        after_prefixes(_alone(engine), texts, len(trial.prompt), case.sampling, models.vocabulary)
        for engine in models.engines(DTYPE)
    )
    halves = Ranks(), Ranks()
    random = np.random.default_rng(trial.seed)
    for number, (tokens, p_TV, q_TV) in enumerate(zip(drawn, exact, drafted, strict=True)):
        halves[number % 2].add(tokens, p_TV, q_TV, case.ends, TOKENS, random)
    return halves


def _alone(engine: Engine | BlockEngine) -> Any:
    """A model that says by itself what it would draw behind a text; a LongSpec drafter needs its target for that."""
    if isinstance(engine, BlockEngine):
        return BesideTarget(engine.model, engine.target.model)
    return engine.model


def _both(p_values: Sequence[float]) -> float:
    """The p-value of two independent tests that must both reject; one that saw an impossible token suffices."""
    return 0.0 if min(p_values) == 0 else min(1.0, (2 * max(p_values)) ** 2)
