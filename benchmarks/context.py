"""What the benchmarks of approximate inference share: prompts of the reference world, rows that survive a kill, and
differences in points with paired intervals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drafttrain.evaluation.long_prompts import LongPrompt, world_prompts
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.statistics import Interval, bootstrap
from drafttrain.evaluation.tasks import HELD_OUT, KINDS

TUNED = HELD_OUT + 500_000
"""Seeds from here on chose the settings that the benchmarks run; they measure on seeds below."""

TASKS = (*(kind for kind in KINDS if kind.startswith("recall")), "facts/one_hop")
"""What the reference target can do at these lengths, or nearly; by its own accuracy a group is counted or not."""


LONG_TASKS = ("recall/single/prose", "recall/single/noise", "recall/multi_key/noise")
"""At 8k, where reading a document takes longest."""


class Size(NamedTuple):
    """Documents of each task, and questions about each: its tokens are read once for all of them."""

    documents: int
    questions: int
    tasks: tuple[str, ...] = TASKS


Plan = Mapping[int, Size]
"""By length in tokens."""

PLAN = {4096: Size(1, 8), 8192: Size(1, 8, LONG_TASKS), 2048: Size(10, 8)}
QUICK = {1024: Size(1, 2, ("recall/single/noise", "recall/multi_key/prose"))}

LEAST_DENSE = 0.8
"""A group of prompts (a task at a length) counts if the dense target answers this share of it exactly."""

LIMIT = 128


@dataclass(frozen=True)
class Asked:
    """A prompt and the tokens of its right answer, the end token included."""

    prompt: LongPrompt
    answer: list[int]

    @property
    def group(self) -> str:
        """Task and length."""
        return f"{self.prompt.task}@{self.prompt.length}"

    @property
    def seed(self) -> int:
        """Of the document."""
        return int(self.prompt.prompt_id.split("/")[-2])


def asked(models: Models, plan: Plan, first_seed: int = HELD_OUT) -> Iterator[Asked]:
    """Prompts of a plan, the tasks in turn, so that an unfinished run is a fair sample."""
    tokenizer = models.tokenizer
    for length, size in plan.items():
        mixture = dict.fromkeys(size.tasks, 1)
        for seed in range(first_seed, first_seed + size.documents):
            for prompt in world_prompts(tokenizer, mixture, length, False, seed, LIMIT, size.questions):
                answer = tokenizer(prompt.references[0], add_special_tokens=False)["input_ids"]
                yield Asked(prompt, [*answer, tokenizer.eos_token_id])


def recorded(folder: Path | None, wanted: Iterator[Asked], measure: Callable[[Asked], dict]) -> list[dict]:
    """One row a prompt, appended to rows.jsonl as it is measured; what the file already has is not measured again.

    Args:
        folder: where the file is; None keeps none.
        wanted: prompts.
        measure: gives a row of one.
    """
    known = _known(folder)
    rows = []
    with nullcontext() if folder is None else (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        for each in wanted:
            name = each.prompt.prompt_id
            row = known.get(name)
            if row is None:
                row = {"id": name, "group": each.group, "tokens": len(each.prompt.ids), **measure(each)}
                if file is not None:
                    file.write(json.dumps(row) + "\n")
                    file.flush()
            rows.append(row)
    return rows


def part_of(wanted: Iterator[Asked], part: str) -> Iterator[Asked]:
    """Documents of one of several processes that share a run: "0/2" are those with an even seed, "1/2" the others."""
    number, parts = map(int, part.split("/"))
    return (each for each in wanted if each.seed % parts == number)


def at_hand(folder: Path, wanted: Iterator[Asked]) -> Iterator[Asked]:
    """Prompts that were measured already."""
    known = _known(folder)
    return (each for each in wanted if each.prompt.prompt_id in known)


def _known(folder: Path | None) -> dict[str, dict]:
    """Rows that an earlier run has written; a line that was cut off is dropped."""
    if folder is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        path.write_text("".join(lines), encoding="utf-8")
    return {row["id"]: row for row in map(json.loads, lines)}


@contextmanager
def processor_time() -> Iterator[None]:
    """Inside, everything is timed by the processor's time, which neighbours on the machine disturb less."""
    usual, time.perf_counter = time.perf_counter, time.process_time
    try:
        yield
    finally:
        time.perf_counter = usual


def compact(rows: Sequence[dict]) -> dict[str, list[str]]:
    """Rows as a results file keeps them: what the columns are, and a line a prompt."""
    columns = [name for name in rows[0]["outcomes"] if ":" not in name] if rows else []
    first = ["dense"] if rows and "dense" in rows[0] else []
    lines = [" ".join([row["id"], *(f"{_value(row, name):g}" for name in [*first, *columns])]) for row in rows]
    return {"columns": ["id", *first, *columns], "prompts": lines}


def counted(rows: Sequence[dict]) -> list[dict]:
    """Rows of the groups that the dense target can do."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    able = [own for own in groups.values() if sum(row["dense"] for row in own) >= LEAST_DENSE * len(own)]
    return [row for own in able for row in own]


def figure_of(rows: Sequence[dict], columns: Sequence[str], figure: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """A figure of the columns' sums, and of the prompts as the last one, with a paired interval.

    Whole documents are resampled within their groups: questions about one document are not independent.
    """
    counts: dict[tuple[str, str], np.ndarray] = {}
    for row in rows:
        own = np.array([*(float(_value(row, column)) for column in columns), 1.0])
        key = (row["group"], row["id"].rsplit("/", 1)[0])
        counts[key] = counts.get(key, 0) + own
    return bootstrap(np.stack(list(counts.values())), figure, [group for group, _ in counts])


def points(rows: Sequence[dict], one: str, other: str) -> Interval:
    """Share of exact answers of one column above that of another, in percentage points."""
    return figure_of(rows, (one, other), lambda sums: 100 * (sums[..., 0] - sums[..., 1]) / sums[..., 2])


def share(rows: Sequence[dict], column: str) -> float:
    """Mean of a column."""
    return sum(float(_value(row, column)) for row in rows) / max(1, len(rows))


def _value(row: dict, column: str) -> float:
    return row["dense"] if column == "dense" else row["outcomes"][column]


def spread(name: str, interval: Interval) -> dict[str, float]:
    """A figure and the ends of its interval, as benchmarks print them."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
