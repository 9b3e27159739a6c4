"""Trace the responses: what the drafter proposes along them, and what the target accepts of it.

Reads RUN/responses and the drafter, writes RUN/traces: the record from which acceptance heads are trained and any
stopping rule is replayed. Killed at any moment and started again, with any number of processes, it ends with the same
rows.

    accelerate launch data_prep/traces.py --config recipes/reference/pair.yaml --run runs/pair
"""

import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drafttrain.config import Parsed, Recipe, SamplingConfig, parse, resolve_path
from drafttrain.errors import UserError, run_program
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from drafttrain.evaluation.tracing import Tracer
    from drafttrain.models.acceptance_head import AcceptanceHead
    from drafttrain.models.loading import Loaded
    from drafttrain.records import ShardedWriter

SECTIONS = ("target", "drafter", "traces")


@run_program
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parsed = parse(__doc__.split("\n\n")[0], SECTIONS, argv)
    if parsed.plan:
        from data_prep.traces_plan import plan

        plan(parsed)
        return
    from drafttrain.distributed import process_group

    with process_group():
        trace(parsed)


def trace(parsed: Parsed) -> None:
    """Make the traces of a run; every process calls it.

    Raises:
        UserError: no responses or drafter, parts that do not belong together, impossible settings, or the folder holds
            traces made with other settings.
    """
    from drafttrain.distributed import say
    from drafttrain.records import ShardedWriter

    run = RunFolder(parsed.run).create()
    check_settings(parsed.recipe)
    recorded = responses_manifest(parsed.recipe, run)
    pair = _load(parsed, run, recorded)
    run.record(parsed, "data_prep/traces.py")
    manifest = traces_manifest(parsed.recipe, recorded, pair)
    folder = run.step_traces if pair.by_step else run.traces
    writer = ShardedWriter(folder, manifest, recorded["rows"], parsed.recipe.traces.shard_rows)
    _fill(writer, pair, parsed, run)
    writer.finish()
    say(step_summary(run) if pair.by_step else summary(run))


@dataclass(frozen=True)
class TracedPair:
    """The models that are traced.

    Attributes:
        target, drafter: loaded and frozen.
        ends: tokens that end a response.
        vocabulary: token ids that both models and the tokenizer know.
        heads: acceptance heads whose scores are stored, by the name that the recipe gives.
        sampling: how both models' tokens are drawn.
    """

    target: "Loaded"
    drafter: "Loaded"
    ends: frozenset[int]
    vocabulary: int
    heads: "dict[str, AcceptanceHead]"
    sampling: SamplingConfig

    @property
    def by_step(self) -> bool:
        """Whether the drafter is a LongSpec drafter, which is traced step by step."""
        from drafttrain.models.longspec import LongSpecDrafter

        return isinstance(self.drafter.model, LongSpecDrafter)


def check_settings(recipe: Recipe) -> None:
    """Refuse impossible settings before anything is loaded.

    Raises:
        UserError: names the setting.
    """
    from drafttrain.ops.sampling import Sampling

    settings = recipe.traces
    if settings.sampling is not None:
        Sampling(**dataclasses.asdict(settings.sampling))
    if any(temperature <= 0 for temperature in settings.temperatures):
        raise UserError(f"traces.temperatures must be above 0, not {settings.temperatures}.")


def responses_manifest(recipe: Recipe, run: RunFolder) -> dict[str, Any]:
    """The manifest of the run's responses.

    Raises:
        UserError: there are none, or they were drawn in another way than is to be traced.
    """
    from drafttrain.records import read_manifest

    manifest = read_manifest(run.require(run.responses, "data_prep/responses.py"), "responses")
    asked, drawn = recipe.traces.sampling, SamplingConfig(**manifest["sampling"])
    if asked is not None and asked != drawn and manifest["source"] == "generate":
        name = next(
            item.name for item in dataclasses.fields(drawn) if getattr(asked, item.name) != getattr(drawn, item.name)
        )
        was, now = (f"{name} {getattr(sampling, name)}" for sampling in (drawn, asked))
        raise UserError(
            f"the responses in {run.responses} were drawn with {was} and traces.sampling has {now}, but traces are "
            "exact only along the target's own draws; leave traces.sampling out, or make such responses in another run "
            "folder."
        )
    return manifest


def traces_manifest(recipe: Recipe, recorded: dict[str, Any], pair: TracedPair) -> dict[str, Any]:
    """Everything that decides what the traces are; the batch size is not among it."""
    from drafttrain.evaluation.trace_scores import RULES, score_names
    from drafttrain.models.fingerprint import weights_hash
    from drafttrain.models.loading import max_context

    settings = recipe.traces
    heads = pair.heads.items()
    if pair.by_step:
        own = {"kind": "step_traces", "steps": pair.drafter.model.config.depth}
    else:
        own = {"kind": "traces", "run_length": settings.run_length}
        own["scores"] = [*RULES, *(column for name, head in heads for column in score_names(name, head))]
        own["heads"] = {name: weights_hash(head) for name, head in heads}
    return {
        "responses": hashlib.sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()[:32],
        "max_new_tokens": recorded["max_new_tokens"],
        "context": max_context(pair.target.model),
        "eos_ids": sorted(pair.ends),
        "vocabulary": pair.vocabulary,
        "fingerprints": {"target": pair.target.fingerprint.to_dict(), "drafter": pair.drafter.fingerprint.to_dict()},
        "sampling": dataclasses.asdict(pair.sampling),
        "seed": recipe.seed,
        "top_k": settings.top_k,
        "temperatures": list(temperatures(recipe, pair)),
        **own,
    }


def summary(run: RunFolder) -> str:
    """What the traces of a run are, in a line."""
    import numpy as np

    from drafttrain.records import iter_records

    rows = tokens = accepted = 0
    overlap = 0.0
    for row in iter_records(run.traces, "traces", columns=["response_ids", "draft_ids", "overlap"]):
        rows, tokens = rows + 1, tokens + len(row["response_ids"])
        accepted += int(np.count_nonzero(np.array(row["response_ids"]) == np.array(row["draft_ids"])))
        overlap += float(np.sum(row["overlap"]))
    share, expected = accepted / max(1, tokens), overlap / max(1, tokens)
    return (
        f"traces: {rows} responses, {tokens} drafted tokens, {share:.1%} accepted ({expected:.1%} expected), "
        f"in {run.traces}"
    )


def step_summary(run: RunFolder) -> str:
    """What the traces of a LongSpec drafter are, in a line: acceptance by step, where the step can be reached."""
    import numpy as np

    from drafttrain.records import iter_records

    found: dict[int, list[np.ndarray]] = {}
    for row in iter_records(run.step_traces, "step_traces", columns=["step", "response_ids", "draft_ids", "reached"]):
        accepted = np.array(row["response_ids"]) == np.array(row["draft_ids"])
        found.setdefault(row["step"], []).append(accepted[np.array(row["reached"], dtype=bool)])
    shares = {step: np.concatenate(parts) for step, parts in sorted(found.items())}
    told = ", ".join(f"{step}: {part.mean() if len(part) else 0.0:.1%} of {len(part)}" for step, part in shares.items())
    return f"accepted by step of the round, where it is reached: {told}; in {run.step_traces}"


def _load(parsed: Parsed, run: RunFolder, recorded: dict[str, Any]) -> TracedPair:
    """Models and heads of the recipe, checked against each other and against the responses."""
    from drafttrain.dialogue import end_tokens
    from drafttrain.evaluation.pair import check_made_for
    from drafttrain.models.fingerprint import Fingerprint
    from drafttrain.models.loading import (
        check_same_tokenizer,
        drafter_path,
        is_longspec,
        load_drafter,
        load_target,
        shared_vocabulary,
        vocabulary_size,
    )

    recipe = parsed.recipe
    path = drafter_path(recipe, run)
    refuse_scores(path, recipe)
    target = load_target(recipe.target)
    # in the target's dtype, as both are served: a trained drafter is stored in that of its training
    drafter = load_drafter(path, recipe.target.dtype, recipe.target.trust_remote_code)
    check_same_tokenizer(target.tokenizer, drafter.tokenizer, path)
    if is_longspec(path):  # another target's keys mean nothing to it
        check_made_for(path, target, parsed.accept_new_target)
    answered_by = Fingerprint.from_dict(recorded["fingerprints"]["target"])
    what = f"the responses in {run.responses} were written by one target"
    answered_by.require(target.fingerprint, what, parsed.accept_new_target, "make the responses again")
    rows = vocabulary_size(target.model) if is_longspec(path) else shared_vocabulary(target.model, drafter.model)
    vocabulary = min(1 + max(target.tokenizer.get_vocab().values()), rows)
    if recipe.traces.top_k > vocabulary:
        raise UserError(f"traces.top_k is {recipe.traces.top_k}, but the models share {vocabulary} tokens; lower it.")
    return TracedPair(
        target=target,
        drafter=drafter,
        ends=end_tokens(target.tokenizer, getattr(target.model, "generation_config", None)),
        vocabulary=vocabulary,
        heads=_load_heads(parsed, target, drafter),
        sampling=recipe.traces.sampling or SamplingConfig(**recorded["sampling"]),
    )


def refuse_scores(path: str, recipe: Recipe) -> None:
    """Refuse to score the tokens of a LongSpec drafter.

    Raises:
        UserError: heads are named for it.
    """
    from drafttrain.models.loading import is_longspec

    if is_longspec(path) and recipe.traces.scores:
        raise UserError("traces.scores are for replays, which LongSpec drafters have none of; leave it out.")


def _load_heads(parsed: Parsed, target: "Loaded", drafter: "Loaded") -> "dict[str, AcceptanceHead]":
    from drafttrain.models.acceptance_head import AcceptanceHead

    base = parsed.config.resolve().parent if parsed.config else None
    pair = {"target": target.fingerprint, "drafter": drafter.fingerprint, "accept_new_target": parsed.accept_new_target}
    return {
        name: AcceptanceHead.load(resolve_path(name, base), **pair, device=drafter.model.device)
        for name in parsed.recipe.traces.scores
    }


def temperatures(recipe: Recipe, pair: TracedPair) -> tuple[float, ...]:
    """At which log Z is stored: those of the recipe, and the one that is traced."""
    asked, own = recipe.traces.temperatures, pair.sampling.temperature
    return (*asked, own) if own > 0 and own not in asked else tuple(asked)


def make_tracer(recipe: Recipe, pair: TracedPair) -> "Tracer":
    """The object that makes the rows."""
    from drafttrain.decoding.engine import Engine
    from drafttrain.evaluation.step_tracing import StepTracer
    from drafttrain.evaluation.tracing import Tracer, TraceSettings
    from drafttrain.models.loading import vocabulary_size
    from drafttrain.ops.sampling import Sampling

    settings = TraceSettings(
        sampling=Sampling(**dataclasses.asdict(pair.sampling)),
        seed=recipe.seed,
        top_k=recipe.traces.top_k,
        temperatures=temperatures(recipe, pair),
        run_length=recipe.traces.run_length,
    )
    entries = 1 + max(pair.target.tokenizer.get_vocab().values())
    if pair.by_step:
        target = Engine(pair.target.model, min(entries, vocabulary_size(pair.target.model))).checked()
        return StepTracer(target, pair.drafter.model, settings)
    models = [pair.target.model, pair.drafter.model]
    engines = [Engine(model, min(entries, vocabulary_size(model))).checked() for model in models]  # as when decoding
    return Tracer(*engines, settings, pair.heads)


def _fill(writer: "ShardedWriter", pair: TracedPair, parsed: Parsed, run: RunFolder) -> None:
    """Make this process's share of the shards that are missing."""
    from drafttrain.distributed import progress, rank, world_size
    from drafttrain.records import read_records

    pending = writer.pending(rank(), world_size())
    if not pending:
        return
    responses = read_records(run.responses, "responses")
    tracer = make_tracer(parsed.recipe, pair)
    batch_size = parsed.recipe.traces.batch_size
    total = sum(len(writer.source_range(shard)) for shard in pending)

    def work() -> Iterator[None]:
        for shard in pending:
            rows = [responses[at] for at in writer.source_range(shard)]
            traced: list[dict[str, Any]] = [{}] * len(rows)
            for places in batches([len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows], batch_size):
                for place, row in zip(places, _trace(tracer, [rows[place] for place in places]), strict=True):
                    traced[place] = row
                    yield
            writer.write(shard, list(itertools.chain(*traced)) if pair.by_step else traced)

    for _ in progress(work(), total, "traces"):
        pass


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of rows that are read together: of about one length, so that little is padding."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _trace(tracer: "Tracer", rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import torch

    try:
        return tracer.trace(rows)
    except torch.OutOfMemoryError:
        longest = max(len(row["prompt_ids"]) + len(row["response_ids"]) for row in rows)
        raise UserError(
            f"out of memory with {len(rows)} responses of up to {longest} tokens with their prompts; lower "
            "traces.batch_size and run again, what is finished is kept."
        ) from None


if __name__ == "__main__":
    main()
