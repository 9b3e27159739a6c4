"""`traces.py --plan`: what would run, on a real response, with estimates; fails on what would fail later."""

from dataclasses import replace
from typing import Any

from data_prep.planning import TargetFacts, check_disk, gigabytes, show_recipe, target_facts
from data_prep.traces import SECTIONS, check_settings, refuse_scores, responses_manifest
from drafttrain.config import Parsed, Recipe, SamplingConfig, TargetConfig
from drafttrain.evaluation.trace_scores import RULES
from drafttrain.evaluation.tracing import PIECE
from drafttrain.models.loading import (
    check_same_tokenizer,
    drafter_path,
    is_longspec,
    load_model_config,
    load_tokenizer,
)
from drafttrain.records import read_records
from drafttrain.run_folder import RunFolder

_NUMBER = 4  # bytes of a stored id or float, before compression
_REJECTED = 0.4  # share of rejected positions that the estimate of the runs takes


def plan(parsed: Parsed) -> None:
    """Print the recipe, an example with the traced tokens marked, and estimates.

    Raises:
        UserError: whatever would stop the run: no responses, no drafter, another tokenizer, too little disk.
    """
    recipe, run = parsed.recipe, RunFolder(parsed.run)
    show_recipe(parsed, SECTIONS)
    check_settings(recipe)
    manifest = responses_manifest(recipe, run)
    path = drafter_path(recipe, run)
    refuse_scores(path, recipe)
    target = target_facts(recipe.target)
    check_same_tokenizer(target.tokenizer, load_tokenizer(path), path)
    rows = read_records(run.responses, "responses", columns=["split", "prompt_ids", "response_ids"])
    print(f"\n--- one example; [[ ]] marks the tokens that are traced ---\n{_example(rows, target)}")
    print("\n--- what would run ---")
    if is_longspec(path):
        steps: int = load_model_config(path).depth
        lines = [*_step_work(rows, recipe, path, run, steps), *_step_sizes(rows, target, recipe, run, steps)]
    else:
        drafter = target_facts(TargetConfig(path=path, trust_remote_code=recipe.target.trust_remote_code))
        lines = [*_work(rows, manifest, recipe, path, run), *_sizes(rows, target, drafter, recipe, run)]
    for line in lines:
        print(line)


def _example(rows: Any, facts: TargetFacts) -> str:
    row = next((row for row in rows if row["split"] == "train"), None) or next(iter(rows), None)
    if row is None:
        return "(no responses)"
    return f"{facts.tokenizer.decode(row['prompt_ids'])}[[{facts.tokenizer.decode(row['response_ids'])}]]"


def _work(rows: Any, manifest: dict[str, Any], recipe: Recipe, path: str, run: RunFolder) -> list[str]:
    settings = recipe.traces
    sampling = settings.sampling or SamplingConfig(**manifest["sampling"])
    way = "greedy" if sampling.temperature == 0 else f"sampled at temperature {sampling.temperature}"
    shards = -(-len(rows) // settings.shard_rows)
    done = len(list(run.traces.glob("part-*.parquet"))) if run.traces.exists() else 0
    runs = f"{settings.run_length} tokens beyond every rejection" if settings.run_length else "none"
    return [
        f"traces: {len(rows)} responses of {recipe.target.path}, {_tokens(rows)} tokens, drafter {path}, {way}",
        f"runs: {runs}",
        f"scores: {', '.join([*RULES, *settings.scores])}",
        f"shards: {shards} of {settings.shard_rows} responses, {done} of them there already, in {run.traces}",
    ]


def _sizes(rows: Any, target: TargetFacts, drafter: TargetFacts, recipe: Recipe, run: RunFolder) -> list[str]:
    settings = recipe.traces
    longest = max((len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows), default=0)
    answer = max((len(row["response_ids"]) for row in rows), default=0)
    branches = _REJECTED * answer * (settings.run_length + 1)
    cache = longest * target.cache_bytes_per_token() + (longest + branches) * drafter.cache_bytes_per_token()
    weights = target.weight_bytes() + drafter.weight_bytes()
    # about a dozen tensors of PIECE float32 entries are alive at the widest point: logits, p, q, sorting, sampling
    memory = int(weights + settings.batch_size * cache + 12 * 4 * PIECE)
    return [
        f"memory a process: {gigabytes(memory)}, of which {gigabytes(weights)} weights",
        f"disk: {check_disk(run.path, disk_bytes(rows, recipe))}",
    ]


def _step_work(rows: Any, recipe: Recipe, path: str, run: RunFolder, steps: int) -> list[str]:
    shards = -(-len(rows) // recipe.traces.shard_rows)
    done = len(list(run.step_traces.glob("part-*.parquet"))) if run.step_traces.exists() else 0
    return [
        f"step traces: {len(rows)} responses of {recipe.target.path}, {_tokens(rows)} tokens, LongSpec drafter {path}",
        f"steps: each response as drafted at step 1 to {steps} of a round",
        f"shards: {shards} of {recipe.traces.shard_rows} responses, {done} of them there already, in {run.step_traces}",
    ]


def _step_sizes(rows: Any, target: TargetFacts, recipe: Recipe, run: RunFolder, steps: int) -> list[str]:
    read = sum(sorted(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)[-recipe.traces.batch_size :])
    states = read * (target.cache_bytes_per_token() + 16 * target.config.get_text_config().hidden_size)
    memory = int(target.weight_bytes() + states + 12 * 4 * PIECE)
    without_runs = replace(recipe, traces=replace(recipe.traces, run_length=0))
    return [
        f"memory a process: {gigabytes(memory)}, of which {gigabytes(target.weight_bytes())} weights of the target",
        f"disk: {check_disk(run.path, steps * disk_bytes(rows, without_runs))}",
    ]


def disk_bytes(rows: Any, recipe: Recipe) -> int:
    """Bytes of the traces, before compression."""
    settings = recipe.traces
    scores = len(RULES) + len(settings.scores)
    per_token = 7 + 4 * settings.top_k + 2 * len(settings.temperatures) + scores
    per_token += _REJECTED * settings.run_length * (2 + scores)
    prompts = sum(len(row["prompt_ids"]) for row in rows)
    return int(_NUMBER * (_tokens(rows) * per_token + prompts))


def _tokens(rows: Any) -> int:
    return sum(len(row["response_ids"]) for row in rows)
