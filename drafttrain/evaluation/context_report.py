"""context.json, context.md, context.html and plots: one `ContextReport`, for programs, terminals and people."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from drafttrain.context.markup import STYLE as MARKS
from drafttrain.evaluation.context_schema import DENSE, ContextReport, ContextRow
from drafttrain.evaluation.html import _STYLE
from drafttrain.evaluation.plots import STYLE
from drafttrain.evaluation.schema import to_json
from drafttrain.evaluation.tables import number, percent, table
from drafttrain.run_folder import RunFolder, write_atomically

COLUMNS = (
    *("method", "budget", "score", "exact", "as dense", "points from dense [95 %]", "recall", "attention kept", "KL"),
    *(
        "first token, s",
        "draft prefill",
        "draft decode",
        "scoring",
        "target prefill",
        "overhead",
        "free tokens",
        "tokens/s",
        "KV, MiB",
        "peak, MiB",
    ),
)

SWEEP = (
    *("lookahead", "tokens drafted", "free tokens", "overhead", "draft decode", "scoring"),
    *("score", "exact", "recall", "attention kept", "KL", "first token, s"),
)

MEASURES: dict[str, tuple[str, Callable[[ContextRow], float | None]]] = {
    "accuracy": ("Score by budget", lambda row: row.score),
    "recall": ("Share of the oracle's choice that was kept", lambda row: row.recall),
    "mass": ("Share of the answer's attention that was kept", lambda row: row.mass),
    "kl": ("KL divergence of next tokens from dense, nats", lambda row: row.kl),
    "speed": ("Tokens per second after the first", lambda row: row.tokens_per_second),
    "memory": ("KV memory, MiB", lambda row: row.kv_bytes / 2**20),
    "peak": ("Peak device memory, MiB", lambda row: row.peak_bytes and row.peak_bytes / 2**20),
}
"""Plots by budget: a title, and the measure."""

PARTS = ("draft_prefill", "draft_decode", "scoring", "target_prefill")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#000000", "#999999")
MARKERS = "osD^v*PXh"


def write(report: ContextReport, run: RunFolder) -> Path:
    """Draw the plots, write all files, context.json last; returns the page."""
    folder = run.path / "context_plots"
    folder.mkdir(parents=True, exist_ok=True)
    report.plots = draw(report, folder)
    write_atomically(run.path / "context.md", markdown(report))
    write_atomically(run.path / "context.html", page(report, run.path))
    write_atomically(run.path / "context.json", to_json(report) + "\n")
    return run.path / "context.html"


def lengths(report: ContextReport) -> list[int]:
    """Of the prompts, in the order in which they were asked."""
    return list(dict.fromkeys(row.length for row in report.rows))


def cells(row: ContextRow) -> list[str]:
    """A row of the table."""
    first = [row.method, "-" if row.method == DENSE else percent(row.budget), f"{row.score:.1%}", f"{row.exact:.1%}"]
    kept = [f"{row.same:.0%}", f"{row.points:.1f}" if row.points else "-"]
    attention = [percent(row.recall), percent(row.mass), number(row.kl, ".3f")]
    times = [*(f"{getattr(row, name):.3f}" for name in PARTS), percent(row.overhead)]
    memory = [f"{row.kv_bytes / 2**20:.2f}", number(row.peak_bytes and row.peak_bytes / 2**20, ".0f")]
    return [
        *first,
        *kept,
        *attention,
        f"{row.first_token:.3f}",
        *times,
        f"{row.free_tokens:.1f}",
        number(row.tokens_per_second, ".1f"),
        *memory,
    ]


def sweep_cells(row: ContextRow) -> list[str]:
    """A row of the table of lookaheads."""
    seconds = [f"{each:.3f}" for each in (row.draft_decode, row.scoring)]
    kept = [f"{row.score:.1%}", f"{row.exact:.1%}", percent(row.recall), percent(row.mass), number(row.kl, ".3f")]
    drafted = [row.method, f"{row.drafted:.1f}", f"{row.free_tokens:.1f}", percent(row.overhead)]
    return [*drafted, *seconds, *kept, f"{row.first_token:.3f}"]


def sections(report: ContextReport) -> Iterator[tuple[int, str, Sequence[str], list[list[str]]]]:
    """Every table: depth and text of its heading, columns, cells."""
    for length in lengths(report):
        rows = [row for row in report.rows if row.length == length]
        names = list(rows[0].tasks)
        yield 2, f"{rows[0].prompts} prompts of about {length} tokens", COLUMNS, [cells(row) for row in rows]
        yield 3, "Score by task", ("method", "budget", *names), [_by_task(row, names) for row in rows]
        swept = [row for row in report.lookaheads if row.length == length]
        if swept:
            yield 3, f"Lookahead of KV dropping at {swept[0].budget:.0%}", SWEEP, [sweep_cells(row) for row in swept]


def notes(report: ContextReport) -> list[str]:
    """How it was measured."""
    machine = report.environment
    paying = ", ".join(
        f"{float(budget):.0%} from {tokens} tokens on" if tokens else f"{float(budget):.0%} at no length"
        for budget, tokens in report.break_even.items()
    )
    return [
        f"Target {report.pair.target}, drafter {report.pair.drafter}, {report.dtype}; a lookahead of at most "
        f"{report.lookahead} tokens, verified in the target's prefill; decoding on by {report.decoding}; greedy.",
        "Recall, attention kept and KL are of methods that drop keys, against the attention of the dense target's own "
        "answer; points are differences of scores, paired over prompts. Chat markup, system prompt and question are "
        "kept by every method. The oracle chooses by the dense answer, which it has read: a bound, with no times to "
        "compare.",
        "Overhead is the draft pass and the scores over the dense prefill. A lookahead ends at an end token, with low "
        "confidence where that is said, or once a token hardly changes what the drafter attends to most (settled).",
        "By the measured costs of both models' reading, of drafting ahead and of scores, reading a compressed prompt "
        f"pays at {paying}." + (" Shorter prompts were read whole (context.bypass)." if report.bypass else ""),
        f"{machine.device}, {machine.cpu}, {machine.cores} cores; load {machine.load_start:.1f} at the start, "
        f"{machine.load_end:.1f} at the end; {machine.created}.",
    ]


def markdown(report: ContextReport) -> str:
    """For a terminal or a forge."""
    lines = ["# Approximate decoding of long prompts", "", f"**{report.warning}**"]
    for depth, heading, columns, rows in sections(report):
        lines += ["", f"{'#' * depth} {heading}", "", *table(columns, rows)]
    lines += ["", *(f"- {note}" for note in notes(report)), ""]
    lines += [f"![{title_of(name)}]({path})" for name, path in report.plots.items()]
    return "\n".join([*lines, ""])


def _by_task(row: ContextRow, names: Sequence[str]) -> list[str]:
    return [row.method, f"{row.budget:g}", *(f"{row.tasks[name]:.0%}" for name in names)]


def page(report: ContextReport, folder: Path) -> str:
    """One file with everything inside."""
    parts = [
        "<h1>Approximate decoding of long prompts</h1>",
        f"<div class='verdict no-gain'><p>{escape(report.warning)}</p></div>",
    ]
    for depth, heading, columns, rows in sections(report):
        parts.append(f"<h{depth}>{escape(heading)}</h{depth}>{_table(columns, rows)}")
    for name, path in report.plots.items():
        data = base64.b64encode((folder / path).read_bytes()).decode()
        title = escape(title_of(name))
        image = f"<img alt='{title}' src='data:image/png;base64,{data}'>"
        parts.append(f"<figure><figcaption>{title}</figcaption>{image}</figure>")
    if report.examples:
        parts.append("<h2>What was read of a prompt</h2>")
    for at, each in enumerate(report.examples):
        head = f"<code>{escape(each.method)}</code> at {each.budget:.0%}, <em>{escape(each.task)}</em>"
        answers = (("right", each.reference), ("dense", each.dense_answer), ("cut down", each.answer))
        told = "".join(f"<p class='note'>{name}: {escape(text)}</p>" for name, text in answers)
        parts.append(f"<details{' open' if at == 0 else ''}><summary>{head}</summary>{told}{each.html}</details>")
    parts.append(f"<ul class='notes'>{''.join(f'<li>{escape(note)}</li>' for note in notes(report))}</ul>")
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>drafttrain: long</title>"
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{_STYLE}{MARKS}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# ---- plots ----


def title_of(name: str) -> str:
    """Of a plot."""
    if name in MEASURES:
        return MEASURES[name][0]
    return {
        "first_token": "Time to the first token",
        "break_even": "Reading a prompt: dense and compressed",
        "lookahead": "KV dropping by its lookahead",
    }[name]


def draw(report: ContextReport, folder: Path) -> dict[str, str]:
    """Every plot that there is data for; file by name, the folder's name in front."""
    drawn = {}
    makers: dict[str, Callable[[Sequence[Axes]], bool]] = {
        name: lambda axes, measure=measure: _by_budget(report, axes, measure) for name, (_, measure) in MEASURES.items()
    }
    makers["first_token"] = lambda axes: _first_token(report, axes)
    makers["break_even"] = lambda axes: _break_even(report, axes[0])
    makers["lookahead"] = lambda axes: _lookahead(report, axes)
    for name, make in makers.items():
        panels = {"break_even": 1, "lookahead": 3}.get(name, len(lengths(report)))
        with pyplot.rc_context(STYLE):
            figure, axes = pyplot.subplots(1, panels, figsize=(1.5 + 4.8 * panels, 3.6), squeeze=False)
            if make(axes[0]):
                figure.suptitle(title_of(name), fontsize=10)
                figure.savefig(folder / f"{name}.png")
                drawn[name] = f"{folder.name}/{name}.png"
            pyplot.close(figure)
    return drawn


def _by_budget(report: ContextReport, axes: Sequence[Axes], measure: Callable[[ContextRow], float | None]) -> bool:
    """A line a method; the dense target is the dashed one."""
    found = False
    methods = [name for name in dict.fromkeys(row.method for row in report.rows) if name != DENSE]
    for axis, length in zip(axes, lengths(report), strict=True):
        own = [row for row in report.rows if row.length == length]
        dense = measure(next(row for row in own if row.method == DENSE))
        if dense is not None:
            axis.axhline(dense, color="#767676", linestyle="--", label=DENSE)
        for at, name in enumerate(methods):
            points = sorted(
                (row.budget, measure(row)) for row in own if row.method == name and measure(row) is not None
            )
            if points:
                found = True
                look = {"color": COLORS[at % len(COLORS)], "marker": MARKERS[at % len(MARKERS)]}
                axis.plot(*zip(*points, strict=True), label=name, **look)
        axis.set_xlabel(f"budget (share of {length} tokens)")
    if found:
        axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return found


def _first_token(report: ContextReport, axes: Sequence[Axes]) -> bool:
    """A bar a row, in its parts."""
    for axis, length in zip(axes, lengths(report), strict=True):
        own = [row for row in report.rows if row.length == length]
        left = [0.0] * len(own)
        for color, part in zip(COLORS, PARTS, strict=False):
            widths = [getattr(row, part) for row in own]
            axis.barh(range(len(own)), widths, left=left, color=color, label=part.replace("_", " "))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        names = [row.method if row.method == DENSE else f"{row.method} {row.budget:g}" for row in own]
        axis.set_yticks(range(len(own)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(f"seconds, {length} tokens")
    axes[0].legend(fontsize=8)
    return True


def _break_even(report: ContextReport, axis: Axes) -> bool:
    """Seconds by length from the fitted costs."""
    costs, most = report.costs, 2 * max(lengths(report))
    sizes = [most * at // 60 for at in range(1, 61)]
    axis.plot(sizes, [costs.target.of(n) for n in sizes], "--", color="#767676", label=DENSE)
    for color, (budget, shortest) in zip(COLORS, report.break_even.items(), strict=False):
        seconds = [costs.compressed(n, float(budget) * n) for n in sizes]
        axis.plot(sizes, seconds, color=color, label=f"compressed to {float(budget):.0%}")
        if shortest is not None and shortest <= most:
            axis.plot(shortest, costs.target.of(shortest), "o", color=color)
    axis.set_xlabel("tokens of the prompt")
    axis.set_ylabel("seconds")
    axis.legend(fontsize=8)
    return True


def _lookahead(report: ContextReport, axes: Sequence[Axes]) -> bool:
    """Quality, overhead and free tokens by tokens drafted: lengths on a line, adaptive ends beside it."""
    if not report.lookaheads:
        return False
    panels: tuple[tuple[str, dict[str, Callable[[ContextRow], float]]], ...] = (
        ("score (solid), share of the oracle's choice", {"-": lambda row: row.score, ":": lambda row: row.recall}),
        ("draft pass and scores over the dense prefill", {"-": lambda row: row.overhead}),
        ("free tokens", {"-": lambda row: row.free_tokens}),
    )
    for color, length in zip(COLORS, lengths(report), strict=False):
        own = [row for row in report.lookaheads if row.length == length]
        fixed = [row for row in own if row.method.isdigit()]
        adaptive = [row for row in own if row not in fixed]
        for axis, (label, measures) in zip(axes, panels, strict=True):
            axis.set_ylabel(label, fontsize=8)
            axis.set_xlabel("tokens drafted, mean")
            for line, measure in measures.items():
                points = [(row.drafted, measure(row)) for row in fixed]
                name = f"{length} tokens" if line == "-" else None
                axis.plot(*zip(*points, strict=True), f"o{line}", color=color, label=name)
                for row, marker in zip(adaptive, "sD", strict=True):
                    shown = row.method if line == "-" and length == lengths(report)[0] else None
                    look = {"color": color, "fillstyle": "none", "linestyle": "none", "marker": marker}
                    axis.plot(row.drafted, measure(row), label=shown, **look)
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return True
