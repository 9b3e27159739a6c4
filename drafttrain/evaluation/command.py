"""`drafttrain evaluate`: sweep by replay, really run the best, check the output, write the report.

    drafttrain evaluate --config recipes/reference/pair.yaml --run runs/pair
    drafttrain evaluate --target.path T --drafter.path D --prompts.path P --run runs/probe     a probe, nothing trained

Per decoding setting: costs are measured on tuning prompts; every fixed length and threshold is replayed on the tuning
split's traces; the best few of each kind answer the test prompts, interleaved with the autoregressive baseline; their
output is checked against the baseline's; the best fixed length and adaptive rule are run again in larger batches. The
report opens with one verdict. Exit code 1 if any output is not exact.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from drafttrain.config import Parsed, SamplingConfig
from drafttrain.distributed import say
from drafttrain.errors import UserError
from drafttrain.evaluation import figures
from drafttrain.evaluation.contexts import by_context, paired_lines
from drafttrain.evaluation.cost import predict
from drafttrain.evaluation.environment import describe, load, peak_bytes, streamed_bytes
from drafttrain.evaluation.exactness import greedy_check, identity_check, not_checked, sampled_check
from drafttrain.evaluation.examples import examples, sample_path
from drafttrain.evaluation.filler import behind_filler
from drafttrain.evaluation.inputs import Inputs, inputs_of
from drafttrain.evaluation.load import Load
from drafttrain.evaluation.load_study import Study
from drafttrain.evaluation.measure import breakdown
from drafttrain.evaluation.methods import check_length, family_of, kind_of, longest_of, parameter_of, widest_of
from drafttrain.evaluation.names import sampling_name, sampling_of
from drafttrain.evaluation.pair import Models, load_models
from drafttrain.evaluation.questions import Limits, Question, different, prompts_hash, questions_of, to_sample
from drafttrain.evaluation.report import write
from drafttrain.evaluation.runner import Timings, answer, batches, instrument_all, interleave
from drafttrain.evaluation.schema import (
    AUTOREGRESSIVE,
    SCHEMA_VERSION,
    ContextBucket,
    Costs,
    Exactness,
    ExampleAnswer,
    MethodResult,
    Report,
    Sample,
    SweepPoint,
    Workload,
)
from drafttrain.evaluation.schema import Sampling as NamedSampling
from drafttrain.evaluation.sweep import Setting as SweptSetting
from drafttrain.evaluation.sweep import pick, settings, sweep
from drafttrain.evaluation.tree_tuning import tuned_tree
from drafttrain.evaluation.tuning import (
    by_family,
    calibrate,
    made_traces,
    record_for_replay,
    stored_traces,
    task_weights,
)
from drafttrain.evaluation.verdict import decide, verdict_lines
from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder

FLOAT64_QUESTIONS = 3
FLOAT64_TOKENS = 48
"""The float64 check: a few answers of this many tokens at most, all methods together in one batch each."""

CALIBRATION_QUESTIONS = 6
"""Tuning questions that costs are measured on."""

LONGSPEC_LENGTHS = (2, 4, 6)
"""Lengths of a LongSpec drafter that are run where a recipe names no methods."""

LONGSPEC_THRESHOLDS = (0.3, 0.5, 0.7)
"""Thresholds of its acceptance heads, likewise."""

SPEED_CHECK_QUESTIONS = 6
"""Questions of the instrumented runs that say where the time goes."""


def evaluate(parsed: Parsed) -> None:
    """Evaluate the pair of a recipe and write the report into the run folder; with synthetic acceptance, its speeds.

    Raises:
        UserError: a part is missing, damaged or foreign, or a method cannot be run.
        SystemExit: code 1, after the report is written: the output of a method is not the target's.
    """
    if parsed.plan:
        from drafttrain.evaluation.plan import plan

        plan(parsed)
        return
    if parsed.recipe.context.lengths or parsed.recipe.context.path:
        from drafttrain.evaluation.context_study import context_study

        context_study(parsed)
        return
    if parsed.recipe.evaluate.synthetic_acceptance is not None:
        from drafttrain.evaluation.synthetic_study import synthetic_study

        synthetic_study(parsed)
        return
    run = RunFolder(parsed.run).create()
    run.record(parsed, "drafttrain evaluate")
    evaluation = Evaluation(parsed, load_models(parsed), run)
    report = evaluation.report()
    page = write(report, evaluation.samples, run)
    say("")
    for line in verdict_lines(report.verdict):
        say(line)
    say(f"Report: {page}")
    if report.verdict.decision == "not exact":
        raise SystemExit(1)


@dataclass
class _Measured:
    """All there is of one decoding setting."""

    name: str
    questions: list[Question]
    samples: dict[str, list[Sample]]
    points: list[SweepPoint]
    calibration: dict[str, Timings]
    tuned_by: str
    costs: dict[str, Costs] = field(default_factory=dict)
    timings: dict[str, Timings] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    contexts: list[ContextBucket] = field(default_factory=list)
    lossless: dict[str, list[Exactness]] = field(default_factory=dict)


class Evaluation:
    """An evaluation in progress.

    Args:
        parsed: the recipe.
        models: of the pair.
        run: where traces and metrics of the training are.

    Attributes:
        samples: answers by the path that the report will name.
    """

    def __init__(self, parsed: Parsed, models: Models, run: RunFolder) -> None:
        self.parsed = parsed
        self.config = parsed.recipe.evaluate
        self.seed = parsed.recipe.seed
        self.models = models
        self.run = run
        self.load_start = load()
        self.head_metrics, self.tau_history = read_head_metrics(run), read_tau_history(run)
        self.inputs: Inputs = inputs_of(parsed, models.tokenizer, models.context)
        self.methods = [models.canonical(method) for method in self.config.methods or []]
        for method in self.methods:
            check_length(method)
        self.samples: dict[str, list[Sample]] = {}
        self.notes: list[str] = []

    def report(self) -> Report:
        """Measure everything."""
        configs = self.config.samplings or [self.parsed.recipe.responses.sampling]
        measured = [self._setting(sampling_name(each), sampling_of(each)) for each in configs]
        self._check_float64(measured)
        rows = [row for each in measured for row in self._rows(each)]
        points = [point for each in measured for point in each.points]
        studied = self._under_load(measured, configs, rows)
        verdict = decide(rows, points, self.tau_history, self.config.min_speedup, studied)
        environment = describe(self.models.device, self.load_start)
        if environment.bandwidth:
            environment.roofline = environment.bandwidth / streamed_bytes(self.models.target.model)
        return Report(
            schema_version=SCHEMA_VERSION,
            verdict=verdict,
            environment=environment,
            pair=self.models.describe(self.run, self.parsed.accept_new_target),
            workload=self._workload(measured, configs),
            methods=rows,
            sweep=points,
            recipe=self.parsed.resolved,
            examples=[example for each in measured for example in self._examples(each)],
            load=studied,
            head=self.head_metrics,
            contexts=[bucket for each in measured for bucket in each.contexts],
            tau_history=self.tau_history,
            notes=self.notes,
        )

    # ---- one decoding setting ----

    def _setting(self, name: str, sampling: Sampling) -> _Measured:
        """Tune, run and check."""
        for note in foreign_heads({head: each.config for head, each in self.models.heads.items()}, name, sampling):
            say(note)
            self.notes.append(note)
        say(f"{name}: measuring costs and replaying the tuning split")
        tuning = self._questions(self.inputs.tune, sampling)
        points, calibration, tuned_by = self._tune(name, sampling, tuning)
        methods = [AUTOREGRESSIVE, *(self.methods or self._picked(points))]
        methods += self._tree(name, sampling, tuning) if self.config.trees else []
        methods = list(dict.fromkeys(methods))
        for point in points:
            point.measured = point.method in methods
        questions = self._questions(self.inputs.test, sampling)
        say(f"{name}: {len(questions)} questions, {len(methods)} methods, {self.config.repeats} repeats")
        measured = _Measured(name, questions, {}, points, calibration, tuned_by)
        self._run(measured, methods, sampling)
        for method in methods:
            measured.lossless[method] = [self._check(measured, method, sampling)]
        return measured

    def _picked(self, points: Sequence[SweepPoint]) -> list[str]:
        """The best of each kind by replay; of a LongSpec drafter some lengths and thresholds."""
        if not self.models.reads_target:
            return pick(points, self.config.top)
        longest = self.config.max_length
        lengths = [f"LongSpec(drafter, length={length})" for length in LONGSPEC_LENGTHS if length <= longest]
        rules = [f"Confidence(0.4, max={longest})"]
        for name, head in self.models.heads.items():
            most = min(longest, head.config.max_length)
            rules += [f"AcceptanceHead({name}, {threshold}, max={most})" for threshold in LONGSPEC_THRESHOLDS]
        return [*lengths, *(f"LongSpec(drafter, stop={rule})" for rule in rules)]

    def _questions(self, records: Sequence[Mapping[str, Any]], sampling: Sampling) -> list[Question]:
        decoder = self.models.decoder(AUTOREGRESSIVE, sampling, self.seed)
        limits = Limits(self.config.max_new_tokens, self.models.context, max(8, self.config.batch_size))
        found = questions_of(records, self.models.tokenizer, limits, lambda group: answer(decoder, group))
        if not self.config.contexts:
            return found
        asked = {record["prompt_id"] for record in records}
        others = [record["prompt_ids"] for record in self.inputs.everything if record["prompt_id"] not in asked]
        return behind_filler(found, self.config.contexts, others, self.models.context)

    def _tune(
        self, name: str, sampling: Sampling, tuning: Sequence[Question]
    ) -> tuple[list[SweepPoint], dict[str, Timings], str]:
        """Instrumented runs, then every setting by replay."""
        config = self.config
        few = different(tuning, CALIBRATION_QUESTIONS)
        calibration = calibrate(self.models, sampling, few, config.batch_size, config.max_length, self.seed)
        if self.models.reads_target:  # what it drafts depends on the step of the round: no trace could say it
            return [], calibration, "nothing: a LongSpec drafter is not replayed, its methods are all run"
        costs = by_family([calibration], config.max_length + 1)
        accept = self.parsed.accept_new_target
        longest = max([config.max_length, *map(longest_of, self.methods)])
        traces = stored_traces(self.run, self.models, sampling, longest, accept)
        if traces is None:
            traces = made_traces(self.models, sampling, tuning, 8, longest, self.seed, self.inputs.apart)
        record = record_for_replay(self.models, traces, self.inputs.references)
        swept = settings(config, {name: head.config for name, head in self.models.heads.items()})
        known = {each.method for each in swept}
        swept += [
            SweptSetting(method, kind_of(method), parameter_of(method))
            for method in self.methods
            if method not in known and kind_of(method) in ("fixed", "confidence", "head", "entropy")
        ]
        tasks = {(row["prompt_id"], row["task"]) for row in traces.rows}
        weights = task_weights([task for _, task in tasks], [record["task"] for record in self.inputs.test])
        points = sweep(record, swept, self.models, costs, weights, name)
        return points, calibration, "the recipe (evaluate.methods)" if self.methods else traces.origin

    def _tree(self, name: str, sampling: Sampling, tuning: Sequence[Question]) -> list[str]:
        """The method with the fastest shape of a tree, if there is one that pays."""
        few = different(tuning, CALIBRATION_QUESTIONS)
        shape = tuned_tree(self.models, sampling, tuning, few, self.config.batch_size, self.seed).shape
        widths, drafter = list(shape.widths), self.models.chain
        method = f"{drafter}(drafter, length={len(widths)})" if shape.chain else f"{drafter}(drafter, tree={widths})"
        found = f"{method}, {shape.tau:.2f} tokens a round, speed-up {shape.speedup:.2f}" if widths else "none pays"
        say(f"{name}: tree predicted to be fastest: {found}")
        return [method] if widths else []

    def _run(self, measured: _Measured, methods: Sequence[str], sampling: Sampling) -> None:
        """The real runs, then the instrumented ones, which add to what calibration knew of the costs."""
        config, models = self.config, self.models
        decoders = {method: models.decoder(method, sampling, self.seed) for method in methods}
        found = interleave(
            decoders, measured.questions, config.batch_size, config.repeats, config.warmup, f"{measured.name}: runs"
        )
        for method in methods:
            measured.samples[method] = [
                to_sample(question, completions, method, measured.name, models.tokenizer)
                for question, completions in zip(measured.questions, found[method], strict=True)
            ]
            self.samples[sample_path(measured.name, method)] = measured.samples[method]
        groups = batches(measured.questions, config.batch_size)
        spread = groups[:: max(1, len(groups) // SPEED_CHECK_QUESTIONS)][:SPEED_CHECK_QUESTIONS]
        measured.timings = instrument_all(decoders, spread, models.engines())
        widest = max([config.max_length, *map(widest_of, methods)])
        measured.costs = by_family([measured.calibration, measured.timings], widest + 1)
        measured.contexts = by_context(
            measured.questions, measured.samples, decoders, measured.name, self.config.bootstrap
        )
        self.notes += paired_lines(measured.contexts)
        decoders.clear()  # their caches are no memory of the next method's
        for method in methods:
            measured.memory[method] = self._peak_bytes(method, sampling, groups[0])

    def _peak_bytes(self, method: str, sampling: Sampling, group: Sequence[Question]) -> int | None:
        decoder = self.models.decoder(method, sampling, self.seed)
        return peak_bytes(self.models.device, lambda: answer(decoder, group))

    def _check(self, measured: _Measured, method: str, sampling: Sampling) -> Exactness:
        """The tier that applies to the dtype of the measurement."""
        own, engine = measured.samples[method], self.models.engines()[0]
        if not sampling.greedy:
            return sampled_check(engine, sampling, measured.questions, own)
        if method == AUTOREGRESSIVE:
            return Exactness("baseline", True, len(own), len(own), sum(len(sample.token_ids) for sample in own))
        base = measured.samples[AUTOREGRESSIVE]
        drafted = max((len(sample.counts["drafted_at"]) for sample in own), default=1)
        widths = sorted({2, 1 + (drafted + 1) // 2, 1 + drafted})
        return greedy_check(engine, sampling, measured.questions, own, base, widths, self.config.tolerance)

    # ---- all settings ----

    def _check_float64(self, measured: Sequence[_Measured]) -> None:
        """Greedy identity in float64 of every method that was run, on a few questions."""
        methods = list(dict.fromkeys(method for each in measured for method in each.samples))
        chosen = different(measured[0].questions, FLOAT64_QUESTIONS)
        few = [dataclasses.replace(each, limit=min(each.limit, FLOAT64_TOKENS)) for each in chosen]
        try:
            answers = {method: self._float64_answers(method, few) for method in methods}
        except (UserError, torch.OutOfMemoryError) as error:
            checks = {m: not_checked("float64", error) for m in methods}
        else:
            checks = identity_check(answers, answers[AUTOREGRESSIVE])
        self.models.release("float64")
        for each in measured:
            for method in each.samples:
                if method != AUTOREGRESSIVE:
                    each.lossless[method].insert(0, checks[method])

    def _float64_answers(self, method: str, questions: Sequence[Question]) -> list[list[int]]:
        decoder = self.models.decoder(method, Sampling(0.0), self.seed, "float64")
        return [completion.token_ids for completion in answer(decoder, questions)]

    def _rows(self, measured: _Measured) -> list[MethodResult]:
        """Methods of a setting as the report shows them."""
        rows = [self._row(measured, method) for method in measured.samples]
        for kind in ("fixed", "confidence"):
            rivals = [row for row in rows if row.kind == kind and row.overall.speedup is not None]
            if not rivals:
                continue
            best = max(rivals, key=lambda row: row.overall.speedup.value)
            for row in rows:
                if row.kind not in (kind, "autoregressive", "fixed"):
                    own, other = measured.samples[row.method], measured.samples[best.method]
                    ratio = figures.versus(own, other, self.config.bootstrap, self.seed)
                    row.versus |= {kind: ratio} if ratio else {}
        return rows

    def _row(self, measured: _Measured, method: str) -> MethodResult:
        kind = kind_of(method)
        own, base = measured.samples[method], measured.samples[AUTOREGRESSIVE]
        overall, tasks = figures.by_task(own, base, self.config.bootstrap, self.seed)
        whole = sum(weight.numel() for weight in self.models.target.model.parameters())
        sizes = {name: count / whole for name, count in self.models.parameters.items()}
        costs = measured.costs.get(family_of(method), measured.costs["fixed"]) if kind != "autoregressive" else None
        if costs and not overall.draft_forwards.keys() <= costs.c.keys():
            costs = None  # a member that the few instrumented runs had no need of
        timings = measured.timings[method]
        point = next((p for p in measured.points if p.method == method), None)
        return MethodResult(
            method=method,
            kind=kind,
            sampling=measured.name,
            overall=overall,
            tasks=tasks,
            turns=figures.by_turn(own, base, self.config.bootstrap, self.seed),
            swi=figures.swi(overall, sizes, costs.c if costs else {}),
            costs=costs,
            predicted_speedup=predict(overall, costs) if costs and overall.tokens else None,
            replayed_speedup=point.predicted_speedup if point else None,
            breakdown=breakdown(timings),
            lossless=measured.lossless[method],
            peak_memory=measured.memory[method],
            kv_bytes=timings.kv_bytes,
            samples=sample_path(measured.name, method),
        )

    def _under_load(
        self, measured: Sequence[_Measured], configs: Sequence[SamplingConfig], rows: Sequence[MethodResult]
    ) -> list[Load]:
        """Larger batches under every setting."""
        found = []
        for each, config in zip(measured, configs, strict=True):
            study = Study(self.models, sampling_of(config), each.name, self.config, self.seed)
            own = [row for row in rows if row.sampling == each.name]
            found.append(study.run(own, each.questions, each.samples))
            self.notes += study.notes
        return [each for each in found if each]

    def _workload(self, measured: Sequence[_Measured], configs: Sequence[SamplingConfig]) -> Workload:
        first, config = measured[0], self.config
        return Workload(
            dtype=self.models.dtype,
            batch_size=config.batch_size,
            max_new_tokens=config.max_new_tokens,
            repeats=config.repeats,
            seed=self.seed,
            samplings=[NamedSampling(sampling_name(each), dataclasses.asdict(each)) for each in configs],
            prompts=figures.workload(first.samples[AUTOREGRESSIVE]),
            prompts_hash=prompts_hash(first.questions),
            tuned_by=first.tuned_by,
            compiled=self.models.compiled,
        )

    def _examples(self, measured: _Measured) -> list[ExampleAnswer]:
        """Answers of the fastest method."""
        rates = {
            method: sum(len(s.token_ids) for s in own) / sum(s.decode_seconds for s in own)
            for method, own in measured.samples.items()
            if method != AUTOREGRESSIVE
        }
        if not rates:
            return []
        best = max(rates, key=rates.get)
        return examples(self.models.tokenizer, measured.questions, measured.samples[best])


def foreign_heads(heads: Mapping[str, AcceptanceHeadConfig], name: str, sampling: Sampling) -> list[str]:
    """A sentence on each head that was trained for another decoding setting than this one, called `name`."""
    made_for = {head: config.sampling for head, config in heads.items() if config.sampling}
    return [
        f"The acceptance head `{head}` was trained for {sampling_name(SamplingConfig(**setting))}: for {name} it "
        "predicts acceptance less well than a head of that setting's own would."
        for head, setting in made_for.items()
        if Sampling(**setting) != sampling
    ]


def read_head_metrics(run: RunFolder) -> dict[str, Any] | None:
    """metrics.json of the run's acceptance head, if it has one."""
    path = run.head / "metrics.json"
    return _read_json(path) if path.exists() else None


def read_tau_history(run: RunFolder) -> list[dict[str, Any]]:
    """Tokens per round while the drafter was trained, as its program recorded them; empty where it did not."""
    path = run.path / "tau_history.json"
    return _read_json(path) if path.exists() else []


def _read_json(path: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is damaged; run the program that wrote it again, or delete it.") from None
