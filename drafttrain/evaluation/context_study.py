"""`drafttrain evaluate` with context.lengths or context.path: long prompts, whole and cut down, by real runs.

    drafttrain evaluate --target.path T --drafter.path D --run runs/long --context.lengths '[2048]'

Every prompt is answered by the dense target and by every method at every budget, in turn. The text of approximate
decoding may differ from the target's; by how much is what this measures. Writes context.json, context.md, context.html
with prompts that show what was kept, and plots into the run folder.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
import torch

from drafttrain.config import ContextConfig, Parsed
from drafttrain.context.ahead import DraftAhead
from drafttrain.context.budgets import Budget, Protected, chat_spans
from drafttrain.context.compression import ChunkAttention, DraftAttention, PromptCompression, WindowAttention
from drafttrain.context.cost import PrefillCost, break_even
from drafttrain.context.decoder import ApproximateDecoder, OracleDecoder, Split
from drafttrain.context.dropping import KVDropping, Protect
from drafttrain.context.markup import marked_html
from drafttrain.context.scorers import LastWindow, LookaheadAttention, Oracle, Random, Recency
from drafttrain.context.study import Candidate, DensePass, Outcome, Reader
from drafttrain.decoding.counts import Completion
from drafttrain.decoding.expression import build
from drafttrain.decoding.loop import Decoder
from drafttrain.dialogue import answer_text
from drafttrain.distributed import progress, say
from drafttrain.errors import UserError
from drafttrain.evaluation.context_report import write
from drafttrain.evaluation.context_schema import DENSE, ContextExample, ContextReport, ContextRow
from drafttrain.evaluation.environment import describe, load, peak_bytes
from drafttrain.evaluation.long_prompts import LongPrompt, check_file, read_prompts, world_prompts
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

ORACLE = "oracle"

_SINKS = Protected(4, 0)


def _dropping(scorer: Any, protect: Protected = _SINKS) -> Callable[[Budget, ContextConfig], dict[str, Any]]:
    return lambda budget, config: {"dropping": KVDropping(budget, scorer, protect)}


def _compression(scorer: Any) -> Callable[[Budget, ContextConfig], dict[str, Any]]:
    return lambda budget, config: {
        "compression": PromptCompression(
            Budget(budget.amount), scorer, config.positions, Protected(4, max(32, scorer.window))
        )
    }


def _both(budget: Budget, config: ContextConfig) -> dict[str, Any]:
    """Half of the reduction by each: the square root of the share is read, the square root of that is kept."""
    part = Budget(budget.amount**0.5)
    scorer = DraftAttention()
    return {
        "compression": PromptCompression(part, scorer, config.positions, Protected(4, scorer.window)),
        "dropping": KVDropping(dataclasses.replace(budget, amount=part.amount), protect=_SINKS),
    }


METHODS: dict[str, Callable[[Budget, ContextConfig], dict[str, Any]]] = {
    "kv_dropping": _dropping(LookaheadAttention()),
    "snapkv": _dropping(LastWindow()),
    "streaming": _dropping(Recency()),
    "random": _dropping(Random(), Protected(4, 32)),
    ORACLE: _dropping(Oracle()),
    "prompt_compression": _compression(DraftAttention()),
    "chunks": _compression(ChunkAttention()),
    "window": _compression(WindowAttention()),
    "both": _both,
}
"""What each does with a budget."""


def context_study(parsed: Parsed) -> None:
    """Measure and write.

    Raises:
        UserError: a part is missing or damaged, an unknown method or kind, or a budget that cannot be kept.
    """
    run, config = RunFolder(parsed.run).create(), parsed.recipe.context
    check(config)
    run.record(parsed, "drafttrain evaluate")
    began = load()
    models = load_models(parsed)
    study = Study(models, config, parsed.recipe.seed)
    groups = list(prompts_of(config, models))
    for _, prompts in groups:
        study.check(prompts)
    rows = [row for group in groups for row in study.rows(*group)]
    lengths = [256, 1024, max(2048, max(config.lengths, default=0))]
    target, drafter = (PrefillCost.measured(engine, lengths, repeats=2) for engine in models.engines())
    drafter = dataclasses.replace(drafter, fixed=drafter.fixed + looking(rows))
    report = ContextReport(
        warning=WARNING,
        environment=describe(models.device, began),
        pair=models.describe(run, parsed.accept_new_target),
        dtype=models.dtype,
        decoding=config.decoding,
        lookahead=config.lookahead,
        rows=rows,
        break_even={f"{budget:g}": break_even(target, drafter, budget) for budget in config.budgets},
        costs={"target": list(vars(target).values()), "drafter": list(vars(drafter).values())},
        examples=study.examples,
    )
    page = write(report, run)
    for row in rows:
        told = f"score {row.score:6.1%}  first token {row.first_token:.2f} s"
        say(f"{row.length:6d}  {row.method:20s} {row.budget:5.2f}  {told}")
    say(f"{WARNING}\nReport: {page}")


def looking(rows: Sequence[ContextRow]) -> float:
    """Mean seconds that methods of prompt compression alone spent on drafting ahead and on scores; 0 without any."""
    own = [row.draft_decode + row.scoring for row in rows if row.method in ("prompt_compression", "chunks", "window")]
    return fmean(own) if own else 0.0


def check(config: ContextConfig) -> None:
    """Refuse what could not be run.

    Raises:
        UserError: an unknown method, no such file, no budget, or one that is no share.
    """
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown:
        raise UserError(f"context.methods has {unknown[0]}; the methods are {', '.join(METHODS)}")
    if config.path is not None:
        check_file(config.path)
    if not config.budgets:
        raise UserError("context.budgets is empty; give shares of the prompt, like [0.25]")
    for budget in config.budgets:
        Budget(float(budget))


def work(config: ContextConfig) -> list[str]:
    """What --plan says would run.

    Raises:
        UserError: as `check`.
    """
    check(config)
    ways = 1 + len(config.methods) * len(config.budgets)
    sizes = [f"{len(config.kinds) * config.prompts} prompts of about {length} tokens" for length in config.lengths]
    if config.path is not None:
        sizes.append(f"at most {config.prompts} prompts of {config.path}")
    budgets = ", ".join(f"{budget:.0%}" for budget in config.budgets)
    return [
        f"approximate decoding: {', '.join(config.methods)} at {budgets}, and dense",
        f"runs: {ways} ways x {' and '.join(sizes)}, answers of at most {config.max_new_tokens} tokens",
    ]


def prompts_of(config: ContextConfig, models: Models) -> Iterator[tuple[int, list[LongPrompt]]]:
    """Prompts by their length; those of a file together, under the mean of theirs.

    Raises:
        UserError: an unknown kind, a damaged file, or prompts that leave no room in the context.
    """
    if config.path is not None:
        prompts = read_prompts(
            config.path, models.tokenizer, config.answer_prefix, config.max_new_tokens, config.prompts
        )
        _fit(prompts, models)
        yield round(fmean(len(prompt.ids) for prompt in prompts)), prompts
    for length in dict.fromkeys(config.lengths):
        mixture = dict.fromkeys(config.kinds, config.prompts)
        prompts = list(
            world_prompts(models.tokenizer, mixture, length, config.answer_prefix, limit=config.max_new_tokens)
        )
        _fit(prompts, models)
        yield length, prompts


def _fit(prompts: Sequence[LongPrompt], models: Models) -> None:
    if not prompts:
        raise UserError("there is no prompt to answer; give context.kinds or a context.path with lines in it")
    for prompt in prompts:
        if len(prompt.ids) + prompt.limit > models.context:
            raise UserError(
                f"prompt {prompt.prompt_id} has {len(prompt.ids)} tokens, which with {prompt.limit} new ones exceeds "
                f"the pair's context of {models.context}; give shorter prompts (context.lengths, context.path)"
            )


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
        examples: prompts that show what was kept.
    """

    def __init__(self, models: Models, config: ContextConfig, seed: int) -> None:
        self.models, self.config, self.seed = models, config, seed
        self.target, self.drafter = models.engines()
        self.reader = Reader(self.target)
        self.examples: list[ContextExample] = []
        self._ahead = DraftAhead(self.drafter, config.lookahead, config.min_confidence, config.settled)

    def check(self, prompts: Sequence[LongPrompt]) -> None:
        """Refuse budgets that do not hold what is protected of each prompt, before anything is run.

        Raises:
            UserError: likewise.
        """
        for prompt, name, budget in itertools.product(prompts, self.config.methods, self.config.budgets):
            way = self._way(name, float(budget), prompt)
            try:
                count = way["compression"].count(prompt.ids) if "compression" in way else len(prompt.ids)
                if "dropping" in way:
                    protected = int(way["dropping"].protected(prompt.ids).sum())  # compression leaves them in
                    if protected < count:
                        way["dropping"].budget.by_layer(count, self.target.layers, protected)
            except UserError as error:
                raise UserError(
                    f"{name} at {budget:g} of prompt {prompt.prompt_id}: {error} (context.budgets, context.lengths)"
                ) from None

    def rows(self, length: int, prompts: Sequence[LongPrompt]) -> list[ContextRow]:
        """All methods and budgets on prompts of one length, the dense target first."""
        ways = [(DENSE, 1.0), *((name, float(b)) for name in self.config.methods for b in self.config.budgets)]
        found: dict[tuple[str, float], list[_Run]] = {way: [] for way in ways}
        for number, prompt in enumerate(progress(prompts, len(prompts), f"prompts of {length}")):
            turn = number % len(ways)
            turns = sorted(ways[turn:] + ways[:turn], key=lambda way: way[0] == ORACLE)  # it must know the answer
            runs: dict[tuple[str, float], _Run] = {}
            for way in turns:
                runs[way] = self._run(self._decoder(*way, prompt, runs.get((DENSE, 1.0))), prompt)
            self._compare(prompt, runs)
            for way, run in runs.items():
                found[way].append(run)
            if number < EXAMPLES:
                self._show(prompt, runs)
        return [self._row(way, length, prompts, own, found[DENSE, 1.0]) for way, own in found.items()]

    def _way(self, name: str, budget: float, prompt: LongPrompt) -> dict[str, Any]:
        """What a method does with a prompt, whose markup, system prompt and question are protected."""
        tokenizer, whole = self.models.tokenizer, chat_spans(prompt.ids, self.models.tokenizer, prompt.question)

        def protecting(protect: Protected) -> Protect:
            def of(ids: Sequence[int]) -> Protected:
                left = len(ids) < len(prompt.ids)
                return dataclasses.replace(
                    protect, spans=chat_spans(ids, tokenizer, prompt.question) if left else whole
                )

            return of

        way = METHODS[name](Budget(budget, self.config.shape), self.config)
        return {kind: dataclasses.replace(each, protect=protecting(each.protect)) for kind, each in way.items()}

    def _decoder(self, name: str, budget: float, prompt: LongPrompt, dense: _Run | None) -> Decoder:
        drafter = build(self.config.decoding, self.models.members(), self.models.allow_code)
        common = (drafter, Sampling(0.0), self.models.ends, self.seed, self.models.stop_strings)
        if name == DENSE:
            return Decoder(self.target, *common)
        way = self._way(name, budget, prompt)
        dropping, compression = way.get("dropping"), way.get("compression")
        if name == ORACLE:
            answers = [dense.completion.token_ids]
            return OracleDecoder(self.target, dropping.budget, answers, dropping.protect, *common)
        looks = compression is not None or dropping.scorer.ahead
        return ApproximateDecoder(self.target, dropping, compression, self._ahead if looks else None, *common)

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
        kept = decoder.kept[0] if approximate else []
        memory = decoder._cache.memory_bytes()
        return _Run(completion, text, prompt.score(text), prompt.exact(text), split, memory, peak, kept=kept)

    @torch.inference_mode()
    def _compare(self, prompt: LongPrompt, runs: dict[tuple[str, float], _Run]) -> None:
        """Of the ways that drop keys: what they kept of what mattered to the dense answer."""
        candidates, own = [], []
        for (name, budget), run in runs.items():
            way = {} if name == DENSE else self._way(name, budget, prompt)
            dropping = way.get("dropping")
            if dropping is not None and "compression" not in way:
                ahead = self.config.lookahead if dropping.scorer.ahead else 0
                candidates.append(Candidate(name, dropping.scorer, dropping.budget, dropping.protect, ahead))
                own.append(run)
        if not candidates:
            return
        answer = runs[DENSE, 1.0].completion.token_ids
        drafted = self._lookahead(prompt.ids)
        dense = DensePass(self.reader, prompt.ids, drafted, answer, sample_id(prompt.prompt_id, 0))
        for run, outcome in zip(own, dense.compare(candidates), strict=True):
            run.outcome = outcome

    def _lookahead(self, ids: Sequence[int]) -> list[int]:
        """What the drafter writes behind a prompt."""
        [completion] = Decoder(self.drafter, None, Sampling(0.0), self.models.ends).generate(
            [list(ids)], self.config.lookahead
        )
        return completion.token_ids

    def _show(self, prompt: LongPrompt, runs: dict[tuple[str, float], _Run]) -> None:
        """The prompt, marked by each method that reads a part of it, at the smallest budget."""
        smallest = float(min(self.config.budgets))
        for (name, budget), run in runs.items():
            if budget == smallest and 0 < len(run.kept) < len(prompt.ids):
                page = marked_html(prompt.ids, run.kept, self.models.tokenizer)
                dense = runs[DENSE, 1.0].text
                reference = prompt.references[0]
                self.examples.append(ContextExample(name, prompt.task, budget, reference, run.text, dense, page))

    def _row(
        self,
        way: tuple[str, float],
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
        return ContextRow(
            method=way[0],
            budget=way[1],
            length=length,
            prompts=len(own),
            score=fmean(run.score for run in own),
            exact=fmean(run.exact for run in own),
            same=fmean(a.completion.token_ids == b.completion.token_ids for a, b in zip(own, dense, strict=True)),
            points=None if way[0] == DENSE else _points(prompts, own, dense),
            recall=fmean(each.recall for each in outcomes) if outcomes else None,
            mass=fmean(each.mass for each in outcomes) if outcomes else None,
            kl=fmean(each.kl for each in outcomes) if outcomes else None,
            first_token=fmean(run.first_token for run in own),
            **{name: fmean(getattr(run.split, name) for run in own) for name in vars(Split())},
            tokens_per_second=tokens / seconds if tokens else None,
            free_tokens=fmean(max(0, run.opening - 1) for run in own),
            kv_bytes=fmean(run.kv_bytes for run in own),
            peak_bytes=fmean(peaks) if peaks else None,
            tasks={task: fmean(scores) for task, scores in tasks.items()},
        )


def _points(prompts: Sequence[LongPrompt], own: Sequence[_Run], dense: Sequence[_Run]) -> Interval:
    counts = [[a.score, b.score, 1.0] for a, b in zip(own, dense, strict=True)]
    strata = [prompt.task for prompt in prompts]
    return bootstrap(np.array(counts), lambda sums: 100 * (sums[..., 0] - sums[..., 1]) / sums[..., 2], strata)
