"""`drafttrain evaluate` with evaluate.synthetic_acceptance: how fast a pair would be if drafts were accepted so often.

    drafttrain evaluate --target.path T --drafter.path D --run runs/speed --evaluate.random_weights true \
        --evaluate.synthetic_acceptance '[0.8, 0.75, 0.7]'

Everything but acceptance is real, so time is; the texts mean nothing. So what is written is no report: synthetic.json
and synthetic.md in the run folder, without verdict, checks or answers, and nothing else reads them. At every batch size
of the recipe the given methods, by default the fixed lengths that the rates and the measured costs predict to be
fastest, are interleaved with autoregressive decoding. Answers end at their limit alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from drafttrain.config import EvaluateConfig, Parsed
from drafttrain.decoding.counts import Completion, Counts
from drafttrain.decoding.synthetic import SyntheticAcceptance
from drafttrain.distributed import say
from drafttrain.evaluation.cost import predict
from drafttrain.evaluation.environment import describe, load, streamed_bytes
from drafttrain.evaluation.inputs import inputs_of
from drafttrain.evaluation.load_study import INSTRUMENTED_REQUESTS, live_rows
from drafttrain.evaluation.methods import check_length, family_of
from drafttrain.evaluation.names import sampling_name, sampling_of
from drafttrain.evaluation.pair import Models, load_models
from drafttrain.evaluation.questions import Limits, Question, questions_of
from drafttrain.evaluation.runner import answer, batches, instrument_all, interleave
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Costs, Environment, Pair, to_json
from drafttrain.evaluation.statistics import Interval, bootstrap, rate_ratio
from drafttrain.evaluation.tables import number, table
from drafttrain.evaluation.tuning import CALIBRATION_TOKENS, by_family, calibrate
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder, write_atomically

NAME = "synthetic"
"""Of the files in the run folder."""

WARNING = (
    "Synthetic acceptance: drafted tokens were accepted at given rates, whatever the target would have said. These are "
    "speeds; no text was the target's, none was checked, scored or kept."
)

COLUMNS = (
    *("method", "batch", "tokens/s", "speed-up [95 %]", "predicted", "tau", "expected", "live rows"),
    *("c", "v(2)", "v(6)", "o"),
)


@dataclass
class SyntheticRow:
    """One method at one batch size, under one decoding setting."""

    method: str
    """with the words "synthetic acceptance", the baseline's without"""
    sampling: str
    batch_size: int
    tokens_per_second: float
    """of the whole batch, prefill left out"""
    live_rows: float
    """rows decoded in a round, on the mean: a batch shrinks as its answers end"""
    tau: float
    acceptance: list[float]
    """measured, of each place, given that all before it were accepted"""
    speedup: Interval | None = None
    """over autoregressive decoding at the same batch size; None of that itself"""
    predicted_speedup: float | None = None
    """from the method's own counts and the measured costs"""
    expected_tau: float | None = None
    """from the rates, of a fixed length"""
    costs: Costs | None = None


@dataclass
class SyntheticSpeeds:
    """synthetic.json."""

    synthetic_acceptance: list[float]
    random_weights: bool
    warning: str
    environment: Environment
    pair: Pair
    dtype: str
    compiled: bool
    max_new_tokens: int
    repeats: int
    seed: int
    rows: list[SyntheticRow]


def synthetic_study(parsed: Parsed) -> None:
    """Measure and write synthetic.json and synthetic.md into the run folder.

    Raises:
        UserError: a part is missing or damaged, rates are impossible, or a method cannot be run.
    """
    run, config = RunFolder(parsed.run).create(), parsed.recipe.evaluate
    run.record(parsed, "drafttrain evaluate")
    began = load()
    models = load_models(parsed)
    methods = [models.canonical(method) for method in config.methods or []]
    for method in methods:
        check_length(method)
    inputs = inputs_of(parsed, models.tokenizer, models.context)
    rows = []
    for each in config.samplings or [parsed.recipe.responses.sampling]:
        sampling, name = sampling_of(each), sampling_name(each)
        base = models.decoder(AUTOREGRESSIVE, sampling, parsed.recipe.seed)
        limits = Limits(config.max_new_tokens, models.context, max(8, config.batch_size))
        questions = questions_of(inputs.test, models.tokenizer, limits, lambda group, base=base: answer(base, group))
        setting = _Setting(models, config, sampling, name, parsed.recipe.seed)
        for size in sorted({*config.batch_sizes, config.batch_size}):
            rows += setting.rows(methods, questions, size)
    environment = describe(models.device, began)
    if environment.bandwidth:
        environment.roofline = environment.bandwidth / streamed_bytes(models.target.model)
    speeds = SyntheticSpeeds(
        synthetic_acceptance=list(models.synthetic.rates),
        random_weights=config.random_weights,
        warning=WARNING,
        environment=environment,
        pair=models.describe(run, parsed.accept_new_target),
        dtype=models.dtype,
        compiled=models.compiled,
        max_new_tokens=config.max_new_tokens,
        repeats=config.repeats,
        seed=parsed.recipe.seed,
        rows=rows,
    )
    text = markdown(speeds)
    write_atomically(run.path / f"{NAME}.md", text)
    write_atomically(run.path / f"{NAME}.json", to_json(speeds) + "\n")
    say(f"\n{text}\nSpeeds: {run.path / f'{NAME}.json'}")


class _Setting:
    """The study of one decoding setting."""

    def __init__(self, models: Models, config: EvaluateConfig, sampling: Sampling, name: str, seed: int) -> None:
        self.models, self.config, self.sampling, self.name, self.seed = models, config, sampling, name, seed

    def rows(self, methods: Sequence[str], questions: Sequence[Question], size: int) -> list[SyntheticRow]:
        """Rows of one batch size, the baseline's first.

        Args:
            methods: to run; none: those predicted to be fastest.
            questions: asked, again with other draws until a batch is full.
            size: of a batch.
        """
        config, models = self.config, self.models
        asked = full_batches(questions, size)
        short = [replace(each, limit=min(each.limit, CALIBRATION_TOKENS)) for each in asked]
        few = short[: max(1, INSTRUMENTED_REQUESTS // size) * size]
        calibration = calibrate(models, self.sampling, few, size, config.max_length, self.seed)
        costs = by_family([calibration], config.max_length + 1)
        swept = (models.synthetic, costs["fixed"], config.max_length, config.top, models.chain)
        methods = list(methods) or best_lengths(*swept)
        methods = list(dict.fromkeys([AUTOREGRESSIVE, *methods]))
        decoders = {method: models.decoder(method, self.sampling, self.seed) for method in methods}
        title = f"{self.name}: batches of {size}"
        found = interleave(decoders, asked, size, config.repeats, config.warmup, title)
        timings = instrument_all(decoders, batches(few, size), models.engines())
        costs = by_family([calibration, timings], config.max_length + 1)
        return [self._row(method, found, costs, size) for method in methods]

    def _row(
        self, method: str, found: dict[str, list[list[Completion]]], costs: dict[str, Costs], size: int
    ) -> SyntheticRow:
        own = [_median_of(repeats) for repeats in found[method]]
        total: Counts = sum(own)
        row = SyntheticRow(
            method=method,
            sampling=self.name,
            batch_size=size,
            tokens_per_second=total.tokens / total.decode_seconds,
            live_rows=live_rows(found[method], size),
            tau=total.tau,
            acceptance=[
                accepted / reached if reached else 0.0
                for accepted, reached in zip(total.accepted_at, total.reached_at, strict=True)
            ],
        )
        if method == AUTOREGRESSIVE:
            return row
        base = [_median_of(repeats) for repeats in found[AUTOREGRESSIVE]]
        sums = [[a.tokens, a.decode_seconds, b.tokens, b.decode_seconds] for a, b in zip(own, base, strict=True)]
        row.method = f"{method}, synthetic acceptance"
        row.speedup = bootstrap(np.array(sums), rate_ratio, ["all"] * len(sums), self.config.bootstrap, self.seed)
        row.costs = costs.get(family_of(method), costs["fixed"])
        if total.draft_forwards.keys() <= row.costs.c.keys():
            row.predicted_speedup = predict(total, row.costs)
        if family_of(method) == "fixed":
            row.expected_tau = self.models.synthetic.tau(len(total.drafted_at))
        return row


def _median_of(repeats: Sequence[Completion]) -> Counts:
    """Counts of the first repeat, from which the others differ in nothing but time, with the median time."""
    seconds = float(np.median([each.counts.decode_seconds for each in repeats]))
    return dataclasses.replace(repeats[0].counts, decode_seconds=seconds)


def full_batches(questions: Sequence[Question], size: int) -> list[Question]:
    """Questions, asked again with other sample ids (hence other draws) until the last batch is full too."""
    count = -(-len(questions) // size) * size
    rounds = [divmod(number, len(questions)) for number in range(count)]
    return [replace(questions[at], sample_id=questions[at].sample_id + times) for times, at in rounds]


def best_lengths(
    synthetic: SyntheticAcceptance, costs: Costs, longest: int, top: int, chain: str = "Model"
) -> list[str]:
    """The fixed lengths up to ``longest`` that rates and costs predict to be fastest, shortest first.

    ``chain`` is the constructor that drafts them.
    """
    member = next(iter(costs.c))
    lengths = range(1, longest + 1)
    speedups = {length: predict(expected_counts(synthetic, length, member), costs) for length in lengths}
    best = sorted(lengths, key=lambda length: -speedups[length])[:top]
    return [f"{chain}(drafter, length={length})" for length in sorted(best)]


def expected_counts(synthetic: SyntheticAcceptance, length: int, member: str) -> Counts:
    """What one round of a fixed length comes to; the tokens are no whole number."""
    return Counts(
        tokens=synthetic.tau(length),
        rounds=1,
        target_forwards=1,
        draft_forwards={member: length},
        drafted=length,
        drafted_at=[1] * length,
    )


def markdown(speeds: SyntheticSpeeds) -> str:
    """synthetic.md."""
    rates = ", ".join(f"{rate:g}" for rate in speeds.synthetic_acceptance)
    pair, machine = speeds.pair, speeds.environment
    made = "random weights" if speeds.random_weights else "trained weights"
    lines = ["# Speed at synthetic acceptance", "", f"**{WARNING}**"]
    for name in dict.fromkeys(row.sampling for row in speeds.rows):
        lines += ["", f"## {name}", "", *table(COLUMNS, [_cells(row) for row in speeds.rows if row.sampling == name])]
    lines += [
        "",
        f"- Rates, each given that all before it were accepted: {rates}; the last one holds on.",
        f"- Target `{pair.target}` ({pair.target_parameters / 1e6:.1f}M parameters), drafter `{pair.drafter}` "
        f"({pair.drafter_parameters / 1e6:.1f}M), {made}, {speeds.dtype}{', compiled' if speeds.compiled else ''}.",
        f"- {speeds.repeats} repeats (median), methods in turn; {speeds.max_new_tokens} new tokens at most, prefill "
        "left out. tau is measured, *expected* what the rates come to; drafts are cut where an answer ends.",
        "- c: one draft step; v(w): a target forward of width w; o: the rest of a round; in autoregressive steps.",
        f"- {machine.device}, {machine.cpu}, {machine.cores} cores; load {machine.load_start:.1f} at the start, "
        f"{machine.load_end:.1f} at the end; {machine.created}.",
        "",
    ]
    return "\n".join(lines)


def _cells(row: SyntheticRow) -> list[str]:
    costs = row.costs
    widths = [number(costs.v[w - 1], ".2f") if costs and len(costs.v) >= w else "-" for w in (2, 6)]
    return [
        row.method,
        str(row.batch_size),
        f"{row.tokens_per_second:.1f}",
        f"{row.speedup:.2f}" if row.speedup else "1",
        number(row.predicted_speedup, ".2f"),
        f"{row.tau:.2f}",
        number(row.expected_tau, ".2f"),
        f"{row.live_rows:.1f}",
        ", ".join(f"{value:.3f}" for value in costs.c.values()) if costs else "-",
        *widths,
        number(costs.o if costs else None, ".3f"),
    ]


def work(config: EvaluateConfig, questions: int) -> list[str]:
    """What --plan says would run."""
    rates = ", ".join(f"{rate:g}" for rate in config.synthetic_acceptance)
    methods = len({AUTOREGRESSIVE, *config.methods}) if config.methods else 1 + config.top
    sizes = sorted({*config.batch_sizes, config.batch_size})
    weights = ", random weights" if config.random_weights else ""
    return [
        f"synthetic acceptance at {rates}{weights}: speed alone is measured; no output is checked, scored or kept",
        f"runs: {methods} methods x {questions} test conversations or a full batch x {config.repeats} repeats in "
        f"batches of {', '.join(map(str, sizes))}",
    ]
