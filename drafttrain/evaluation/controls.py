"""Negative controls: decoders with the known bugs, which the tests of `drafttrain lossless` must reject.

A test proves something of a right decoder only if it fails the wrong ones. Each control takes the decoder under test
and breaks one thing of it, in the way that public decoders are broken; everything else stays as it is.
"""

# B batch, K drafted tokens, V vocabulary

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.loop import Decoder, Reply
from drafttrain.decoding.verify import Verdict, verify_sampled
from drafttrain.decoding.verify_tree import verify_tree
from drafttrain.ops.random import sample
from drafttrain.ops.sampling import Sampling, log_probability_and_entropy
from drafttrain.ops.tree import ABSENT, ancestry

_SHARPENED = 2.5
"""Wrong q: tokens are drawn from this power of what is declared."""


@dataclass(frozen=True)
class Control:
    """A way to be wrong.

    Attributes:
        name: of the bug.
        broken: makes the wrong decoder of a right one, which must not be used afterwards.
        greedy: whether the bug shows in greedy text too.
    """

    name: str
    broken: Callable[[Decoder], Decoder]
    greedy: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Drafters that declare what is not true


class _Declaring:
    """A drafter between the loop and the one under test.

    Attributes:
        declared: whether a false declaration was made so far; a drafter of deterministic tokens declares no q.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.declared = False
        self.name, self.max_length = drafter.name, drafter.max_length

    def __getattr__(self, name: str) -> Any:
        """Everything else is the drafter's."""
        return getattr(self._drafter, name)


@dataclass(frozen=True)
class _Twisted(Sampling):
    """Gives another distribution than the setting's, and remembers the setting's."""

    twist: Callable[[Tensor], Tensor] = field(kw_only=True)
    honest: list[Tensor] = field(default_factory=list)

    def probabilities(self, logits_BKV: Tensor, seen_BKV: Tensor | None = None) -> Tensor:
        """What the drafter draws from."""
        q_BKV = super().probabilities(logits_BKV, seen_BKV)
        self.honest.append(q_BKV)
        return self.twist(q_BKV)


class Misdrawn(_Declaring):
    """Draws from a twisted q and declares q itself: the commonest bug of public decoders."""

    def __init__(self, drafter: Drafter, twist: Callable[[Tensor], Tensor]) -> None:
        super().__init__(drafter)
        self._twist = twist
        self._honest: list[Tensor] = []

    def start(self, committed: Committed, setting: Setting, *more: Any) -> None:
        """Let the drafter draw from the twisted distribution."""
        sampling = _Twisted(**vars(setting.sampling), twist=self._twist)
        self._honest = sampling.honest
        self._drafter.start(committed, dataclasses.replace(setting, sampling=sampling), *more)

    def propose(self, *arguments: Any) -> Draft:
        """Declare the honest one."""
        self._honest.clear()
        draft = self._drafter.propose(*arguments)
        if draft.probs_BKV is None or sum(q_BKV.shape[1] for q_BKV in self._honest) != draft.probs_BKV.shape[1]:
            return draft
        self.declared = True
        return dataclasses.replace(draft, probs_BKV=torch.cat(self._honest, 1))


class TokenDropped(_Declaring):
    """Cuts the draft before a token less likely than the drafter's usual: presence then depends on the value drawn."""

    def propose(self, *arguments: Any) -> Draft:
        """Drop what is behind the leading likely tokens."""
        draft = self._drafter.propose(*arguments)
        if draft.probs_BKV is None:
            return draft
        self.declared = True
        if draft.parents_BK is not None:
            return self._pruned(draft)
        log_q_BK, entropy_BK = log_probability_and_entropy(draft.probs_BKV, draft.tokens_BK)
        kept_BK = log_q_BK >= -entropy_BK
        if draft.sampled_BK is not None:
            kept_BK |= ~draft.sampled_BK
        length_B = kept_BK.long().cumprod(1).sum(1)
        if draft.length_B is not None:
            length_B = torch.minimum(length_B, draft.length_B)
        return dataclasses.replace(draft, length_B=length_B)

    def _pruned(self, draft: Draft) -> Draft:
        """The same of a tree: such tokens, and what is below them, become padding."""
        row_BK = (draft.parents_BK + 1).clamp(min=0)
        q_BKV = draft.probs_BKV.gather(1, row_BK.unsqueeze(2).expand(-1, -1, draft.probs_BKV.shape[2]))
        log_q_BK, entropy_BK = log_probability_and_entropy(q_BKV, draft.tokens_BK)
        dropped_BK = log_q_BK < -entropy_BK
        gone_BK = (ancestry(draft.parents_BK) & dropped_BK.unsqueeze(1)).any(2)
        return dataclasses.replace(draft, parents_BK=draft.parents_BK.masked_fill(gone_BK, ABSENT))


def sharper(q_BKV: Tensor) -> Tensor:
    """A distribution with more mass on likely tokens."""
    powered_BKV = q_BKV**_SHARPENED
    return powered_BKV / powered_BKV.sum(-1, keepdim=True)


def likeliest(q_BKV: Tensor) -> Tensor:
    """All mass on the likeliest token: a greedy draft."""
    return torch.zeros_like(q_BKV).scatter_(-1, q_BKV.argmax(-1, keepdim=True), 1.0)


def likelier_of_two(q_BKV: Tensor) -> Tensor:
    """The likelier of two draws: beams of width two that are pruned to one after every token.

    With F(x) the mass of all tokens that rank below x, both draws rank at most x with probability (F + q)^2 and below
    it with F^2; the difference is q (2 F + q).
    """
    order_BKV = q_BKV.argsort(-1)
    sorted_BKV = q_BKV.gather(-1, order_BKV)
    below_BKV = sorted_BKV.cumsum(-1) - sorted_BKV
    return torch.zeros_like(q_BKV).scatter_(-1, order_BKV, sorted_BKV * (2 * below_BKV + sorted_BKV))


def _misdrawing(twist: Callable[[Tensor], Tensor]) -> Callable[[Decoder], Decoder]:
    return lambda decoder: _with_drafter(decoder, Misdrawn(decoder.drafter, twist))


def _dropping(decoder: Decoder) -> Decoder:
    return _with_drafter(decoder, TokenDropped(decoder.drafter))


def _with_drafter(decoder: Decoder, drafter: Any, kind: type[Decoder] = Decoder) -> Decoder:
    return kind(decoder.target, drafter, decoder.sampling, decoder.eos_ids, decoder.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Loops that verify or roll back wrongly


class _Judging(Decoder):
    """Sampled, a tree of deterministic tokens is judged token by token too, as one of drawn tokens is."""

    def _compares(self, draft: Draft) -> bool:
        return self.sampling.greedy


class ResidualOmitted(_Judging):
    """After a rejection the target draws from p instead of (p - q)+, and what was rejected comes back."""

    def _verify(self, logits: Tensor, committed: Any, draft: Draft, draws: Any) -> Verdict:
        verdict = super()._verify(logits, committed, draft, draws)
        if self.sampling.greedy or draft.width == 0:
            return verdict
        p = self.sampling.probabilities(logits, self._seen(committed, draft))
        u_next = draws.at("target", committed.lengths, draft.width + 1)
        rows, at = torch.arange(len(p), device=p.device), verdict.accepted_B
        node = at
        if verdict.path_BK is not None:
            last_B = verdict.path_BK[rows, (at - 1).clamp(min=0)]
            node = torch.where(at > 0, last_B + 1, 0)
        next_B = sample(p[rows, node], u_next[rows, at])
        return verdict._replace(emitted=verdict.emitted.scatter(1, at.unsqueeze(1), next_B.unsqueeze(1)))


class NodeNumbers(_Judging):
    """p and q are read at the number of a drafted token in its block, not at its id: LongSpec's public code.

    Attributes:
        declared: whether there was a q to read so far.
    """

    declared = False

    def _verify(self, logits: Tensor, committed: Any, draft: Draft, draws: Any) -> Verdict:
        if draft.probs_BKV is None:
            return super()._verify(logits, committed, draft, draws)
        self.declared = True
        numbers_BK = torch.arange(draft.width, device=logits.device).expand_as(draft.tokens_BK)
        wrong = dataclasses.replace(draft, tokens_BK=numbers_BK % logits.shape[2])
        p = self.sampling.probabilities(logits, self._seen(committed, draft))
        starts = committed.lengths
        u_accept_BK = draws.at("accept", starts, draft.width)
        verify = verify_sampled if draft.parents_BK is None else verify_tree
        verdict = verify(p, wrong, u_accept_BK, draws.at("target", starts, draft.width + 1))
        tokens_BK = draft.tokens_BK if verdict.path_BK is None else draft.tokens_BK.gather(1, verdict.path_BK)
        at_B1 = verdict.accepted_B.unsqueeze(1)
        emitted = pad(tokens_BK, (0, 1)).scatter(1, at_B1, verdict.emitted.gather(1, at_B1))
        return verdict._replace(emitted=emitted)


class OffByOneCache(Decoder):
    """After a rejection the target's cache keeps one token too many, the rejected one."""

    def _settle(self, committed: Any, rows: Any, draft: Draft, reply: list[Reply], started: float) -> None:
        super()._settle(committed, rows, draft, reply, started)
        rejected = [accepted < drafted for accepted, drafted, *_ in reply]
        self._cache.rollback([length + more for length, more in zip(self._cache.lengths, rejected, strict=True)])


def _looping(kind: type[Decoder]) -> Callable[[Decoder], Decoder]:
    return lambda decoder: _with_drafter(decoder, decoder.drafter, kind)


CONTROLS = (
    Control("wrong q", _misdrawing(sharper)),
    Control("greedy draft declared as sampled", _misdrawing(likeliest)),
    Control("sampled beams pruned", _misdrawing(likelier_of_two)),
    Control("a drawn token dropped for its value", _dropping),
    Control("residual omitted", _looping(ResidualOmitted)),
    Control("probabilities of node numbers", _looping(NodeNumbers)),
    Control("off-by-one cache", _looping(OffByOneCache), greedy=True),
)


def is_broken(decoder: Decoder) -> bool:
    """Whether a control could do its harm in what was decoded so far: false where a drafter declares no q."""
    return all(part.declared for part in (decoder, decoder.drafter) if isinstance(part, _Declaring | NodeNumbers))
