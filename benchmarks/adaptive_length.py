"""Does an acceptance head earn its place? Against the best fixed length, confidence, the paper's head, the oracle.

    python benchmarks/adaptive_length.py --run runs/adaptive --output results.json
    python benchmarks/adaptive_length.py --run runs/adaptive --plan        only the commands

Runs the chain of a recipe with the programs a user would run, greedy and at temperature 1 (heads are trained for the
setting they serve), with one head a training seed and one in the published setting (recipes/published/specdecpp.yaml,
with our number of steps and learning rate, which its own would leave untrained on so few answers). Both settings take
one drafter, distilled at temperature 1 on prompts of its own: on those that heads learn from it must not accept by
memory. What is done is reused, so a killed run goes on.

Thresholds and lengths are chosen by replay on the tuning split; the two best of each kind are really run on the test
split, interleaved. The best fixed length and the best confidence rule are those that turned out fastest there, a head's
setting the one replay chose. Figures end in `_greedy` or `_sampled`; without an ending they are the smaller of the two.

gain_over_best_fixed, gain_over_confidence    ratios of measured decoding rates, mean over seeds
oracle_gap_closed      (measured gain - 1) / (replayed gain of perfect stopping - 1), mean over seeds
worst_task             least ratio, over tasks, of the head's replayed speed to that task's own best fixed length
speedup_*              over autoregressive decoding, measured; speedup_oracle is replayed; the published head's
                       threshold and lengths are tuned as ours, its own (h = 0.7, lengths 2 to 20) replayed as
                       speedup_published_as_is
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import finish  # noqa: E402
from drafttrain.config import parse  # noqa: E402
from drafttrain.evaluation.methods import head_of, kind_of  # noqa: E402
from drafttrain.evaluation.schema import MethodResult, Report, SweepPoint, read_report  # noqa: E402

TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
"""Decoding settings."""

RUN_LENGTH = 19
"""Tokens traced beyond a rejection: the published head drafts up to 20, which replay then counts exactly."""

PUBLISHED = "published"
AS_IS = f"Model(drafter, stop=AcceptanceHead({PUBLISHED}, 0.7, min=2, max=20))"
"""The published head in the published setting."""


def main() -> None:
    """Run the chain, read its reports, print the figures."""
    options = _options()
    for command in [*distil(options), *(command for name in TEMPERATURES for command in chain(name, options))]:
        print("$ " + " ".join(command), flush=True)
        if not options.plan:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    if options.plan:
        return
    figures: dict[str, float] = {}
    rows = {}
    for name in TEMPERATURES:
        report = read_report(options.run / name / "report.json")
        found, rows[name] = figures_of(report)
        figures |= {f"{figure}_{name}": value for figure, value in found.items()}
    for figure in dict.fromkeys(figure.rpartition("_")[0] for figure in figures):
        figures[figure] = min(figures[f"{figure}_{name}"] for name in TEMPERATURES)
    finish("adaptive_length", figures, rows, options.output)


def distil(options: argparse.Namespace) -> list[list[str]]:
    """The commands that make the drafter, without the interpreter."""
    ours = [*_ours(options), *_run("distil", 1.0, options), "--prompts.seed", "1"]
    return [["data_prep/responses.py", *ours], ["drafttrain/train_drafter.py", *ours]]


def chain(name: str, options: argparse.Namespace) -> list[list[str]]:
    """The commands of one decoding setting, likewise."""
    run = [*_run(name, TEMPERATURES[name], options), "--drafter.path", str(options.run / "distil" / "drafter")]
    ours = [*_ours(options), *run, "--traces.run_length", str(RUN_LENGTH)]
    published = ["--config", "recipes/published/specdecpp.yaml", *run]
    published += ["--target.path", options.target, "--head.folder", PUBLISHED]
    for setting in ("num_train_epochs", "learning_rate", "per_device_train_batch_size"):
        published += [f"--head.arguments.{setting}", str(options.head_arguments[setting])]
    published += ["--head.arguments.gradient_accumulation_steps", "1"]
    commands = [["data_prep/responses.py", *ours], ["data_prep/traces.py", *ours]]
    for seed in range(options.seeds):
        commands.append(["drafttrain/train_head.py", *ours, "--seed", str(seed), "--head.folder", f"head_{seed}"])
    commands.append(["drafttrain/train_head.py", *published])
    evaluated = ["--evaluate.samplings", f"[{{temperature: {TEMPERATURES[name]}}}]"]
    return [*commands, ["-m", "drafttrain.cli", "evaluate", *ours, *evaluated]]


def _ours(options: argparse.Namespace) -> list[str]:
    return ["--config", str(options.config), *options.set]


def _run(folder: str, temperature: float, options: argparse.Namespace) -> list[str]:
    return ["--run", str(options.run / folder), "--responses.sampling.temperature", str(temperature)]


def figures_of(report: Report) -> tuple[dict[str, float], list[dict[str, object]]]:
    """Figures of one decoding setting, and the rows of single seeds."""
    if len(report.workload.samplings) != 1:
        raise SystemExit("the report holds several decoding settings; this benchmark compares within one")
    measured = [row for row in report.methods if row.overall.speedup is not None]
    fixed, confidence = (_fastest(measured, kind) for kind in ("fixed", "confidence"))
    points = {kind: _best(report.sweep, kind) for kind in ("fixed", "oracle")}
    names = dict.fromkeys(head_of(row.method) for row in measured if row.kind == "head")
    rows = [_seed(report, measured, name, points) for name in names]
    ours = [row for row in rows if row["head"] != PUBLISHED]
    published = next(row for row in rows if row["head"] == PUBLISHED)
    figures = {
        figure: mean(row[figure] for row in ours)
        for figure in ("gain_over_best_fixed", "gain_over_confidence", "oracle_gap_closed", "worst_task")
    }
    figures |= {f"least_{figure}": min(row[figure] for row in ours) for figure in ("gain_over_best_fixed",)}
    figures["published_gap_closed"] = published["oracle_gap_closed"]
    figures["speedup_best_fixed"] = fixed.overall.speedup.value
    figures["speedup_confidence"] = confidence.overall.speedup.value
    figures["speedup_head"] = mean(row["speedup"] for row in ours)
    figures["speedup_published"] = published["speedup"]
    [as_is] = [p for p in report.sweep if p.method == AS_IS]
    figures["speedup_published_as_is"] = as_is.predicted_speedup
    figures["speedup_oracle"] = points["oracle"].predicted_speedup
    return figures, rows


def _seed(
    report: Report, measured: list[MethodResult], name: str, points: dict[str, SweepPoint]
) -> dict[str, float | str]:
    """One head at the setting that replay chose for it."""
    point = _best([p for p in report.sweep if p.kind == "head" and head_of(p.method) == name], "head")
    row = next(row for row in measured if row.method == point.method)
    fixed, oracle = (points[kind].predicted_speedup for kind in ("fixed", "oracle"))
    versus = {f"versus_{kind}": [ratio.value, ratio.low, ratio.high] for kind, ratio in row.versus.items()}
    return {
        "head": name,
        "method": row.method,
        "speedup": row.overall.speedup.value,
        "gain_over_best_fixed": row.versus["fixed"].value,
        "gain_over_confidence": row.versus["confidence"].value,
        "oracle_gap_closed": (row.versus["fixed"].value - 1) / (oracle / fixed - 1),
        "replayed_gap_closed": (point.predicted_speedup - fixed) / (oracle - fixed),
        "worst_task": min(_against_best_fixed(report.sweep, point).values()),
        "tasks": _against_best_fixed(report.sweep, point),
        **versus,
    }


def _against_best_fixed(sweep: list[SweepPoint], point: SweepPoint) -> dict[str, float]:
    """Replayed speed on each task over that of the task's own best fixed length."""
    fixed = [p.task_speedups for p in sweep if p.kind == "fixed"]
    return {task: speed / max(each[task] for each in fixed) for task, speed in point.task_speedups.items()}


def _best(sweep: list[SweepPoint], kind: str) -> SweepPoint:
    return max((p for p in sweep if p.kind == kind), key=lambda p: p.predicted_speedup)


def _fastest(rows: list[MethodResult], kind: str) -> MethodResult:
    return max((row for row in rows if kind_of(row.method) == kind), key=lambda row: row.overall.speedup.value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/adaptive"), help="folder for both settings' runs")
    parser.add_argument("--config", type=Path, default=ROOT / "recipes/reference/pair.yaml", help="recipe of the pair")
    parser.add_argument("--seeds", type=int, default=3, help="heads trained a setting")
    parser.add_argument("--plan", action="store_true", help="print the commands and stop")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    parser.add_argument("set", nargs="*", help="further flags of our own runs, after `--`")
    options = parser.parse_args()
    options.run = options.run.resolve()
    parsed = parse("", [], ["--config", str(options.config), "--run", str(options.run)])
    options.config, options.target = parsed.config.resolve(), parsed.recipe.target.path
    options.head_arguments = parsed.recipe.head.arguments
    return options


if __name__ == "__main__":
    main()
