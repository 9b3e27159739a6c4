"""`drafttrain lossless`: prove that a method emits what the target alone would.

    drafttrain lossless --target.path T --drafter.path D --method "Model(drafter, length=5)" --run runs/proof

* Tokens, greedy: identical to autoregressive decoding in float64; in float32 and bfloat16 every first difference is
  held against the noise measured there (exactness.py).
* Distributions, sampled: thousands of answers to one prompt, their first tokens counted, against exact probabilities
  from an independent float64 reference (reference.py), by Pearson's chi-square. The decoder runs in float32, whose
  rounding is far below what so many answers can show.
* Negative controls: the same test must reject a target of another temperature, and a drafter that declares another
  distribution than it draws from (the commonest bug of public decoders). A test that cannot reject these proves
  nothing, and fails.

Exit code 1 when anything fails; what was found is in RUN/lossless.json.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drafttrain.config import Parsed
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.loop import Decoder
from drafttrain.distributed import progress, say
from drafttrain.errors import UserError
from drafttrain.evaluation.environment import describe, load
from drafttrain.evaluation.exactness import greedy_check, not_checked
from drafttrain.evaluation.inputs import inputs_of
from drafttrain.evaluation.names import sampling_name, sampling_of
from drafttrain.evaluation.pair import Models, load_models
from drafttrain.evaluation.plan import check_pair
from drafttrain.evaluation.questions import Question, to_sample
from drafttrain.evaluation.reference import Tree, tree
from drafttrain.evaluation.runner import answer
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Exactness, to_json_line
from drafttrain.evaluation.statistics import ChiSquare, chi_square
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder, write_atomically

DEFAULT_METHODS = ("Model(drafter, length=5)",)
SAMPLINGS = (Sampling(1.0), Sampling(0.8, top_k=20), Sampling(1.0, top_p=0.9))

FALSE_ALARM = 1e-7
"""A p-value below this is a failure; one in ten million right decoders would be accused."""

ANSWERS = 3000
DEPTH = 3
WIDE = 6
"""The chi-square test: answers, tokens of each that are looked at, tokens told apart at each place."""

_DTYPES = ("float64", "float32", "bfloat16")
_EXTRA = 3  # tokens beyond those looked at, so that drafts of full length occur
_BATCH = 250
_PROMPTS = 4
_CONTROL_TEMPERATURE = 1.35
_SHARPER = 0.4

_TEXTS = ("Once upon a time", "def main():", "The answer is", "1, 2, 3,")
"""Prompts where none are given."""


@dataclass
class Distribution:
    """A chi-square test of a method, or a negative control of it."""

    method: str
    sampling: str
    what: str
    must_reject: bool
    statistic: float
    degrees: int
    p_value: float
    answers: int
    passed: bool


@dataclass
class Proof:
    """Everything that was found out about a method."""

    method: str
    tokens: list[Exactness]
    distributions: list[Distribution]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.passed for check in [*self.tokens, *self.distributions])


def command(parsed: Parsed) -> None:
    """Prove the methods of evaluate.methods (--method) and write RUN/lossless.json.

    Raises:
        UserError: a part is missing or damaged, or a method cannot be run.
        SystemExit: code 1, a method is not lossless.
    """
    samplings = [sampling_of(each) for each in parsed.recipe.evaluate.samplings]
    samplings = [each for each in samplings if not each.greedy and not each.penalised] or list(SAMPLINGS)
    methods = list(parsed.recipe.evaluate.methods or DEFAULT_METHODS)
    if parsed.plan:
        plan_lossless(parsed, methods, samplings)
        return
    run = RunFolder(parsed.run).create()
    run.record(parsed, "drafttrain lossless")
    began = load()
    models = load_models(parsed)
    methods = [models.canonical(method) for method in methods]
    prompts = _prompts(parsed, models)
    proofs = [
        prove(models, method, prompts, samplings, parsed.recipe.evaluate.tolerance, parsed.recipe.seed)
        for method in methods
    ]
    _write(run, models, proofs, began)
    for proof in proofs:
        _show(proof)
    say(f"Report: {run.path / 'lossless.json'}")
    if not all(proof.passed for proof in proofs):
        raise SystemExit(1)


def plan_lossless(parsed: Parsed, methods: Sequence[str], samplings: Sequence[Sampling]) -> None:
    """Print what would be tested; raises what would stop it, without loading weights."""
    path = check_pair(parsed, methods)
    print(f"would test {parsed.recipe.target.path} with {path}, into {RunFolder(parsed.run).path / 'lossless.json'}")
    for method in methods:
        print(f"  {method}: greedy in {', '.join(_DTYPES)} on at most {_PROMPTS} prompts")
        for sampling in samplings:
            print(f"    {sampling_name(sampling)}: {ANSWERS} answers by chi-square, and negative controls")


def prove(
    models: Models,
    method: str,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    tolerance: float,
    seed: int,
    answers: int = ANSWERS,
) -> Proof:
    """All tests of one method.

    Args:
        models: of the pair.
        method: an expression.
        prompts: token ids.
        samplings: that distributions are tested at.
        tolerance: how many times the noise a gap may be in low precision.
        seed: of all draws.
        answers: of each chi-square test.

    Raises:
        UserError: the models cannot be had in the dtypes that distributions are tested in.
    """
    questions = [Question(f"prompt {i}", "", 0, tuple(ids), 48, None, i) for i, ids in enumerate(prompts)]
    _require_reference(models)
    prompt = _least_certain(models, prompts)
    tokens = [_tokens(models, method, questions, dtype, tolerance, seed) for dtype in _DTYPES]
    distributions = []
    for sampling in progress(samplings, len(samplings), f"{method}: distributions"):
        distributions += distribution_tests(models, method, prompt, sampling, seed, answers)
    for dtype in _DTYPES:
        models.release(dtype)
    return Proof(method, tokens, distributions)


def _require_reference(models: Models) -> None:
    try:
        for dtype in ("float64", "float32"):
            models.engines(dtype)
    except UserError as error:
        raise UserError(
            f"{error} The test of distributions needs it; `drafttrain evaluate` checks output in the dtype served."
        ) from None


def _tokens(
    models: Models, method: str, questions: Sequence[Question], dtype: str, tolerance: float, seed: int
) -> Exactness:
    """Greedy answers of the method, one batch, against autoregressive ones, one by one; where the dtype can be had."""
    try:
        models.engines(dtype)
    except (UserError, torch.OutOfMemoryError) as error:
        return not_checked(dtype, error)
    decoders = [models.decoder(each, Sampling(0.0), seed, dtype) for each in (method, AUTOREGRESSIVE)]
    own = answer(decoders[0], questions) if dtype == "float64" else _one_by_one(decoders[0], questions)
    base = _one_by_one(decoders[1], questions)
    rows = [
        [to_sample(q, [c], method, "greedy", models.tokenizer) for q, c in zip(questions, found, strict=True)]
        for found in (own, base)
    ]
    longest = decoders[0].drafter.max_length if decoders[0].drafter else 1
    engine = models.engines(dtype)[0]
    check = greedy_check(engine, Sampling(0.0), questions, *rows, sorted({2, 1 + longest}), tolerance)
    return dataclasses.replace(check, tier=dtype if dtype != "bfloat16" else "low precision")


def _one_by_one(decoder: Decoder, questions: Sequence[Question]) -> list[Any]:
    return [answer(decoder, [question])[0] for question in questions]


# ---------------------------------------------------------------------------------------------------------------------
# Distributions


def distribution_tests(
    models: Models, method: str, prompt: Sequence[int], sampling: Sampling, seed: int, answers: int = ANSWERS
) -> list[Distribution]:
    """The test and its negative controls at one setting."""
    exact = _tree(models, prompt, sampling)
    hotter = dataclasses.replace(sampling, temperature=_CONTROL_TEMPERATURE * sampling.temperature)
    drawn = draw(models.decoder(method, sampling, seed, "float32"), prompt, answers)
    tests = [
        _test(method, sampling, "the method", False, exact, drawn),
        _test(method, sampling, "control: a hotter target", True, _tree(models, prompt, hotter), drawn),
    ]
    decoder = models.decoder(method, sampling, seed, "float32")
    if decoder.drafter is not None and sampling.top_p == 1 and sampling.min_p == 0:
        decoder.drafter = Misdeclared(decoder.drafter)
        wrong = draw(decoder, prompt, answers)
        if decoder.drafter.declared:  # greedy and copied proposals declare nothing that could be wrong
            tests.append(_test(method, sampling, "control: a drafter that misdeclares q", True, exact, wrong))
    return tests


def _least_certain(models: Models, prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The prompt whose next token is hardest to tell: there a wrong distribution shows best."""
    target = models.engines("float64")[0].model

    def entropy(prompt: Sequence[int]) -> float:
        leaves = tree(target, prompt, Sampling(1.0), models.ends, models.vocabulary, 1, models.vocabulary).leaves
        return -sum(p * math.log(p) for p in leaves.values() if p > 0)

    return max(prompts, key=entropy)


def _tree(models: Models, prompt: Sequence[int], sampling: Sampling) -> Tree:
    target, drafter = (engine.model for engine in models.engines("float64"))
    return tree(target, prompt, sampling, models.ends, models.vocabulary, DEPTH, WIDE, drafter)


def draw(decoder: Decoder, prompt: Sequence[int], answers: int) -> list[list[int]]:
    """Many answers to one prompt, in batches, each with draws of its own."""
    found: list[list[int]] = []
    for start in range(0, answers, _BATCH):
        ids = list(range(start, min(start + _BATCH, answers)))
        completions = decoder.generate([list(prompt)] * len(ids), DEPTH + _EXTRA, ids)
        found += [completion.token_ids for completion in completions]
    return found


def _test(
    method: str, sampling: Sampling, what: str, must_reject: bool, reference: Tree, drawn: Sequence[Sequence[int]]
) -> Distribution:
    found: ChiSquare = chi_square(reference.count(drawn), reference.leaves)
    rejected = found.p_value < FALSE_ALARM
    name = sampling_name(sampling)
    return Distribution(
        method,
        name,
        what,
        must_reject,
        found.statistic,
        found.degrees,
        found.p_value,
        found.observations,
        rejected == must_reject,
    )


class Misdeclared:
    """A drafter with the commonest bug: it draws from a sharper distribution than it declares.

    It drafts at a lower temperature and declares the q of the run's own, which is a power of the drawn one as long as
    no nucleus (whose size depends on the temperature) cuts it.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.declared = False
        self.name, self.max_length = drafter.name, drafter.max_length

    def start(self, committed: Committed, setting: Setting, *more: Any) -> None:
        """Let the drafter draw at a lower temperature."""
        sharper = dataclasses.replace(setting.sampling, temperature=_SHARPER * setting.sampling.temperature)
        self._drafter.start(committed, dataclasses.replace(setting, sampling=sharper), *more)

    def propose(self, *arguments: Any) -> Draft:
        """Declare the distribution of the run's temperature."""
        draft = self._drafter.propose(*arguments)
        if draft.probs_BKV is None:
            return draft
        self.declared = True
        declared_BKV = draft.probs_BKV**_SHARPER
        return dataclasses.replace(draft, probs_BKV=declared_BKV / declared_BKV.sum(-1, keepdim=True))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the drafter's."""
        return getattr(self._drafter, name)


# ---------------------------------------------------------------------------------------------------------------------
# Input and output


def _prompts(parsed: Parsed, models: Models) -> list[list[int]]:
    """A few prompts: the run's, those of prompts.path, or short texts."""
    if RunFolder(parsed.run).prompts.exists() or parsed.recipe.prompts.path is not None:
        found = inputs_of(parsed, models.tokenizer, models.context)
        prompts = [list(record["prompt_ids"]) for record in found.test]
    else:
        start = [] if models.tokenizer.bos_token_id is None else [models.tokenizer.bos_token_id]
        prompts = [start + models.tokenizer(text, add_special_tokens=False)["input_ids"] for text in _TEXTS]
    room = models.context - 64
    prompts = sorted((ids for ids in prompts if 0 < len(ids) <= room), key=len)[:_PROMPTS]
    if not prompts:
        raise UserError(f"no prompt of at most {room} tokens is there to test with; give shorter ones.")
    return prompts


def _write(run: RunFolder, models: Models, proofs: Sequence[Proof], began: float) -> None:
    data = {
        "schema_version": 1,
        "passed": all(proof.passed for proof in proofs),
        "environment": json.loads(to_json_line(describe(models.device, began))),
        "pair": json.loads(to_json_line(models.describe(run, False))),
        "proofs": [{"passed": proof.passed, **json.loads(to_json_line(proof))} for proof in proofs],
    }
    write_atomically(run.path / "lossless.json", json.dumps(data, indent=1) + "\n")


def _show(proof: Proof) -> None:
    say(f"\n{proof.method}: {'lossless' if proof.passed else 'NOT LOSSLESS'}")
    for check in proof.tokens:
        state = "passed" if check.passed else "FAILED"
        found = f"{check.identical} of {check.answers} greedy answers identical, {state} " if check.answers else ""
        say(f"  {check.tier:14} {found}{check.reason}")
    for test in proof.distributions:
        expected = "must be rejected" if test.must_reject else "must not be"
        state = "passed" if test.passed else "FAILED"
        say(f"  {test.sampling}, {test.what}: p = {test.p_value:.2g} ({expected}), {state}")
