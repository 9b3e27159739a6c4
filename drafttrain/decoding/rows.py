"""One row of a batch while it is decoded: its tokens, and what happened in its rounds.

A round only notes what happened. It is counted when the row is done: between forwards every statement costs ten times
what it costs in a loop of its own, for the weights have taken its place in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from drafttrain.decoding.counts import Completion, Counts


class Reply(NamedTuple):
    """What the host must know of a row's round.

    Attributes:
        accepted: drafted tokens that the target accepts.
        drafted: tokens proposed.
        forwards: of the drafter's members, in the draft's order.
        tokens: the first accepted + 1 are emitted, the rest is padding.
        path: of a tree: the accepted nodes; None for a chain.
        depth: of a tree: tokens of its longest path.
    """

    accepted: int
    drafted: int
    forwards: list[int]
    tokens: list[int]
    path: list[int] | None = None
    depth: int | None = None


class Round(NamedTuple):
    """A row's round, once it is over.

    Attributes:
        reply: what was read of it.
        emitted: tokens of it that were kept.
        seconds: the row's share of its time.
        members: names of the drafter's members.
        sources: who proposed the tokens, one label or one a token.
        origins: the positions that they were copied from; None for none.
    """

    reply: Reply
    emitted: int
    seconds: float
    members: tuple[str, ...]
    sources: str | Sequence[str]
    origins: Sequence[int | None] | None

    def nodes(self) -> Sequence[int]:
        """The drafted tokens that were emitted, as places in the draft."""
        reply = self.reply
        return (range(reply.accepted) if reply.path is None else reply.path)[: self.emitted]


@dataclass
class Row:
    """One sequence being decoded."""

    index: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    prefill_seconds: float = 0.0
    finish_reason: str | None = None

    def completion(self, synthetic: bool) -> Completion:
        """The result, with what all rounds cost together."""
        sources: list[str] = []
        origins: list[int | None] = []
        counts = Counts(prefill_seconds=self.prefill_seconds)
        for each in self.rounds:
            nodes, reply = each.nodes(), each.reply
            others = each.emitted - len(nodes)
            single = isinstance(each.sources, str)
            sources += [each.sources if single else each.sources[node] for node in nodes] + ["target"] * others
            origins += [None if each.origins is None else each.origins[node] for node in nodes] + [None] * others
            forwards = dict(zip(each.members, reply.forwards, strict=False))
            counts.add_round(each.emitted, reply.drafted, len(nodes), forwards, each.seconds, reply.depth)
            drafted = [each.sources] * reply.drafted if single else each.sources[: reply.drafted]
            counts.add_sources(each.emitted, drafted, sources[len(sources) - each.emitted :][: len(nodes)])
        return Completion(self.tokens, self.finish_reason, sources, counts, synthetic, origins)
