"""What speculation brings over autoregressive decoding, on revising (greedy, right answers) and on code (T = 0.8).

    python benchmarks/speculation.py --drafter runs/pair/drafter --run runs/speculation --output results.json
    python benchmarks/speculation.py --quick     the target as its own drafter, under a minute; its figures say nothing

Evaluates the drafter twice with `drafttrain evaluate`, once a task, on prompts whose code and seeds nothing was trained
on: lengths and thresholds are chosen by replay on eight of them, the two best of each kind are run on the others beside
the autoregressive decoder, and output is checked. `speedup_revise` and `speedup_code` are of the setting that replay
chose; `_low` and `_high` end their 95 % intervals over conversations, `_answers` says how many answers counted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import finish  # noqa: E402
from drafttrain.config import resolve_path  # noqa: E402
from drafttrain.evaluation.schema import Report, read_report  # noqa: E402

TASKS = {"revise": 0.0, "code": 0.8}
"""Tasks and the temperatures they are measured at."""

TRIED = 3
"""Prompts made for every one that is run: some are set aside, eight tune, not all come out right."""


def main() -> None:
    """Evaluate both tasks and print the figures."""
    options = _options()
    figures: dict[str, float] = {}
    rows = {}
    for task, temperature in TASKS.items():
        command = [sys.executable, "-m", "drafttrain.cli", "evaluate", *flags(task, temperature, options)]
        subprocess.run(command, cwd=ROOT, check=True)
        report = read_report(options.run / task / "report.json")
        figures |= figures_of(report, task)
        rows[task] = [
            {"method": row.method, "speedup": row.overall.speedup and vars(row.overall.speedup), "tau": row.overall.tau}
            for row in report.methods
        ]
    finish("speculation", figures, rows, options.output)


def flags(task: str, temperature: float, options: argparse.Namespace) -> list[str]:
    """Settings of one evaluation."""
    settings = {
        "run": options.run / task,
        "target.path": options.target,
        "target.dtype": "bfloat16",
        "drafter.path": options.drafter,
        f"prompts.mixture.{task}": TRIED * options.prompts,
        "prompts.length": options.length,
        "prompts.held_out": 0.45,
        "responses.sampling.temperature": temperature,
        "evaluate.prompts_per_task": 2 * options.prompts if task == "revise" else options.prompts,
        "evaluate.max_new_tokens": options.tokens,
        "evaluate.repeats": options.repeats,
        "evaluate.batch_sizes": "[]",
    }
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def figures_of(report: Report, task: str) -> dict[str, float]:
    """The speed-up of the setting that replay predicts to be fastest."""
    row = max((row for row in report.methods if row.replayed_speedup), key=lambda row: row.replayed_speedup)
    own = row.overall
    if own.speedup is None:
        raise SystemExit(f"no answer to {task} was left to measure: all of them loop or are wrong")
    named = {"": own.speedup.value, "_low": own.speedup.low, "_high": own.speedup.high, "_tau": own.tau}
    return {f"speedup_{task}{ending}": value for ending, value in named.items()} | {f"{task}_answers": own.prompts}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="checkpoints/reference-target", help="the target")
    parser.add_argument("--drafter", help="a drafter distilled for it")
    parser.add_argument("--run", type=Path, default=Path("runs/speculation"), help="folder for both reports")
    parser.add_argument("--prompts", type=int, default=16, help="conversations of a task that are run")
    parser.add_argument("--length", type=int, default=160, help="tokens of a prompt with its reference answer")
    parser.add_argument("--tokens", type=int, default=160, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--quick", action="store_true", help="few prompts, without a drafter")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    options.target = resolve_path(options.target)
    if options.quick:
        options.drafter, options.prompts, options.length, options.tokens, options.repeats = options.target, 3, 64, 64, 1
    elif options.drafter is None:
        parser.error("give --drafter, or --quick")
    options.run, options.drafter = options.run.resolve(), resolve_path(options.drafter)
    return options


if __name__ == "__main__":
    main()
