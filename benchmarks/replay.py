"""Replay of stopping rules: policies a second over a million recorded tokens, and how well speed is predicted.

    python benchmarks/replay.py --report runs/q/report.json     1,000 policies over 10^6 tokens; a report's real runs
    python benchmarks/replay.py --quick                         200 policies over 10^5 tokens; needs no report

The record is made up (4,000 answers, tasks of unlike acceptance, runs of 8 tokens behind every rejection; scores that
know something of acceptance): replay's time depends on its sizes, not on where it came from. Policies are fixed
lengths, the oracle, and threshold rules of three scores at many thresholds and maximal lengths; all that they share is
computed within the time that is taken (that replay is right is shown by tests/evaluation/test_replay.py). Figures are
of the fastest repeat, `_low` of the slowest.

`prediction_error` is the median over a report's speculative rows of |predicted / measured speed-up - 1|, predicted from
the row's own counts and the measured costs; `replay_prediction_error` the same for the speed-up that replay of the
tuning split predicted before anything was run, so it holds the difference of the two splits as well. `_max` is the
greatest of all rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from drafttrain.evaluation.policies import FixedPolicy, OraclePolicy, Policy, ThresholdPolicy  # noqa: E402
from drafttrain.evaluation.replay import Tally, replay  # noqa: E402
from drafttrain.evaluation.schema import read_report  # noqa: E402
from drafttrain.evaluation.trace_record import Record  # noqa: E402
from drafttrain.evaluation.trace_scores import Scores  # noqa: E402

FULL = {"answers": 4000, "tokens": 250, "thresholds": 100, "repeats": 3}
QUICK = {"answers": 400, "tokens": 250, "thresholds": 20, "repeats": 2}
RUN_LENGTH = 8
TASKS = {"revise": 0.95, "code": 0.7, "chat": 0.6, "facts": 0.8}
"""Mean acceptance of each task."""


def main() -> None:
    """Make the record, check, time, and print the figures."""
    arguments = _arguments()
    case = QUICK if arguments.quick else FULL
    record, policies = make_record(case["answers"], case["tokens"]), make_policies(case["thresholds"])
    rows = [_timed(record, policies) for _ in range(case["repeats"])]
    for row in rows:
        spent = f"{row['seconds']:.2f} s, {row['cpu_seconds']:.2f} s of processor time"
        print(f"{len(policies)} policies over {record.size} tokens: {spent}")
    figures = {}
    for name, seconds in (("policies_per_second", "seconds"), ("policies_per_processor_second", "cpu_seconds")):
        taken = [row[seconds] for row in rows]
        figures |= {name: len(policies) / min(taken), f"{name}_low": len(policies) / max(taken)}
    if arguments.report is not None:
        figures |= prediction_errors(arguments.report)
    finish("replay", figures, {"case": case, "policies": len(policies), "runs": rows}, arguments.output)


def make_record(answers: int, tokens: int, seed: int = 0) -> Record:
    """A record of answers of one length, tasks in turn, with scores that know something of acceptance."""
    rng = np.random.default_rng(seed)
    groups = [list(TASKS)[index % len(TASKS)] for index in range(answers)]
    mean_N = np.repeat([TASKS[group] for group in groups], tokens)
    chance_N = rng.beta(4 * mean_N, 4 * (1 - mean_N))
    accepted_N = rng.random(len(chance_N)) < chance_N
    run_chance_MR = rng.beta(2.0, 2.0, (int((~accepted_N).sum()), RUN_LENGTH))

    def score(noise: float) -> Scores:
        values = [np.clip(c + noise * rng.standard_normal(c.shape), 0.01, 1.0) for c in (chance_N, run_chance_MR)]
        return Scores(*(value.astype(np.float32)[..., None] for value in values))

    return Record.make(
        lengths_S=[tokens] * answers,
        accepted_N=accepted_N,
        draft_ends_N=~accepted_N & (rng.random(len(chance_N)) < 0.002),
        run_ends_MR=rng.random(run_chance_MR.shape) < 0.002,
        finished_S=[False] * answers,
        group_S=groups,
        scores={"head": score(0.05), "confidence": score(0.15), "entropy": score(0.3)},
    )


def make_policies(thresholds: int) -> list[Policy]:
    """Fixed lengths, the oracle, and ten threshold rules at each of the thresholds: at 100 of them, 1,000 or so."""
    found: list[Policy] = [*(FixedPolicy(length) for length in range(1, 13)), OraclePolicy(12)]
    for h in np.linspace(0.02, 0.98, thresholds):
        found += [ThresholdPolicy("head", h, maximum=longest) for longest in (6, 8, 12, 20)]
        found += [ThresholdPolicy("head", h, minimum=2, maximum=20, lag=1)]
        found += [ThresholdPolicy("confidence", h, maximum=longest) for longest in (8, 12, 20)]
        found += [ThresholdPolicy("confidence", h, "token", maximum=12), ThresholdPolicy("entropy", h, "bound")]
    return found


def prediction_errors(path: Path) -> dict[str, float]:
    """How far the speed-ups that a report predicts are from those that it measured."""
    rows = [row for row in read_report(path).methods if row.kind != "autoregressive" and row.overall.speedup]
    errors: dict[str, list[float]] = {"prediction_error": [], "replay_prediction_error": []}
    for row in rows:
        measured = row.overall.speedup.value
        print(f"{row.sampling:12} {row.method:60} measured {measured:.3f}", end="")
        for name, predicted in zip(errors, (row.predicted_speedup, row.replayed_speedup), strict=True):
            if predicted is not None:
                errors[name].append(abs(predicted / measured - 1))
                print(f", {name.removesuffix('_error')} {predicted:.3f}", end="")
        print()
    errors = {name: values for name, values in errors.items() if values}
    return {name: statistics.median(values) for name, values in errors.items()} | {
        f"{name}_max": max(values) for name, values in errors.items()
    }


def _timed(record: Record, policies: list[Policy]) -> dict[str, Any]:
    started, cpu = time.perf_counter(), time.process_time()
    tallies: list[Tally] = replay(record, policies)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tallies[0].tokens}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens, a fifth of the policies")
    parser.add_argument("--report", type=Path, help="report.json of drafttrain evaluate")
    parser.add_argument("--output", type=Path, help="write figures and raw rows here, e.g. in benchmarks/results")
    arguments = parser.parse_args()
    if arguments.report is None and not arguments.quick:
        parser.error("give --report, whose predictions are held against its real runs, or --quick")
    return arguments


if __name__ == "__main__":
    main()
