"""What a report holds: the typed form of report.json and of the sample files beside it.

`read_report` refuses a file that does not fit and says where. Times are seconds, memory is bytes; `c`, `v` and `o` are
in units of one autoregressive step of the target (README, "terms").
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from drafttrain.errors import UserError
from drafttrain.evaluation.load import Load
from drafttrain.evaluation.statistics import Interval

SCHEMA_VERSION = 2
READABLE = (1, SCHEMA_VERSION)
"""Versions of report.json that are read: version 1 differs in having no `load`."""

AUTOREGRESSIVE = "Autoregressive()"
ALL = "all"
"""Name of the row of figures over all tasks together."""

Kind = Literal["autoregressive", "fixed", "confidence", "head", "entropy", "oracle", "known", "other"]


@dataclass
class Figures:
    """What a method did on a set of prompts, from summed counts; looping and wrong answers already left out."""

    prompts: int
    """conversations counted, each in both this method and the baseline"""
    looping: int
    """answers left out because they loop (this method's or the baseline's)"""
    wrong: int
    """*revise* answers left out because they are not right (this method's or the baseline's)"""
    tokens: int = 0
    rounds: int = 0
    target_forwards: int = 0
    draft_forwards: dict[str, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    discarded: int = 0
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0
    baseline_tokens: int = 0
    baseline_seconds: float = 0.0
    tokens_per_second: float | None = None
    speedup: Interval | None = None
    """ratio of decoding rates to the baseline on the same prompts, prefill left out"""
    end_to_end_speedup: float | None = None
    """the same with both prefills"""
    drafted_at: list[int] = field(default_factory=list)
    """rounds that drafted position i"""
    reached_at: list[int] = field(default_factory=list)
    """rounds that drafted position i and had everything before it accepted"""
    accepted_at: list[int] = field(default_factory=list)
    """rounds that accepted position i"""
    trees_of: list[int] = field(default_factory=list)
    """rounds that drafted a tree of 0, 1, 2, ... tokens"""
    drafted_by: dict[str, int] = field(default_factory=dict)
    """proposed tokens by who proposed them"""
    accepted_by: dict[str, int] = field(default_factory=dict)
    """of those, the emitted ones"""
    rounds_by: dict[str, int] = field(default_factory=dict)
    """rounds by who proposed the first token; "" for none"""
    tokens_by: dict[str, int] = field(default_factory=dict)
    """emitted tokens of those rounds"""
    tau: float | None = None
    acceptance_rate: float | None = None
    acceptance_unconditional: list[float] = field(default_factory=list)
    """share of rounds in which position i was accepted"""
    acceptance_conditional: list[float] = field(default_factory=list)
    """share accepted of those that were drafted at position i and had everything before them accepted"""
    discard_rate: float | None = None
    verification_rate: float | None = None
    time_to_first_token: float | None = None
    """both prefills and one round"""
    repetition: float | None = None
    """share of repeated 4-grams, over all answers (those left out too)"""
    score: float | None = None
    """mean score of the task over all answers, where it has a scorer"""


@dataclass
class Costs:
    """Measured costs of a kind of drafting; divide by `step_seconds` once and speed is counts alone."""

    step_seconds: float
    """one autoregressive step of the target, its loop included"""
    c: dict[str, float]
    """one draft step of each member, drawing and stopping rule included"""
    v: list[float]
    """a target forward of width 1, 2, ..., i.e. over 0, 1, ... drafted tokens"""
    o: float
    """what is left of a round: beginning a draft, accepting, bookkeeping"""


@dataclass
class Breakdown:
    """Seconds per emitted token, from an instrumented run of its own."""

    draft: float
    verify: float
    loop: float


@dataclass
class Divergence:
    """The first token at which a greedy answer departs from the autoregressive one, and why that may be."""

    prompt_id: str
    position: int
    gap: float | None
    """logit of the autoregressive token minus that of the other; None where one answer ends and the other goes on"""
    noise: float
    """largest logit difference there between one-row and many-row evaluation of the same prefix"""
    passed: bool


@dataclass
class Exactness:
    """Whether a method's output is the target's, by the tier that applies."""

    tier: Literal["float64", "float32", "low precision", "sampled", "baseline", "not checked"]
    passed: bool
    answers: int = 0
    identical: int = 0
    tokens: int = 0
    divergences: list[Divergence] = field(default_factory=list)
    z: float | None = None
    """sampled: standard score of the tokens' log-probability under the target"""
    reason: str = ""


@dataclass
class MethodResult:
    """One method under one sampling setting."""

    method: str
    kind: Kind
    sampling: str
    overall: Figures
    tasks: dict[str, Figures]
    turns: dict[str, Figures] = field(default_factory=dict)
    """of tasks with several turns each of them, by names such as `revise, turn 2`"""
    swi: dict[str, float] = field(default_factory=dict)
    """standardized walltime improvement: tokens per forward, a drafter's being charged its share of the target's
    "parameters", and its "measured" cost; width and everything beside the forwards are free"""
    costs: Costs | None = None
    predicted_speedup: float | None = None
    """from this method's own counts and the measured costs"""
    replayed_speedup: float | None = None
    """from replay of recorded traces, before the method was ever run"""
    breakdown: Breakdown | None = None
    lossless: list[Exactness] = field(default_factory=list)
    peak_memory: int | None = None
    """bytes of the GPU at most in use, weights of both models included; None on a CPU"""
    kv_bytes: int | None = None
    versus: dict[str, Interval] = field(default_factory=dict)
    """ratio of decoding rates to the fastest measured method of another kind, on answers that count for both"""
    samples: str = ""
    """JSONL of its answers, relative to the report"""


def mixed(row: MethodResult) -> bool:
    """Whether more than one member proposes, or one that is no model."""
    proposing = set(row.overall.drafted_by)
    return len(proposing) > 1 or not proposing <= set(row.overall.draft_forwards)


@dataclass
class SweepPoint:
    """One setting as replay of the tuning split predicts it."""

    method: str
    kind: Kind
    sampling: str
    parameter: float | None
    tau: float
    discard_rate: float
    verification_rate: float
    predicted_speedup: float
    task_speedups: dict[str, float] = field(default_factory=dict)
    measured: bool = False
    """whether it was picked for a real run"""
    unobserved: float = 0.0
    """share of its rounds that drafted on beyond what the traces hold, and were taken to stop there"""


@dataclass
class Sampling:
    """A decoding setting by the name that the rest of the report uses."""

    name: str
    settings: dict[str, float]


@dataclass
class Workload:
    """What was run; two reports with different workloads are not compared unasked."""

    dtype: str
    batch_size: int
    max_new_tokens: int
    repeats: int
    seed: int
    samplings: list[Sampling]
    prompts: dict[str, int]
    """test conversations of each task"""
    prompts_hash: str
    tuned_by: str
    """how the settings were chosen: replay of which traces, or the recipe"""
    compiled: bool = False
    """whether target and drafter ran as compiled graphs"""


@dataclass
class Pair:
    """The models, by fingerprint."""

    target: str
    target_fingerprint: dict[str, str]
    drafter: str
    drafter_fingerprint: dict[str, str]
    heads: dict[str, str]
    """acceptance heads: path by the name that expressions use"""
    accepted_new_target: bool
    target_parameters: int
    drafter_parameters: int
    member_parameters: dict[str, int] = field(default_factory=dict)
    """of all drafting models by the name that expressions use"""


@dataclass
class Environment:
    """Where and when; `load` is the machine's run queue a minute before the start and the end."""

    created: str
    device: str
    cpu: str
    cores: int
    threads: int
    load_start: float
    load_end: float
    memory: int
    system: str
    versions: dict[str, str]
    commit: str | None
    bandwidth: float | None = None
    """GPU only: measured bytes per second of a device copy, read and written"""
    roofline: float | None = None
    """GPU only: tokens per second at which the bytes streamed per autoregressive step would saturate it"""


@dataclass
class Piece:
    """A stretch of an answer's text and where its tokens came from."""

    text: str
    source: str
    tokens: int = 1
    origin: int | None = None
    """position in prompt ++ answer that its first token was copied from; None if it was not copied"""


@dataclass
class ExampleAnswer:
    """An answer for show."""

    prompt_id: str
    task: str
    method: str
    sampling: str
    prompt: str
    pieces: list[Piece]
    tau: float | None = None


Decision = Literal["deploy", "no gain", "not proven", "not exact"]


@dataclass
class SettingVerdict:
    """The verdict on one decoding setting: the method that replay chose and what it gains."""

    sampling: str
    decision: Decision
    method: str | None = None
    speedup: Interval | None = None
    limit: Literal["tau", "c", "v", "o"] | None = None
    predicted: float | None = None
    halved: dict[str, float] = field(default_factory=dict)
    """predicted speed-up if half of what each of tau, c, v, o costs were gone"""


@dataclass
class Verdict:
    """What the report comes to, in the order in which a reader needs it."""

    decision: Decision
    """of the first setting, which is the one that is served"""
    headline: str
    details: list[str] = field(default_factory=list)
    """one sentence each: the other settings, what the adaptive rule adds, what limits the speed"""
    next_steps: list[str] = field(default_factory=list)
    settings: list[SettingVerdict] = field(default_factory=list)


@dataclass
class ContextBucket:
    """A method on the prompts of about one length."""

    method: str
    sampling: str
    context: int
    """longest prompt of the bucket, in tokens"""
    prompts: int
    tokens: int
    tau: float
    tokens_per_second: float
    """of decoding, without reading the prompt"""
    prefill_seconds: float
    """of reading a prompt, mean"""
    drafter_kv_bytes: int | None
    """keys and values that the drafter keeps behind the longest prompt; None without such"""
    tau_ratio: Interval | None = None
    """tau over that of the same questions at the shortest length (evaluate.contexts)"""


@dataclass
class Report:
    """report.json."""

    schema_version: int
    verdict: Verdict
    environment: Environment
    pair: Pair
    workload: Workload
    methods: list[MethodResult]
    sweep: list[SweepPoint]
    recipe: dict[str, Any]
    examples: list[ExampleAnswer] = field(default_factory=list)
    load: list[Load] = field(default_factory=list)
    """larger batches, by decoding setting; empty where none were asked for (evaluate.batch_sizes)"""
    head: dict[str, Any] | None = None
    """metrics.json of the acceptance head"""
    contexts: list[ContextBucket] = field(default_factory=list)
    """by length of the prompt; empty where all are of about one length"""
    tau_history: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """what else a reader must know of how this was measured, a sentence each"""
    plots: dict[str, str] = field(default_factory=dict)
    """PNG files by name, relative to the report"""

    def baseline(self, sampling: str) -> MethodResult:
        """The autoregressive row of a setting."""
        return next(row for row in self.methods if row.sampling == sampling and row.kind == "autoregressive")

    def of(self, sampling: str, *kinds: str) -> list[MethodResult]:
        """The speculative rows of a setting, all kinds or those named."""
        rows = [row for row in self.methods if row.sampling == sampling and row.kind != "autoregressive"]
        return [row for row in rows if not kinds or row.kind in kinds]


@dataclass
class Sample:
    """One answer: a line of a samples file."""

    prompt_id: str
    task: str
    turn: int
    method: str
    sampling: str
    token_ids: list[int]
    sources: list[str]
    finish_reason: str
    text: str
    counts: dict[str, Any]
    decode_seconds: float
    """median over the repeats"""
    prefill_seconds: float
    repetition: float
    looping: bool
    right: bool | None
    """exactly the reference answer; None where there is none"""
    score: float | None
    repeats: list[float] = field(default_factory=list)
    """decoding seconds of each repeat"""
    origins: list[int | None] = field(default_factory=list)
    """for each token the position in prompt ++ answer that it was copied from, None for one that was not"""


T = TypeVar("T")


def to_json(value: Any) -> str:
    """JSON of a dataclass of this file; infinities and NaN, which JSON does not have, become null."""
    return json.dumps(_finite(dataclasses.asdict(value)), indent=1, ensure_ascii=False, allow_nan=False)


def to_json_line(value: Any) -> str:
    """The same on one line."""
    return json.dumps(_finite(dataclasses.asdict(value)), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def read_report(path: Path) -> Report:
    """The report at `path`, or in the run folder `path`.

    Raises:
        UserError: there is none, it is not JSON, of another version, or does not fit the schema.
    """
    path = path / "report.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist; make it with `drafttrain evaluate --run {path.parent}`.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a whole JSON file ({error}); run `drafttrain evaluate` again.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in READABLE:
        raise UserError(
            f"{path} has schema version {version} but this drafttrain reads {SCHEMA_VERSION}; "
            "run `drafttrain evaluate` again."
        )
    try:
        return build(Report, data)
    except SchemaError as error:
        raise UserError(f"{path} is no report of this version ({error}); run `drafttrain evaluate` again.") from None


def read_samples(path: Path) -> list[Sample]:
    """The lines of a samples file.

    Raises:
        UserError: it is missing, cut short, or does not fit.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; it belongs to the report beside it, run `drafttrain evaluate` again.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); run `drafttrain evaluate` again.") from None
    samples = []
    lines = text.removesuffix("\n").split("\n") if text else []  # splitlines() would split at U+2028 in an answer too
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(build(Sample, json.loads(line)))
        except (ValueError, SchemaError) as error:
            raise UserError(f"{path} line {number} is damaged ({error}); run `drafttrain evaluate` again.") from None
    return samples


class SchemaError(Exception):
    """Where in a document, and what does not fit."""


def build(kind: type[T], data: Any, where: str = "") -> T:
    """`data` as an instance of a dataclass, every field checked against its type.

    Raises:
        SchemaError: a field is missing, unknown or of another type.
    """
    hints = typing.get_type_hints(kind)
    if not isinstance(data, dict):
        raise SchemaError(f"{where or 'the document'} should be an object")
    if unknown := sorted(set(data) - set(hints)):
        raise SchemaError(f"{_join(where, unknown[0])} is unknown")
    values = {}
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if item.name in data:
            values[item.name] = _convert(hints[item.name], data[item.name], _join(where, item.name))
        elif required:
            raise SchemaError(f"{_join(where, item.name)} is missing")
    return kind(**values)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType or origin is typing.Union:
        return None if value is None else _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value not in arguments:
            raise SchemaError(f"{where} is {value!r}, not one of {', '.join(map(str, arguments))}")
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if origin is list and isinstance(value, list):
        return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, _join(where, key)) for key, item in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise SchemaError(f"{where} should be {name}, got {value!r:.60}")
