"""Tokens a second of LongSpec drafting at long contexts, beside autoregressive decoding and an ordinary drafter.

    python benchmarks/longspec_speed.py --output results.json
    python benchmarks/longspec_speed.py --eager     without compiled graphs
    python benchmarks/longspec_speed.py --quick     short, few questions, eager, a minute; its figures say nothing

The reference target with the reference LongSpec drafter and the reference drafter (two layers distilled on the same
stream, with half as many parameters again as the block), compiled but for LongSpec's trees, bfloat16, greedy, on
held-out *recall*, *self_correct* and *revise*, all turns, each behind so much text of other prompts that it has
--length tokens. Each drafter's shape (a chain's length, a confidence that ends it, or a tree) is the one that is
fastest on a first part of the questions; it is measured on the others, all methods interleaved. Reading the prompt is
not counted. What loops does not count, nor a *revise* that is not right.

speedup_over_autoregressive     decoding rate of LongSpec over the target's alone
speedup_over_causal_drafter     decoding rate of LongSpec over that with the ordinary drafter
speedup_over_..._TASK           the same by task
speedup_over_..._right          the same of right answers alone
answers_TASK                    how many count
tau_longspec, tau_causal        tokens a round; ..._TASK by task
kv_bytes_longspec, _causal      what each drafter keeps behind the longest prompt
tokens_per_second               of the target alone
speedup_at_RATE                 LongSpec over the target alone, were each token that is reached accepted in RATE % of
                                the cases, whatever is drafted (synthetic acceptance; every part costs what it does):
                                the best of some chains, on a few of the same questions

`_low` and `_high` end 95 % intervals over conversations.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import finish  # noqa: E402
from benchmarks.pair import CHECKPOINTS, GREEDY, held_out_questions, reference_models  # noqa: E402
from drafttrain.decoding.counts import Completion, Counts  # noqa: E402
from drafttrain.decoding.synthetic import SyntheticAcceptance  # noqa: E402
from drafttrain.dialogue import answer_text  # noqa: E402
from drafttrain.evaluation.filler import behind_filler  # noqa: E402
from drafttrain.evaluation.pair import Models  # noqa: E402
from drafttrain.evaluation.questions import Question, is_right, usable  # noqa: E402
from drafttrain.evaluation.runner import interleave  # noqa: E402
from drafttrain.models.loading import load_drafter  # noqa: E402

BASE = "Autoregressive()"
TASKS = ("recall", "self_correct", "revise")
FILLER = {"code": 12, "facts": 12}
"""Conversations of other tasks, which are not asked."""

OWN = 512
"""Tokens of a conversation itself."""

STOPS = [f"stop=Confidence({least}, max={most})" for least, most in ((0.3, 9), (0.5, 9), (0.7, 14))]
LENGTHS = (2, 3, 4, 6)
SHAPES = {
    "longspec": [
        *(f"LongSpec(block, length={length})" for length in LENGTHS),
        *(f"LongSpec(block, {stop})" for stop in STOPS),
        "LongSpec(block, tree=[2, 2, 2, 1])",
    ],
    "causal": [
        *(f"Model(drafter, length={length})" for length in (1, 2, 3, 4)),
        *(f"Model(drafter, {stop})" for stop in STOPS),
        "Model(drafter, tree=[2, 2, 2, 1])",
    ],
}
RATES, FIXED, FEW = (70, 80, 90, 100), (3, 4, 6, 9), 12
"""Percent of the tokens that are accepted where all before them were; lengths and questions that this is asked of."""

RESAMPLES = 1000


def main() -> None:
    """Tune, measure, print."""
    options = _options()
    models = reference_models(compiled=not options.eager)
    models.others["block"] = load_drafter(options.drafter, "bfloat16")
    tuning, test = divided(questions_at(models, options), options.tuning)
    _, found = counting(models, tuning, run(models, tuning, [BASE, *SHAPES["longspec"], *SHAPES["causal"]], 1))
    tried = {method: rate(answers) for method, answers in found.items()}
    print({method: round(each / tried[BASE], 2) for method, each in tried.items()}, flush=True)
    chosen = {name: max(methods, key=tried.get) for name, methods in SHAPES.items()}
    print(f"chosen: {chosen}", flush=True)
    test, measured = counting(models, test, run(models, test, [BASE, *chosen.values()], options.repeats))
    figures: dict[str, float] = {f"answers_{task}": sum(each.task == task for each in test) for task in TASKS}
    right = [right_in(models, question, runs[0]) for question, runs in zip(test, measured[BASE], strict=True)]
    for name, method in (("autoregressive", BASE), ("causal_drafter", chosen["causal"])):
        own, base = measured[chosen["longspec"]], measured[method]
        figures |= ratio(f"speedup_over_{name}", own, base, test)
        parts = {task: [question.task == task for question in test] for task in TASKS} | {"right": right}
        for part, belongs in parts.items():
            if any(belongs):
                rates = [rate(list(itertools.compress(side, belongs))) for side in (own, base)]
                figures[f"speedup_over_{name}_{part}"] = rates[0] / rates[1]
    figures["tokens_per_second"] = rate(measured[BASE])
    figures |= at_rates(models, test[:: max(1, len(test) // FEW)], options.repeats)
    for name, method in chosen.items():
        figures[f"tau_{name}"] = tau(measured[method])
        for task in dict.fromkeys(question.task for question in test):
            figures[f"tau_{name}_{task}"] = tau(of_task(measured[method], test, task))
        figures[f"kv_bytes_{name}"] = kept(models, method, max(test, key=lambda question: len(question.ids)))
    rows = [
        {
            "method": method,
            "task": question.task,
            "prompt": len(question.ids),
            "tokens": len(runs[0].token_ids),
            "seconds": seconds(runs),
        }
        for method, answers in measured.items()
        for question, runs in zip(test, answers, strict=True)
    ]
    finish("longspec_speed", figures, rows, options.output)


def questions_at(models: Models, options: argparse.Namespace) -> list[Question]:
    """All turns of the conversations, at the length that is wished."""
    wanted = dict.fromkeys(TASKS, options.questions) | FILLER
    found = held_out_questions(models, wanted, options.tokens, dict.fromkeys(wanted, min(OWN, options.length)))
    asked = [
        dataclasses.replace(question, prompt_id=f"{question.prompt_id}#{question.turn}", turn=0)
        for question in found
        if question.task in TASKS
    ]
    others = [question.ids for question in found if question.task in FILLER]
    return behind_filler(asked, [options.length], others, models.context)


def divided(asked: Sequence[Question], tuning: int) -> tuple[list[Question], list[Question]]:
    """The questions of the first conversations of every task, and the others."""
    seen: dict[str, list[str]] = {task: [] for task in TASKS}
    first, others = [], []
    for question in asked:
        name, known = conversation(question), seen[question.task]
        if name not in known:
            known.append(name)
        (first if known.index(name) < tuning else others).append(question)
    return first, others


def conversation(question: Question) -> str:
    """That it is a turn of."""
    return question.prompt_id.partition("#")[0]


def run(
    models: Models, questions: Sequence[Question], methods: Sequence[str], repeats: int
) -> dict[str, list[list[Completion]]]:
    """Completions of every method, all repeats of each question."""
    decoders = {method: models.decoder(method, GREEDY, 0) for method in methods}
    return interleave(decoders, questions, 1, repeats, 1, "runs")


def counting(
    models: Models, questions: Sequence[Question], found: Mapping[str, list[list[Completion]]]
) -> tuple[list[Question], dict[str, list[list[Completion]]]]:
    """Only questions of which every method's answer may stand in a figure."""
    tokenizer = models.tokenizer
    kept = [
        all(usable(each.task, each.reference, runs[place][0].token_ids, tokenizer) for runs in found.values())
        for place, each in enumerate(questions)
    ]
    if not any(kept):
        raise SystemExit("no answer is left to measure on: all loop or are wrong; ask more --questions")
    chosen = {method: list(itertools.compress(runs, kept)) for method, runs in found.items()}
    return list(itertools.compress(questions, kept)), chosen


def right_in(models: Models, question: Question, done: Completion) -> bool:
    """Whether it is the right answer."""
    return bool(is_right(question.reference, answer_text(models.tokenizer, done.token_ids)))


def at_rates(models: Models, questions: Sequence[Question], repeats: int) -> dict[str, float]:
    """What the best of some chains would reach at given rates of acceptance, over the target's own rate."""
    decoders = {BASE: models.decoder(BASE, GREEDY, 0)}
    for percent in RATES:
        fixed = dataclasses.replace(models, synthetic=SyntheticAcceptance([percent / 100]))
        for length in FIXED:
            decoders[f"{percent} {length}"] = fixed.decoder(f"LongSpec(block, length={length})", GREEDY, 0)
    rates = {name: rate(runs) for name, runs in interleave(decoders, questions, 1, repeats, 1, "rates").items()}
    return {
        f"speedup_at_{percent}": max(rates[f"{percent} {length}"] for length in FIXED) / rates[BASE]
        for percent in RATES
    }


def seconds(runs: Sequence[Completion]) -> float:
    """Decoding time of an answer: its least disturbed repeat's."""
    return min(each.counts.decode_seconds for each in runs)


def rate(answers: Sequence[Sequence[Completion]]) -> float:
    """Tokens a second."""
    return sum(len(runs[0].token_ids) for runs in answers) / sum(map(seconds, answers))


def tau(answers: Sequence[Sequence[Completion]]) -> float:
    """Tokens a round."""
    return sum((runs[0].counts for runs in answers), Counts()).tau


def of_task(
    answers: Sequence[Sequence[Completion]], questions: Sequence[Question], task: str
) -> list[Sequence[Completion]]:
    """The answers to the questions of a task."""
    return [runs for runs, question in zip(answers, questions, strict=True) if question.task == task]


def ratio(
    name: str,
    own: Sequence[Sequence[Completion]],
    base: Sequence[Sequence[Completion]],
    questions: Sequence[Question],
) -> dict[str, float]:
    """Ratio of rates, with its interval over conversations."""
    turns: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        turns.setdefault(conversation(question), []).append(place)
    draw, resampled = random.Random(0), []
    for _ in range(RESAMPLES):
        places = [place for each in draw.choices(list(turns.values()), k=len(turns)) for place in each]
        resampled.append(rate([own[place] for place in places]) / rate([base[place] for place in places]))
    cuts = statistics.quantiles(resampled, n=40)
    return {name: rate(own) / rate(base), f"{name}_low": cuts[0], f"{name}_high": cuts[-1]}


def kept(models: Models, method: str, question: Question) -> int:
    """Bytes that a drafter keeps of a text."""
    decoder = models.decoder(method, GREEDY, 0)
    decoder.generate([question.ids], 8)
    return decoder.drafter.cache.memory_bytes()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", default=str(CHECKPOINTS / "reference-longspec"), help="a LongSpec drafter")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a prompt")
    parser.add_argument("--questions", type=int, default=9, help="conversations of each task")
    parser.add_argument("--tuning", type=int, default=2, help="conversations of each task that shapes are chosen on")
    parser.add_argument("--tokens", type=int, default=96, help="longest answer")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repetitions")
    parser.add_argument("--eager", action="store_true", help="run no compiled graphs")
    parser.add_argument("--quick", action="store_true", help="short and few")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    if options.quick:
        options.length, options.questions, options.tokens, options.repeats = 768, 2, 16, 1
        options.tuning, options.eager = 1, True
    return options


if __name__ == "__main__":
    main()
