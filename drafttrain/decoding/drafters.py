"""Drafters: everything that proposes tokens.

After every round, of each drafter: its cache ++ its pending tokens = committed ++ prefix. Pending tokens are those that
it has not read yet; they ride along in its next forward, so a full acceptance costs no forward of its own.
"""

# B batch, K drafted tokens, Q query width, V vocabulary, H hidden

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.engine import Engine, pad
from drafttrain.decoding.joining import common, rows_behind
from drafttrain.decoding.stopping import FixedLength, Step, StoppingRule
from drafttrain.decoding.target_view import TargetView
from drafttrain.errors import UserError
from drafttrain.ops.cache import DenseCache
from drafttrain.ops.random import Draws, sample
from drafttrain.ops.sampling import Sampling, seen_along
from drafttrain.ops.upload import upload


@dataclass(frozen=True)
class Setting:
    """What a drafter must know of the run it takes part in.

    Attributes:
        sampling: the same for target and drafter.
        eos_ids: tokens that end a row.
        vocabulary: the target's; a drafter never proposes a token beyond it.
        capacity: the longest sequence that can occur, prompts included.
        dtype: the target's; None where there is no target.
        device: where the target reads its tokens; likewise.
        target_view: what drafters that read their target will be given by `propose`; likewise.
    """

    sampling: Sampling
    eos_ids: frozenset[int]
    vocabulary: int
    capacity: int
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    target_view: TargetView | None = None


class Drafter(Protocol):
    """The interface of everything that proposes tokens.

    What is proposed may depend on the committed text, the prefix, the sample ids and the run's draws alone: not on
    drafts that were rejected, nor on the rest of the batch. `drafttrain.testing.check_drafter` holds a drafter to it.
    One that keeps nothing between rounds may inherit `start`, `commit` and `keep`, which do nothing, from here.

    Attributes:
        name: the label of its tokens and of its forwards in reports.
        max_length: the most tokens it proposes in a round.
    """

    name: str
    max_length: int

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """Take up a batch.

        Args:
            committed: the prompts; the object grows with the text and is handed to every `propose`.
            setting: of the run.
            resume: keep what was read before, where the prompts repeat it.

        Raises:
            UserError: the run is longer than the drafter can be, or its target of another dtype or device.
        """
        ...

    @abstractmethod
    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: TargetView | None = None,
    ) -> Draft:
        """Extend committed ++ prefix.

        Inside other drafters it may be asked more than once in a round. Then only the last prefix counts: what was seen
        before and is not repeated in it is forgotten.

        Args:
            committed: the decided text.
            prefix: an uncommitted draft to extend, or None.
            budget: the most tokens to propose in each row; 0 leaves a row out.
            random: the run's draws.
            target_view: of the target, for drafters that read its keys and values.

        Returns:
            the proposed tokens, without the prefix.
        """
        ...

    def score(self, committed: Committed, prefix: Draft | None, draft: Draft) -> Tensor:
        """Read another's draft behind committed ++ prefix.

        Returns:
            its own logits at each drafted position and the one after, [B, K + 1, V]; V may be less than the target's.

        Raises:
            UserError: it has no logits of its own.
        """
        raise UserError(f"{self.name} has no logits to hold another drafter's tokens against")

    def commit(self, agreed: Sequence[int], paths: Sequence[Sequence[int]] | None = None) -> None:
        """A round is over and the committed text has grown.

        Args:
            agreed: of the tokens that this drafter saw beyond the committed text (the last prefix ++ its own proposal,
                or what it scored), how many are now committed. It forgets the others.
            paths: of a tree, which of its own proposal's tokens; given only to drafters that propose trees.
        """
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Release all rows but these, which become the rows 0, 1, ... (each from its own place or a later one)."""
        ...


class ModelDrafter:
    """A small causal language model that drafts a chain, one token a forward.

    Args:
        engine: the model.
        length: tokens a round; with a ``stop`` rule the most, by default the rule's own maximum.
        stop: when to stop drafting; None is a fixed length.
        name: label of its tokens and forwards.
        check_every: with an adaptive rule, ask the device only every so many tokens whether all rows have stopped.
    """

    def __init__(
        self,
        engine: Engine,
        length: int | None = None,
        stop: StoppingRule | None = None,
        name: str = "drafter",
        check_every: int = 1,
    ) -> None:
        if stop is None:
            if length is None:
                raise ValueError("a model drafter needs a length or a stopping rule")
            stop = FixedLength(length)
        self.engine = engine
        self.stop = stop
        self.name = name
        self.check_every = check_every
        self.max_length = stop.max_length if length is None else min(length, stop.max_length)
        self.cache: DenseCache | None = None
        self._spare = 1  # slots beyond the longest sequence
        self._setting: Setting | None = None
        self._committed: Committed | None = None
        self._base: list[int] = []  # committed tokens of each row when the last proposal began
        # in this round: the last prefix and draft that it read
        self._asked: tuple[Draft | None, Draft | None] | None = None

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """Read the prompts, each but its last token."""
        self._check(setting)
        kept = committed.shared_with(self._committed) if resume else None
        self._setting = setting
        self._committed = committed
        self._asked = None
        if kept is None:
            self.cache = None  # its storage can serve again
            self.cache = self.engine.new_cache(len(committed.tokens), setting.capacity + self._spare)
        else:
            self.cache.rollback([min(length, keep) for length, keep in zip(self.cache.lengths, kept, strict=True)])
        self._base = committed.lengths
        unread = zip(committed.tokens, self.cache.lengths, strict=True)
        self.engine.read(self.cache, [self._readable(tokens[length:-1]) for tokens, length in unread])

    def take_over(self, other: ModelDrafter) -> None:
        """Go on from another drafter of the same model, which started the batch and whose draft is being verified."""
        if other.engine is not self.engine:
            raise ValueError("a drafter can take over from one of its own model alone")
        self.cache, self._setting, self._committed, self._base, self._asked = (
            other.cache,
            other._setting,
            other._committed,
            other._base,
            other._asked,
        )

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: TargetView | None = None,
    ) -> Draft:
        """Draft a chain behind committed ++ prefix."""
        texts = self._join(committed, prefix)
        starts = [len(text) for text in texts]
        limits = self.stop.limits(committed.sample_ids, starts)
        limits = [min(pair) for pair in zip(limits, budget, strict=True)]
        width = min(self.max_length, max(limits))
        if width <= 0:
            return Draft.empty(len(texts), self.engine.device)
        u_BK = None
        if not self._setting.sampling.greedy:
            u_BK = random.at("draft", starts, width).to(self.engine.device)
        block = _Round(self, committed, prefix, [min(limit, width) for limit in limits], width)
        draft = block.run(*self._pending(committed, texts), u_BK)
        self._asked = (prefix, draft)
        return draft

    def score(self, committed: Committed, prefix: Draft | None, draft: Draft) -> Tensor:
        """Logits for another's tokens, of one forward; they are read into the cache, as if it had drafted them."""
        tokens_BQ, counts = self._pending(committed, self._join(committed, prefix))
        self._asked = (prefix, draft)
        device, width = tokens_BQ.device, draft.width
        drafted_BK = draft.tokens_BK.to(device).clamp(max=self.engine.entries - 1)
        if counts is None:
            block_BQ = torch.cat([tokens_BQ, drafted_BK], 1)
            logits = self.engine.forward(self.cache, block_BQ).logits[:, tokens_BQ.shape[1] - 1 :]
        else:
            first_B1 = upload(counts, device).unsqueeze(1)
            block_BQ = torch.nn.functional.pad(tokens_BQ, (0, width))
            block_BQ.scatter_(1, first_B1 + torch.arange(width, device=device), drafted_BK)
            logits = self.engine.forward(self.cache, block_BQ, [count + width for count in counts]).logits
            index_BK = first_B1 - 1 + torch.arange(width + 1, device=device)
            logits = logits.gather(1, index_BK.unsqueeze(2).expand(-1, -1, logits.shape[2]))
        return logits[..., : self._setting.vocabulary]

    def commit(self, agreed: Sequence[int], paths: Sequence[Sequence[int]] | None = None) -> None:
        """Roll the cache back to what was accepted."""
        valid = [base + count for base, count in zip(self._base, agreed, strict=True)]
        self.cache.rollback([min(pair) for pair in zip(self.cache.lengths, valid, strict=True)])
        self._base, self._asked = valid, None

    def keep(self, rows: Sequence[int]) -> None:
        """Release all other rows."""
        self.cache.keep(rows)
        self._base = [self._base[row] for row in rows]

    def _check(self, setting: Setting) -> None:
        engine = self.engine
        most = engine.max_positions
        if most is not None and setting.capacity > most:
            raise UserError(
                f"a sequence of up to {setting.capacity} tokens exceeds the {most} positions of {self.name}; "
                "shorten the prompt or lower max_new_tokens"
            )
        if setting.dtype is not None and (setting.dtype, setting.device) != (engine.dtype, engine.device):
            raise UserError(
                f"the target computes in {setting.dtype} on {setting.device}, {self.name} in {engine.dtype} on "
                f"{engine.device}; load both in one dtype and on one device"
            )

    def _join(self, committed: Committed, prefix: Draft | None) -> list[list[int]]:
        """The text of each row up to the end of the prefix, of which the cache then holds a beginning."""
        texts = committed.extended(prefix)
        if self._asked is not None:  # in this round already: what the cache holds may be other tokens
            held = rows_behind(*self._asked, len(texts))
            kept = [
                min(base + common(text[base:], tokens), len(text) - 1)
                for base, text, tokens in zip(self._base, texts, held, strict=True)
            ]
            self.cache.rollback([min(pair) for pair in zip(self.cache.lengths, kept, strict=True)])
        self._base, self._asked = committed.lengths, (prefix, None)
        return texts

    def _pending(self, committed: Committed, texts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int] | None]:
        """What the cache has not read of each text: at least the last token."""
        lengths, chunk = self.cache.lengths, self.engine.chunk
        if texts is committed.tokens:
            entries = self.engine.entries
            if lengths == [len(text) - 1 if text[-1] < entries else -1 for text in texts]:
                return committed.last(self.engine.device), None  # which the target reads too
        unread = [self._readable(text[length:]) for text, length in zip(texts, lengths, strict=True)]
        if max(map(len, unread)) > chunk:
            self.engine.read(self.cache, [text[:-1] for text in unread])
            unread = [text[-1:] for text in unread]
        return pad(unread, self.engine.device)

    def _readable(self, tokens: Sequence[int]) -> list[int]:
        """The target may emit tokens that the drafter has no entry for: it reads them as its last one."""
        last = self.engine.entries - 1
        return [min(token, last) for token in tokens]


_STOPPED = -1
"""Read in place of a token where the rule stops."""


class _Round:
    """The drafting of one block."""

    def __init__(
        self, drafter: ModelDrafter, committed: Committed, prefix: Draft | None, limits: list[int], width: int
    ) -> None:
        self.engine = drafter.engine
        self.cache = drafter.cache
        self.rule = drafter.stop
        self.name = drafter.name
        self.check_every = drafter.check_every
        self.sampling = drafter._setting.sampling
        self.eos_ids = drafter._setting.eos_ids
        self.vocabulary = min(drafter._setting.vocabulary, drafter.engine.vocabulary)
        self.limits = limits
        self.width = width
        self.ragged = min(limits) < width
        self.seen_BV = None
        if self.sampling.penalised:
            self.seen_BV = seen_with(committed, prefix).to(drafter.engine.device)

    def run(self, tokens_BQ: Tensor, counts: list[int] | None, u_BK: Tensor | None) -> Draft:
        """Draft up to ``width`` tokens behind the pending ones; ``u_BK`` is needed to sample."""
        adaptive, single = self.rule.adaptive, len(self.limits) == 1 and self.check_every == 1
        going_B = length_B = limits_B = None  # for a single row the host knows
        if self.ragged or (adaptive and not single):
            length_B = limits_B = upload(self.limits, tokens_BQ.device)
            going_B = length_B > 0
        if adaptive:
            self.rule.begin(len(self.limits))
            length_B = None if single else going_B.long()
        drawn: list[Tensor] = []
        probs: list[Tensor] = []
        for number in range(1, self.width + 1):
            output = self.engine.forward(self.cache, tokens_BQ, counts, keep="last")
            counts = None
            tokens_BQ, logits_BKV, q_BKV = self._draw(output.logits, number, u_BK)
            drawn.append(tokens_BQ)
            if q_BKV is not None:
                probs.append(q_BKV)
            if adaptive and number < self.width:
                stop_B = self._stop(number, tokens_BQ, output.hidden, logits_BKV, q_BKV)
                if not single:
                    going_B = self._going(going_B & (limits_B > number), stop_B, tokens_BQ[:, 0])
                    if number % self.check_every == 0 and not going_B.any():
                        break
                    length_B = length_B + going_B
                elif self._ends(stop_B, tokens_BQ[:, 0]):
                    break
        return Draft(
            torch.cat(drawn, 1),
            length_B,
            torch.cat(probs, 1) if probs else None,
            source=self.name,
            # a single row pays for every forward; of a batch each row for those of its own tokens
            forwards={self.name: len(drawn) if length_B is None or len(self.limits) == 1 else length_B},
        )

    def _draw(self, logits_BKV: Tensor, number: int, u_BK: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The next token [B, 1], the logits and, when sampling, the distribution it was drawn from [B, 1, V]."""
        if self.vocabulary != self.engine.vocabulary:
            logits_BKV = logits_BKV[..., : self.vocabulary]
        seen_BKV = None if self.seen_BV is None else self.seen_BV.unsqueeze(1)
        q_BKV = None
        if u_BK is None:
            tokens_BK = self.sampling.choose(logits_BKV, seen_BKV)
        else:
            q_BKV = self.sampling.probabilities(logits_BKV, seen_BKV)
            tokens_BK = sample(q_BKV, u_BK[:, number - 1 : number])
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, tokens_BK, True)
        return tokens_BK, logits_BKV, q_BKV

    def _stop(
        self, number: int, tokens_BK: Tensor, hidden_BKH: Tensor, logits_BKV: Tensor, q_BKV: Tensor | None
    ) -> Tensor | None:
        """Where the rule ends the draft with the token just drawn: bool [B], None for no row."""

        def scoring() -> Tensor:
            return (self.sampling.scoring.probabilities(logits_BKV) if q_BKV is None else q_BKV)[:, 0]

        stop_B = self.rule.stop(Step(number, tokens_BK[:, 0], hidden_BKH[:, 0], scoring))
        return None if number < self.rule.min_length else stop_B

    def _ends(self, stop_B: Tensor | None, token_B: Tensor) -> bool:
        """Whether the draft of a single row ends with the token just drawn: one read, of the token or of a stop."""
        if stop_B is not None:
            token_B = token_B.masked_fill(stop_B, _STOPPED)
        token = token_B.item()
        return token == _STOPPED or token in self.eos_ids

    def _going(self, going_B: Tensor, stop_B: Tensor | None, tokens_B: Tensor) -> Tensor:
        """Which rows draw another token, of those that their limits let."""
        for eos in self.eos_ids:
            going_B = going_B & (tokens_B != eos)
        return going_B if stop_B is None else going_B & ~stop_B


def seen_with(committed: Committed, prefix: Draft | None) -> Tensor:
    """The tokens seen before the first drafted one: bool [B, V], a copy to be extended."""
    if prefix is None or prefix.width == 0:
        return committed.seen_BV.clone()
    seen_BKV = seen_along(committed.seen_BV, prefix.tokens_BK)
    if prefix.length_B is None:
        return seen_BKV[:, -1]
    return seen_BKV[torch.arange(len(seen_BKV), device=seen_BKV.device), prefix.length_B]
