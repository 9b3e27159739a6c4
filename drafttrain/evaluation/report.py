"""report.json, report.md and report.html: one `Report`, three readers (programs, terminals, people).

The verdict stands first in all of them. Nothing is computed here: what a table shows is in the `Report`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from drafttrain.evaluation import plots
from drafttrain.evaluation.examples import write_samples
from drafttrain.evaluation.html import render_html
from drafttrain.evaluation.schema import Report, Sample, to_json
from drafttrain.evaluation.tables import (
    COST_COLUMNS,
    EXACT_COLUMNS,
    LOAD_COLUMNS,
    METHOD_COLUMNS,
    SOURCE_COLUMNS,
    VERIFY_COLUMNS,
    cost_cells,
    exactness_cells,
    left_out,
    load_cells,
    load_notes,
    method_cells,
    method_notes,
    source_cells,
    table,
    task_cells,
    verify_cells,
)
from drafttrain.evaluation.verdict import verdict_lines
from drafttrain.run_folder import RunFolder, write_atomically

PLOT_TITLES = {
    "speedup": "Speed-up of every method",
    "length": "Tokens per second against the number of drafted tokens",
    "load": "Larger batches: throughput, and what speculation gains at the same batch size",
    "pareto": "Verification rate against discard rate, every setting replayed",
    "reliability": "Reliability of the acceptance head",
    "breakdown": "Where the time goes",
    "sources": "Who wrote the tokens: members, copies and the target",
    "turns": "Speed-up turn by turn",
    "gamma": "Copying: how many tokens must match",
    "contexts": "Longer prompts: tokens per round, speed, and what the drafter keeps",
    "tau_history": "Tokens per round while training",
}


def write(report: Report, samples: Mapping[str, Iterable[Sample]], run: RunFolder) -> Path:
    """Draw the plots and write answers and report, each file whole or not at all, report.json last.

    An old report.json goes first: it never stands beside answers that are not its own.

    Args:
        report: what was found.
        samples: answers by the path that the report names.
        run: where everything goes.

    Returns:
        Path of report.html.
    """
    run.create()
    (run.report / "report.json").unlink(missing_ok=True)
    for path, answers in samples.items():
        write_samples(run.report, answers, path)
    report.plots = plots.draw_all(report, run.plots)
    write_atomically(run.report / "report.md", markdown(report))
    write_atomically(run.report / "report.html", render_html(report, run.report, PLOT_TITLES))
    write_atomically(run.report / "report.json", to_json(report) + "\n")
    return run.report / "report.html"


def markdown(report: Report) -> str:
    """The report for a terminal or a forge."""
    headline, *details = verdict_lines(report.verdict)
    parts = ["# Does speculative decoding pay?", "", f"**{headline}**", "", *[f"- {line}" for line in details]]
    for name in plots.samplings(report):
        parts += ["", f"## Measured, {name}", "", *table(METHOD_COLUMNS, method_cells(report, name))]
        parts += ["", left_out(report, name)]
        parts += ["", f"### Speed-up by task, {name}", "", *table(*task_cells(report, name))]
        if sources := source_cells(report, name):
            parts += ["", f"### Who wrote the tokens, {name}", "", *table(SOURCE_COLUMNS, sources)]
        parts += ["", f"### Costs, {name}", "", *table(COST_COLUMNS, cost_cells(report, name))]
    for load in report.load:
        parts += ["", f"## Under load, {load.sampling}", "", *table(LOAD_COLUMNS, load_cells(load)), ""]
        parts += [*[f"- {line}" for line in load_notes(load)], "", *table(VERIFY_COLUMNS, verify_cells(load))]
    parts += ["", "## Is the output the target's?", "", *table(EXACT_COLUMNS, exactness_cells(report))]
    parts += _plot_links(report)
    parts += ["", "## How it was measured", "", *[f"- {line}" for line in method_notes(report)], ""]
    return "\n".join(parts)


def _plot_links(report: Report) -> list[str]:
    lines = []
    for name, title in PLOT_TITLES.items():
        if name in report.plots:
            lines += ["", f"![{title}]({report.plots[name]})"]
    return ["", "## Plots", *lines] if lines else []
