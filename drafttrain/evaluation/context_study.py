"""`drafttrain evaluate` with context.lengths or context.path: long prompts, whole and cut down, by real runs.

    drafttrain evaluate --target.path T --drafter.path D --run runs/long --context.lengths '[2048]'

Every prompt is answered by the dense target and by every method at every budget, in turn. The text of approximate
decoding may differ from the target's; by how much is what this measures. Writes context.json, context.md, context.html
with prompts that show what was kept, and plots into the run folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from drafttrain.config import ContextConfig, Parsed
from drafttrain.context.ahead import DraftAhead
from drafttrain.context.budgets import Budget
from drafttrain.context.compression import PromptCompression
from drafttrain.context.cost import CompressionCost
from drafttrain.context.decoder import ApproximateDecoder, OracleDecoder, Split
from drafttrain.context.markup import marked_html
from drafttrain.context.study import Candidate, DensePass, Outcome, Reader
from drafttrain.context.timing import compression_cost
from drafttrain.decoding.counts import Completion
from drafttrain.decoding.expression import build
from drafttrain.decoding.loop import Decoder
from drafttrain.dialogue import answer_text
from drafttrain.distributed import progress, say
from drafttrain.evaluation.context_methods import ORACLE, SWEPT, Methods, lookaheads, prompts_of
from drafttrain.evaluation.context_report import write
from drafttrain.evaluation.context_schema import DENSE, ContextExample, ContextReport, ContextRow
from drafttrain.evaluation.environment import describe, load, peak_bytes
from drafttrain.evaluation.long_prompts import LongPrompt
from drafttrain.evaluation.pair import Models, load_models
from drafttrain.evaluation.statistics import Interval, bootstrap
from drafttrain.ops.random import sample_id
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder

WARNING = (
    "Approximate: the target answers with a part of the prompt before it, so its text may differ from its own; how "
    "often and by how much is what the tables say. Everything else in drafttrain leaves the text as it is."
)

EXAMPLES = 3
"""Prompts of each method that the page shows."""


class Asked(NamedTuple):
    """How a prompt is asked; ``stop`` is a lookahead of the sweep, "" the recipe's own."""

    method: str
    budget: float
    stop: str = ""


WHOLE = Asked(DENSE, 1.0)


def context_study(parsed: Parsed) -> None:
    """Measure and write.

    Raises:
        UserError: a part is missing or damaged, an unknown method or kind, or a budget that cannot be kept.
    """
    run, config = RunFolder(parsed.run).create(), parsed.recipe.context
    Methods(config, None)  # refuses before anything is loaded
    run.record(parsed, "drafttrain evaluate")
    began = load()
    models = load_models(parsed)
    study = Study(models, config, parsed.recipe.seed)
    groups = list(prompts_of(config, models.tokenizer, models.context))
    for _, prompts in groups:
        study.methods.check(prompts, study.target.layers)
    costs = study.measure(max(length for length, _ in groups))
    protected = min(study.methods.protected(prompt) for _, prompts in groups for prompt in prompts)
    found = [study.rows(*group) for group in groups]
    report = ContextReport(
        warning=WARNING,
        environment=describe(models.device, began),
        pair=models.describe(run, parsed.accept_new_target),
        dtype=models.dtype,
        decoding=config.decoding,
        lookahead=config.lookahead,
        rows=[row for rows, _ in found for row in rows],
        lookaheads=[row for _, rows in found for row in rows],
        break_even={f"{budget:g}": costs.break_even(budget, protected) for budget in config.budgets},
        costs=costs,
        bypass=config.bypass,
        examples=study.examples,
    )
    page = write(report, run)
    for row in report.rows:
        told = f"score {row.score:6.1%}  first token {row.first_token:.2f} s"
        say(f"{row.length:6d}  {row.method:20s} {row.budget:5.2f}  {told}")
    say(f"{WARNING}\nReport: {page}")


@dataclass
class _Run:
    """One answer."""

    completion: Completion
    text: str
    score: float
    exact: bool
    split: Split
    kv_bytes: int
    peak: int | None
    outcome: Outcome | None = None
    kept: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)

    @property
    def opening(self) -> int:
        """Tokens that were emitted with the prefill: what was accepted of the lookahead, and one behind it."""
        if not self.kept:
            return 0
        drafted = (source == "lookahead" for source in self.completion.sources)
        return 1 + sum(itertools.takewhile(bool, drafted))

    @property
    def first_token(self) -> float:
        """Seconds."""
        counts = self.completion.counts
        return counts.prefill_seconds + counts.decode_seconds / max(1, counts.rounds)


class Study:
    """The study of a pair.

    Args:
        models: of the pair.
        config: which methods and budgets.
        seed: of the draws of random choice.

    Attributes:
        methods: prompt by prompt.
        examples: prompts that show what was kept.
    """

    def __init__(self, models: Models, config: ContextConfig, seed: int) -> None:
        self.models, self.config, self.seed = models, config, seed
        self.target, self.drafter = models.engines()
        self.methods = Methods(config, models.tokenizer)
        self.reader = Reader(self.target)
        self.examples: list[ContextExample] = []
        own = {"length": config.lookahead, "min_confidence": config.min_confidence, "settled": config.settled}
        self._aheads = {
            name: DraftAhead(self.drafter, **settings) for name, settings in {"": own, **lookaheads(config)}.items()
        }

    def measure(self, longest: int) -> CompressionCost:
        """What compression takes and saves by length; prompts that it does not pay for are read whole from now on, if
        the recipe wants that."""
        compression = PromptCompression(Budget(0.5), positions=self.config.positions)
        costs = compression_cost(self.target, compression, self._aheads[""], [512, 1024, max(2048, longest)])
        if self.config.bypass:
            self.methods = Methods(self.config, self.models.tokenizer, costs)
        return costs

    def rows(self, length: int, prompts: Sequence[LongPrompt]) -> tuple[list[ContextRow], list[ContextRow]]:
        """All methods and budgets on prompts of one length, the dense one first; and KV dropping by its lookahead."""
        budgets = [float(budget) for budget in self.config.budgets]
        ways = [WHOLE, *(Asked(name, budget) for name in self.config.methods for budget in budgets)]
        ways += [Asked(SWEPT, min(budgets), stop) for stop in self._aheads if stop]
        found: dict[Asked, list[_Run]] = {way: [] for way in ways}
        for number, prompt in enumerate(progress(prompts, len(prompts), f"prompts of {length}")):
            turn = number % len(ways)
            turns = sorted(ways[turn:] + ways[:turn], key=lambda way: way.method == ORACLE)  # it must know the answer
            runs: dict[Asked, _Run] = {}
            for way in turns:
                runs[way] = self._run(self._decoder(way, prompt, runs.get(WHOLE)), prompt)
            self._compare(prompt, runs)
            for way, run in runs.items():
                found[way].append(run)
            if number < EXAMPLES:
                self._show(prompt, runs)
        rows = {way: self._row(way, length, prompts, own, found[WHOLE]) for way, own in found.items()}
        return [row for way, row in rows.items() if not way.stop], [row for way, row in rows.items() if way.stop]

    def _decoder(self, way: Asked, prompt: LongPrompt, dense: _Run | None) -> Decoder:
        drafter = build(self.config.decoding, self.models.members(), self.models.allow_code)
        common = (drafter, Sampling(0.0), self.models.ends, self.seed, self.models.stop_strings)
        if way == WHOLE:
            return Decoder(self.target, *common)
        dropping, compression = self.methods.of(way.method, way.budget, prompt)
        if way.method == ORACLE:
            answers = [dense.completion.token_ids]
            return OracleDecoder(self.target, dropping.budget, answers, dropping.protect, *common)
        looks = compression is not None or dropping.scorer.ahead
        ahead = self._aheads[way.stop] if looks else None
        return ApproximateDecoder(self.target, dropping, compression, ahead, *common)

    def _run(self, decoder: Decoder, prompt: LongPrompt) -> _Run:
        done: list[Completion] = []

        def answer() -> None:
            done.extend(decoder.generate([prompt.ids], prompt.limit, [sample_id(prompt.prompt_id, 0)]))

        peak = peak_bytes(self.models.device, answer)
        if peak is None:
            answer()
        [completion] = done
        text = answer_text(self.models.tokenizer, completion.token_ids)
        approximate = isinstance(decoder, ApproximateDecoder)
        split = decoder.split if approximate else Split(target_prefill=completion.counts.prefill_seconds)
        memory = decoder._cache.memory_bytes()
        run = _Run(completion, text, prompt.score(text), prompt.exact(text), split, memory, peak)
        return replace(run, kept=decoder.kept[0], drafted=decoder.drafted[0]) if approximate else run

    @torch.inference_mode()
    def _compare(self, prompt: LongPrompt, runs: dict[Asked, _Run]) -> None:
        """Of the ways that drop keys: what they kept of what mattered to the dense answer."""
        candidates, own = [], []
        for way, run in runs.items():
            dropping, compression = (None, None) if way == WHOLE else self.methods.of(way.method, way.budget, prompt)
            if dropping is not None and compression is None:
                ahead = len(run.drafted)
                candidates.append(Candidate(way.method, dropping.scorer, dropping.budget, dropping.protect, ahead))
                own.append(run)
        if not candidates:
            return
        answer = runs[WHOLE].completion.token_ids
        drafted = max((run.drafted for run in own), key=len)  # of one drafter, greedily: the others begin it
        dense = DensePass(self.reader, prompt.ids, drafted, answer, sample_id(prompt.prompt_id, 0))
        for run, outcome in zip(own, dense.compare(candidates), strict=True):
            run.outcome = outcome

    def _show(self, prompt: LongPrompt, runs: dict[Asked, _Run]) -> None:
        """The prompt, marked by each method that reads a part of it, at the smallest budget."""
        smallest = float(min(self.config.budgets))
        for way, run in runs.items():
            if way.budget == smallest and 0 < len(run.kept) < len(prompt.ids):
                page = marked_html(prompt.ids, run.kept, self.models.tokenizer)
                texts = (prompt.references[0], run.text, runs[WHOLE].text)
                self.examples.append(ContextExample(way.method, prompt.task, way.budget, *texts, page))

    def _row(
        self,
        way: Asked,
        length: int,
        prompts: Sequence[LongPrompt],
        own: Sequence[_Run],
        dense: Sequence[_Run],
    ) -> ContextRow:
        tasks: dict[str, list[float]] = {}
        for prompt, run in zip(prompts, own, strict=True):
            tasks.setdefault(prompt.task, []).append(run.score)
        outcomes = [run.outcome for run in own if run.outcome is not None]
        peaks = [run.peak for run in own if run.peak is not None]
        tokens = sum(len(run.completion.token_ids) - min(run.opening, len(run.completion.token_ids)) for run in own)
        seconds = sum(run.completion.counts.decode_seconds for run in own)
        ahead = sum(run.split.total - run.split.target_prefill for run in own)
        return ContextRow(
            method=way.stop or way.method,
            budget=way.budget,
            length=length,
            prompts=len(own),
            score=fmean(run.score for run in own),
            exact=fmean(run.exact for run in own),
            same=fmean(a.completion.token_ids == b.completion.token_ids for a, b in zip(own, dense, strict=True)),
            points=None if way == WHOLE else _points(prompts, own, dense),
            recall=fmean(each.recall for each in outcomes) if outcomes else None,
            mass=fmean(each.mass for each in outcomes) if outcomes else None,
            kl=fmean(each.kl for each in outcomes) if outcomes else None,
            first_token=fmean(run.first_token for run in own),
            **{name: fmean(getattr(run.split, name) for run in own) for name in vars(Split())},
            tokens_per_second=tokens / seconds if tokens else None,
            overhead=ahead / sum(run.split.target_prefill for run in dense),
            drafted=fmean(len(run.drafted) for run in own),
            free_tokens=fmean(max(0, run.opening - 1) for run in own),
            kv_bytes=fmean(run.kv_bytes for run in own),
            peak_bytes=fmean(peaks) if peaks else None,
            tasks={task: fmean(scores) for task, scores in tasks.items()},
        )


def _points(prompts: Sequence[LongPrompt], own: Sequence[_Run], dense: Sequence[_Run]) -> Interval:
    counts = [[a.score, b.score, 1.0] for a, b in zip(own, dense, strict=True)]
    strata = [prompt.task for prompt in prompts]
    return bootstrap(np.array(counts), lambda sums: 100 * (sums[..., 0] - sums[..., 1]) / sums[..., 2], strata)
