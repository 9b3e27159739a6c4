"""What the tuning split is for: the costs of this pair on this machine, and the traces that settings are replayed on.

Traces are those of the run where they were made for the same decoding setting. For any other setting, and in a probe
that trained nothing, the target answers the tuning prompts here and the answers are traced in memory: replay is exact
only on answers drawn as they will be served.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drafttrain.distributed import say
from drafttrain.evaluation.measure import costs_by_family
from drafttrain.evaluation.methods import KNOWN, family_of
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.questions import Question, response_row, usable
from drafttrain.evaluation.runner import Timings, answer, batches, instrument_all
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Costs
from drafttrain.evaluation.trace_record import Record, record_of
from drafttrain.evaluation.trace_scores import RULES, known_probabilities, score_rows, with_run_entropy
from drafttrain.ops.sampling import Sampling
from drafttrain.records import read_manifest, read_records
from drafttrain.run_folder import RunFolder

Row = Mapping[str, Any]

CALIBRATION_TOKENS = 48
"""New tokens of an instrumented run: enough rounds for a mean."""

_LENGTHS = (2, 6)


@dataclass(frozen=True)
class Traces:
    """Rows of the schema `traces`, the manifest that says how to read them, and where they are from, in words."""

    rows: list[Row]
    manifest: Mapping[str, Any]
    origin: str


def calibrate(
    models: Models, sampling: Sampling, questions: Sequence[Question], batch_size: int, longest: int, seed: int
) -> dict[str, Timings]:
    """Instrumented runs on tuning prompts of methods of every family, which `by_family` makes costs of.

    Every method runs once unmeasured before; the measured runs are interleaved question by question.
    """
    chain = models.chain
    methods = [AUTOREGRESSIVE, *[f"{chain}(drafter, length={k})" for k in _LENGTHS if k < longest]]
    methods += [f"{chain}(drafter, length={longest})", f"{chain}(drafter, stop=Confidence(0.4, max={longest}))"]
    methods += [f"{chain}(drafter, stop=AcceptanceHead({name}, 0.4, max={longest}))" for name in models.heads]
    short = [dataclasses.replace(each, limit=min(each.limit, CALIBRATION_TOKENS)) for each in questions]
    groups = batches(short, batch_size)
    decoders = {method: models.decoder(method, sampling, seed) for method in methods}
    return instrument_all(decoders, groups, models.engines())


def by_family(runs: Sequence[Mapping[str, Timings]], widths: int) -> dict[str, Costs]:
    """Costs of each family from all instrumented runs of its methods, the autoregressive one among them."""
    families: dict[str, Timings] = {}
    for timings in runs:
        for method, found in timings.items():
            families.setdefault(family_of(method), Timings()).add(found)
    baseline = families.pop("autoregressive")
    return costs_by_family(families, baseline, widths)


def stored_traces(
    run: RunFolder, models: Models, sampling: Sampling, longest: int, accept_new_target: bool
) -> Traces | None:
    """The run's own traces of the tuning split, None where there are none for this decoding setting.

    Nor are they of use if they do not follow the drafter as far as `longest` tokens: a rule that drafts on behind a
    rejection would get those tokens for nothing.

    Raises:
        UserError: they were made for another target or drafter.
    """
    if not run.traces.exists():
        return None
    manifest = read_manifest(run.traces, "traces")
    if manifest["sampling"] != dataclasses.asdict(sampling):
        return None
    if manifest["run_length"] < longest - 1:
        say(
            f"the run's traces hold {manifest['run_length']} tokens beyond a rejection, {longest - 1} are needed "
            "(traces.run_length): the tuning prompts are traced anew"
        )
        return None
    expect = {"fingerprints": {"target": models.target.fingerprint.to_dict()}}
    expect["fingerprints"]["drafter"] = models.drafter.fingerprint.to_dict()
    rows = read_records(run.traces, "traces", expect, accept_new_weights=accept_new_target)
    chosen = [row for row in rows if row["split"] == "tune"]
    return Traces(chosen, manifest, "replay of the run's traces (tuning split)") if chosen else None


def made_traces(
    models: Models,
    sampling: Sampling,
    questions: Sequence[Question],
    batch_size: int,
    run_length: int,
    seed: int,
    apart: bool = True,
) -> Traces:
    """Answer the tuning prompts without a drafter and trace the answers, in memory.

    Args:
        models: of the pair.
        sampling: how the answers are drawn.
        questions: tuning prompts.
        batch_size: answered together.
        run_length: tokens that the drafter is followed for beyond every rejection.
        seed: of all draws.
        apart: whether none of them is a test prompt; only said in the origin.
    """
    from drafttrain.evaluation.tracing import Tracer, TraceSettings

    decoder = models.decoder(AUTOREGRESSIVE, sampling, seed)
    settings = TraceSettings(sampling, seed, top_k=1, temperatures=(), run_length=run_length)
    tracer = Tracer(*models.engines(), settings)
    rows: list[Row] = []
    for group in batches(sorted(questions, key=lambda each: len(each.ids)), batch_size):
        responses = [
            response_row(question, completion.token_ids)
            for question, completion in zip(group, answer(decoder, group), strict=True)
        ]
        rows += tracer.trace(responses)
    manifest = {
        "sampling": dataclasses.asdict(sampling),
        "scores": list(RULES),
        "run_length": run_length,
        "eos_ids": sorted(models.ends),
        "max_new_tokens": max((question.limit for question in questions), default=1),
        "context": models.context,
    }
    prompts = "tuning prompts" if apart else "a quarter of the test prompts themselves, for want of tuning prompts"
    return Traces(rows, manifest, f"replay of traces made for it ({prompts})")


def record_for_replay(models: Models, traces: Traces, references: Mapping[tuple[str, int], str]) -> Record:
    """Traces as replay reads them, with the heads' scores, without the answers that do not count in a report."""
    rows = [row for row in traces.rows if counts(row, references, models.tokenizer)]
    rows = rows or list(traces.rows)
    scored = with_run_entropy(rows, traces.manifest)
    drafter = models.engines()[1].model
    added = {name: score_rows(drafter, head, scored) for name, head in models.heads.items()}
    if not Sampling(**traces.manifest["sampling"]).greedy:  # else it is 0 or 1, and the rule perfect stopping
        added[KNOWN] = known_probabilities(scored)
    return record_of(rows, traces.manifest, added)


def counts(row: Row, references: Mapping[tuple[str, int], str], tokenizer: Any) -> bool:
    """Whether an answer would count: it does not loop, and is right where it has to be."""
    ids = list(row["response_ids"])
    return bool(ids) and usable(row["task"], references.get((row["prompt_id"], row["turn"])), ids, tokenizer)


def task_weights(tuning: Iterable[str], test: Iterable[str]) -> dict[str, float]:
    """Weight of each task: its test prompts over its tuning prompts, each given as the tasks of all prompts."""
    tuned, tested = list(tuning), list(test)
    if not set(tuned) & set(tested):
        return {}  # other tasks altogether: as they come
    return {task: tested.count(task) / tuned.count(task) for task in dict.fromkeys(tuned)}
