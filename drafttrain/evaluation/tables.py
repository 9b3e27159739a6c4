"""What the report's tables show, as text cells, for markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from drafttrain.evaluation.load import Load, told
from drafttrain.evaluation.schema import ALL, Exactness, Figures, MethodResult, Report, mixed


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table, numbers to the right."""
    lines = [f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


BUSY = 0.7
"""Run queue per core at the start from which the report says that the machine was busy."""

METHOD_COLUMNS = (
    "method",
    "tokens/s",
    "speed-up [95 %]",
    "predicted",
    "by replay",
    "with prefill",
    "tau",
    "accepted",
    "discard rate",
    "verification rate",
    "to first token, ms",
)


def method_cells(report: Report, sampling: str) -> list[list[str]]:
    """One row a method: the baseline, then the fastest first."""
    rows = sorted(report.of(sampling), key=lambda row: -(row.overall.speedup.value if row.overall.speedup else 0.0))
    return [_method_row(row) for row in [report.baseline(sampling), *rows]]


def _method_row(row: MethodResult) -> list[str]:
    figures = row.overall
    is_baseline = row.kind == "autoregressive"
    return [
        f"`{row.method}`",
        number(figures.tokens_per_second, ".1f"),
        "1" if is_baseline else (f"{figures.speedup:.2f}" if figures.speedup else "-"),
        number(row.predicted_speedup, ".2f"),
        number(row.replayed_speedup, ".2f"),
        "1" if is_baseline else number(figures.end_to_end_speedup, ".2f"),
        number(figures.tau, ".2f"),
        percent(figures.acceptance_rate),
        number(figures.discard_rate, ".2f"),
        number(figures.verification_rate, ".2f"),
        milliseconds(figures.time_to_first_token),
    ]


def task_cells(report: Report, sampling: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of speed-ups by task, with the task's own best fixed length by replay, and by turn."""
    rows = report.of(sampling)
    base = report.baseline(sampling)
    tasks = list(base.tasks)
    own_best = {task: _own_best(report, sampling, task) for task in tasks}
    columns = ["task", "answers", *[f"`{row.method}`" for row in rows]]
    if any(own_best.values()):
        columns.append("its own best K, by replay")
    cells = []
    for task in tasks:
        line = [task, str(base.tasks[task].prompts), *[_interval(row.tasks.get(task)) for row in rows]]
        if any(own_best.values()):
            line.append(own_best[task] or "-")
        cells.append(line)
    for turn, own in base.turns.items():
        line = [turn, str(own.prompts), *[_interval(row.turns.get(turn)) for row in rows]]
        cells.append(line + ["-"] * (len(columns) - len(line)))
    return columns, cells


SOURCE_COLUMNS = (
    "method",
    "task",
    "tokens by whom",
    "tokens per round, by who drafts first",
    "accepted of drafted",
    "discard rate",
    "verification rate",
)


def source_cells(report: Report, sampling: str) -> list[list[str]]:
    """Who wrote the tokens, by method and task: of methods in which more than one member proposes, or copies."""
    cells = []
    for row in report.of(sampling):
        for task, own in (row.tasks | row.turns).items() if mixed(row) else ():
            if own.tokens:
                cells.append([f"`{row.method}`", task, *_sources(own)])
    return cells


def _sources(own: Figures) -> list[str]:
    target = own.tokens - sum(own.accepted_by.values())
    written = {**own.accepted_by, "target": target}
    first = {who or "nobody": own.tokens_by[who] / rounds for who, rounds in own.rounds_by.items()}
    shares = {who: own.accepted_by.get(who, 0) / drafted for who, drafted in own.drafted_by.items()}
    return [
        ", ".join(f"{who} {count / own.tokens:.0%}" for who, count in written.items()),
        ", ".join(f"{who} {tau:.2f}" for who, tau in first.items()),
        ", ".join(f"{who} {share:.0%}" for who, share in shares.items()),
        number(own.discard_rate, ".2f"),
        number(own.verification_rate, ".2f"),
    ]


def _interval(figures: Figures | None) -> str:
    if figures is None or figures.speedup is None:
        return "-"
    return f"{figures.speedup:.2f}" if figures.prompts > 2 else f"{figures.speedup.value:.2f}"


def _own_best(report: Report, sampling: str, task: str) -> str | None:
    points = [p for p in report.sweep if p.sampling == sampling and p.kind == "fixed" and task in p.task_speedups]
    if not points:
        return None
    best = max(points, key=lambda point: point.task_speedups[task])
    return f"K={int(best.parameter)}: {best.task_speedups[task]:.2f}"


_WIDTHS = (2, 4, 6, 12)
"""Widths that v is shown of."""

_V_COLUMNS = tuple(f"v({width})" for width in _WIDTHS)

COST_COLUMNS = (
    "method",
    "c",
    *_V_COLUMNS,
    "o",
    "draft ms",
    "verify ms",
    "loop ms",
    "SWI by parameters",
    "SWI by c",
    "KV MiB",
    "memory MiB",
)


def cost_cells(report: Report, sampling: str) -> list[list[str]]:
    """One row a method: costs in autoregressive steps, and milliseconds per emitted token."""
    cells = []
    for row in [report.baseline(sampling), *report.of(sampling)]:
        costs, spent = row.costs, row.breakdown
        widths = [number(costs.v[w - 1], ".2f") if costs and len(costs.v) >= w else "-" for w in _WIDTHS]
        c = ", ".join(f"{name} {value:.3f}" for name, value in costs.c.items()) if costs and costs.c else "-"
        times = [milliseconds(getattr(spent, part)) if spent else "-" for part in ("draft", "verify", "loop")]
        swi = [number(row.swi.get(by), ".2f") for by in ("parameters", "measured")]
        sizes = [_mebibytes(row.kv_bytes), _mebibytes(row.peak_memory)]
        cells.append([f"`{row.method}`", c, *widths, number(costs.o if costs else None, ".3f"), *times, *swi, *sizes])
    return cells


LOAD_COLUMNS = (
    "method",
    "batch",
    "tokens/s",
    "speed-up [95 %]",
    "latency, s: median",
    "95th percentile",
    "live rows",
)


def load_cells(load: Load) -> list[list[str]]:
    """One row a method and batch size."""
    return [
        [
            f"`{point.method}`",
            str(batch.batch_size),
            f"{point.tokens_per_second:.1f}",
            f"{point.speedup:.2f}" if point.speedup else "1",
            f"{point.latency_median:.2f}",
            f"{point.latency_95:.2f}",
            f"{point.live_rows:.1f}",
        ]
        for batch in load.batches
        for point in batch.points
    ]


VERIFY_COLUMNS = ("batch", *_V_COLUMNS)


def verify_cells(load: Load) -> list[list[str]]:
    """One row a batch size: a target forward of several tokens a row, in forwards of one token a row."""
    return [
        [str(each.batch_size), *[number(each.v[w - 1], ".2f") if len(each.v) >= w else "-" for w in _WIDTHS]]
        for each in load.batches
    ]


def load_notes(load: Load) -> list[str]:
    """Where every method stops paying, and how that was measured; a line each."""
    again = f", {load.repeated} of them again under other sample ids, for want of prompts" if load.repeated else ""
    return [
        *[told(load, found) for found in load.break_even],
        f"Asked at every batch size: the {load.requests} requests with the longest answers, of {load.prompts} "
        f"conversations{again}; such fill the batches of a busy server. None joins a batch that runs: it shrinks as "
        "answers end, and *live rows* says how many were decoded together on the mean.",
        "Tokens per second are of the whole batch, prefill left out. Latency is from the start of a batch, prefill "
        "included, to the end of a request. v(w) is of full batches, in forwards of width 1 of as many rows.",
    ]


EXACT_COLUMNS = ("method", "setting", "check", "answers", "identical", "evidence", "verdict")


def exactness_cells(report: Report) -> list[list[str]]:
    """One row a check."""
    return [
        [
            f"`{row.method}`",
            row.sampling,
            check.tier,
            str(check.answers),
            _identical(check),
            _divergences(check),
            ("passed" if check.passed else "FAILED") + (f": {check.reason}" if check.reason else ""),
        ]
        for row in report.methods
        for check in row.lossless
    ]


def _identical(check: Exactness) -> str:
    return "-" if check.tier in ("sampled", "not checked") else str(check.identical)


def _divergences(check: Exactness) -> str:
    if check.z is not None:
        return f"z = {check.z:+.2f}"
    if not check.divergences:
        return "-"
    measured = [each for each in check.divergences if each.gap is not None]
    if not measured:
        return str(len(check.divergences))
    worst = max(measured, key=lambda each: each.gap / max(each.noise, 1e-30))
    return f"{len(check.divergences)}; worst gap {worst.gap:.2g} at noise {worst.noise:.2g}"


def number(value: float | None, spec: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else format(value, spec)


def percent(value: float | None) -> str:
    """A share as whole percents."""
    return "-" if value is None else f"{100 * value:.0f} %"


def milliseconds(value: float | None) -> str:
    """Seconds as milliseconds."""
    return "-" if value is None else f"{1e3 * value:.2f}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f}"


def left_out(report: Report, sampling: str) -> str:
    """How many answers do not count, and how the target itself did."""
    base = report.baseline(sampling).overall
    rows = report.of(sampling)
    looping = max([base.looping, *[row.overall.looping for row in rows]])
    wrong = max([base.wrong, *[row.overall.wrong for row in rows]])
    return (
        f"Left out at most: {looping} looping answers, {wrong} *revise* answers that are not right. Repeated 4-grams "
        f"in the target's own answers: {percent(base.repetition)}; its task score: {percent(base.score)}."
    )


def method_notes(report: Report) -> list[str]:
    """What ran, on what, and what the words mean; a line each."""
    return [
        _models(report),
        _work(report),
        f"Settings were chosen by {report.workload.tuned_by}; the verdict is on the one predicted to be best.",
        "Speed-up is the ratio of decoding rates (tokens over seconds, both summed; prefill left out). Its interval is "
        "a bootstrap over conversations, paired with the baseline, with tasks as strata.",
        "tau counts the bonus token. Discard rate: discarded drafted tokens per emitted token. Verification rate: "
        "target forwards per emitted token. c: one draft step; v(w): a target forward of width w; o: the rest of a "
        "round; all in autoregressive steps. Predicted: the method's own counts with these costs.",
        *_unobserved(report),
        *report.notes,
        *_machine(report),
    ]


def _models(report: Report) -> str:
    pair = report.pair
    line = (
        f"Target `{pair.target}` ({pair.target_parameters / 1e6:.1f}M parameters), drafter `{pair.drafter}` "
        f"({pair.drafter_parameters / 1e6:.1f}M)"
    )
    line += "".join(f", {name} `{path}`" for name, path in pair.heads.items()) + "."
    if pair.accepted_new_target:
        line += " The target's weights are not those that the drafter was made for; this was asked for."
    return line


def _work(report: Report) -> str:
    work = report.workload
    prompts = ", ".join(f"{task} {count}" for task, count in work.prompts.items() if task != ALL)
    return (
        f"Test prompts: {prompts}; up to {work.max_new_tokens} new tokens, batch {work.batch_size}, {work.dtype}, "
        f"{'compiled, ' if work.compiled else ''}"
        f"{work.repeats} repeats (median). Methods ran in turn prompt by prompt after a warm-up, the baseline among "
        "them, in the same process, engine and dtype."
    )


def _unobserved(report: Report) -> list[str]:
    share = max((point.unobserved for point in report.sweep), default=0.0)
    if not share:
        return []
    return [
        f"Replay took rounds to stop where the traces end: up to {100 * share:.1f} % of the rounds of a setting would "
        "have drafted on. Their discarded tokens are counted too low (traces.run_length)."
    ]


def _machine(report: Report) -> list[str]:
    machine = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    commit = f"; commit {machine.commit[:12]}" if machine.commit else ""
    notes = [
        f"{machine.device}, {machine.cpu}, {machine.cores} cores, {machine.threads} threads, {machine.system}; load "
        f"{machine.load_start:.1f} at the start, {machine.load_end:.1f} at the end; {versions}{commit}; "
        f"{machine.created}."
    ]
    if machine.roofline and machine.bandwidth:
        notes.append(
            f"Memory bandwidth {machine.bandwidth / 1e9:.0f} GB/s (measured): a ceiling of {machine.roofline:.0f} "
            "tokens/s for decoding one token at a time."
        )
    if machine.load_start > BUSY * machine.cores:
        notes.append("The machine was busy before this began: the intervals hold the noise, the costs less so.")
    return notes
