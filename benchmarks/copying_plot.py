"""Draws what benchmarks/copying.py has written: the sweep of gamma, speed by turn, and who writes the tokens.

    python benchmarks/copying_plot.py benchmarks/results/2026-11-22-copying.json

The picture lies beside the results, with the same name.
"""

from __future__ import annotations

import argparse
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

COLOURS = ("#0072B2", "#CC79A7", "#D55E00", "#009E73", "#767676")
SHOWN = {
    "speculation": "tuned drafter",
    "specdecpp": "SpecDec++",
    "copy": "tuned copying",
    "both": "copying before the drafter",
}
TEMPERATURES = {"greedy": "", "sampled": "_sampled"}
"""Of the results: where rows of the runs stand, and what the names of what was chosen for them end in."""

Row = dict[str, Any]


def main() -> None:
    """Draw the results that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="what benchmarks/copying.py has written")
    for path in parser.parse_args().results:
        if not path.is_file():
            parser.error(f"{path} does not exist")
        draw(json.loads(path.read_text(encoding="utf-8"))["rows"], path.with_suffix(".png"))


def draw(rows: dict[str, Any], path: Path) -> None:
    """Three panels for each temperature that was measured.

    Args:
        rows: of the results: `chosen`, `tuning` and `greedy`; `chosen_sampled`, `tuning_sampled` and `sampled`.
        path: of the picture.
    """
    measured = {name: end for name, end in TEMPERATURES.items() if f"chosen{end}" in rows}
    with pyplot.rc_context(STYLE):
        figure, grid = pyplot.subplots(len(measured), 3, figsize=(13, 3.9 * len(measured)), squeeze=False)
        for panels, (name, end) in zip(grid, measured.items(), strict=True):
            chosen = rows[f"chosen{end}"]
            _sweep(panels[0], rows[f"tuning{end}"], list(chosen))
            _by_turn(panels[1], rows[name], chosen)
            _members(panels[2], rows[name], chosen)
            for panel in panels:
                panel.set_title(f"{panel.get_title()}, {name}")
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
    shown = {kind: label for kind, label in SHOWN.items() if all(kind in methods for methods in chosen.values())}
    step = 0.8 / len(shown)
    for place, (kind, label) in enumerate(shown.items()):
        rated = {number: _row(rows, methods[kind], task) for number, (task, methods) in enumerate(chosen.items())}
        found = {number: row["speedup"] for number, row in rated.items() if row}
        at = [number + step * (place - (len(shown) - 1) / 2) for number in found]
        values = [each["value"] for each in found.values()]
        below = [each["value"] - each["low"] for each in found.values()]
        above = [each["high"] - each["value"] for each in found.values()]
        look = {"color": COLOURS[list(SHOWN).index(kind)], "label": label, "error_kw": {"lw": 1}}
        axes.bar(at, values, 0.92 * step, yerr=[below, above], **look)
    axes.set_xticks(range(len(chosen)), list(chosen))
    axes.set(title="Speed-up by turn, right answers", ylabel="over no drafter")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4, fontsize=7, columnspacing=1)


def _members(axes: Axes, rows: list[Row], chosen: dict[str, dict[str, str]]) -> None:
    """Shares of tokens by who wrote them, copying before the drafter."""
    written = {task: _row(rows, methods["both"], task) for task, methods in chosen.items()}
    shares = {task: row["by_source"] for task, row in written.items() if row}
    below = [0.0] * len(shares)
    for who, colour in zip(("copy", "drafter", "target"), (COLOURS[2], COLOURS[0], COLOURS[-1]), strict=True):
        values = [each.get(who, 0.0) for each in shares.values()]
        axes.bar(range(len(values)), values, 0.5, bottom=below, color=colour, label=who)
        below = [one + two for one, two in zip(below, values, strict=True)]
    axes.set_xticks(range(len(shares)), list(shares))
    axes.set(title="Who wrote the tokens", ylabel="share")
    axes.tick_params(axis="x", labelsize=8)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)


def _row(rows: list[Row], method: str, task: str) -> Row | None:
    """None where no answer of the task counts, as may be of sampled ones."""
    return next((row for row in rows if (row["method"], row["task"]) == (method, task)), None)


if __name__ == "__main__":
    main()
