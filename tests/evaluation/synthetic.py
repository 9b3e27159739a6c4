"""A report made of simulated rounds: every token's fate is drawn, every second follows from a cost model."""

from __future__ import annotations

import dataclasses
import functools
import random

import numpy as np

from drafttrain.evaluation import figures
from drafttrain.evaluation.cost import predict
from drafttrain.evaluation.load import Load, LoadBatch, LoadPoint, break_even
from drafttrain.evaluation.methods import ORACLE
from drafttrain.evaluation.schema import (
    AUTOREGRESSIVE,
    SCHEMA_VERSION,
    Breakdown,
    Costs,
    Divergence,
    Environment,
    Exactness,
    ExampleAnswer,
    MethodResult,
    Pair,
    Piece,
    Report,
    Sample,
    Sampling,
    SweepPoint,
    Workload,
)
from drafttrain.evaluation.statistics import Interval
from drafttrain.evaluation.verdict import decide
from drafttrain.training import calibration

STEP = 0.0035
COSTS = Costs(STEP, {"drafter": 0.16}, [0.97 + 0.015 * w for w in range(13)], 0.06)
TASKS = {"code": 0.62, "recall": 0.9, "revise": 0.86, "self_correct": 0.88}
SAMPLINGS = {"greedy": 0.0, "temperature 1": 1.0}


def counts_of(length, acceptance, tokens, rng, stop=0.0):
    """Rounds until `tokens` are out; `stop` is how well a rule knows the first rejection (1: the oracle)."""
    counts = dict.fromkeys(("tokens", "rounds", "target_forwards", "drafted", "accepted", "discarded"), 0)
    at = {name: [0] * length for name in ("drafted_at", "reached_at", "accepted_at")}
    sources = []
    while counts["tokens"] < tokens:
        good = next((i for i in range(length) if rng.random() > acceptance), length)
        drafted = min(length, good) if rng.random() < stop else length
        accepted = min(good, drafted)
        emitted = min(accepted + 1, tokens - counts["tokens"])
        for i in range(drafted):
            at["drafted_at"][i] += 1
            at["reached_at"][i] += i <= accepted
            at["accepted_at"][i] += i < accepted
        for name, value in (
            ("tokens", emitted),
            ("rounds", 1),
            ("target_forwards", 1),
            ("drafted", drafted),
            ("accepted", accepted),
            ("discarded", drafted - accepted),
        ):
            counts[name] += value
        sources += (["drafter"] * accepted + ["target"])[:emitted]
    return counts | at | {"draft_forwards": {"drafter": counts["drafted"]} if length else {}}, sources


def sample(prompt_id, task, method, sampling, length, rng, stop=0.0, noise=0.05, looping=False, right=True):
    """One answer of 60 to 120 tokens."""
    tokens = random.Random(prompt_id).randint(60, 120)
    acceptance = TASKS[task] - 0.08 * (sampling != "greedy")
    counts, sources = counts_of(length, acceptance, tokens, rng, stop)
    reach = [counts["rounds"], *counts["drafted_at"], 0]
    verify = sum((reach[i] - reach[i + 1]) * COSTS.v[min(i, 12)] for i in range(len(reach) - 1))
    steps = counts["drafted"] * COSTS.c["drafter"] + verify + counts["rounds"] * (COSTS.o if length else 0.03)
    seconds = STEP * steps * rng.lognormvariate(0, noise)
    return Sample(
        prompt_id,
        task,
        0,
        method,
        sampling,
        list(range(tokens)),
        sources,
        "eos",
        "answer",
        counts,
        seconds,
        0.012 + 0.002 * bool(length),
        0.6 if looping else 0.04,
        looping,
        right,
        float(right),
        [seconds],
    )


def samples(method, sampling, length, stop=0.0, prompts=8, looping=(), wrong=(), seed=0, noise=0.05):
    """Answers to `prompts` prompts of every task."""
    rng = random.Random(f"{method}/{sampling}/{seed}")
    names = [(f"{task}-{i}", task) for task in TASKS for i in range(prompts)]
    return [
        sample(name, task, method, sampling, length, rng, stop, noise, name in looping, name not in wrong)
        for name, task in names
    ]


METHODS = (
    ("Model(drafter, length=3)", "fixed", 3, 0.0),
    ("Model(drafter, length=4)", "fixed", 4, 0.0),
    ("Model(drafter, stop=AcceptanceHead(head, 0.55))", "head", 12, 0.75),
    ("Model(drafter, stop=AcceptanceHead(head, 0.7))", "head", 12, 0.7),
    ("Model(drafter, stop=Confidence(0.4))", "confidence", 12, 0.6),
)


def result(method, kind, sampling, own, base, best_fixed=None):
    """A method's row from its answers."""
    overall, tasks = figures.by_task(own, base, resamples=200, seed=0)
    row = MethodResult(method, kind, sampling, overall, tasks)
    if kind == "autoregressive":
        row.breakdown = Breakdown(0.0, 0.97 * STEP, 0.03 * STEP)
        row.lossless = [Exactness("baseline", True, len(own), len(own))]
        return row
    row.costs, row.predicted_speedup = COSTS, predict(overall, COSTS)
    row.replayed_speedup = row.predicted_speedup * 1.02
    draft = overall.drafted * 0.16 * STEP / overall.tokens
    step = overall.rounds * STEP / overall.tokens
    row.breakdown = Breakdown(draft, 1.03 * step, 0.05 * step)
    if best_fixed and kind != "fixed":
        row.versus["fixed"] = figures.versus(own, best_fixed, 200, 0)
    row.lossless = (
        [
            Exactness("float64", True, 4, 4, 400),
            Exactness("low precision", True, 32, 31, 2800, [Divergence("code-1", 17, 0.01, 0.02, True)]),
        ]
        if sampling == "greedy"
        else [Exactness("sampled", True, 32, 0, 2800, z=0.7)]
    )
    return row


@functools.cache
def sweep(sampling):
    """Replay's points: fixed lengths, thresholds, the oracle."""
    points = []
    grid = [(f"Model(drafter, length={k})", "fixed", k, 0.0, float(k)) for k in range(1, 13)]
    for i, h in enumerate((0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)):
        grid.append((f"Model(drafter, stop=AcceptanceHead(head, {h}))", "head", 2 + i, 0.75, h))
        grid.append((f"Model(drafter, stop=Confidence({h}))", "confidence", 2 + i, 0.6, h))
    grid.append((ORACLE, "oracle", 12, 1.0, None))
    for method, kind, length, stop, parameter in grid:
        own = samples(method, sampling, length, stop, prompts=6, seed=1)
        base = samples(AUTOREGRESSIVE, sampling, 0, prompts=6, seed=1)
        overall, tasks = figures.by_task(own, base, 50, 0)
        points.append(
            SweepPoint(
                method,
                kind,
                sampling,
                parameter,
                overall.tau,
                overall.discard_rate,
                overall.verification_rate,
                predict(overall, COSTS),
                {task: predict(row, COSTS) for task, row in tasks.items()},
            )
        )
    return points


def load(sampling, speedups=None, sizes=(1, 4, 16)):
    """Throughput that grows less than the batch, and speed-ups that fall as it does."""
    speedups = speedups or {METHODS[1][0]: (1.46, 1.3, 0.84), METHODS[2][0]: (1.62, 1.22, 0.71)}
    batches = []
    for at, size in enumerate(sizes):
        base = 250 * size**0.7
        points = [LoadPoint(AUTOREGRESSIVE, base, 0.4 * size**0.3, 0.5 * size**0.3, size**0.9)]
        for method, values in speedups.items():
            value = values[at]
            around = Interval(value, value - 0.05, value + 0.05)
            points.append(LoadPoint(method, base * value, 0.4 / value, 0.5 / value, size**0.85, around))
        batches.append(LoadBatch(size, points, [1 + 0.015 * size**0.8 * w for w in range(13)]))
    found = Load(sampling, 16, 0, 16, batches, [])
    found.break_even = [break_even(method, found.speedups(method)) for method in speedups]
    return found


def report(seed=0, samplings=tuple(SAMPLINGS), **changes):
    """A whole report of `METHODS`, and the answers behind it by (sampling, method)."""
    rows, answers, points = [], {}, []
    for sampling in samplings:
        points += [dataclasses.replace(point) for point in sweep(sampling)]
        base = answers[sampling, AUTOREGRESSIVE] = samples(AUTOREGRESSIVE, sampling, 0, seed=seed)
        rows.append(result(AUTOREGRESSIVE, "autoregressive", sampling, base, base))
        for method, kind, length, stop in METHODS:
            own = answers[sampling, method] = samples(method, sampling, length, stop, seed=seed)
            rows.append(result(method, kind, sampling, own, base, answers.get((sampling, METHODS[1][0]))))
    for row in rows:
        row.samples = f"samples/{row.sampling}-{len(row.method)}-{row.method[-8:]}.jsonl".replace(" ", "_")
    history = [{"step": 100 * i, "fraction": i / 10, "tau": 1.6 + 1.2 * (1 - 0.6**i)} for i in range(1, 11)]
    loads = [load(sampling) for sampling in samplings]
    made = Report(
        SCHEMA_VERSION,
        decide(rows, points, history, 1.05, loads),
        environment(),
        pair(),
        workload(answers, samplings),
        rows,
        points,
        {"seed": seed},
        examples(),
        load=loads,
        head=head_metrics(),
        tau_history=history,
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made, answers


def environment(**changes):
    values = {
        "created": "2026-01-02T03:04:05+0000",
        "device": "cpu",
        "cpu": "Some Processor",
        "cores": 2,
        "threads": 2,
        "load_start": 0.3,
        "load_end": 1.9,
        "memory": 8 << 30,
        "system": "Linux",
        "versions": {"torch": "2.13.0"},
        "commit": "0123456789abcdef",
    }
    return Environment(**values | changes)


def pair(**changes):
    values = {
        "target": "checkpoints/reference-target",
        "target_fingerprint": {"tokenizer": "t", "architecture": "a", "weights": "w"},
        "drafter": "runs/x/drafter",
        "drafter_fingerprint": {"tokenizer": "t", "architecture": "b", "weights": "x"},
        "heads": {"head": "runs/x/head"},
        "accepted_new_target": False,
        "target_parameters": 5_800_000,
        "drafter_parameters": 1_900_000,
    }
    return Pair(**values | changes)


def workload(answers, samplings):
    return Workload(
        "bfloat16",
        1,
        128,
        3,
        0,
        [Sampling(name, {"temperature": SAMPLINGS[name]}) for name in samplings],
        figures.workload(next(iter(answers.values()))),
        "hash-of-prompts",
        "replay of traces of the tuning split",
    )


def head_metrics():
    """What train_head.py leaves of a head that is right, the same head as trained with w_rej = 6, and q alone."""
    rng = np.random.default_rng(0)
    accepted = rng.beta(3, 1, 4000)
    predictions = {
        "head": np.clip(accepted + rng.normal(0, 0.03, 4000), 0.001, 0.999),
        "head_raw": calibration.invert_loss_weight(accepted, 6.0, 1.0),
        "raw_q": np.clip(accepted + rng.normal(-0.1, 0.15, 4000), 0.001, 0.999),
    }
    return {"predictors": {name: calibration.report(values, accepted) for name, values in predictions.items()}}


def examples():
    pieces = [
        Piece("The", "target"),
        Piece(" harbour master", "drafter", 2),
        Piece(" 14", "target"),
        Piece(" ships <b>&amp; boats</b>.\n", "drafter", 4),
        Piece("Then", "target"),
        Piece(" he slept.", "drafter", 3),
    ]
    head = METHODS[2][0]
    return [
        ExampleAnswer("revise-1", "revise", head, "greedy", "Replace sea by harbour.\n\nThe sea ...", pieces, 3.4),
        ExampleAnswer("code-1", "code", head, "temperature 1", "def add(", [Piece("a, b):", "drafter", 4)], 2.1),
    ]
