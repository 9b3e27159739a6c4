"""Are the tokens those of autoregressive decoding? Very many of them, greedy, in float64 and float32; is memory flat?

    python benchmarks/identity.py                                200,000 tokens, about half an hour on two cores
    python benchmarks/identity.py --tokens 1000000 --data DIR --output FILE     hours; goes on where it was ended
    python benchmarks/identity.py --quick                        under a minute

Prompts are of the held-out reference world, with --data also those of HumanEval and MBPP (DIR/humaneval and DIR/mbpp,
see --help). Every batch is decoded twice in each dtype, without and with the drafter (k = 5), and compared token by
token. Tokens are counted once, as emitted without a drafter. In float64 any difference is a failure; in float32 the gap
of the two tokens is held against the noise measured there (evaluation/exactness.py), more than four times of which is
no rounding: `unexplained_float32` counts these. `memory_growth_mib` is how much the resident memory of the process grew
from a tenth of the run to its end; `memory_growth_late_mib` from the half; a run that went on knows that of its last
process alone, which decoded `memory_tokens` tokens, those of all dtypes and with the drafter included.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from benchmarks.pair import GREEDY, METHOD, held_out_questions, reference_models  # noqa: E402
from drafttrain.evaluation.exactness import greedy_check  # noqa: E402
from drafttrain.evaluation.pair import Models  # noqa: E402
from drafttrain.evaluation.questions import Question  # noqa: E402
from drafttrain.evaluation.runner import answer, batches  # noqa: E402
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Divergence, Exactness  # noqa: E402
from drafttrain.run_folder import write_atomically  # noqa: E402

DTYPES = ("float64", "float32")
TOKENS, QUICK_TOKENS = 200_000, 800
LEAST_PROMPTS, QUICK_PROMPTS = 1_000, 12
LIMIT, QUICK_LIMIT = 256, 64
BATCH = 64

SHARES = {"code": 0.7, "revise": 0.12, "self_correct": 0.06, "recall": 0.06, "facts": 0.06}
"""Of the reference world's conversations: code goes on up to the limit, the others end."""

LENGTHS = {"code": 128, "revise": 160, "self_correct": 256, "recall": 256, "facts": 256}

MEAN_SHARE = 0.75
"""Tokens of an answer, by a first run, as a share of the limit: how many prompts are made hangs on it."""

FILES = {"humaneval": ("HumanEval.jsonl.gz", 164), "mbpp": ("mbpp.jsonl", 974)}
"""Files looked for below --data, and their prompts."""

TOLERANCE = 4.0
WIDTHS = [2, 6]
"""Tokens read at once by which the noise at a difference is measured: k + 1, and the fewest."""


def main() -> None:
    """Decode, compare, and print the figures."""
    options = _options()
    models = reference_models()
    questions = _questions(models, options)
    groups = grouped(questions)
    print(f"{len(questions)} prompts of {len({each.task for each in questions})} tasks", flush=True)
    part = None if options.output is None else options.output.with_suffix(".part.json")
    done, checks = load(part, len(groups))
    memory: list[tuple[int, int]] = []
    before, started = checks[DTYPES[0]].tokens, time.perf_counter()
    for number, group in enumerate(groups[done:], start=1):
        for dtype, total in checks.items():
            add(total, compare(models, dtype, group))
        memory.append((checks[DTYPES[0]].tokens - before, resident()))
        if done + number < len(groups):
            save(part, done + number, len(groups), checks)
        if number % 8 == 0 or done + number == len(groups):
            share, seconds = number / (len(groups) - done), time.perf_counter() - started
            print(progress(share, checks, memory, seconds), flush=True)
    finish("identity", figures_of(checks, memory), _rows(options, checks, memory), options.output)
    if part is not None:
        part.unlink(missing_ok=True)


def grouped(questions: Sequence[Question]) -> list[list[Question]]:
    """Batches of prompts of about one length, so that little is padding; long and short ones in mixed order."""
    groups = batches(sorted(questions, key=lambda question: len(question.ids)), BATCH)
    random.Random(0).shuffle(groups)
    return groups


def load(part: Path | None, groups: int) -> tuple[int, dict[str, Exactness]]:
    """How many batches an ended run has done, and what it found.

    Args:
        part: its file, which need not be there.
        groups: batches of the whole run.
    """
    if part is None or not part.exists():
        return 0, {dtype: Exactness(dtype, True) for dtype in DTYPES}
    saved = json.loads(part.read_text(encoding="utf-8"))
    if saved["groups"] != groups:
        raise SystemExit(f"{part} is of a run of {saved['groups']} batches, not {groups}; delete it to begin anew")
    checks = {dtype: Exactness(**found) for dtype, found in saved["checks"].items()}
    for check in checks.values():
        check.divergences = [Divergence(**each) for each in check.divergences]
    return saved["done"], checks


def save(part: Path | None, done: int, groups: int, checks: dict[str, Exactness]) -> None:
    """Write what `load` reads."""
    if part is not None:
        found = {dtype: dataclasses.asdict(check) for dtype, check in checks.items()}
        write_atomically(part, json.dumps({"done": done, "groups": groups, "checks": found}) + "\n")


def compare(models: Models, dtype: str, group: Sequence[Question]) -> Exactness:
    """A batch with and without the drafter."""
    base, own = (answer(models.decoder(each, GREEDY, 0, dtype), group) for each in (AUTOREGRESSIVE, METHOD))
    return greedy_check(models.engines(dtype)[0], GREEDY, group, own, base, WIDTHS, TOLERANCE)


def add(total: Exactness, part: Exactness) -> None:
    """Count a batch."""
    total.answers += part.answers
    total.identical += part.identical
    total.tokens += part.tokens
    total.divergences += part.divergences
    total.passed &= part.passed
    total.reason = total.reason or part.reason


def resident() -> int:
    """Bytes of the process's resident memory."""
    gc.collect()
    return psutil.Process().memory_info().rss


def growth(memory: Sequence[tuple[int, int]], share: float) -> float:
    """MiB that were added since a share of the tokens had been decoded."""
    everything, end = memory[-1]
    start = next(size for tokens, size in memory if tokens >= share * everything)
    return (end - start) / 2**20


def figures_of(checks: dict[str, Exactness], memory: Sequence[tuple[int, int]]) -> dict[str, float]:
    """What was found in each dtype, and what memory did."""
    found: dict[str, float] = {}
    for dtype, check in checks.items():
        found |= {
            f"tokens_{dtype}": check.tokens,
            f"answers_{dtype}": check.answers,
            f"identical_fraction_{dtype}": check.identical / check.answers,
            f"divergences_{dtype}": len(check.divergences),
            f"unexplained_{dtype}": sum(not each.passed for each in check.divergences),
        }
    return found | {
        "memory_growth_mib": growth(memory, 0.1),
        "memory_growth_late_mib": growth(memory, 0.5),
        "memory_tokens": 2 * len(checks) * memory[-1][0],
    }


def progress(share: float, checks: dict[str, Exactness], memory: Sequence[tuple[int, int]], seconds: float) -> str:
    """A line about what is done."""
    counts = ", ".join(f"{dtype} {len(check.divergences)} different" for dtype, check in checks.items())
    tokens, size = checks[DTYPES[0]].tokens, memory[-1][1]
    spent = f"{seconds / 60:.1f} of about {seconds / share / 60:.0f} minutes"
    return f"{share:4.0%}  {tokens} tokens, {counts}, {size / 2**20:.0f} MiB, {spent}"


def mixture(tokens: int, least: int, limit: int, given: int) -> dict[str, int]:
    """Conversations of each task of the reference world.

    Args:
        tokens: of all answers together, about.
        least: prompts at least.
        limit: tokens of an answer at most.
        given: prompts that come from elsewhere.
    """
    wanted = max(least, round(tokens / (MEAN_SHARE * limit))) - given
    return {task: max(1, math.ceil(share * wanted)) for task, share in SHARES.items()}


def _questions(models: Models, options: argparse.Namespace) -> list[Question]:
    files = [] if options.data is None else [(options.data / name / file, n) for name, (file, n) in FILES.items()]
    least, limit = (QUICK_PROMPTS, QUICK_LIMIT) if options.quick else (LEAST_PROMPTS, LIMIT)
    conversations = mixture(options.tokens, least, limit, sum(count for _, count in files))
    return held_out_questions(models, conversations, limit, LENGTHS, files)


def _rows(
    options: argparse.Namespace, checks: dict[str, Exactness], memory: Sequence[tuple[int, int]]
) -> dict[str, Any]:
    return {
        "tokens": options.tokens,
        "data": options.data is not None,
        "divergences": {
            dtype: [dataclasses.asdict(each) for each in check.divergences] for dtype, check in checks.items()
        },
        "reasons": {dtype: check.reason for dtype, check in checks.items()},
        "tokens_and_resident_bytes": memory,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of each dtype, about")
    parser.add_argument(
        "--data", type=Path, help="folder with humaneval/HumanEval.jsonl.gz and mbpp/mbpp.jsonl; none by default"
    )
    parser.add_argument("--quick", action="store_true", help="few prompts, short answers")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    if options.quick:
        options.tokens = QUICK_TOKENS
    return options


if __name__ == "__main__":
    main()
