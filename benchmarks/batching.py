"""Eight ragged prompts as one batch against eight single runs, with and without a drafter, greedy.

    python benchmarks/batching.py            in bfloat16, about three minutes on two cores
    python benchmarks/batching.py --quick    one batch, under a minute

Rows of a batch differ in the length of their prompt, in the tokens they may write and, with a drafter, in the tokens of
every round; a row that is done leaves. `throughput_ratio` is tokens a second of the batch over those of the single runs
one after the other, whole calls, the drafter's by `_speculative`, without it by `_autoregressive`; without a name the
smaller of the two. Batch and single runs take turns; `_low` and `_high` end the 95 % interval over turns.
`identical_fraction` is the share of rows, of both methods, whose tokens in float64 are those of their single run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from benchmarks.pair import GREEDY, METHOD, held_out_questions, reference_models  # noqa: E402
from drafttrain.decoding.loop import Decoder  # noqa: E402
from drafttrain.evaluation.pair import Models  # noqa: E402
from drafttrain.evaluation.questions import Question  # noqa: E402
from drafttrain.evaluation.runner import answer, batches, steady  # noqa: E402
from drafttrain.evaluation.schema import AUTOREGRESSIVE  # noqa: E402
from drafttrain.evaluation.statistics import Interval, bootstrap, rate_ratio  # noqa: E402

METHODS = {"speculative": METHOD, "autoregressive": AUTOREGRESSIVE}
BATCH = 8
FULL = {"batches": 2, "tokens": 80, "repeats": 4}
QUICK = {"batches": 1, "tokens": 48, "repeats": 3}
PROMPT = 192
"""Tokens of the longest prompt."""


def main() -> None:
    """Time both methods, check their rows in float64, and print the figures."""
    options = _options()
    case = QUICK if options.quick else FULL
    models = reference_models()
    groups = ragged(models, case["batches"], case["tokens"])
    turns = timed({name: models.decoder(each, GREEDY, 0) for name, each in METHODS.items()}, groups, case["repeats"])
    found = {name: ratio(rows) for name, rows in turns.items()}
    for name, own in found.items():
        print(f"{name}: {own:.2f} times", flush=True)
    same = {name: identical(models.decoder(each, GREEDY, 0, "float64"), groups) for name, each in METHODS.items()}
    named = {f"throughput_ratio_{name}": own for name, own in found.items()}
    named["throughput_ratio"] = min(found.values(), key=lambda own: own.value)
    rows = [row for each in same.values() for row in each]
    named["identical_fraction"] = bootstrap(
        np.array([[row, 1] for row in rows], dtype=float), lambda sums: sums[..., 0] / sums[..., 1], ["all"] * len(rows)
    )
    figures: dict[str, float] = {}
    for name, own in named.items():
        figures |= {name: own.value, f"{name}_low": own.low, f"{name}_high": own.high}
    sizes = [[(len(each.ids), each.limit) for each in group] for group in groups]
    raw = {"case": case, "prompt_and_new_tokens": sizes, "turns": turns, "identical": same}
    finish("batching", figures, raw, options.output)


def ragged(models: Models, count: int, tokens: int) -> list[list[Question]]:
    """Batches of prompts of code, the only task whose answers do not end by themselves; all rows of unlike sizes.

    Args:
        models: the pair.
        count: batches.
        tokens: new tokens of the shortest row; the longest writes about half as many more.
    """
    questions = held_out_questions(models, {"code": BATCH * count}, 2 * tokens, {"code": 2 * PROMPT})
    groups = batches(questions, BATCH)
    return [[_cut(each, place, tokens) for place, each in enumerate(group)] for group in groups]


def _cut(question: Question, place: int, tokens: int) -> Question:
    """The place-th row of a batch: 1/8, 2/8, ... of the prompt's tokens, limits in another order."""
    longest = BATCH - 1
    length = max(1, len(question.ids) * (place + 1) // BATCH)
    more = (3 * place) % BATCH / (2 * longest)
    return replace(question, ids=question.ids[:length], limit=round(tokens * (1 + more)))


def timed(
    decoders: dict[str, Decoder], groups: Sequence[Sequence[Question]], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Tokens and seconds of every method's every batch, as one and one by one, in turn."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in decoders}
    for decoder in decoders.values():
        answer(decoder, groups[0])
        answer(decoder, groups[0][:1])
    with steady():
        for number in range(repeats):
            for at, group in enumerate(groups):
                for name, decoder in decoders.items():
                    parts = {"batch": [group], "single": [[each] for each in group]}
                    order = list(parts) if number % 2 else list(parts)[::-1]
                    row = {part: _run(decoder, parts[part]) for part in order}
                    rows[name].append({"batch_number": at, **row})
                    spent = ", ".join(f"{part} {seconds:.1f} s" for part, (_, seconds) in row.items())
                    print(f"turn {number + 1}, {name}: {spent}", flush=True)
    return rows


def _run(decoder: Decoder, groups: Sequence[Sequence[Question]]) -> tuple[int, float]:
    """Tokens and seconds."""
    started = time.perf_counter()
    found = [completion for group in groups for completion in answer(decoder, group)]
    return sum(len(each.token_ids) for each in found), time.perf_counter() - started


def ratio(rows: Sequence[dict[str, Any]]) -> Interval:
    """Throughput of batches over that of single runs; each batch keeps its share of the turns."""
    counts = np.array([[*row["batch"], *row["single"]] for row in rows], dtype=float)
    return bootstrap(counts, rate_ratio, [row["batch_number"] for row in rows])


def identical(decoder: Decoder, groups: Sequence[Sequence[Question]]) -> list[bool]:
    """Of every row, whether its tokens in the batch are those of its single run."""
    return [
        together.token_ids == answer(decoder, [question])[0].token_ids
        for group in groups
        for question, together in zip(group, answer(decoder, group), strict=True)
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one batch, short answers")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
