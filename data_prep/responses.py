"""Answer the prompts: the target's responses, on which everything else is trained.

Makes the prompts first where they are missing (RUN/prompts), then RUN/responses. With `responses.source: generate` the
target answers with the bundled decoder; with `logged` recorded answers are kept. Killed at any moment and started
again, with any number of processes, it ends with the same rows.

    accelerate launch data_prep/responses.py --config recipes/reference/pair.yaml --run runs/pair
"""

import dataclasses
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drafttrain.config import Parsed, Recipe, parse
from drafttrain.errors import UserError, run_program
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from data_prep.answering import Answered, Decode, Question
    from data_prep.planning import TargetFacts
    from drafttrain.decoding.counts import Completion
    from drafttrain.models.loading import Loaded
    from drafttrain.records import ShardedWriter

SECTIONS = ("target", "prompts", "responses")


@run_program
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parsed = parse(__doc__.split("\n\n")[0], SECTIONS, argv)
    if parsed.plan:
        from data_prep.responses_plan import plan

        plan(parsed)
        return
    from drafttrain.distributed import process_group

    with process_group():
        respond(parsed)


def respond(parsed: Parsed) -> None:
    """Make prompts and responses of a run; every process calls it.

    Raises:
        UserError: bad prompts, settings or target; or the folder holds responses made with other settings.
    """
    from data_prep.planning import target_facts
    from data_prep.prompts import ensure_prompts, prompts_manifest
    from drafttrain.distributed import say
    from drafttrain.models.loading import load_target
    from drafttrain.records import ShardedWriter

    recipe, run = parsed.recipe, RunFolder(parsed.run).create()
    check_settings(recipe)
    facts = target_facts(recipe.target)
    run.record(parsed, "data_prep/responses.py")
    asked_for = (recipe.prompts, facts.tokenizer, facts.context)
    total = ensure_prompts(*asked_for, run)
    check_recorded(recipe, run)
    loaded = load_target(recipe.target)
    manifest = responses_manifest(recipe, loaded, prompts_manifest(*asked_for))
    writer = ShardedWriter(run.responses, manifest, total, recipe.responses.shard_rows)
    _fill(writer, recipe, facts, loaded, run)
    writer.finish()
    say(summary(run))


def check_settings(recipe: Recipe) -> None:
    """Refuse impossible settings before anything is loaded.

    Raises:
        UserError: names the setting.
    """
    from drafttrain.ops.sampling import Sampling

    Sampling(**dataclasses.asdict(recipe.responses.sampling))


def check_recorded(recipe: Recipe, run: RunFolder) -> None:
    """Refuse `logged` prompts without a recorded answer."""
    from data_prep.answering import require_recorded
    from drafttrain.records import iter_records

    if recipe.responses.source == "logged":
        require_recorded(iter_records(run.prompts, "prompts"))


def responses_manifest(recipe: Recipe, loaded: "Loaded", prompts: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides what the responses are; the batch size is not among it."""
    settings = recipe.responses
    manifest = {
        "kind": "responses",
        "source": settings.source,
        "max_new_tokens": settings.max_new_tokens,
        "prompts": hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()[:32],
        "fingerprints": {"target": loaded.fingerprint.to_dict()},
        "sampling": dataclasses.asdict(settings.sampling),
    }
    return manifest | ({"seed": recipe.seed} if settings.source == "generate" else {})


def summary(run: RunFolder) -> str:
    """What the responses of a run are, in a line.

    Raises:
        UserError: there is none.
    """
    from drafttrain.records import iter_records

    splits: Counter[str] = Counter()
    tokens = ended = 0
    for row in iter_records(run.responses, "responses", columns=["split", "finish_reason", "response_ids"]):
        splits[row["split"]] += 1
        tokens += len(row["response_ids"])
        ended += row["finish_reason"] != "length"
    if not (total := splits.total()):
        raise UserError(
            "no prompt got an answer: each is longer than the target's context, or its recorded answer is empty; see "
            f"{run.prompts}."
        )
    counts = ", ".join(f"{number} {split}" for split, number in sorted(splits.items(), reverse=True))
    share = 100 * ended / total
    return f"responses: {total} ({counts}), {tokens} tokens, {share:.0f} % end by themselves, in {run.responses}"


def _fill(writer: "ShardedWriter", recipe: Recipe, facts: "TargetFacts", loaded: "Loaded", run: RunFolder) -> None:
    """Make this process's share of the shards that are missing."""
    from data_prep.answering import in_order
    from drafttrain.dialogue import Dialogue
    from drafttrain.distributed import progress, rank, world_size
    from drafttrain.records import read_records

    pending = writer.pending(rank(), world_size())
    if not pending:
        return
    prompts = read_records(run.prompts, "prompts")
    answer = _answerer(recipe, facts, loaded)
    turns = sum(Dialogue.from_record(prompts[at]).turns for shard in pending for at in writer.source_range(shard))

    def work() -> Iterator[None]:
        for shard in pending:
            rows = []
            for entry in answer([prompts[at] for at in writer.source_range(shard)]):
                rows.append(entry)
                yield
            writer.write(shard, in_order(rows))

    for _ in progress(work(), turns, "answers"):
        pass


def _answerer(
    recipe: Recipe, facts: "TargetFacts", loaded: "Loaded"
) -> "Callable[[Sequence[dict[str, Any]]], Answered]":
    """The function that turns prompt records into rows."""
    from data_prep.answering import Limits, generated, logged

    settings = recipe.responses
    limits = Limits(facts.context, settings.max_new_tokens, settings.batch_size)
    if settings.source == "logged":
        return lambda records: logged(records, facts.tokenizer, facts.ends, limits)
    decode = _decoder(recipe, facts, loaded)
    return lambda records: generated(records, facts.tokenizer, decode, limits)


def _decoder(recipe: Recipe, facts: "TargetFacts", loaded: "Loaded") -> "Decode":
    """Answers a batch of questions with the bundled decoder, autoregressively.

    Logits beyond the tokenizer's entries are padding of the embedding and stand for no text; they are cut off.
    """
    import torch

    from drafttrain.decoding.engine import Engine
    from drafttrain.decoding.loop import Decoder
    from drafttrain.decoding.stop_strings import StopStrings
    from drafttrain.models.loading import vocabulary_size
    from drafttrain.ops.sampling import Sampling

    entries = 1 + max(facts.tokenizer.get_vocab().values())
    engine = Engine(loaded.model, vocabulary=min(entries, vocabulary_size(loaded.model))).checked()
    sampling = Sampling(**dataclasses.asdict(recipe.responses.sampling))
    stops = StopStrings(facts.tokenizer, recipe.responses.stop) if recipe.responses.stop else None
    decoding = Decoder(engine, None, sampling, facts.ends, recipe.seed, stops)

    def decode(batch: "Sequence[Question]") -> "list[Completion]":
        ids, room = [question.ids for question in batch], [question.room for question in batch]
        try:
            return decoding.generate(ids, room, [question.sample_id for question in batch])
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of memory with {len(batch)} prompts of up to {max(map(len, ids))} tokens; lower "
                "responses.batch_size and run again, what is finished is kept."
            ) from None

    return decode


if __name__ == "__main__":
    main()
