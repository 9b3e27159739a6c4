"""`responses.py --plan`: what would run, on a real rendered example, with estimates; fails on what would fail later."""

from collections.abc import Mapping
from typing import Any

from data_prep.answering import Limits, logged, require_recorded
from data_prep.planning import TargetFacts, check_disk, gigabytes, show_recipe, target_facts
from data_prep.prompts import Prompts, is_complete, prompts_manifest, prompts_of
from data_prep.responses import SECTIONS, check_settings
from drafttrain.config import Parsed, Recipe
from drafttrain.dialogue import Dialogue
from drafttrain.errors import UserError
from drafttrain.records import iter_records
from drafttrain.run_folder import RunFolder

_BYTES_PER_TOKEN = 4  # int32 ids; the text beside them is about as large, compression gains that back


def plan(parsed: Parsed) -> None:
    """Print the recipe, an example with the trained tokens marked, and estimates.

    Raises:
        UserError: whatever would stop the run: bad prompts, a target that is not there, too little disk.
    """
    recipe, run = parsed.recipe, RunFolder(parsed.run)
    show_recipe(parsed, SECTIONS)
    check_settings(recipe)
    facts = target_facts(recipe.target)
    prompts = _prompts(recipe, facts, run)
    if recipe.responses.source == "logged":
        require_recorded(prompts.records)
    print(f"\n--- one example; [[ ]] marks the tokens that are trained on ---\n{_example(prompts, recipe, facts)}")
    print("\n--- what would run ---")
    for line in (*prompts.notes, *_work(prompts, recipe, run), *_sizes(prompts, recipe, facts, run)):
        print(line)


def _prompts(recipe: Recipe, facts: TargetFacts, run: RunFolder) -> Prompts:
    asked_for = (recipe.prompts, facts.tokenizer, facts.context)
    if is_complete(run.prompts):
        found = iter_records(run.prompts, "prompts", expect=prompts_manifest(*asked_for))
        return Prompts(list(found), [f"prompts are there already: {run.prompts}"])
    return prompts_of(*asked_for)


def _example(prompts: Prompts, recipe: Recipe, facts: TargetFacts) -> str:
    limits = Limits(facts.context, recipe.responses.max_new_tokens, recipe.responses.batch_size)
    record = next((each for each in prompts.records if each["split"] == "train"), prompts.records[0])
    answer = f"the target's answer, at most {limits.room(record['prompt_ids'])} tokens"
    context = record["prompt_ids"]
    if recipe.responses.source == "logged":
        recorded = (row for each in prompts.records for _, row in logged([each], facts.tokenizer, facts.ends, limits))
        row = next(recorded, None)
        if row is None:
            raise UserError(
                "no recorded answer can be used: each is empty, or its prompt fills the target's context; shorten the "
                "prompts or set responses.source: generate."
            )
        context, answer = row["prompt_ids"], facts.tokenizer.decode(row["response_ids"])
    return f"{facts.tokenizer.decode(context)}[[{answer}]]"


def _work(prompts: Prompts, recipe: Recipe, run: RunFolder) -> list[str]:
    settings, counts = recipe.responses, prompts.counts()
    turns = sum(Dialogue.from_record(record).turns for record in prompts.records)
    shards = -(-len(prompts.records) // settings.shard_rows)
    done = len(list(run.responses.glob("part-*.parquet"))) if run.responses.exists() else 0
    sampling = settings.sampling
    way = "greedy" if sampling.temperature == 0 else f"sampled at temperature {sampling.temperature}"
    verb = "recorded answers kept" if settings.source == "logged" else f"answers by {recipe.target.path}, {way}"
    return [
        f"prompts: {counts['train']} train, {counts['tune']} tune, {counts['test']} test",
        f"responses: {turns} {verb}, at most {settings.max_new_tokens} tokens each",
        f"shards: {shards} of {settings.shard_rows} prompts, {done} of them there already, in {run.responses}",
    ]


def _sizes(prompts: Prompts, recipe: Recipe, facts: TargetFacts, run: RunFolder) -> list[str]:
    settings = recipe.responses
    longest = max(map(_tokens, prompts.records))
    row = min(facts.context, longest + settings.max_new_tokens)
    cache = settings.batch_size * row * facts.cache_bytes_per_token()
    needed = sum(_disk(record, settings.max_new_tokens) for record in prompts.records)
    memory = f"{gigabytes(facts.weight_bytes())} weights"
    memory += f" + {gigabytes(cache)} cache at the longest batch" if settings.source == "generate" else ""
    quantized = ", before quantization" if recipe.target.quantization else ""
    return [
        f"prompt tokens: {sum(map(_tokens, prompts.records))}, the longest prompt {longest} of {facts.context}",
        f"memory a process: {memory}{quantized}",
        f"disk: {check_disk(run.path, needed)}",
    ]


def _tokens(record: Mapping[str, Any]) -> int:
    return len(record["prompt_ids"])


def _disk(record: Mapping[str, Any], max_new_tokens: int) -> int:
    """Bytes of a prompt and its responses if every answer is as long as allowed; each turn holds all before it."""
    turns = Dialogue.from_record(record).turns
    contexts = (turns + 1) * _tokens(record) + max_new_tokens * turns * (turns + 1) // 2
    return _BYTES_PER_TOKEN * contexts
