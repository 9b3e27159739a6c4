"""What each method of approximate decoding does with a budget and a prompt, and whether it can."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from drafttrain.config import ContextConfig
from drafttrain.context.budgets import Budget, Protected, chat_spans, document_spans
from drafttrain.context.compression import ChunkAttention, DraftAttention, PromptCompression, Spans, WindowAttention
from drafttrain.context.cost import CompressionCost
from drafttrain.context.dropping import KVDropping, Protect
from drafttrain.context.scorers import LastWindow, LookaheadAttention, Oracle, Random, Recency, Scorer
from drafttrain.errors import UserError
from drafttrain.evaluation.long_prompts import LongPrompt, check_file, read_prompts, world_prompts

ORACLE = "oracle"

SWEPT = "kv_dropping"
"""The method whose lookahead is swept."""

CONFIDENT, SETTLED = 0.5, 0.1
"""Where the sweep's adaptive lookaheads stop, if the recipe does not say it."""


class Way(NamedTuple):
    """What a method does with a prompt: drop keys, read a part, or both."""

    dropping: KVDropping | None = None
    compression: PromptCompression | None = None


PROTECTED = Protected(sinks=4, window=32)
"""By every method, which makes them alike, beside markup, system prompt and question."""


def _dropping(scorer: Scorer) -> Callable[[Budget, ContextConfig], Way]:
    return lambda budget, config: Way(KVDropping(budget, scorer, PROTECTED))


def _compression(scorer: Any) -> Callable[[Budget, ContextConfig], Way]:
    return lambda budget, config: Way(
        None,
        PromptCompression(
            Budget(budget.amount), scorer, config.positions, PROTECTED, min_per_document=config.min_per_document
        ),
    )


def _both(budget: Budget, config: ContextConfig) -> Way:
    """Half of the reduction by each: the square root of the share is read, the square root of that is kept."""
    part = dataclasses.replace(budget, amount=budget.amount**0.5)
    return Way(*_dropping(LookaheadAttention())(part, config)[:1], *_compression(DraftAttention())(part, config)[1:])


METHODS: dict[str, Callable[[Budget, ContextConfig], Way]] = {
    SWEPT: _dropping(LookaheadAttention()),
    "snapkv": _dropping(LastWindow()),
    "streaming": _dropping(Recency()),
    "random": _dropping(Random()),
    ORACLE: _dropping(Oracle()),
    "prompt_compression": _compression(DraftAttention()),
    "chunks": _compression(ChunkAttention()),
    "window": _compression(WindowAttention()),
    "both": _both,
}
"""What each does with a budget."""


class Methods:
    """The methods of a recipe, prompt by prompt.

    Args:
        config: which methods, budgets and kinds of prompts.
        tokenizer: of the pair.
        costs: where by them compressing a prompt does not pay, it is read whole; None always compresses.

    Raises:
        UserError: an unknown method, no such file, no budget, one that is no share, or no regular expression.
    """

    def __init__(self, config: ContextConfig, tokenizer: Any, costs: CompressionCost | None = None) -> None:
        unknown = [name for name in config.methods if name not in METHODS]
        if unknown:
            raise UserError(f"context.methods has {unknown[0]}; the methods are {', '.join(METHODS)}")
        if config.path is not None:
            check_file(config.path)
        if not config.budgets:
            raise UserError("context.budgets is empty; give shares of the prompt, like [0.25]")
        for budget in config.budgets:
            Budget(float(budget))
        try:
            re.compile(config.documents)
        except re.error as error:
            raise UserError(f"context.documents is no regular expression ({error}); try '\\n\\n'") from None
        self.config, self.tokenizer, self.costs = config, tokenizer, costs
        self._spans: tuple[LongPrompt | None, Spans] = (None, ())

    def of(self, name: str, budget: float, prompt: LongPrompt) -> Way:
        """What a method does with a prompt, whose markup, system prompt and question are protected."""
        dropping, compression = METHODS[name](Budget(budget, self.config.shape), self.config)
        if dropping is not None:
            dropping = dataclasses.replace(dropping, protect=self._protecting(dropping.protect, prompt))
        if compression is not None:
            protect = self._protecting(compression.protect, prompt)
            compression = dataclasses.replace(compression, protect=protect, documents=self._documents, costs=self.costs)
        return Way(dropping, compression)

    def _documents(self, ids: Sequence[int]) -> Spans:
        return document_spans(ids, self.tokenizer, self.config.documents)

    def _protecting(self, protect: Protected, prompt: LongPrompt) -> Protect:
        def of(ids: Sequence[int]) -> Protected:
            return dataclasses.replace(protect, spans=self._marked(ids, prompt))

        return of

    def _marked(self, ids: Sequence[int], prompt: LongPrompt) -> Spans:
        """Spans of a prompt or of what is left of it; those of the last whole prompt are known."""
        if len(ids) < len(prompt.ids):
            return chat_spans(ids, self.tokenizer, prompt.question)
        if self._spans[0] is not prompt:
            self._spans = prompt, chat_spans(prompt.ids, self.tokenizer, prompt.question)
        return self._spans[1]

    def check(self, prompts: Sequence[LongPrompt], layers: int) -> None:
        """Refuse budgets that do not hold what is protected of each prompt, before anything is run.

        Raises:
            UserError: likewise.
        """
        for prompt, name, budget in itertools.product(prompts, self.config.methods, self.config.budgets):
            dropping, compression = self.of(name, float(budget), prompt)
            try:
                count = len(prompt.ids) if compression is None else compression.count(prompt.ids)
                if dropping is not None:
                    protected = int(dropping.protected(prompt.ids).sum())  # compression leaves them in
                    if protected < count:
                        dropping.budget.by_layer(count, layers, protected)
            except UserError as error:
                raise UserError(
                    f"{name} at {budget:g} of prompt {prompt.prompt_id}: {error} (context.budgets, context.lengths)"
                ) from None

    def protected(self, prompt: LongPrompt) -> int:
        """Most tokens that any method keeps of a prompt in any case."""
        parts = [each for name in self.config.methods for each in self.of(name, 1.0, prompt) if each is not None]
        return max(int(each.protected(prompt.ids).sum()) for each in parts)


def lookaheads(config: ContextConfig) -> dict[str, dict[str, Any]]:
    """Settings of the lookaheads that are swept, by what the report calls them: lengths, and the longest with stops."""
    if SWEPT not in config.methods or not config.lookaheads:
        return {}
    most = max(config.lookaheads)
    confident, settled = config.min_confidence or CONFIDENT, config.settled or SETTLED
    return {
        **{str(length): {"length": length} for length in sorted(set(config.lookaheads))},
        f"{most}, confidence {confident:g}": {"length": most, "min_confidence": confident},
        f"{most}, settled {settled:g}": {"length": most, "settled": settled},
    }


def prompts_of(config: ContextConfig, tokenizer: Any, context: int) -> Iterator[tuple[int, list[LongPrompt]]]:
    """Prompts by their length; those of a file together, under the mean of theirs.

    Args:
        config: which.
        tokenizer: of the pair.
        context: tokens that it can read and write together.

    Raises:
        UserError: an unknown kind, a damaged file, or prompts that leave no room in the context.
    """
    if config.path is not None:
        prompts = read_prompts(config.path, tokenizer, config.answer_prefix, config.max_new_tokens, config.prompts)
        _fit(prompts, context)
        yield round(fmean(len(prompt.ids) for prompt in prompts)), prompts
    for length in dict.fromkeys(config.lengths):
        mixture = dict.fromkeys(config.kinds, config.prompts)
        prompts = list(world_prompts(tokenizer, mixture, length, config.answer_prefix, limit=config.max_new_tokens))
        _fit(prompts, context)
        yield length, prompts


def _fit(prompts: Sequence[LongPrompt], context: int) -> None:
    if not prompts:
        raise UserError("there is no prompt to answer; give context.kinds or a context.path with lines in it")
    for prompt in prompts:
        if len(prompt.ids) + prompt.limit > context:
            raise UserError(
                f"prompt {prompt.prompt_id} has {len(prompt.ids)} tokens, which with {prompt.limit} new ones exceeds "
                f"the pair's context of {context}; give shorter prompts (context.lengths, context.path)"
            )
