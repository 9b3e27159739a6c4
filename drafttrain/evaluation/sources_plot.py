"""The report's plots of who wrote the tokens: members by task, speed-up turn by turn, the sweep of gamma."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from textwrap import fill

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from drafttrain.evaluation.schema import Figures, MethodResult, Report, mixed
from drafttrain.evaluation.statistics import Interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
TARGET = "#BBBBBB"
SHOWN = len(COLOURS)
"""Methods of a plot at most, the fastest."""

_GAMMA = re.compile(r"Copy\((gamma=(\d+)(?:, )?)?")


def sources(report: Report) -> Figure | None:
    """Shares of tokens by who proposed them, a bar a task and method in which more than one may."""
    rows = [row for row in report.methods if mixed(row)]
    bars = [(row, task, own) for row in rows for task, own in row.tasks.items() if own.tokens]
    if not bars:
        return None
    figure, axis = pyplot.subplots(figsize=(9, 1.4 + 0.3 * len(bars) + 0.3 * len(rows)))
    looks = dict(zip(dict.fromkeys(who for _, _, own in bars for who in own.accepted_by), COLOURS * 9, strict=False))
    y, last, places = 0.0, None, []
    for row, _, own in bars:
        y -= 1.0 if row is last else 2.0
        if row is not last:
            axis.annotate(f"{row.method}, {row.sampling}", (0, y + 0.75), fontsize=8, va="center")
        last = row
        places.append(y)
        left = 0.0
        for who, colour in looks.items():
            left += _bar(axis, y, left, own.accepted_by.get(who, 0) / own.tokens, colour, who)
        _bar(axis, y, left, 1 - left, TARGET, "target")
    axis.set_yticks(places, [task for _, task, _ in bars], fontsize=8)
    axis.set(xlim=(0, 1), ylim=(y - 0.6, 0))
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlabel("share of the answers' tokens")
    axis.grid(axis="y", visible=False)
    found = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(found.values(), found, loc="outside upper center", ncols=4, fontsize=8.5)
    return figure


def _bar(axis: Axes, y: float, left: float, width: float, colour: str, label: str) -> float:
    axis.barh(y, width, left=left, color=colour, height=0.7, label=label)
    if width > 0.06:
        axis.annotate(f"{width:.0%}", (left + width / 2, y), ha="center", va="center", fontsize=7)
    return width


def turns(report: Report) -> Figure | None:
    """Speed-up turn by turn of the tasks that have several, the fastest methods of each decoding setting."""
    panels = {}
    for name in dict.fromkeys(row.sampling for row in report.methods):
        rows = [row for row in report.of(name) if any(own.speedup for own in row.turns.values())]
        if rows:
            panels[name] = sorted(rows, key=lambda row: -row.overall.speedup.value)[:SHOWN]
    if not panels:
        return None
    labels = list(dict.fromkeys(label for rows in panels.values() for row in rows for label in row.turns))
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 0.4 + 4.6 * len(panels)), squeeze=False, sharex=True)
    for (name, rows), axis in zip(panels.items(), axes[:, 0], strict=True):
        for number, row in enumerate(rows):
            shift = 0.7 * ((number + 0.5) / len(rows) - 0.5)
            points = [(labels.index(label) + shift, own.speedup) for label, own in row.turns.items() if own.speedup]
            _intervals(axis, points, "o", COLOURS[number], row.method)
        axis.axhline(1, color="#767676", lw=1.2, ls="--")
        axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel("speed-up")
        axis.set_xticks(range(len(labels)), [label.replace(", ", "\n") for label in labels], fontsize=8)
        axis.grid(axis="x", visible=False)
        axis.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.14))
    return figure


def gamma(report: Report) -> Figure | None:
    """Speed-up of copying methods by gamma, where several that differ in nothing else were run."""
    found: dict[tuple[str, str], list[tuple[int, MethodResult]]] = {}
    for row in report.methods:
        if row.overall.speedup and (split := without_gamma(row.method)):
            found.setdefault((row.sampling, split[0]), []).append((split[1], row))
    swept = {key: sorted(rows, key=lambda each: each[0]) for key, rows in found.items() if len(rows) > 1}
    if not swept:
        return None
    figure, axes = pyplot.subplots(1, len(swept), figsize=(5.6 * len(swept), 4.4), squeeze=False, sharey=True)
    for ((name, family), rows), axis in zip(swept.items(), axes[0], strict=True):
        for place, (task, own) in enumerate(_by_task(rows)):
            colour = "black" if task == "all" else COLOURS[place % SHOWN]
            _intervals(axis, own, "o-", colour, task)
        axis.axhline(1, color="#767676", lw=1.2, ls="--")
        axis.set_title(fill(f"{family}, {name}", 70), fontsize=8, loc="left")
        axis.set_xlabel("gamma: tokens that must match")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("speed-up over no drafter")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8.5)
    return figure


def without_gamma(method: str) -> tuple[str, int] | None:
    """A method with n in place of its only gamma, and that; None where it copies not at all or more than once."""
    found = list(_GAMMA.finditer(method))
    if len(found) != 1:
        return None
    [match] = found
    rest = method[match.end() :]
    given = f"gamma=n{'' if rest.startswith(')') else ', '}"
    return f"{method[: match.start()]}Copy({given}{rest}", int(match[2] or 3)


def _by_task(rows: Sequence[tuple[int, MethodResult]]) -> Iterator[tuple[str, list[tuple[int, Interval]]]]:
    tasks = [*rows[0][1].tasks, "all"]
    for task in tasks if len(tasks) > 2 else ["all"]:
        figures: list[tuple[int, Figures | None]] = [
            (number, row.overall if task == "all" else row.tasks.get(task)) for number, row in rows
        ]
        own = [(number, each.speedup) for number, each in figures if each and each.speedup]
        if own:
            yield task, own


def _intervals(axis: Axes, points: Sequence[tuple[float, Interval]], style: str, colour: str, label: str) -> None:
    values = [each.value for _, each in points]
    bars = [[each.value - each.low for _, each in points], [each.high - each.value for _, each in points]]
    where = [place for place, _ in points]
    axis.errorbar(where, values, yerr=bars, fmt=style, color=colour, ms=5, lw=1.4, elinewidth=1, capsize=2, label=label)
