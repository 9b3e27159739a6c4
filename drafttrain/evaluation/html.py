"""report.html: one file with everything inside, readable offline and by mail."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from drafttrain.evaluation import tables as cells
from drafttrain.evaluation.schema import ExampleAnswer, Piece, Report

_STYLE = """
:root { --ink:#1c1e21; --soft:#5c6670; --line:#dfe3e8; --paper:#fff; --wash:#f6f7f9; }
* { box-sizing:border-box }
body { margin:0 auto; padding:2rem 1.25rem 4rem; max-width:76rem; color:var(--ink); background:var(--paper);
  font:16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { font-size:1.15rem; margin:0 0 1rem; color:var(--soft); font-weight:600 }
h2 { font-size:1.25rem; margin:2.6rem 0 .6rem }
h3 { font-size:1rem; margin:1.6rem 0 .4rem }
.verdict { border-left:.45rem solid; padding:1rem 1.25rem; border-radius:.4rem; background:var(--wash) }
.verdict p { margin:.4rem 0 }
.verdict .headline { font-size:1.3rem; font-weight:650; line-height:1.35; margin-top:0 }
.deploy { border-color:#009E73 } .no-gain, .not-proven { border-color:#E69F00 } .not-exact { border-color:#D55E00 }
.verdict ul { margin:.3rem 0 0; padding-left:1.2rem }
figure { margin:1.2rem 0 } figure img { width:100%; height:auto; border:1px solid var(--line); border-radius:.4rem }
figure.narrow { max-width:46rem } figcaption { color:var(--soft); font-size:.9rem; margin-bottom:.35rem }
.scroll { overflow-x:auto }
table { border-collapse:collapse; font-size:.82rem; min-width:100% }
th { text-align:right; font-weight:600; border-bottom:2px solid var(--line); padding:.3rem .45rem;
  vertical-align:bottom }
td { text-align:right; border-bottom:1px solid var(--line); padding:.3rem .45rem; white-space:nowrap;
  font-variant-numeric:tabular-nums }
th:first-child, td:first-child { text-align:left } tr:hover td { background:var(--wash) }
td.text { text-align:left; white-space:normal }
code, pre { font-family:ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size:.92em }
pre.answer { white-space:pre-wrap; overflow-wrap:anywhere; background:var(--wash); padding:.9rem 1rem;
  border-radius:.4rem; line-height:1.75 }
pre.prompt { white-space:pre-wrap; overflow-wrap:anywhere; max-height:12rem; overflow-y:auto; color:var(--soft);
  border:1px solid var(--line); padding:.6rem .8rem; border-radius:.4rem }
.piece { border-radius:.2rem; padding:.12em 0; border-bottom:2px solid transparent }
.key { display:inline-block; padding:.05rem .5rem; margin:0 .5rem .3rem 0; border-radius:.2rem;
  border-bottom:2px solid }
.note { color:var(--soft); font-size:.9rem } ul.notes { color:var(--soft); font-size:.9rem; padding-left:1.2rem }
details { margin:.6rem 0 } summary { cursor:pointer }
"""

# Background and underline per source; the underline tells sources apart in print and for colour-blind readers.
_SOURCES = (
    ("#ffffff00", "#8a939c", "dotted"),
    ("#cfe6f5", "#0072B2", "solid"),
    ("#cdeee2", "#009E73", "double"),
    ("#fbe0cb", "#D55E00", "dashed"),
    ("#f3d9e6", "#CC79A7", "solid"),
    ("#fdf0c4", "#B8860B", "double"),
)
TARGET = "target"
_WORDS = {TARGET: "chosen by the target itself"}


def render_html(report: Report, folder: Path, titles: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        report: what to show.
        folder: where the report's plots lie.
        titles: caption by name of plot, in the order in which they are shown.
    """
    body = [_verdict(report), _plot(report, folder, "speedup", titles)]
    for name in dict.fromkeys(row.sampling for row in report.methods):
        body.append(f"<h2>Measured, {escape(name)}</h2>")
        body.append(_table(cells.METHOD_COLUMNS, cells.method_cells(report, name)))
        body.append(f"<h3>Speed-up by task</h3>{_table(*cells.task_cells(report, name))}")
        if sources := cells.source_cells(report, name):
            body.append(f"<h3>Who wrote the tokens</h3>{_table(cells.SOURCE_COLUMNS, sources)}")
    for name in titles:
        if name not in ("speedup", "load"):
            body.append(_plot(report, folder, name, titles))
    body.append(_load(report, folder, titles))
    body.append("<h2>Where each token came from</h2>" + _examples(report))
    body.append(
        "<h2>Is the output the target's?</h2>"
        + _table(cells.EXACT_COLUMNS, cells.exactness_cells(report), prose_last=True)
    )
    for name in dict.fromkeys(row.sampling for row in report.methods):
        body.append(f"<details><summary>Costs, {escape(name)}</summary>")
        body.append(_table(cells.COST_COLUMNS, cells.cost_cells(report, name)) + "</details>")
    notes = "".join(f"<li>{_inline(line)}</li>" for line in cells.method_notes(report))
    body.append(f"<h2>How it was measured</h2><ul class='notes'>{notes}</ul>")
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{_title(report)}</title>"
    page = f"<head>{head}<style>{_STYLE}</style></head><body>{''.join(body)}</body>"
    return f"<!doctype html><html lang='en'>{page}</html>\n"


def _title(report: Report) -> str:
    return escape(f"drafttrain: {report.verdict.decision}, {Path(report.pair.target).name}")


def _verdict(report: Report) -> str:
    verdict = report.verdict
    details = "".join(f"<p>{_inline(line)}</p>" for line in verdict.details)
    steps = "".join(f"<li>{_inline(step)}</li>" for step in verdict.next_steps)
    return (
        "<h1>drafttrain report: does speculative decoding pay?</h1>"
        f"<div class='verdict {verdict.decision.replace(' ', '-')}'><p class='headline'>{_inline(verdict.headline)}</p>"
        + details
        + (f"<p>What to do next:</p><ul>{steps}</ul>" if steps else "")
        + "</div>"
    )


def _inline(text: str) -> str:
    """Escaped text with `code` and *emphasis*."""
    parts = escape(text).split("`")
    for i in range(1, len(parts) - 1, 2):
        parts[i] = f"<code>{parts[i]}</code>"
    for i in range(0, len(parts), 2):
        words = parts[i].split("*")
        if len(words) % 2:
            parts[i] = "".join(f"<em>{word}</em>" if j % 2 else word for j, word in enumerate(words))
    return "".join(parts)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], prose_last: bool = False) -> str:
    """A table of numbers; `prose_last`: the last column holds sentences."""
    head = "".join(f"<th>{_inline(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        last = len(row) - 1
        tags = ["<td class='text'>" if prose_last and i == last else "<td>" for i in range(len(row))]
        lines.append("".join(f"{tag}{_inline(cell)}</td>" for tag, cell in zip(tags, row, strict=True)))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _plot(report: Report, folder: Path, name: str, titles: Mapping[str, str]) -> str:
    if name not in report.plots:
        return ""
    data = base64.b64encode((folder / report.plots[name]).read_bytes()).decode()
    narrow = " class='narrow'" if name in ("tau_history", "reliability") else ""
    caption = escape(titles[name])
    return (
        f"<figure{narrow}><figcaption>{caption}</figcaption>"
        f"<img alt='{caption}' src='data:image/png;base64,{data}'></figure>"
    )


def _load(report: Report, folder: Path, titles: Mapping[str, str]) -> str:
    """Larger batches, nothing where none were run."""
    if not report.load:
        return ""
    parts = ["<h2>Under load</h2>", _plot(report, folder, "load", titles)]
    for load in report.load:
        notes = "".join(f"<li>{_inline(line)}</li>" for line in cells.load_notes(load))
        parts += [f"<h3>Batch sizes, {escape(load.sampling)}</h3>", _table(cells.LOAD_COLUMNS, cells.load_cells(load))]
        parts += [f"<ul class='notes'>{notes}</ul>", _table(cells.VERIFY_COLUMNS, cells.verify_cells(load))]
    return "".join(parts)


def _examples(report: Report) -> str:
    if not report.examples:
        return "<p class='note'>No answers were kept.</p>"
    found = [piece.source for example in report.examples for piece in example.pieces]
    sources = list(dict.fromkeys([TARGET, *found]))
    looks = {source: _SOURCES[i % len(_SOURCES)] for i, source in enumerate(sources)}
    legend = "".join(
        f"<span class='key' style='{_look(looks[source])}'>"
        f"{escape(_WORDS.get(source, f'drafted by {source}, accepted'))}</span>"
        for source in sources
    )
    shown = [_example(example, looks, opened=i == 0) for i, example in enumerate(report.examples)]
    return f"<p>{legend}</p>" + "".join(shown)


def _look(look: tuple[str, str, str]) -> str:
    background, line, style = look
    return f"background:{background};border-bottom-color:{line};border-bottom-style:{style}"


def _example(example: ExampleAnswer, looks: Mapping[str, tuple[str, str, str]], opened: bool) -> str:
    spans = "".join(
        f"<span class='piece' style='{_look(looks[piece.source])}' "
        f"title='{escape(_hover(piece))}'>{escape(piece.text)}</span>"
        for piece in example.pieces
    )
    tau = f", {example.tau:.2f} tokens per round" if example.tau else ""
    summary = f"<em>{escape(example.task)}</em>, {escape(example.sampling)}, <code>{escape(example.method)}</code>{tau}"
    return (
        f"<details{' open' if opened else ''}><summary>{summary}</summary>"
        f"<pre class='prompt'>{escape(example.prompt)}</pre><pre class='answer'>{spans}</pre></details>"
    )


def _hover(piece: Piece) -> str:
    said = f"{_WORDS.get(piece.source, piece.source)}: {piece.tokens} token{'s' if piece.tokens != 1 else ''}"
    return said if piece.origin is None else f"{said}, copied from position {piece.origin} of prompt and answer"
