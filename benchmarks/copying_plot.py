"""Draws what benchmarks/copying.py has written: the sweep of gamma, speed by turn, and who writes the tokens.

    python benchmarks/copying_plot.py benchmarks/results/2026-11-22-copying.json

The picture lies beside the results, with the same name.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

from drafttrain.evaluation.plots import STYLE, pyplot  # noqa: E402

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676")
SHOWN = {"speculation": "tuned drafter", "copy": "tuned copying", "both": "copying before the drafter"}

Row = dict[str, Any]


def main() -> None:
    """Draw the results that are named."""
    for name in sys.argv[1:]:
        path = Path(name)
        draw(json.loads(path.read_text(encoding="utf-8"))["rows"], path.with_suffix(".png"))


def draw(rows: dict[str, Any], path: Path) -> None:
    """Three panels.

    Args:
        rows: of the results: `tuning`, `greedy`, `chosen`.
        path: of the picture.
    """
    tasks = list(rows["chosen"])
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8))
        _sweep(panels[0], rows["tuning"], tasks)
        _by_turn(panels[1], rows["greedy"], rows["chosen"])
        _members(panels[2], rows["greedy"], rows["chosen"])
        figure.savefig(path)
        pyplot.close(figure)


def _sweep(axes: Axes, rows: list[Row], tasks: list[str]) -> None:
    """The published rule by the number of tokens that must match."""
    for task, colour in zip(tasks, COLOURS, strict=False):
        found = sorted(
            (int(match[1]), row["speedup"]["value"])
            for row in rows
            if row["task"] == task and (match := re.fullmatch(r"Copy\(gamma=(\d+)\)", row["method"]))
        )
        axes.plot(*zip(*found, strict=True), marker="o", color=colour, label=task)
    axes.set(title="Copying as published", xlabel="gamma: tokens that must match", ylabel="speed-up")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()


def _by_turn(axes: Axes, rows: list[Row], chosen: dict[str, dict[str, str]]) -> None:
    """What was tuned for each task, with intervals."""
    for place, (kind, label) in enumerate(SHOWN.items()):
        found = [_row(rows, methods[kind], task)["speedup"] for task, methods in chosen.items()]
        at = [number + 0.26 * (place - 1) for number in range(len(found))]
        values = [each["value"] for each in found]
        below = [each["value"] - each["low"] for each in found]
        above = [each["high"] - each["value"] for each in found]
        axes.bar(at, values, 0.24, yerr=[below, above], color=COLOURS[place], label=label, error_kw={"lw": 1})
    axes.set_xticks(range(len(chosen)), list(chosen))
    axes.set(title="Speed-up by turn, right answers", ylabel="over no drafter")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, fontsize=7, columnspacing=1)


def _members(axes: Axes, rows: list[Row], chosen: dict[str, dict[str, str]]) -> None:
    """Shares of tokens by who wrote them, copying before the drafter."""
    shares = {task: _row(rows, methods["both"], task)["by_source"] for task, methods in chosen.items()}
    below = [0.0] * len(shares)
    for who, colour in zip(("copy", "drafter", "target"), (*COLOURS[:2], COLOURS[-1]), strict=True):
        values = [each.get(who, 0.0) for each in shares.values()]
        axes.bar(range(len(values)), values, 0.5, bottom=below, color=colour, label=who)
        below = [one + two for one, two in zip(below, values, strict=True)]
    axes.set_xticks(range(len(shares)), list(shares))
    axes.set(title="Who wrote the tokens", ylabel="share")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def _row(rows: list[Row], method: str, task: str) -> Row:
    return next(row for row in rows if (row["method"], row["task"]) == (method, task))


if __name__ == "__main__":
    main()
