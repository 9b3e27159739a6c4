"""The approximate decoder: the loop of `drafttrain.decoding` behind a prompt that was cut down.

A drafter looks ahead; the target reads the prompt, or what is left of it, and the lookahead in one pass; what it would
have written itself of the lookahead is emitted at once; then any drafter of the algebra goes on over what was kept.
"""

# B batch, S tokens of a prompt, L tokens of the lookahead, K drafted tokens, V vocabulary

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.context.ahead import DraftAhead
from drafttrain.context.budgets import Budget
from drafttrain.context.compression import PromptCompression
from drafttrain.context.dropping import KVDropping, Protect
from drafttrain.context.prefill import Prefill, Reading
from drafttrain.context.scorers import Oracle
from drafttrain.context.watching import QueryWatch
from drafttrain.decoding.counts import Completion
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, ModelDrafter, Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stop_strings import StopStrings
from drafttrain.errors import UserError
from drafttrain.ops.random import Draws
from drafttrain.ops.sampling import Sampling


@dataclass
class Split:
    """Where the time to the first token went: seconds of a whole batch."""

    draft_prefill: float = 0.0
    draft_decode: float = 0.0
    scoring: float = 0.0
    target_prefill: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.draft_prefill + self.draft_decode + self.scoring + self.target_prefill

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Count the block's seconds."""
        started = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - started)


@dataclass
class _Row:
    """What will be read of one prompt, and what is kept of that."""

    tokens: list[int]
    count: int
    """tokens read"""
    counts: list[int]
    """tokens kept by each layer, if the prompt is not compressed"""
    kept: list[int] = field(default_factory=list)
    """indices of the tokens read"""

    @property
    def whole(self) -> bool:
        """Whether nothing is left out or dropped."""
        return self.count == len(self.tokens) and min(self.counts) == len(self.tokens)


class ApproximateDecoder(Decoder):
    """Decodes behind a part of the prompt. The text may differ from the target's; completions say `approximate`.

    With a budget of the whole prompt it is exactly the target's. The first token and what is accepted of the lookahead
    always are, unless the prompt itself is compressed.

    Args:
        target: the model whose text is wanted.
        dropping: keep a part of the keys.
        compression: read a part of the prompt. With both, keys are dropped of what was read.
        ahead: the draft pass; needed for compression and for scorers that look at the lookahead.
        drafter: decodes on behind it; None decodes autoregressively.
        sampling, eos_ids, seed, stop_strings: as of `Decoder`.

    Attributes:
        split: where the time to the first token of the last batch went.
        kept: of each prompt of the last batch the indices of the tokens that the target read.
        drafted: of each the tokens of the lookahead.

    Raises:
        UserError: neither method is given, or one that needs a draft pass has none.

    Example:
        >>> ahead = DraftAhead(Engine(small), length=8)
        >>> decoder = ApproximateDecoder(Engine(target), KVDropping(Budget(0.1)), ahead=ahead)
        >>> [completion] = decoder.generate([prompt], max_new_tokens=64)
    """

    _looks_ahead = True

    def __init__(
        self,
        target: Engine,
        dropping: KVDropping | None = None,
        compression: PromptCompression | None = None,
        ahead: DraftAhead | None = None,
        drafter: Drafter | None = None,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] = (),
        seed: int = 0,
        stop_strings: StopStrings | None = None,
    ) -> None:
        super().__init__(target, drafter, sampling, eos_ids, seed, stop_strings)
        if dropping is None and compression is None:
            raise UserError("approximate decoding needs KV dropping or prompt compression; use Decoder without either")
        if ahead is None and self._looks_ahead and (compression is not None or dropping.scorer.ahead):
            raise UserError("this way of choosing tokens needs a drafter that looks ahead; give one, or another scorer")
        self.dropping, self.compression, self.ahead = dropping, compression, ahead
        self.split = Split()
        self.kept: list[list[int]] = []
        self.drafted: list[list[int]] = []
        self._opening: tuple[Draft, Tensor] | None = None
        self._taken_over = self._opened = False
        self._cut_short: set[int] = set()

    # ---- start ----

    def _start(self, committed: Committed, rows: list, resume: bool) -> None:
        """Look ahead and read; what an earlier call left is of no use."""
        started = time.perf_counter()
        self.split, self._committed = Split(), None
        plans = [self._plan(tokens) for tokens in committed.tokens]
        self._cut_short = {row.index for row, plan in zip(rows, plans, strict=True) if not plan.whole}
        setting = replace(self._setting(committed, rows), target_view=None)  # its keys are no longer all there
        self._cache = None
        draft = self._look_ahead(committed, setting, plans, [row.limit - 1 for row in rows])
        self.kept = [plan.kept for plan in plans]
        self.drafted = draft.rows()
        self._cache, logits = self._read_prompts(committed, setting, plans, draft)
        self._opening = (draft.to(self.target.device), logits)
        self._started(rows, started)

    def _plan(self, tokens: list[int]) -> _Row:
        """How much of a prompt will be read and kept. Raises where a budget does not hold what is protected."""
        layers = self.target.layers
        count = len(tokens) if self.compression is None else self.compression.count(tokens)
        counts = [len(tokens)] * layers
        if self.dropping is not None and count == len(tokens):
            counts = self.dropping.counts(tokens, layers)
        return _Row(tokens, count, counts, list(range(len(tokens))))

    def _look_ahead(self, committed: Committed, setting: Setting, plans: list[_Row], room: list[int]) -> Draft:
        """The draft pass: a lookahead for every prompt that is cut down, and the choice of what is read."""
        self._taken_over = False
        active = [not plan.whole for plan in plans]
        if self.ahead is None or not any(active):
            if self.drafter:
                self.drafter.start(committed, setting)
            return Draft.empty(len(plans), self.target.device)
        engine, length = self.ahead.engine, self.ahead.length
        window = self.compression.scorer.window if self.compression else 1
        watch = QueryWatch(engine, committed.lengths, window, length)
        scout = ModelDrafter(engine, stop=self.ahead.rule(watch), name="lookahead")
        with watch.watching() if self.compression or self.ahead.settled else nullcontext():
            with self.split.timing("draft_prefill"):
                scout.start(committed, setting)
            with self.split.timing("draft_decode"):
                budget = [min(length, left) if goes else 0 for left, goes in zip(room, active, strict=True)]
                draws = Draws(self.seed, committed.sample_ids, committed.lengths, engine.device)
                draft = self._drafted_ahead(scout, committed, budget, draws, watch)
        if self.compression:
            with self.split.timing("scoring"):
                self._compress(plans, watch, draft)
        self._continue(scout, committed, setting)
        return draft

    def _drafted_ahead(
        self, scout: ModelDrafter, committed: Committed, budget: list[int], draws: Draws, watch: QueryWatch
    ) -> Draft:
        """The lookahead. A drafter that may write nothing still reads the last token, whose queries are wanted."""
        if max(budget) > 0:
            return scout.propose(committed, None, budget, draws)
        self.ahead.engine.forward(scout.cache, torch.tensor([t[-1:] for t in committed.tokens]).to(watch.engine.device))
        return Draft.empty(len(budget), self.target.device)

    def _compress(self, plans: list[_Row], watch: QueryWatch, draft: Draft) -> None:
        """Choose what is read of each prompt."""
        for row, (plan, drafted) in enumerate(zip(plans, draft.rows(), strict=True)):
            if plan.count < len(plan.tokens):
                read = max(0, len(drafted) - 1)  # the last drafted token was never read
                layers = [watch.looked(layer, row, read) for layer in range(watch.engine.layers)]
                plan.kept = self.compression.choose(layers, plan.tokens, plan.count).tolist()

    def _continue(self, scout: ModelDrafter, committed: Committed, setting: Setting) -> None:
        """Start the drafter that decodes; one of the same model goes on from the draft pass."""
        if isinstance(self.drafter, ModelDrafter) and self.drafter.engine is scout.engine:
            self.drafter.take_over(scout)
            self._taken_over = True
        elif self.drafter:
            self.drafter.start(committed, setting)

    def _read_prompts(
        self, committed: Committed, setting: Setting, plans: list[_Row], draft: Draft
    ) -> tuple[object, Tensor]:
        """The target's only pass over the prompts. Returns its cache and the logits of the opening round."""
        ahead = self._behind(draft)
        readings = [self._reading(*each) for each in zip(plans, ahead, committed.sample_ids, strict=True)]
        lengths = committed.lengths
        most = 1 + max(draft.width, self.drafter.max_length if self.drafter else 0)
        room = setting.capacity - min(lengths) + most
        scorer = self.dropping.scorer if self.dropping else None
        prefill = Prefill(self.target, readings, lengths, scorer, room)
        with self.split.timing("target_prefill"):
            found = prefill.run()
        self.split.target_prefill -= prefill.scoring_seconds
        self.split.scoring += prefill.scoring_seconds
        prefill.cache.rollback([length + draft.width for length in lengths])  # as if all had drafted as many
        opening = [logits[: 1 + draft.width] for logits in found]
        padded = [pad(logits, (0, 0, 0, 1 + draft.width - len(logits))) for logits in opening]
        return prefill.cache, torch.stack(padded)

    def _behind(self, draft: Draft) -> list[list[int]]:
        """What is read behind each prompt."""
        return draft.rows()

    def _reading(self, plan: _Row, ahead: list[int], sample_id: int) -> Reading:
        tokens = [plan.tokens[at] for at in plan.kept]
        counts, protected = plan.counts, torch.zeros(len(tokens), dtype=torch.bool)
        if self.dropping is not None:
            protected = self.dropping.protected(tokens)
            if len(tokens) < len(plan.tokens):
                counts = self.dropping.counts(tokens, self.target.layers)
        elif len(tokens) < len(plan.tokens):
            counts = [len(tokens)] * self.target.layers
        original = self.compression is not None and self.compression.positions == "original"
        positions = plan.kept if original else list(range(len(tokens)))
        if original:  # the next token's position is the text's, even if its last token was left out
            positions = [*positions[:-1], len(plan.tokens) - 1]
        return Reading(tokens, positions, ahead, counts, protected, sample_id)

    # ---- rounds ----

    def _drafted(self, committed: Committed, rows: list, draws: Draws) -> tuple[Draft, Tensor]:
        """The lookahead with the logits of the prefill first, then as ever."""
        if self._opening is None:
            return super()._drafted(committed, rows, draws)
        opening, self._opening = self._opening, None
        self._opened = True
        return opening

    def _settle(self, committed: Committed, rows: list, draft: Draft, reply: list, started: float) -> None:
        """As ever; a drafter that did not write the lookahead has seen nothing of it."""
        opened, self._opened = self._opened, False
        if not opened or self._taken_over or self.drafter is None:
            super()._settle(committed, rows, draft, reply, started)
            return
        drafter, self.drafter = self.drafter, None
        try:
            super()._settle(committed, rows, draft, reply, started)
        finally:
            self.drafter = drafter
        drafter.commit([0] * len(rows))

    def _completion(self, row: object) -> Completion:
        completion = super()._completion(row)
        completion.approximate = row.index in self._cut_short
        return completion


class OracleDecoder(ApproximateDecoder):
    """Decodes behind the keys that answers known beforehand attend to: what no choice of keys can know, to measure by.

    The answers are read behind the prompts for their queries alone: nothing of them is emitted, and no key of theirs is
    kept.

    Args:
        target: the model whose text is wanted.
        budget: of the keys.
        answers: token ids of each row of the batch that will be decoded.
        protect: kept in any case.
        drafter, sampling, eos_ids, seed, stop_strings: as of `ApproximateDecoder`.
    """

    _looks_ahead = False

    def __init__(
        self, target: Engine, budget: Budget, answers: Sequence[Sequence[int]], protect: Protect, *common: object
    ) -> None:
        super().__init__(target, KVDropping(budget, Oracle(), protect), None, None, *common)
        self.answers = answers

    def _behind(self, draft: Draft) -> list[list[int]]:
        """The answers but their last tokens, which nothing was read for."""
        return [list(answer[:-1]) for answer in self.answers]
