"""What decoding cost and gave: counts that can be added up, and the result of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Counts of one decoded sequence, or the sum over many (``a + b``).

    Attributes:
        tokens: emitted tokens.
        rounds: rounds of draft and verify; an autoregressive step is a round without a draft.
        target_forwards: target forwards after the prompt, one a round.
        draft_forwards: forwards of each drafter member after the prompt, as if the row were alone.
        drafted: proposed tokens.
        accepted: proposed tokens that were emitted.
        discarded: proposed tokens that were not.
        drafted_at: rounds that proposed a token at each place of the block, or at each depth of a tree.
        reached_at: of those, rounds that emitted every token before it, so that this one was judged; an end token ends
            the judging. accepted_at / reached_at is the conditional acceptance.
        accepted_at: rounds whose token at each place was emitted.
        drafted_by: proposed tokens by who proposed them, where several may.
        accepted_by: of those, the emitted ones.
        rounds_by: rounds by who proposed the first token; "" for none.
        tokens_by: emitted tokens of those rounds, bonus included; tokens_by / rounds_by is the tau of each.
        trees_of: rounds that drafted a tree of 0, 1, 2, ... tokens; empty where all drafts were chains.
        prefill_seconds: reading the prompt, both models; a row's share of its batch.
        decode_seconds: all rounds; a row's share of its batch.
    """

    tokens: int = 0
    rounds: int = 0
    target_forwards: int = 0
    draft_forwards: dict[str, int] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0
    discarded: int = 0
    drafted_at: list[int] = field(default_factory=list)
    reached_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    drafted_by: dict[str, int] = field(default_factory=dict)
    accepted_by: dict[str, int] = field(default_factory=dict)
    rounds_by: dict[str, int] = field(default_factory=dict)
    tokens_by: dict[str, int] = field(default_factory=dict)
    trees_of: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tau(self) -> float:
        """Tokens per round, bonus included."""
        return self.tokens / self.rounds if self.rounds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def add_round(
        self,
        emitted: int,
        drafted: int,
        accepted: int,
        forwards: dict[str, int],
        seconds: float,
        depth: int | None = None,
    ) -> None:
        """Count one round.

        Args:
            emitted: tokens of the round that were kept.
            drafted: tokens proposed.
            accepted: proposed tokens among the emitted.
            forwards: draft forwards by member.
            seconds: the row's share of the round's time.
            depth: tokens of the longest path where they are a tree; None is a chain of all of them.
        """
        if depth is None:
            depth = drafted
        elif drafted:
            self.trees_of.extend([0] * (drafted + 1 - len(self.trees_of)))
            self.trees_of[drafted] += 1
        self.tokens += emitted
        self.rounds += 1
        self.target_forwards += 1
        self.drafted += drafted
        self.accepted += accepted
        self.discarded += drafted - accepted
        self.decode_seconds += seconds
        for name, count in forwards.items():
            self.draft_forwards[name] = self.draft_forwards.get(name, 0) + count
        missing = depth - len(self.drafted_at)
        if missing > 0:
            self.drafted_at.extend([0] * missing)
            self.reached_at.extend([0] * missing)
            self.accepted_at.extend([0] * missing)
        for place in range(depth):
            self.drafted_at[place] += 1
        for place in range(min(depth, emitted)):
            self.reached_at[place] += 1
        for place in range(accepted):
            self.accepted_at[place] += 1

    def add_sources(self, emitted: int, drafted: Sequence[str], accepted: Sequence[str]) -> None:
        """Count who proposed a round's tokens.

        Args:
            emitted: tokens of the round that were kept.
            drafted: label of every proposed token.
            accepted: of those that were emitted.
        """
        opened = drafted[0] if drafted else ""
        for counts, labels in ((self.drafted_by, drafted), (self.accepted_by, accepted), (self.rounds_by, [opened])):
            for label in labels:
                counts[label] = counts.get(label, 0) + 1
        self.tokens_by[opened] = self.tokens_by.get(opened, 0) + emitted

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            tokens=self.tokens + other.tokens,
            rounds=self.rounds + other.rounds,
            target_forwards=self.target_forwards + other.target_forwards,
            draft_forwards=_sum_by_name(self.draft_forwards, other.draft_forwards),
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            discarded=self.discarded + other.discarded,
            drafted_by=_sum_by_name(self.drafted_by, other.drafted_by),
            accepted_by=_sum_by_name(self.accepted_by, other.accepted_by),
            rounds_by=_sum_by_name(self.rounds_by, other.rounds_by),
            tokens_by=_sum_by_name(self.tokens_by, other.tokens_by),
            drafted_at=_sum(self.drafted_at, other.drafted_at),
            reached_at=_sum(self.reached_at, other.reached_at),
            accepted_at=_sum(self.accepted_at, other.accepted_at),
            trees_of=_sum(self.trees_of, other.trees_of),
            prefill_seconds=self.prefill_seconds + other.prefill_seconds,
            decode_seconds=self.decode_seconds + other.decode_seconds,
        )

    def __radd__(self, other: int | Counts) -> Counts:
        """So that ``sum(counts)`` works."""
        return self if other == 0 else self.__add__(other)


@dataclass
class Completion:
    """What was decoded behind one prompt.

    Attributes:
        token_ids: the new tokens; the end token is included.
        finish_reason: "eos", "stop" (a stop string) or "length".
        sources: for each token who it came from: "target" or a drafter's label.
        counts: what it cost.
        synthetic: whether acceptance was drawn at given rates: then the tokens are no text of the target.
        origins: for each token the position of prompt ++ answer that it was copied from, None for one that was not.
        approximate: whether the target had less than the whole prompt before it: then the text may differ from its own.
    """

    token_ids: list[int]
    finish_reason: str
    sources: list[str]
    counts: Counts
    synthetic: bool = False
    origins: list[int | None] = field(default_factory=list)
    approximate: bool = False


def _sum_by_name(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in sorted(a.keys() | b.keys())}


def _sum(a: list[int], b: list[int]) -> list[int]:
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return [x + y for x, y in zip(longer, shorter, strict=False)] + longer[len(shorter) :]
