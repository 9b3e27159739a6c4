"""`drafttrain lossless`: prove that a method emits what the target alone would.

    drafttrain lossless --target.path T --drafter.path D --method "Model(drafter, length=5)"

* Tokens, greedy, on every prompt: in float64 identical to autoregressive decoding, one answer at a time, in batches,
  and with a repetition penalty; in float32 and bfloat16 every first difference is held against the noise measured
  there (identity.py, exactness.py).
* Distributions, sampled: every token of hundreds of answers to one prompt against exact probabilities from an
  independent float64 reference (reference.py), by chi-square over combinations of options, with a bound on false alarms
  that holds for the whole command (distributions.py).
* Negative controls: the same tests must reject decoders with the known bugs (controls.py). A test that cannot reject
  these proves nothing, and fails.

Exit code 1 when anything fails; what was found is in RUN/lossless.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from drafttrain.config import Parsed, PromptsConfig
from drafttrain.distributed import say
from drafttrain.errors import UserError
from drafttrain.evaluation.controls import CONTROLS
from drafttrain.evaluation.distributions import (
    FAMILY,
    SAMPLINGS,
    Trial,
    cases_of,
    distribution_findings,
    least_certain,
    level_of,
)
from drafttrain.evaluation.environment import describe, load
from drafttrain.evaluation.findings import Finding, aligned
from drafttrain.evaluation.identity import BATCH, LOW_PRECISION, float64_findings, low_precision_finding
from drafttrain.evaluation.inputs import inputs_of
from drafttrain.evaluation.names import sampling_name, sampling_of
from drafttrain.evaluation.pair import Models, load_models
from drafttrain.evaluation.plan import check_pair, context_of
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.schema import to_json_line
from drafttrain.models.drafters import without_storage
from drafttrain.models.loading import default_device, drafter_path, is_longspec, load_model_config, load_tokenizer
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder, write_atomically

SCHEMA_VERSION = 2
DEFAULT_METHOD = "{}(drafter, length=5)"

TEXTS = (
    "Once upon a time",
    "def main():",
    "The answer is",
    "1, 2, 3,",
    "import os\nimport sys\n",
    "Question: what is the word? Answer:",
    '{"name": "',
    "To be or not to be, to be or not",
)
"""Prompts where none are given."""

_SHORT = 48  # a given prompt of more tokens is not asked thousands of times
_CANDIDATES = 16


@dataclass
class Proof:
    """Everything that was found out about a method."""

    method: str
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(finding.passed for finding in self.findings)

    @property
    def verdict(self) -> str:
        """In capitals when it is none to rely on."""
        if any(finding.result == "FAILED" for finding in self.findings):
            return "NOT LOSSLESS"
        return "lossless" if self.passed else "NOT PROVEN"


def command(parsed: Parsed) -> None:
    """Prove the methods of evaluate.methods (--method) and write RUN/lossless.json.

    Raises:
        UserError: a part is missing or damaged, a method cannot be run, or acceptance is to be synthetic.
        SystemExit: code 1, a method is not lossless or a test has no power.
    """
    config = parsed.recipe.evaluate
    if config.synthetic_acceptance is not None or config.random_weights:
        raise UserError(
            "nothing can be proven of synthetic acceptance; leave evaluate.synthetic_acceptance and "
            "evaluate.random_weights out."
        )
    given = [sampling_of(each) for each in config.samplings]
    samplings = [each for each in given if not each.greedy] or list(SAMPLINGS)
    methods = list(config.methods or [_default(parsed)])
    if parsed.plan:
        plan_lossless(parsed, methods, samplings)
        return
    run = RunFolder(parsed.run).create()
    run.record(parsed, "drafttrain lossless")
    began = load()
    models = load_models(parsed)
    methods = [models.canonical(method) for method in methods]
    questions = _questions(parsed, models.tokenizer, models.context)
    trial = trial_of(models, questions, samplings, len(methods), config.answers, parsed.recipe.seed)
    proofs = [prove(models, method, questions, trial, config.tolerance) for method in methods]
    _write(run, models, questions, trial, proofs, began)
    _show(proofs, trial)
    say(f"Report: {run.path / 'lossless.json'}")
    if not all(proof.passed for proof in proofs):
        raise SystemExit(1)


def _default(parsed: Parsed) -> str:
    path = drafter_path(parsed.recipe, RunFolder(parsed.run))
    return DEFAULT_METHOD.format("LongSpec" if is_longspec(path) else "Model")


def trial_of(
    models: Models, questions: Sequence[Question], samplings: Sequence[Sampling], methods: int, answers: int, seed: int
) -> Trial:
    """The tests of distributions, the same for every method of the command.

    Args:
        models: of the pair.
        questions: short ones among them are candidates for the prompt, beside `TEXTS`.
        samplings: that distributions are tested at.
        methods: how many methods are tested: they share the bound on false alarms.
        answers: of each test.
        seed: of all draws.

    Raises:
        UserError: the models cannot be had in float64.
    """
    try:
        models.engines("float64")
    except UserError as error:
        raise UserError(
            f"{error} The test of distributions needs it; `drafttrain evaluate` checks output in the dtype served."
        ) from None
    short = [question.ids for question in questions if len(question.ids) <= _SHORT]
    prompt = least_certain(models, [*short[:_CANDIDATES], *texts_of(models.tokenizer).values()])
    cases = cases_of(models, samplings, prompt)
    return Trial(prompt, cases, answers, level_of(methods * len(cases)), seed)


def prove(models: Models, method: str, questions: Sequence[Question], trial: Trial, tolerance: float) -> Proof:
    """All tests of one method.

    Args:
        models: of the pair.
        method: an expression.
        questions: answered greedily.
        trial: of distributions.
        tolerance: how many times the noise a gap may be in low precision.
    """
    findings = float64_findings(models, method, questions, trial.seed)
    findings += distribution_findings(models, method, trial)
    models.release("float64")
    for dtype in LOW_PRECISION:
        findings.append(low_precision_finding(models, method, questions, dtype, tolerance, trial.seed))
        models.release(dtype)
    return Proof(method, findings)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def texts_of(tokenizer: Any) -> dict[str, list[int]]:
    """Token ids of `TEXTS`, by a name."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    return {f"text {number}": ids for number, ids in enumerate(texts)}


def _questions(parsed: Parsed, tokenizer: Any, context: int, write: bool = True) -> list[Question]:
    """All prompts of the run or the recipe, `TEXTS` where neither says anything of prompts."""
    prompts: Mapping[str, Sequence[int]] = texts_of(tokenizer)
    if RunFolder(parsed.run).responses.exists() or parsed.recipe.prompts != PromptsConfig():
        found = inputs_of(parsed, tokenizer, context, write)
        records = [*found.tune, *found.test] if found.apart else found.test  # nothing is tuned here
        prompts = {record["prompt_id"]: record["prompt_ids"] for record in records}
    return questions_of(prompts, context, parsed.recipe.evaluate.max_new_tokens)


def questions_of(prompts: Mapping[str, Sequence[int]], context: int, limit: int) -> list[Question]:
    """What is asked greedily: every prompt that leaves room for an answer.

    Args:
        prompts: token ids by name.
        context: tokens that both models can read and write together.
        limit: most new tokens.

    Raises:
        UserError: no prompt leaves any.
    """
    questions = [
        Question(name, "", 0, tuple(ids), min(limit, context - len(ids)), None, number)
        for number, (name, ids) in enumerate(prompts.items())
        if 0 < len(ids) < context
    ]
    if not questions:
        raise UserError(f"no prompt of fewer than {context} tokens is there to test with; give shorter ones.")
    return questions


# ---------------------------------------------------------------------------------------------------------------------
# Plan


def plan_lossless(parsed: Parsed, methods: Sequence[str], samplings: Sequence[Sampling]) -> None:
    """Print what would be tested; raises what would stop it, without loading weights."""
    recipe = parsed.recipe
    path = check_pair(parsed, methods)
    tokenizer = load_tokenizer(recipe.target.path, recipe.target.revision, recipe.target.trust_remote_code)
    questions = _questions(parsed, tokenizer, context_of(recipe, path), write=False)
    cases = len(samplings) + 1
    level = level_of(len(methods) * cases)
    print(f"would test {recipe.target.path} with {path}, into {RunFolder(parsed.run).path / 'lossless.json'}")
    for method in methods:
        print(f"  {method}")
        print(f"    greedy in float64 (one at a time, batches of {BATCH}, repetition penalty), float32, bfloat16")
        for sampling in samplings:
            print(f"    {sampling_name(sampling)}: {recipe.evaluate.answers} answers by chi-square")
        print(f"    {sampling_name(samplings[0])} with more end tokens: likewise")
        print(f"    controls that must be caught: {', '.join(each.name for each in CONTROLS)}")
    limit = recipe.evaluate.max_new_tokens
    print(f"prompts answered greedily: {len(questions)}, up to {limit} tokens each (evaluate.max_new_tokens)")
    print(f"false alarms: at most {FAMILY:g} for all tests of distributions, each rejecting at p < {level:.2g}")
    draws = len(methods) * (cases + len(CONTROLS))
    seconds = _seconds(parsed, path, draws, len(methods) * sum(question.limit for question in questions))
    print(f"time: about {max(1, round(seconds / 60))} min on {default_device()}")


def _seconds(parsed: Parsed, path: str, draws: int, tokens: int) -> float:
    """A rough estimate of the time.

    Args:
        parsed: the recipe.
        path: of the drafter.
        draws: chi-square tests that need answers of their own.
        tokens: greedy ones of all methods.
    """
    target, trust = parsed.recipe.target, parsed.recipe.target.trust_remote_code
    configs = [load_model_config(target.path, target.revision, trust), load_model_config(path, None, trust)]
    sizes = [sum(weight.numel() for weight in without_storage(each, trust).parameters()) for each in configs]
    layers = sum(config.get_text_config().num_hidden_layers for config in configs)
    operations = 2 * _READ * sum(sizes) * draws * parsed.recipe.evaluate.answers
    left, right = (torch.randn(768, 768, dtype=torch.float64, device=default_device()) for _ in range(2))
    started = time.perf_counter()
    for _ in range(4):
        left = left @ right / 768
    left.sum().item()
    speed = 4 * 2 * 768**3 / (time.perf_counter() - started)
    return operations / (_EFFICIENCY * speed) + _PASSES * tokens * layers * _LAYER_SECONDS


_READ = 60
_EFFICIENCY = 0.7
_PASSES = 6
_LAYER_SECONDS = 3e-4
"""For the estimate: tokens that each model reads in an answer, share of the matrix speed reached in that, forwards of
one token that a greedy token costs in all tests together, and seconds of a layer in such a forward."""


# ---------------------------------------------------------------------------------------------------------------------
# Output


def _write(
    run: RunFolder,
    models: Models,
    questions: Sequence[Question],
    trial: Trial,
    proofs: Sequence[Proof],
    began: float,
) -> None:
    data = {
        "schema_version": SCHEMA_VERSION,
        "passed": all(proof.passed for proof in proofs),
        "environment": json.loads(to_json_line(describe(models.device, began))),
        "pair": json.loads(to_json_line(models.describe(run, False))),
        "workload": {
            "prompts": len(questions),
            "max_new_tokens": max(question.limit for question in questions),
            "cases": [case.name for case in trial.cases],
            "answers": trial.answers,
            "prompt_ids": list(trial.prompt),
            "seed": trial.seed,
        },
        "false_alarms": {"family": FAMILY, "tests": len(proofs) * len(trial.cases), "level": trial.level},
        "proofs": [
            {"verdict": proof.verdict, "passed": proof.passed, **json.loads(to_json_line(proof))} for proof in proofs
        ],
    }
    write_atomically(run.path / "lossless.json", json.dumps(data, indent=1) + "\n")


def _show(proofs: Sequence[Proof], trial: Trial) -> None:
    say("")
    for line in aligned([finding for proof in proofs for finding in proof.findings]):
        say(line)
    tests = len(proofs) * len(trial.cases)
    say(
        f"\n{tests} tests of distributions, {trial.answers} answers each, rejecting at p < {trial.level:.2g}: the "
        f"probability that a right decoder is accused by any of them is at most {FAMILY:g}."
    )
    if any(finding.result == "NOT CAUGHT" for proof in proofs for finding in proof.findings):
        say(
            "A control was not caught, so its test has no power here: give more answers "
            f"(--answers {4 * trial.answers}), more prompts, or options and a drafter under which drafts are rejected."
        )
    for proof in proofs:
        say(f"{proof.method}: {proof.verdict}")
