"""Drafters made of drafters: the first that proposes (`FirstOf`), one behind another (`Then`).

    FirstOf(Copy(gamma=3), Model(drafter, length=5))    CopySpec on top of speculative decoding
    Then((Model(drafter, length=2), 2), (Copy(), 10))   a horizontal cascade

Each member may be such a drafter itself. A member may be asked several times in a round, behind different prefixes, and
what it proposed may be cut or replaced; after the round each is told how much of what it last saw became text.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, Setting
from drafttrain.decoding.joining import common, join, rows_behind
from drafttrain.errors import UserError
from drafttrain.ops.random import Draws


class Member:
    """A drafter inside another, and what it has seen of the round: the last prefix and its own proposal."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self._seen: tuple[Draft | None, Draft] | None = None

    def start(self, committed: Committed, setting: Setting, resume: bool) -> None:
        """A batch begins."""
        self._seen = None
        self.drafter.start(committed, setting, resume)

    def propose(self, committed: Committed, prefix: Draft | None, *more: Any, **named: Any) -> Draft:
        """What the drafter proposes."""
        draft = self.drafter.propose(committed, prefix, *more, **named)
        self._seen = (prefix, draft)
        return draft

    def saw(self, prefix: Draft | None, draft: Draft) -> None:
        """It has read another's draft."""
        self._seen = (prefix, draft)

    def commit(self, valid: Sequence[Sequence[int]], paths: Sequence[Sequence[int]] | None = None) -> None:
        """The round is over; ``valid`` are the drafted tokens that became text, ``paths`` where they are in a tree."""
        if paths is not None and self._seen and self._seen[1].parents_BK is not None:
            self._seen = None
            self.drafter.commit([len(row) for row in valid], paths)
            return
        seen = rows_behind(*self._seen, len(valid)) if self._seen else [[]] * len(valid)
        self._seen = None
        self.drafter.commit([common(mine, row) for mine, row in zip(seen, valid, strict=True)])


class Combined(Drafter):
    """What drafters of drafters share: the members follow batch and text.

    Args:
        drafters: the members.
        max_length: the most tokens of a round.
    """

    def __init__(self, drafters: Sequence[Drafter], max_length: int) -> None:
        self.members = [Member(drafter) for drafter in drafters]
        self.name = "+".join(dict.fromkeys(drafter.name for drafter in drafters))
        self.max_length = max_length
        self._whole: tuple[Draft | None, Draft] | None = None

    @property
    def depth(self) -> int:
        """How many reviews a token of its may have gone through."""
        return max(depth_of(member.drafter) for member in self.members)

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """All members take up the batch."""
        self._whole = None
        for member in self.members:
            member.start(committed, setting, resume)

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        *more: Any,
        **named: Any,
    ) -> Draft:
        """Extend committed ++ prefix; whatever else the loop gives a drafter goes on to the members."""
        if max(budget) < 1:
            return Draft.empty(len(budget), torch.device("cpu"))
        draft = self.combine(committed, prefix, budget, random, *more, **named)
        self._whole = (prefix, draft)
        return draft

    @abstractmethod
    def combine(
        self, committed: Committed, prefix: Draft | None, budget: Sequence[int], random: Draws, *more: Any, **named: Any
    ) -> Draft:
        """The proposal, for at least one row with a budget."""

    def commit(self, agreed: Sequence[int], paths: Sequence[Sequence[int]] | None = None) -> None:
        """Tell every member what became of the tokens that it saw."""
        whole = rows_behind(*self._whole, len(agreed)) if self._whole else [[]] * len(agreed)
        if paths is not None:  # a member's tree, behind no prefix
            whole = [[row[node] for node in path] for row, path in zip(whole, paths, strict=True)]
        self._whole = None
        valid = [row[:count] for row, count in zip(whole, agreed, strict=True)]
        for member in self.members:
            member.commit(valid, paths)

    def keep(self, rows: Sequence[int]) -> None:
        """Release all other rows, in every member."""
        for member in self.members:
            member.drafter.keep(rows)


class FirstOf(Combined):
    """In each row the first member that proposes anything. Which one is decided before a token is drawn.

    Args:
        drafters: in order; all but the last should be such as may propose nothing (`Copy`).
    """

    def __init__(self, *drafters: Drafter) -> None:
        if not drafters:
            raise UserError("FirstOf() can propose nothing; give it drafters, as in FirstOf(Copy(), Model(drafter, 5))")
        super().__init__(drafters, max(drafter.max_length for drafter in drafters))

    def combine(
        self, committed: Committed, prefix: Draft | None, budget: Sequence[int], random: Draws, *more: Any, **named: Any
    ) -> Draft:
        """Ask the members in turn for the rows that have nothing yet."""
        draft, room = None, list(budget)
        for member in self.members:
            found = member.propose(committed, prefix, room, random, *more, **named)
            draft = join(draft, found)
            room = [0 if length else most for length, most in zip(found.lengths(), room, strict=True)]
            if not any(room):
                break
        return draft


class Then(Combined):
    """The horizontal cascade (Chen et al. 2023, section 4.2): the first tokens by one member, the next by another.

    A member is asked until its row has as many tokens as its own number and those before it come to, or until it
    proposes nothing. Its last proposal is not cut, so there may be more.

    Args:
        parts: members, each with the number of additional tokens after which the next one takes over.
    """

    def __init__(self, *parts: tuple[Drafter, int]) -> None:
        if not parts:
            raise UserError(
                "Then() can propose nothing; give it drafters, as in Then((Model(drafter, 2), 2), (Copy(), 10))"
            )
        most = goal = 0
        for drafter, count in parts:
            if count < 1:
                raise UserError(f"Then gives {drafter.name} {count} tokens, but it must be at least 1")
            goal += count
            most = max(most, goal - 1 + drafter.max_length)
        super().__init__([drafter for drafter, _ in parts], most)
        self.counts = [count for _, count in parts]

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """All members take up the batch."""
        super().start(committed, setting, resume)
        self._eos_ids = setting.eos_ids

    def combine(
        self, committed: Committed, prefix: Draft | None, budget: Sequence[int], random: Draws, *more: Any, **named: Any
    ) -> Draft:
        """Ask the members in turn, each behind what there is."""
        draft = Draft.empty(len(budget), torch.device("cpu"))
        have, ended, goal = [0] * len(budget), [False] * len(budget), 0
        for member, count in zip(self.members, self.counts, strict=True):
            goal += count
            asked = [not end for end in ended]
            while True:
                room = [
                    most - length if ask and length < goal else 0
                    for most, length, ask in zip(budget, have, asked, strict=True)
                ]
                if max(room) < 1:
                    break
                behind = draft if prefix is None else join(prefix, draft)
                found = member.propose(committed, behind, room, random, *more, **named)
                draft = join(draft, found)
                rows = found.rows()
                have = [length + len(row) for length, row in zip(have, rows, strict=True)]
                ended = [end or not self._eos_ids.isdisjoint(row) for end, row in zip(ended, rows, strict=True)]
                asked = [bool(row) and not end for row, end in zip(rows, ended, strict=True)]
        return draft


def depth_of(drafter: Drafter) -> int:
    """How many reviews a token of a drafter may have gone through."""
    return drafter.depth if isinstance(drafter, Combined) else 0
