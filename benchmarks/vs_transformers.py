"""Our decoder against transformers' generate: the same pair, prompts and k = 5, greedy, in one process.

    python benchmarks/vs_transformers.py --output results.json     both dtypes, about 15 minutes on two cores
    python benchmarks/vs_transformers.py --quick                   few prompts, under a minute

Every prompt is answered by every method in turn, another one first each time: `generate`, assisted `generate` (a
constant draft of 5 tokens, its confidence threshold off), prompt lookup, ours without and with the drafter, and ours
compiled where engines can be. A time is that of the whole call, reading the prompt included, on both sides; prompts are
short beside their answers. Prompts whose answer loops are left out beforehand, for loops flatter every drafter.

`autoregressive_ratio` is ours / `generate`, `assisted_ratio` ours / assisted generation, `assisted_ratio_compiled` ours
compiled / assisted generation, all in tokens per second. `overhead_ratio` is ours / theirs of what a round costs beside
the forwards: a call's time less that of both models' forwards, divided by the target's, in runs of their own with a
clock around every forward. A forward is all that leads from tokens to logits, positions and masks included: the model's
own there, `Engine.forward` here. `module_overhead_ratio` counts the decoder stack and the output head alone, the same
modules on both sides; our masks are made outside of them, theirs inside.

`identical_fraction` is the share of our answers with the drafter that are those of `generate`, token by token, and
`assisted_identical_fraction` the same of assisted generation. Where ours differ, the gap of the two tokens is held
against the noise measured there (evaluation/exactness.py): `unexplained` counts answers that differ by more. All
figures come by dtype, with 95 % intervals over prompts; one without a dtype is the worse of the two.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from benchmarks.pair import GREEDY, METHOD, held_out_questions, reference_models  # noqa: E402
from drafttrain.decoding.counts import Completion, Counts  # noqa: E402
from drafttrain.decoding.drafters import ModelDrafter  # noqa: E402
from drafttrain.decoding.engine import Engine  # noqa: E402
from drafttrain.decoding.loop import Decoder  # noqa: E402
from drafttrain.evaluation.exactness import greedy_check  # noqa: E402
from drafttrain.evaluation.figures import loops  # noqa: E402
from drafttrain.evaluation.pair import Models  # noqa: E402
from drafttrain.evaluation.questions import Question  # noqa: E402
from drafttrain.evaluation.runner import answer, steady  # noqa: E402
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Exactness  # noqa: E402
from drafttrain.evaluation.statistics import Interval, bootstrap, rate_ratio  # noqa: E402

K = 5
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
FULL = {"mixture": {"code": 10, "revise": 10, "self_correct": 2}, "tokens": 128, "repeats": 3}
QUICK = {"mixture": {"code": 2, "revise": 2}, "tokens": 48, "repeats": 1}
LENGTHS = {"code": 64, "revise": 160, "self_correct": 256}
"""Tokens of a conversation with its answers; of code, twice those of the prompt."""

TOLERANCE = 4.0
"""A gap of more than this many times the noise is no rounding."""

GENERATE, ASSISTED, LOOKUP = "generate", "assisted", "prompt lookup"
OURS, COMPILED = "ours", "ours, compiled"

Answers = Callable[[Question], list[int]]


def main() -> None:
    """Run both dtypes and print the figures."""
    options = _options()
    case = QUICK if options.quick else FULL
    models = reference_models()
    questions = held_out_questions(models, case["mixture"], case["tokens"], LENGTHS)
    found: dict[str, Interval] = {}
    rows: dict[str, Any] = {"case": case}
    for dtype, short in DTYPES.items():
        own, rows[short] = compare(models, dtype, questions, case["repeats"])
        print(f"\n{dtype}, {len(rows[short]['prompts'])} answers")
        for name, interval in own.items():
            print(f"  {name:28} {interval:.3f}", flush=True)
        found |= {f"{name}_{short}": interval for name, interval in own.items()}
    found |= worst(found)
    ends = {"": "value", "_low": "low", "_high": "high"}
    figures = {f"{name}{end}": getattr(own, part) for name, own in found.items() for end, part in ends.items()}
    finish("vs_transformers", figures, rows, options.output)


def worst(found: dict[str, Interval]) -> dict[str, Interval]:
    """The worse dtype of each figure."""
    names = [name.removesuffix("_fp32") for name in found if name.endswith("_fp32")]
    return {
        name: (max if "overhead" in name or name == "unexplained" else min)(
            (found[f"{name}_{short}"] for short in DTYPES.values()), key=lambda interval: interval.value
        )
        for name in names
    }


def compare(
    models: Models, dtype: str, questions: Sequence[Question], repeats: int
) -> tuple[dict[str, Interval], dict[str, Any]]:
    """Figures of one dtype, and its rows."""
    target, drafter = models.engines(dtype)
    baseline = models.decoder(AUTOREGRESSIVE, GREEDY, 0, dtype)
    questions = [each for each in questions if not loops(answer(baseline, [each])[0].token_ids, None)]
    if not questions:
        raise SystemExit("every answer loops; nothing is left to measure")
    methods = make_methods(models, dtype)
    times, tokens = timed(methods, questions, repeats)
    check = _checked(target, questions, tokens[METHOD], tokens[GENERATE])
    overheads = overheads_of(
        {name: methods[name] for name in (METHOD, ASSISTED)}, [target, drafter], questions, repeats
    )
    rows = {
        "prompts": [
            {
                "prompt": each.prompt_id,
                "turn": each.turn,
                "prompt_tokens": len(each.ids),
                "seconds": {method: times[method][at] for method in methods},
                "tokens": {method: len(tokens[method][at]) for method in methods},
                "overhead_seconds_modules_rounds": {method: overheads[method][at] for method in overheads},
                "identical": {method: tokens[method][at] == tokens[GENERATE][at] for method in methods},
            }
            for at, each in enumerate(questions)
        ],
        "divergences": [dataclasses.asdict(each) for each in check.divergences],
    }
    return figures_of(questions, times, tokens, overheads, check), rows


def figures_of(
    questions: Sequence[Question],
    times: dict[str, list[float]],
    tokens: dict[str, list[list[int]]],
    overheads: dict[str, list[tuple[float, float, int]]],
    check: Exactness,
) -> dict[str, Interval]:
    """All figures of one dtype."""
    strata = [each.task for each in questions]

    def interval(columns: list[Sequence[float]], figure: Callable[[np.ndarray], np.ndarray]) -> Interval:
        return bootstrap(np.array(columns, dtype=float).T, figure, strata)

    def speed(method: str) -> list[list[float]]:
        return [[len(ids) for ids in tokens[method]], times[method]]

    def equal(method: str) -> list[list[float]]:
        same = [own == base for own, base in zip(tokens[method], tokens[GENERATE], strict=True)]
        return [same, [1] * len(same)]

    def share(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    pairs = {
        "autoregressive_ratio": (AUTOREGRESSIVE, GENERATE),
        "assisted_ratio": (METHOD, ASSISTED),
        "assisted_ratio_compiled": (COMPILED, ASSISTED),
        "speedup": (METHOD, AUTOREGRESSIVE),
        "assisted_speedup": (ASSISTED, GENERATE),
        "lookup_speedup": (LOOKUP, GENERATE),
    }
    found = {
        name: interval([*speed(own), *speed(base)], rate_ratio)
        for name, (own, base) in pairs.items()
        if own in times and base in times
    }
    spent = {method: [list(column) for column in zip(*own, strict=True)] for method, own in overheads.items()}
    for at, kind in enumerate(("", "module_")):
        sides = [[spent[method][at], spent[method][2]] for method in (METHOD, ASSISTED)]
        found[f"{kind}overhead_ratio"] = interval([*sides[0], *sides[1]], rate_ratio)  # a quotient of quotients too
        found[f"{kind}overhead_ms"], found[f"assisted_{kind}overhead_ms"] = (
            interval(side, lambda sums: 1e3 * share(sums)) for side in sides
        )
    found["identical_fraction"] = interval(equal(METHOD), share)
    found["assisted_identical_fraction"] = interval(equal(ASSISTED), share)
    unexplained = sum(not each.passed for each in check.divergences)
    found["unexplained"] = Interval(unexplained, unexplained, unexplained)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Methods


def make_methods(models: Models, dtype: str) -> dict[str, Answers]:
    """What answers a question, by name."""
    target, drafter = models.engines(dtype)
    settings = drafter.model.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = K, "constant"
    settings.assistant_confidence_threshold = 0.0
    methods = {
        GENERATE: _generate(target, models.ends),
        ASSISTED: _generate(target, models.ends, assistant_model=drafter.model),
        LOOKUP: _generate(target, models.ends, prompt_lookup_num_tokens=K),
        AUTOREGRESSIVE: _ours(models.decoder(AUTOREGRESSIVE, GREEDY, 0, dtype)),
        METHOD: _ours(models.decoder(METHOD, GREEDY, 0, dtype)),
    }
    if can_compile():
        engines = [Engine(copy.deepcopy(each.model), each.vocabulary, compiled=True) for each in (target, drafter)]
        methods[COMPILED] = _ours(Decoder(engines[0], ModelDrafter(engines[1], K), GREEDY, models.ends))
    return methods


def can_compile() -> bool:
    """Whether engines have a compiled mode."""
    return "compiled" in inspect.signature(Engine).parameters


def _generate(target: Engine, ends: frozenset[int], **settings: Any) -> Answers:
    padding = target.config.pad_token_id

    def answers(question: Question) -> list[int]:
        ids = torch.tensor([question.ids], device=target.device)
        text = target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=question.limit,
            do_sample=False,
            eos_token_id=sorted(ends),
            pad_token_id=padding,
            **settings,
        )
        return text[0, len(question.ids) :].tolist()

    return answers


def _ours(decoder: Decoder) -> Answers:
    return lambda question: answer(decoder, [question])[0].token_ids


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def timed(
    methods: dict[str, Answers], questions: Sequence[Question], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Seconds (the median of the repeats) and tokens of every method's every answer, methods in turn."""
    names = list(methods)
    for name in names:  # every shape once: what is compiled is compiled here
        for question in questions:
            methods[name](question)
    times: dict[str, list[float]] = {name: [] for name in names}
    tokens: dict[str, list[list[int]]] = {name: [] for name in names}
    with steady():
        for number, question in enumerate(questions):
            seconds: dict[str, list[float]] = {name: [] for name in names}
            for repeat in range(repeats):
                turn = (number + repeat) % len(names)
                for name in names[turn:] + names[:turn]:
                    started = time.perf_counter()
                    found = methods[name](question)
                    seconds[name].append(time.perf_counter() - started)
                    if repeat == 0:
                        tokens[name].append(found)
            for name in names:
                times[name].append(statistics.median(seconds[name]))
    return times, tokens


def overheads_of(
    methods: dict[str, Answers], engines: Sequence[Engine], questions: Sequence[Question], repeats: int
) -> dict[str, list[tuple[float, float, int]]]:
    """Every method's `overhead` at every question, methods in turn; of the repeats the one of median seconds."""
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in methods}
    with steady():
        for question in questions:
            runs = [
                {name: overhead(answers, engines, question) for name, answers in methods.items()}
                for _ in range(repeats)
            ]
            for name, own in found.items():
                own.append(sorted(run[name] for run in runs)[len(runs) // 2])
    return found


def overhead(answers: Answers, engines: Sequence[Engine], question: Question) -> tuple[float, float, int]:
    """Seconds of an answer beside the models' forwards and beside their modules, and its rounds: target forwards.

    Args:
        answers: the method.
        engines: of the target, then of the drafter: they and their models are watched, whoever calls them.
        question: what is asked.
    """
    whole = [thing for each in engines for thing in (each, each.model)]  # a method calls the one or the other
    modules = [part for each in engines for part in (each.model.get_output_embeddings(), each.model.get_decoder())]
    with _watched([*whole, *modules]) as spent:
        started = time.perf_counter()
        answers(question)
        seconds = time.perf_counter() - started
    outside = [seconds - sum(map(sum, calls)) for calls in (spent[: len(whole)], spent[len(whole) :])]
    return *outside, len(spent[len(whole)])


@contextmanager
def _watched(things: Sequence[Any]) -> Iterator[list[list[float]]]:
    """Seconds of each call of each thing's forward while the block runs. It is replaced on the instance."""
    spent: list[list[float]] = [[] for _ in things]

    def watch(forward: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        @functools.wraps(forward)  # generate reads the signature
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = forward(*args, **kwargs)
            seconds.append(time.perf_counter() - started)
            return found

        return run

    for thing, seconds in zip(things, spent, strict=True):
        thing.forward = watch(thing.forward, seconds)
    try:
        yield spent
    finally:
        for thing in things:
            del thing.forward  # that of its class shows again


def _checked(
    target: Engine, questions: Sequence[Question], own: Sequence[list[int]], base: Sequence[list[int]]
) -> Exactness:
    answers = [[Completion(ids, "", [], Counts()) for ids in each] for each in (own, base)]
    return greedy_check(target, GREEDY, questions, *answers, widths=[2, K + 1], tolerance=TOLERANCE)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few prompts, short answers, one repeat")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
