"""`drafttrain tune`: find the method that is fastest for a pair of models, on this machine and these prompts.

    drafttrain tune --config recipes/reference/pair.yaml --run runs/pair

The target answers the tuning prompts once. What every model would have proposed along the answers is looked up, the
cost of a forward of every model is measured by width, and hundreds of methods are counted without running a model:
lengths, stopping rules, copying by every policy, cascades of every order and their numbers. The best few are then run,
and of those that cannot be told from the fastest the simplest is taken. RUN/tune.json keeps predicted and measured
speed-ups, RUN/tune.md says it in words, RUN/tuned.yaml is the recipe.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import yaml

from drafttrain.config import Parsed
from drafttrain.decoding.counts import Completion
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import parse_method
from drafttrain.distributed import say
from drafttrain.errors import UserError
from drafttrain.evaluation.candidates import combinations, copies, singles
from drafttrain.evaluation.forward_costs import ForwardCosts, fitted, forward_seconds
from drafttrain.evaluation.guesses import Answer, look_up
from drafttrain.evaluation.inputs import inputs_of
from drafttrain.evaluation.names import sampling_name, sampling_of
from drafttrain.evaluation.pair import BIGRAMS, Models, load_models
from drafttrain.evaluation.questions import Limits, Question, questions_of, usable
from drafttrain.evaluation.runner import answer, interleave
from drafttrain.evaluation.schema import AUTOREGRESSIVE
from drafttrain.evaluation.sketch import Sketch, count
from drafttrain.evaluation.statistics import Interval, bootstrap
from drafttrain.evaluation.tree_tuning import tuned_tree
from drafttrain.ops.random import sample_id
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder, write_atomically

ANCHORS = (
    "Model({0}, length=2)",
    "Model({0}, length=8)",
    "Model({0}, stop=Confidence(0.6, max=16))",
    "FirstOf(Copy(), Model({0}, length=4))",
    "Reviewed({0}, inner=Copy())",
    "Then((Reviewed({0}, inner=MaxGram()), 2), (MaxGram(), 24))",
    "Copy(gamma=2, longest=40, source='longest', follow=True)",
)
"""Methods that are run to find what a round costs beside its forwards."""

DRAWS = 4
"""Answers to every prompt where answers are drawn. Of one alone the search would learn its accidents."""

CONFIRMED = 4
"""Methods that are run in the end, beside two of a single drafter, of a copy before one, and of cascades."""


@dataclass
class Tried:
    """A method, what was predicted of it and, where it was run, what was measured: over all tasks and by task."""

    method: str
    predicted: float
    predicted_by_task: dict[str, float] = field(default_factory=dict)
    measured: float | None = None
    measured_by_task: dict[str, float] = field(default_factory=dict)
    behind: Interval | None = None
    """the fastest method's speed over its own, with a 95 % interval over prompts"""

    @property
    def ties(self) -> bool:
        """Whether it cannot be told from the fastest."""
        return self.behind is not None and self.behind.low <= 1

    @property
    def error(self) -> float | None:
        """predicted / measured - 1."""
        return None if self.measured is None else self.predicted / self.measured - 1


@dataclass
class Tuned:
    """What was found.

    Attributes:
        fastest: as measured.
        chosen: of all that cannot be told from the fastest the simplest.
        best_speculation: the fastest method of a single drafting model.
        best_pair: the fastest of a copy before such.
        best_cascade: the fastest in which a model reviews or several draft one behind another.
        tried: all that was counted, the best first.
        dropped: members that the chosen method does without.
        costs: of forwards, by which was counted.
    """

    fastest: Tried
    chosen: Tried
    best_speculation: Tried
    best_pair: Tried
    best_cascade: Tried
    tried: list[Tried]
    dropped: list[str]
    costs: ForwardCosts

    @property
    def confirmed(self) -> list[Tried]:
        """Those that were really run."""
        return [each for each in self.tried if each.measured is not None]


@dataclass(frozen=True)
class Prompt:
    """A tuning prompt.

    Attributes:
        drawn: it, once for every answer that is drawn to it.
        first: of these, the first whose recorded answer is usable.
        answers: places of its usable answers among all that are recorded.
    """

    drawn: Sequence[Question]
    first: Question
    answers: Sequence[int]


class Tuner:
    """A search in progress.

    Args:
        models: of the pair.
        sampling: how is decoded.
        questions: tuning prompts.
        seed: of all draws.
        repeats: of every real run; where answers are drawn there are none, but `DRAWS` answers a prompt.
        trees: find the shape of a tree, too.
    """

    def __init__(
        self,
        models: Models,
        sampling: Sampling,
        questions: Sequence[Question],
        seed: int = 0,
        repeats: int = 2,
        trees: bool = False,
    ) -> None:
        self.trees = trees
        self.models, self.sampling, self.seed = models, sampling, seed
        self.repeats = repeats if sampling.greedy else 1
        self.target = models.engines()[0]
        members = models.members()
        self.members = ["drafter", *models.others]
        self.engines = {name: members[name] for name in self.members}
        self.more = {name: each for name, each in members.items() if name not in self.members}
        self.prompts, self.answers = self._answered(questions)
        self.costs = self._costs()

    def run(self) -> Tuned:
        """Count, rank, confirm."""
        single = [method for member in self.members for method in singles(member, self._heads(member))]
        ranked = self._ranked([*single, *copies(BIGRAMS in self.more)])
        say(f"tune: {len(ranked)} single drafters and copies counted")
        of_models = [each for each in ranked if each.method in single]
        tree = self._tree() if self.trees else []
        tops = [each.method for each in of_models[:3]]
        tops += [next(each.method for each in of_models if f"({name}," in each.method) for name in self.members]
        short = [f"Model({name}, length=4)" for name in self.members]
        bottoms = [each.method for each in ranked if each.method not in single][:3]
        more = combinations(self.members, list(dict.fromkeys([*tops, *short])), bottoms)
        ranked = sorted([*ranked, *self._ranked(more), *tree], key=lambda each: -each.predicted)
        say(f"tune: {len(ranked)} methods counted, the best is {ranked[0].method}")
        pairs = [each for each in ranked if each.method.startswith("FirstOf(") and _flat(each.method)]
        cascades = [each for each in ranked if cascaded(each.method)]
        wanted = [*ranked[:CONFIRMED], *of_models[:2], *tree, *pairs[:2], *cascades[:2]]
        self._confirm(list({each.method: each for each in wanted}.values()))
        measured = [each for each in ranked if each.measured is not None]
        chosen = min((each for each in measured if each.ties), key=lambda each: simplicity(each.method, self.engines))
        used = parse_method(chosen.method).members | ({"copying"} if _copies(chosen.method) else set())
        return Tuned(
            _fastest(measured),
            chosen,
            _fastest([*of_models, *tree]),
            _fastest(pairs),
            _fastest(cascades),
            ranked,
            [name for name in [*self.members, *self.more, "copying"] if name not in used],
            self.costs,
        )

    def _heads(self, member: str) -> list[str]:
        return list(self.models.heads) if member == "drafter" else []

    # ---- counting ----

    def _ranked(self, methods: Sequence[str]) -> list[Tried]:
        return sorted(map(self.counted, methods), key=lambda each: -each.predicted)

    def _counts(self, method: str) -> list[Sketch]:
        return count(method, self.answers, self.models.vocabulary, self.models.ends, self.more)

    def counted(self, method: str) -> Tried:
        """What the cost model says of a method on the recorded answers."""
        sketches = self._counts(method)
        by_task = {
            task: self.costs.predicted(_sum(sketches[at] for at, own in enumerate(self.answers) if own.task == task))
            for task in dict.fromkeys(each.task for each in self.answers)
        }
        return Tried(method, self.costs.predicted(_sum(sketches)), by_task)

    def _tree(self) -> list[Tried]:
        """The tree that should be fastest, by costs and acceptance (tree_tuning.py); none if it is a chain."""
        asked = [prompt.first for prompt in self.prompts]
        shape = tuned_tree(self.models, self.sampling, asked, asked, 1, self.seed).shape
        return [] if shape.chain else [Tried(f"Model(drafter, tree={list(shape.widths)})", shape.speedup)]

    # ---- real runs ----

    def _answered(self, questions: Sequence[Question]) -> tuple[list[Prompt], list[Answer]]:
        """Prompts with answers of the target that are usable, and these answers."""
        decoder = self.models.decoder(AUTOREGRESSIVE, self.sampling, self.seed)
        prompts, answers = [], []
        for question in questions:
            drawn = [question] if self.sampling.greedy else [_redrawn(question, draw) for draw in range(DRAWS)]
            found = [(each, answer(decoder, [each])[0]) for each in drawn]
            kept = [(each, done) for each, done in found if self._usable(each, done)]
            if kept:
                prompts.append(Prompt(drawn, kept[0][0], [len(answers) + more for more in range(len(kept))]))
            answers += [
                look_up(self.engines, self.target, each, done.token_ids, self.sampling, {"drafter": self.models.heads})
                for each, done in kept
            ]
        if not prompts:
            raise UserError("no answer to the tuning prompts is left to tune on: all of them loop or are wrong.")
        return prompts, answers

    def _usable(self, question: Question, done: Completion) -> bool:
        return usable(question.task, question.reference, done.token_ids, self.models.tokenizer)

    def _costs(self) -> ForwardCosts:
        """Of forwards, then of what is beside them."""
        context = statistics.mean(len(each.prompt) + len(each.tokens) / 2 for each in self.answers)
        anchors = list(dict.fromkeys(form.format(name) for name in self.members for form in ANCHORS))
        runs = self._real([AUTOREGRESSIVE, *anchors])
        tokens = [sum(len(self.answers[at].tokens) for at in prompt.answers) for prompt in self.prompts]
        step = sum(runs[AUTOREGRESSIVE]) / sum(tokens)
        seconds = forward_seconds({"": self.target, **self.engines}, int(context))
        steps = {name: {width: each / step for width, each in own.items()} for name, own in seconds.items()}
        costs = ForwardCosts(steps.pop(""), steps, 0.0, step)
        fits = []
        for method in anchors:
            sketches = self._counts(method)
            for at, prompt in enumerate(self.prompts):
                unit = runs[AUTOREGRESSIVE][at] / tokens[at]
                fits.append((_sum(sketches[each] for each in prompt.answers), runs[method][at] / unit))
        return fitted(costs, fits)

    def _confirm(self, chosen: Sequence[Tried]) -> None:
        runs = self._real([AUTOREGRESSIVE, *(each.method for each in chosen)])
        measure(chosen, runs, [prompt.first.task for prompt in self.prompts])

    def _real(self, methods: Sequence[str]) -> dict[str, list[float]]:
        """Seconds that every method would need for the recorded tokens, prompt by prompt.

        Those of its own usable answers, by the token, or of all where none is usable: what is drawn differs from
        method to method. Of repeats the fastest counts, for whatever else a machine does takes time from a run and
        gives it none.
        """
        made = {method: self.models.decoder(method, self.sampling, self.seed) for method in methods}
        asked = [question for prompt in self.prompts for question in prompt.drawn]
        runs = interleave(made, asked, 1, self.repeats, 1, "tune")
        return {method: self._scaled(dict(zip(asked, found, strict=True))) for method, found in runs.items()}

    def _scaled(self, runs: Mapping[Question, Sequence[Completion]]) -> list[float]:
        """Seconds of real runs for the recorded tokens, prompt by prompt."""
        scaled = []
        for prompt in self.prompts:
            own = [runs[each] for each in prompt.drawn if self._usable(each, runs[each][0])]
            own = own or [runs[each] for each in prompt.drawn]
            seconds = sum(min(each.counts.decode_seconds for each in repeats) for repeats in own)
            recorded = sum(len(self.answers[at].tokens) for at in prompt.answers)
            scaled.append(seconds / sum(repeats[0].counts.tokens for repeats in own) * recorded)
        return scaled


def _redrawn(question: Question, draw: int) -> Question:
    """The same question with draws of its own."""
    name = f"{question.prompt_id}#{draw}"
    return replace(question, prompt_id=name, sample_id=sample_id(name, question.turn))


def measure(tried: Sequence[Tried], runs: Mapping[str, Sequence[float]], tasks: Sequence[str]) -> None:
    """Fill in what real runs say of methods.

    Args:
        tried: the methods.
        runs: seconds of each and of autoregressive decoding, prompt by prompt.
        tasks: of the prompts.
    """
    for each in tried:
        each.measured = sum(runs[AUTOREGRESSIVE]) / sum(runs[each.method])
        for task in dict.fromkeys(tasks):
            own, base = (
                sum(value for value, one in zip(runs[name], tasks, strict=True) if one == task)
                for name in (each.method, AUTOREGRESSIVE)
            )
            each.measured_by_task[task] = base / own
    best = _fastest(tried).method
    for each in tried:
        seconds_P2 = np.array([runs[each.method], runs[best]]).T
        each.behind = bootstrap(seconds_P2, lambda sums: sums[..., 0] / sums[..., 1], tasks)


def simplicity(method: str, engines: Mapping[str, Engine]) -> tuple[int, int, int]:
    """Members, weights of the models, settings: the fewer, the simpler."""
    expression = parse_method(method)
    weights = [each for name in expression.members & engines.keys() for each in engines[name].model.parameters()]
    return len(expression.members) + _copies(method), sum(each.numel() for each in weights), expression.settings


def _sum(sketches: Iterable[Sketch]) -> Sketch:
    total = Sketch()
    for sketch in sketches:
        total.add(sketch)
    return total


def _fastest(tried: Sequence[Tried]) -> Tried:
    """Of those that were run."""
    return max((each for each in tried if each.measured is not None), key=lambda each: each.measured)


def cascaded(method: str) -> bool:
    """Whether a model reviews, or several members draft one behind another."""
    return "Reviewed(" in method or "Then(" in method


def _flat(method: str) -> bool:
    """Whether a method has one level: a copy and a model, nothing in between."""
    return not cascaded(method) and method.count("FirstOf(") == 1


def _copies(method: str) -> bool:
    return "Copy(" in method or "MaxGram(" in method


# ---- the command ----


def tune(parsed: Parsed, report: Callable[[str], None] = say) -> None:
    """Tune a recipe's pair and write what was found into the run folder.

    Raises:
        UserError: a part is missing or foreign, no tuning prompt can be used, or synthetic acceptance is asked for.
    """
    recipe = parsed.recipe
    if recipe.evaluate.synthetic_acceptance is not None:
        raise UserError("tune needs real drafts; leave out evaluate.synthetic_acceptance.")
    run = RunFolder(parsed.run).create()
    models = load_models(parsed)
    if models.reads_target:
        raise UserError(
            f"{models.drafter.path} is a LongSpec drafter, of which recorded answers say nothing without its target; "
            "drafttrain evaluate measures its methods."
        )
    inputs = inputs_of(parsed, models.tokenizer, models.context, write=not parsed.plan)
    settings = recipe.evaluate.samplings or [recipe.responses.sampling]
    sampling = sampling_of(settings[0])
    decoder = models.decoder(AUTOREGRESSIVE, sampling, recipe.seed)
    limits = Limits(recipe.evaluate.max_new_tokens, models.context, recipe.evaluate.batch_size)
    if parsed.plan:
        report(f"tune: {len(inputs.tune)} tuning prompts, {sampling_name(settings[0])}; nothing was run")
        return
    run.record(parsed, "drafttrain tune")
    questions = questions_of(inputs.tune, models.tokenizer, limits, lambda each: answer(decoder, each))
    found = Tuner(models, sampling, questions, recipe.seed, recipe.evaluate.repeats, recipe.evaluate.trees).run()
    write(found, run, parsed, sampling_name(settings[0]))
    for line in lines_of(found):
        report(line)


def lines_of(found: Tuned) -> list[str]:
    """What was found, a sentence each."""
    best, base, both, cascade = found.fastest, found.best_speculation, found.best_pair, found.best_cascade
    errors = [abs(each.error) for each in found.confirmed]
    lines = [
        f"Fastest: {best.method}, {best.measured:.2f} times autoregressive decoding (predicted {best.predicted:.2f}).",
    ]
    if found.chosen is not best:
        simpler = found.chosen
        lines.append(
            f"Chosen: {simpler.method}, {simpler.measured:.2f}, which is simpler; the fastest is {simpler.behind} "
            "times as fast, too little to tell."
        )
    lines += [
        f"Best single drafter: {base.method}, {base.measured:.2f}; best copy and drafter: {both.method}, "
        f"{both.measured:.2f}; best cascade: {cascade.method}, {cascade.measured:.2f}.",
        f"Counted {len(found.tried)} methods, ran {len(found.confirmed)}; predictions were off by "
        f"{max(errors):.1%} at most, {statistics.median(errors):.1%} on the median.",
    ]
    lines += [f"Dropped: {name}, which does not pay here." for name in found.dropped]
    return lines


def write(found: Tuned, run: RunFolder, parsed: Parsed, sampling: str) -> None:
    """tune.json, tune.md and tuned.yaml."""
    kept = replace(found, tried=[*found.confirmed, *(each for each in found.tried[:40] if each.measured is None)])
    write_atomically(run.path / "tune.json", json.dumps({"sampling": sampling, **asdict(kept)}, indent=1) + "\n")
    table = ["| method | predicted | measured | error | the fastest over it |", "|---|---|---|---|---|"]
    table += [
        f"| `{each.method}` | {each.predicted:.2f} | {each.measured:.2f} | {each.error:+.1%} | {each.behind} |"
        for each in sorted(found.confirmed, key=lambda each: -each.measured)
    ]
    text = "\n".join([f"# Tuned, {sampling}", "", *(f"{line}\n" for line in lines_of(found)), *table]) + "\n"
    write_atomically(run.path / "tune.md", text)
    recipe = json.loads(json.dumps(parsed.resolved))
    recipe["evaluate"]["methods"] = [found.chosen.method]
    write_atomically(run.path / "tuned.yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
