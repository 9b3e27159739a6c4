"""Questions whose answers repeat what was said before, and what benchmarks of copying share: runs, rates, intervals.

*revise*: a passage and one change. *revise, turn 2*: the changed passage and one more change, so that two versions of
it stand in the context. *self-correct, turn 3*: a list written again with a correction. Earlier turns are answered as
they should be: the reference target often is not right by itself, and only right answers count. *code* and *facts*:
little or nothing repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import finish
from benchmarks.pair import held_out_questions
from data_prep.prompts import prompts_of
from drafttrain.config import PromptsConfig
from drafttrain.decoding.counts import Completion, Counts
from drafttrain.decoding.loop import Decoder
from drafttrain.dialogue import Dialogue, answer_text
from drafttrain.evaluation.figures import loops
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.questions import Question, is_right
from drafttrain.evaluation.runner import answer, batches, interleave
from drafttrain.evaluation.statistics import Interval, bootstrap, rate_ratio
from drafttrain.evaluation.tasks import HELD_OUT, KINDS, Kind, kinds
from drafttrain.evaluation.tasks.base import build
from drafttrain.evaluation.tasks.revise import AGAIN
from drafttrain.ops.sampling import Sampling

REVISE, AGAIN_2, CORRECT_3, CODE, FACTS = "revise", "revise turn 2", "self-correct turn 3", "code", "facts"
REDUNDANT = (REVISE, AGAIN_2, CORRECT_3)

LIMIT = 224
_LENGTHS = {REVISE: 160, AGAIN_2: 240, CORRECT_3: 160}
_BATCH = 12
_SEED = HELD_OUT + 77_000


@dataclass(frozen=True)
class Split:
    """Questions that settings are chosen on, and those that figures are of."""

    tune: list[Question]
    test: list[Question]

    def of(self, *tasks: str) -> Split:
        """Those of some tasks."""
        return Split(*([each for each in part if each.task in tasks] for part in (self.tune, self.test)))


def redundant(models: Models, wanted: int, tuning: int) -> Split:
    """Questions of the redundant tasks that the target answers rightly when greedy; of each `wanted` and `tuning`."""
    decoder = models.decoder("Autoregressive()", Sampling(0.0), 0)
    tune, test = [], []
    for task in REDUNDANT:
        right: list[Question] = []
        at_once = min(4, wanted + tuning) * _BATCH
        for start in range(0, 40 * (wanted + tuning), at_once):
            made = _questions(models, task, range(start, start + at_once))
            for group in batches(sorted(made, key=lambda each: len(each.ids)), _BATCH):
                for question, completion in zip(group, answer(decoder, group), strict=True):
                    if is_right(question.reference, answer_text(models.tokenizer, completion.token_ids)):
                        right.append(question)
            if len(right) >= wanted + tuning:
                break
        right.sort(key=lambda each: each.sample_id)
        tune += right[:tuning]
        test += right[tuning : tuning + wanted]
    return Split(tune, test)


def plain(models: Models, tasks: Mapping[str, int], wanted: int, tuning: int, limit: int = 128) -> Split:
    """First turns of tasks of the reference world as they come; `tasks` gives their lengths in tokens."""
    asked = dict.fromkeys(tasks, wanted + tuning)
    found = held_out_questions(models, asked, limit, tasks)
    tune, test = [], []
    for task in tasks:
        own = [each for each in found if each.task == task and each.turn == 0]
        tune += own[:tuning]
        test += own[tuning : tuning + wanted]
    return Split(tune, test)


def _questions(models: Models, task: str, seeds: range) -> list[Question]:
    kind_of: Callable[[int], Kind] = {
        REVISE: lambda seed: KINDS[kinds("revise")[seed % 3]],
        AGAIN_2: lambda seed: AGAIN,
        CORRECT_3: lambda seed: KINDS[kinds("self_correct")[seed % 3]],
    }[task]
    turn = {REVISE: 0, AGAIN_2: 1, CORRECT_3: 2}[task]

    def count(text: str) -> int:
        return len(models.tokenizer(text, add_special_tokens=False)["input_ids"])

    made = [build(kind_of(seed), _SEED + seed, _LENGTHS[task], count, turn + 1) for seed in seeds]
    rows = [
        {
            "id": f"{task}/{seed}",
            "turns": [each.user for each in example.turns],
            "reference": {"answers": [each.answer for each in example.turns]},
        }
        for seed, example in zip(seeds, made, strict=True)
    ]
    found = []
    for at, record in enumerate(_records(models, rows)):
        answers = json.loads(record["reference"])["answers"]
        ids = Dialogue.from_record(record).context(models.tokenizer, answers[:turn])
        limit = min(LIMIT, models.context - len(ids))
        found.append(Question(record["prompt_id"], task, turn, tuple(ids), limit, answers[turn], seeds[at]))
    return found


def _records(models: Models, rows: Sequence[dict]) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        fields = {"turns": "turns", "reference": "reference", "id": "id"}
        settings = PromptsConfig(source="file", path=str(path), preset="fields", fields=fields, near_duplicate=1.0)
        return prompts_of(settings, models.tokenizer, models.context).records


# ---- runs ----


@dataclass
class Answer:
    """One question answered by one method: counts and tokens of the first repeat, the median of all seconds."""

    question: Question
    counts: Counts
    completion: Completion
    right: bool | None
    seconds: float

    @property
    def counted(self) -> bool:
        """Whether it may stand in a figure: not in a loop, and right where that is asked for."""
        fine = not loops(self.completion.token_ids, self.right)
        return fine and (self.question.task not in REDUNDANT or bool(self.right))


Runs = dict[str, list[Answer]]


def run(
    models: Models,
    methods: Sequence[str],
    questions: Sequence[Question],
    sampling: Sampling,
    repeats: int,
    decoders: Mapping[str, Decoder] | None = None,
) -> Runs:
    """Every method on every question, interleaved question by question."""
    made = {method: models.decoder(method, sampling, 0) for method in methods}
    made.update(decoders or {})
    found = interleave(made, questions, 1, repeats, 1, "runs")
    return {
        method: [_answer(models, question, each) for question, each in zip(questions, answers, strict=True)]
        for method, answers in found.items()
    }


def _answer(models: Models, question: Question, repeats: Sequence[Completion]) -> Answer:
    first = repeats[0]
    right = is_right(question.reference, answer_text(models.tokenizer, first.token_ids))
    seconds = statistics.median(each.counts.decode_seconds for each in repeats)
    return Answer(question, replace(first.counts), first, right, seconds)


def ratio(runs: Runs, method: str, base: str, *tasks: str) -> Interval:
    """Tokens per second of a method over those of another, on answers of both that count."""
    found = _pairs(runs, method, base, tasks)
    if not found:
        raise SystemExit(f"no answer of {method} is left to measure on {', '.join(tasks)}: all loop or are wrong")
    rows = [[one.counts.tokens, one.seconds, two.counts.tokens, two.seconds] for one, two in found]
    return bootstrap(np.array(rows, dtype=float), rate_ratio, [one.question.task for one, _ in found])


def _pairs(runs: Runs, method: str, base: str, tasks: Sequence[str]) -> list[tuple[Answer, Answer]]:
    pairs = zip(runs[method], runs[base], strict=True)
    asked = [(one, two) for one, two in pairs if not tasks or one.question.task in tasks]
    return [(one, two) for one, two in asked if one.counted and two.counted]


def ratios(runs: Runs, named: Mapping[str, tuple[str, str, Sequence[str], int]], suffix: str = "") -> dict[str, float]:
    """Figures with their intervals.

    Args:
        runs: of the methods.
        named: by figure a method, what it is compared with, the tasks (none are all), and what is taken off the ratio.
        suffix: of every name.

    Returns:
        name, name_low and name_high of each; of sampled answers none may be left to a figure, which is then left out.
    """
    figures = {}
    for name, (method, base, tasks, less) in named.items():
        if _pairs(runs, method, base, tasks):
            found = ratio(runs, method, base, *tasks)
            for end, value in (("", found.value), ("_low", found.low), ("_high", found.high)):
                figures[name + suffix + end] = value - less
    return figures


def fastest(runs: Runs, *tasks: str) -> str:
    """The method with the most tokens a second on these tasks."""

    def rate(method: str) -> float:
        counted = [each for each in runs[method] if each.counted and (not tasks or each.question.task in tasks)]
        return sum(each.counts.tokens for each in counted) / max(1e-9, sum(each.seconds for each in counted))

    return max(runs, key=rate)


def rows(runs: Runs, base: str) -> list[dict]:
    """What the results keep of every method and task."""
    found = []
    for method, answers in runs.items():
        for task in dict.fromkeys(each.question.task for each in answers):
            counted = [each for each in answers if each.question.task == task and each.counted]
            if not _pairs(runs, method, base, [task]):
                continue
            total = sum(each.counts for each in counted)
            sources = [label for each in counted for label in each.completion.sources]
            found.append(
                {
                    "method": method,
                    "task": task,
                    "answers": len(counted),
                    "speedup": vars(ratio(runs, method, base, task)),
                    "tokens_per_second": total.tokens / sum(each.seconds for each in counted),
                    "tau": total.tau,
                    "tau_by_first": {who or "none": total.tokens_by[who] / n for who, n in total.rounds_by.items()},
                    "rounds_by_first": total.rounds_by,
                    "by_source": {label: sources.count(label) / len(sources) for label in sorted(set(sources))},
                    "discard_rate": total.discarded / total.tokens,
                    "verification_rate": total.target_forwards / total.tokens,
                    "draft_forwards": total.draft_forwards,
                }
            )
    return found


def options(description: str, questions: int) -> argparse.Namespace:
    """What both benchmarks take from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=questions, help="questions of each task that are measured")
    parser.add_argument("--tuning", type=int, default=6, help="and that settings are chosen on")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--temperature", type=int, choices=(0, 1), help="only this one; others in --output are kept")
    parser.add_argument("--quick", action="store_true", help="few questions, one repetition")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.questions, chosen.tuning, chosen.repeats = 2, 1, 1
    chosen.temperatures = (0, 1) if chosen.temperature is None else (chosen.temperature,)
    return chosen


def suffix_of(temperature: int) -> str:
    """What names of figures and rows at this temperature end in."""
    return "_sampled" if temperature else ""


def finish_part(benchmark: str, figures: dict[str, float], rows: dict[str, Any], options: argparse.Namespace) -> None:
    """`finish`; where one temperature alone was measured, what the output holds of the other stays."""
    if options.temperature is not None and options.output is not None and options.output.exists():
        kept = json.loads(options.output.read_text(encoding="utf-8"))
        figures, rows = kept["figures"] | figures, kept["rows"] | rows
    finish(benchmark, figures, rows, options.output)
