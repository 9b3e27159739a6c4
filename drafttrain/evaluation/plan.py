"""`drafttrain evaluate --plan`: what would run, on a real prompt; fails on what would fail later. Loads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from drafttrain.config import EvaluateConfig, Parsed
from drafttrain.context.ahead import NO_LONGSPEC
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import parse_method, resolved
from drafttrain.errors import UserError
from drafttrain.evaluation.filler import check_contexts
from drafttrain.evaluation.inputs import Inputs, inputs_of
from drafttrain.evaluation.load_study import group_of, request_count, sizes_of
from drafttrain.evaluation.methods import check_length, kind_of
from drafttrain.evaluation.names import sampling_name
from drafttrain.evaluation.pair import BIGRAMS, head_names, speed_dtype, synthetic_of
from drafttrain.evaluation.sweep import settings
from drafttrain.evaluation.synthetic_study import NAME, work
from drafttrain.models.acceptance_head import AcceptanceHeadConfig, load_config
from drafttrain.models.drafters import without_storage
from drafttrain.models.loading import (
    check_same_tokenizer,
    drafter_path,
    is_longspec,
    load_model_config,
    load_tokenizer,
)
from drafttrain.models.longspec import LongSpecConfig
from drafttrain.run_folder import RunFolder

_SECTIONS = ("target", "drafter", "prompts", "evaluate", "seed")
_NO_LIMIT = 1 << 30


def plan(parsed: Parsed) -> None:
    """Print the recipe, a prompt as the target reads it, and the work.

    Raises:
        UserError: whatever would stop the run: no drafter, another tokenizer, no prompts, an impossible method or rate.
    """
    recipe, run = parsed.recipe, RunFolder(parsed.run)
    synthetic_of(recipe.evaluate)
    long = bool(recipe.context.lengths or recipe.context.path)
    sections = ("target", "drafter", "context", "seed") if long else _SECTIONS
    print(yaml.safe_dump({name: parsed.resolved[name] for name in sections}, sort_keys=False).rstrip())
    path = check_pair(parsed, [recipe.context.decoding] if long else recipe.evaluate.methods or [])
    if long:
        from drafttrain.evaluation.context_plan import context_plan

        if is_longspec(path):
            raise UserError(NO_LONGSPEC)
        print("\n".join(["\n--- what would run ---", *context_plan(parsed, path, context_of(recipe, path))]))
        return
    for method in recipe.evaluate.methods or []:
        check_length(method)
    target = load_tokenizer(recipe.target.path, recipe.target.revision, recipe.target.trust_remote_code)
    heads = {name: load_config(run.path / name) for name in head_names(run)}
    check_contexts(recipe.evaluate.contexts, context_of(recipe, path))
    found = inputs_of(parsed, target, context_of(recipe, path), write=False)
    shown = target.decode(found.test[0]["prompt_ids"])
    print(
        f"\n--- one test prompt; [[ ]] marks what every method is timed on ---\n{shown}[[the answer, at most", end=" "
    )
    print(f"{recipe.evaluate.max_new_tokens} tokens]]\n\n--- what would run ---")
    for line in _work(parsed, found, path, heads):
        print(line)


def check_pair(parsed: Parsed, methods: Sequence[str]) -> str:
    """Path of the drafter, when it fits the target and the methods name nothing that is missing.

    Raises:
        UserError: there is no drafter, it has another tokenizer, one of the two cannot be rolled back, or a method is
            malformed or names a stranger, or a class from outside that is not allowed or not to be had.
    """
    recipe, run = parsed.recipe, RunFolder(parsed.run)
    path = drafter_path(recipe, run)
    for config in _configs(recipe, path):
        if not isinstance(config, LongSpecConfig):
            Engine(without_storage(config, recipe.target.trust_remote_code))
    target = load_tokenizer(recipe.target.path, recipe.target.revision, recipe.target.trust_remote_code)
    check_same_tokenizer(target, load_tokenizer(path, None, recipe.target.trust_remote_code), path)
    members = {"drafter", *head_names(run), *recipe.evaluate.members} | ({BIGRAMS} if run.bigrams.exists() else set())
    _check_methods(methods, members, parsed.allow_code)
    return path


def context_of(recipe: Any, path: str) -> int:
    """Tokens that both models can read and write together, by their configurations."""
    configs = _configs(recipe, path)
    return min(getattr(config.get_text_config(), "max_position_embeddings", _NO_LIMIT) for config in configs)


def _configs(recipe: Any, path: str) -> list[Any]:
    """Configurations of target and drafter."""
    target = recipe.target
    return [
        load_model_config(target.path, target.revision, target.trust_remote_code),
        load_model_config(path, None, target.trust_remote_code),
    ]


def _check_methods(methods: Sequence[str], members: set[str], allow_code: bool) -> None:
    for method in methods:
        missing = sorted(resolved(parse_method(method), allow_code).members - members)
        if missing:
            raise UserError(
                f"{method} names {missing[0]}, which this run does not have; train it first or leave it out."
            )


def _work(parsed: Parsed, found: Inputs, path: str, heads: dict[str, AcceptanceHeadConfig]) -> list[str]:
    config = parsed.recipe.evaluate
    if config.synthetic_acceptance is not None:
        pair = f"pair: {parsed.recipe.target.path} with {path}"
        return [pair, *work(config, len(found.test)), f"speeds: {parsed.run / f'{NAME}.json'}"]
    samplings = [sampling_name(each) for each in config.samplings or [parsed.recipe.responses.sampling]]
    methods = 1 + (len(config.methods) if config.methods else (2 + len(heads)) * config.top)
    turns = len(found.test) * max(1, len(config.contexts))
    tokens = turns * methods * config.repeats * config.max_new_tokens * len(samplings)
    tasks = ", ".join(f"{task} {count}" for task, count in Counter(r["task"] for r in found.test).items())
    return [
        f"pair: {parsed.recipe.target.path} with {path}" + (f", heads: {', '.join(heads)}" if heads else ", no head"),
        f"settings: {'; '.join(samplings)}; {speed_dtype(parsed.recipe)}, batch {config.batch_size}"
        + (", compiled" if config.compile else ""),
        f"replay: {len(settings(config, heads))} lengths and thresholds, and perfect stopping",
        f"real runs: {methods} methods x {turns} test conversations x {config.repeats} repeats ({tasks})",
        f"tokens: at most {tokens:,} for the turns of one answer each, decoded one prompt after another",
        _load(config),
        f"report: {RunFolder(parsed.run).report / 'report.html'}",
    ]


def _load(config: EvaluateConfig) -> str:
    """What the load study would run, a decoding setting."""
    sizes = sizes_of(config)
    kinds = {kind_of(method) for method in config.methods} if config.methods else {"fixed", "head"}
    methods = 1 + len({group_of(kind) for kind in kinds - {"autoregressive"}})
    if not sizes or methods == 1:
        return "load: not studied (evaluate.batch_sizes)"
    count = request_count(sizes)
    tokens = len(sizes) * methods * count * config.repeats * config.max_new_tokens
    work = f"{methods} methods x {count} requests x {config.repeats} repeats"
    return f"load: {work} in batches of {', '.join(map(str, sizes))}; at most {tokens:,} tokens a setting"
