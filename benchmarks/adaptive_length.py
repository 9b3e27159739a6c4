"""Does an acceptance head earn its place? Against the best fixed length, confidence, the paper's head, the oracle.

    python benchmarks/adaptive_length.py --run runs/adaptive --output results.json   and a plot, results.png
    python benchmarks/adaptive_length.py --run runs/adaptive --plan        only the commands
    python benchmarks/adaptive_length.py --quick     few prompts, sampled only, under a minute; its figures say nothing

Runs the chain of a recipe with the programs a user would run, greedy and at temperature 1 (heads are trained for the
setting they serve), with one head a training seed and one in the published setting (recipes/published/specdecpp.yaml,
with our number of steps and learning rate, which its own would leave untrained on so few answers). Both settings take
one drafter, distilled at temperature 1 on prompts of its own: on those that heads learn from it must not accept by
memory. Greedy answers are to tasks that end, code left out: open-ended greedy text loops. What is done is reused, so a
killed run goes on.

Thresholds and lengths are chosen by replay on the tuning split; the two best of each kind are really run on the test
split, interleaved. The best fixed length and the best confidence rule are those that turned out fastest there, a head's
setting the one replay chose. Figures are of one setting, `_greedy` or `_sampled`, or else the smaller of the two;
`_low` and `_high` end their 95 % intervals over conversations, for means over seeds the widest of all seeds.

gain_over_best_fixed, gain_over_confidence    ratios of measured decoding rates, mean over seeds
oracle_gap_closed      (measured gain - 1) / (replayed gain of perfect stopping - 1), mean over seeds
worst_task             least ratio, over tasks, of the head's replayed speed to that task's own best fixed length
speedup_*              over autoregressive decoding, measured; speedup_oracle is replayed; the published head's
                       threshold and lengths are tuned as ours, its own (h = 0.7, lengths 2 to 20) replayed as
                       speedup_published_as_is; speedup_known, replayed too, is of a rule that stops by the true
                       acceptance probabilities: what a head of any kind can reach (perfect stopping when greedy)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import finish  # noqa: E402
from data_prep.reference_prompts import DEFAULT_MIXTURE  # noqa: E402
from drafttrain.config import parse  # noqa: E402
from drafttrain.evaluation.methods import head_of, kind_of  # noqa: E402
from drafttrain.evaluation.schema import MethodResult, Report, SweepPoint, read_report  # noqa: E402
from drafttrain.evaluation.statistics import Interval  # noqa: E402

TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
"""Decoding settings."""

RUN_LENGTH = 19
"""Tokens traced beyond a rejection: the published head drafts up to 20, which replay then counts exactly."""

QUICK = {
    "prompts.mixture": "{code: 12, recall: 12}",
    "prompts.length": 160,
    "prompts.lengths": "{}",
    "responses.max_new_tokens": 24,
    "training.arguments.max_steps": 4,
    "training.tau_evaluations": 0,
    "head.arguments.num_train_epochs": 1,
    "evaluate.max_new_tokens": 24,
    "evaluate.prompts_per_task": 2,
    "evaluate.repeats": 1,
    "evaluate.top": 1,
    "evaluate.bootstrap": 100,
}

PUBLISHED = "published"
AS_IS = f"Model(drafter, stop=AcceptanceHead({PUBLISHED}, 0.7, min=2, max=20))"
"""The published head in the published setting."""

BARS = {
    "best_fixed": ("best fixed length", "fixed"),
    "confidence": ("confidence, tuned", "confidence"),
    "published": ("published head, tuned", "other"),
    "head": ("acceptance head", "head"),
    "known": ("bound of all heads", "known"),
    "oracle": ("perfect stopping", "oracle"),
}
"""What is drawn: label and colour of each speed-up."""


def main() -> None:
    """Run the chain, read its reports, print the figures."""
    options = _options()
    for command in [*distil(options), *(command for name in options.temperatures for command in chain(name, options))]:
        print("$ " + " ".join(command), flush=True)
        if not options.plan:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    if options.plan:
        return
    found, rows = {}, {}
    for name in options.temperatures:
        found[name], rows[name] = figures_of(read_report(options.run / name / "report.json"))
    figures: dict[str, float] = {}
    for figure in found[name]:
        by_setting = {f"{figure}_{name}": own[figure] for name, own in found.items()}
        by_setting[figure] = min(by_setting.values(), key=lambda interval: interval.value)
        for full, interval in by_setting.items():
            figures |= {full: interval.value, f"{full}_low": interval.low, f"{full}_high": interval.high}
    finish("adaptive_length", figures, rows, options.output)
    if options.output is not None:
        draw(figures, options.output.with_suffix(".png"))


def draw(figures: dict[str, float], path: Path) -> None:
    """One panel a decoding setting: what every way to stop brings, replayed ones hollow."""
    from drafttrain.evaluation.plots import COLORS, STYLE, pyplot

    names = [name for name in TEMPERATURES if f"speedup_head_{name}" in figures]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 2.6), sharey=True, squeeze=False)
        for axis, name in zip(axes[0], names, strict=True):
            for y, (speedup, (_, kind)) in enumerate(reversed(BARS.items())):
                value, low, high = (figures[f"speedup_{speedup}_{name}{end}"] for end in ("", "_low", "_high"))
                replayed = speedup in ("oracle", "known")
                axis.barh(y, value, 0.62, color="none" if replayed else COLORS[kind], edgecolor=COLORS[kind])
                if not replayed:
                    axis.plot([low, high], [y, y], color="#222222", lw=1.6)
                axis.text(max(value, high) + 0.03, y, f"{value:.2f}", va="center", fontsize=9)
            axis.axvline(1, color=COLORS["autoregressive"], lw=1.2, ls="--")
            axis.set_yticks(range(len(BARS)), [label for label, _ in reversed(BARS.values())])
            axis.set_title(f"{name}, temperature {TEMPERATURES[name]:g}", fontsize=10, loc="left")
            axis.grid(axis="y", visible=False)
            axis.margins(x=0.12)
        figure.supxlabel("speed-up over decoding without a drafter", fontsize=10)
        figure.savefig(path)
        pyplot.close(figure)


def distil(options: argparse.Namespace) -> list[list[str]]:
    """The commands that make the drafter, without the interpreter."""
    ours = [*_ours(options), *_run("distil", 1.0, options), "--prompts.seed", "1"]
    return [["data_prep/responses.py", *ours], ["drafttrain/train_drafter.py", *ours]]


def chain(name: str, options: argparse.Namespace) -> list[list[str]]:
    """The commands of one decoding setting, likewise."""
    run = [*_run(name, TEMPERATURES[name], options), "--drafter.path", str(options.run / "distil" / "drafter")]
    if name == "greedy" and "code" in options.mixture:
        run += ["--prompts.mixture", str({task: count for task, count in options.mixture.items() if task != "code"})]
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
    evaluated = ["--evaluate.samplings", f"[{{temperature: {TEMPERATURES[name]}}}]", "--evaluate.batch_sizes", "[]"]
    return [*commands, ["-m", "drafttrain.cli", "evaluate", *ours, *evaluated]]


def _ours(options: argparse.Namespace) -> list[str]:
    return ["--config", str(options.config), *options.set]


def _run(folder: str, temperature: float, options: argparse.Namespace) -> list[str]:
    return ["--run", str(options.run / folder), "--responses.sampling.temperature", str(temperature)]


def figures_of(report: Report) -> tuple[dict[str, Interval], list[dict[str, Any]]]:
    """Figures of one decoding setting, and the rows of single seeds."""
    if len(report.workload.samplings) != 1:
        raise SystemExit("the report holds several decoding settings; this benchmark compares within one")
    measured = [row for row in report.methods if row.overall.speedup is not None]
    fixed, confidence = (_fastest(measured, kind) for kind in ("fixed", "confidence"))
    points = {kind: _best(report.sweep, kind) for kind in ("fixed", "oracle")}
    points["known"] = next((p for p in report.sweep if p.kind == "known"), points["oracle"])
    names = dict.fromkeys(head_of(row.method) for row in measured if row.kind == "head")
    seeds = {name: _seed(report, measured, name, points) for name in names}
    published = seeds[PUBLISHED]
    ours = [seed for name, seed in seeds.items() if name != PUBLISHED]
    [as_is] = [p for p in report.sweep if p.method == AS_IS]
    figures = {
        figure: Interval(
            mean(seed[figure].value for seed in ours),
            min(seed[figure].low for seed in ours),
            max(seed[figure].high for seed in ours),
        )
        for figure in (
            "gain_over_best_fixed",
            "gain_over_confidence",
            "oracle_gap_closed",
            "worst_task",
            "speedup_head",
        )
    }
    figures["published_gap_closed"] = published["oracle_gap_closed"]
    figures["speedup_best_fixed"] = fixed.overall.speedup
    figures["speedup_confidence"] = confidence.overall.speedup
    figures["speedup_published"] = published["speedup_head"]
    figures["speedup_published_as_is"] = _replayed(as_is.predicted_speedup)
    for kind in ("oracle", "known"):
        figures[f"speedup_{kind}"] = _replayed(points[kind].predicted_speedup)
    rows = [
        {"head": name, **{key: vars(value) if isinstance(value, Interval) else value for key, value in seed.items()}}
        for name, seed in seeds.items()
    ]
    return figures, rows


def _replayed(value: float) -> Interval:
    """A figure by replay, which has no interval."""
    return Interval(value, value, value)


def _seed(report: Report, measured: list[MethodResult], name: str, points: dict[str, SweepPoint]) -> dict[str, Any]:
    """One head at the setting that replay chose for it."""
    point = _best([p for p in report.sweep if p.kind == "head" and head_of(p.method) == name], "head")
    row = next(row for row in measured if row.method == point.method)
    fixed, oracle = (points[kind].predicted_speedup for kind in ("fixed", "oracle"))
    gain, tasks = row.versus["fixed"], _against_best_fixed(report.sweep, point)
    return {
        "method": row.method,
        "speedup_head": row.overall.speedup,
        "gain_over_best_fixed": gain,
        "gain_over_confidence": row.versus["confidence"],
        "oracle_gap_closed": Interval(*((end - 1) / (oracle / fixed - 1) for end in (gain.value, gain.low, gain.high))),
        "replayed_gap_closed": (point.predicted_speedup - fixed) / (oracle - fixed),
        "worst_task": _replayed(min(tasks.values())),
        "tasks": tasks,
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
    parser.add_argument(
        "--config", type=Path, default=ROOT / "recipes/reference/adaptive.yaml", help="recipe of the pair"
    )
    parser.add_argument("--seeds", type=int, default=3, help="heads trained a setting")
    parser.add_argument("--quick", action="store_true", help="few prompts, one seed, sampled only")
    parser.add_argument("--plan", action="store_true", help="print the commands and stop")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    parser.add_argument("set", nargs="*", help="further flags of our own runs, after `--`")
    options = parser.parse_args()
    options.run, options.temperatures = options.run.resolve(), TEMPERATURES
    if options.quick:
        options.seeds, options.temperatures = 1, {"sampled": 1.0}
        options.set += [part for name, value in QUICK.items() for part in (f"--{name}", str(value))]
    parsed = parse("", [], ["--config", str(options.config), "--run", str(options.run), *options.set])
    options.config, options.target = parsed.config.resolve(), parsed.recipe.target.path
    options.head_arguments, prompts = parsed.recipe.head.arguments, parsed.recipe.prompts
    options.mixture = prompts.mixture or ({} if prompts.path else DEFAULT_MIXTURE)
    return options


if __name__ == "__main__":
    main()
