"""Drafting a tree: level by level, as many tokens on each as the shape gives it.

A level's tokens go to the places where the drafter gives the most probability to a whole path (the beam of LongSpec):
of all continuations of the level above the likeliest are found, and how many of them each parent has is how many
children it gets. Which tokens these are differs:

* *likeliest*: the continuations found. They are deterministic; the target's own choice decides (verify_tree.py).
* *drawn*: as many draws without replacement from the parent's q. Exact, since how many are drawn is settled by q and by
  the levels above, before any of them is seen, and none is dropped for what it is.

Behind an end token nothing is drafted. A row that may draft less deep, or whose rule has stopped, has padding there.
"""

# B batch, W tokens of the level above, N tokens of a level, K nodes, V vocabulary, H hidden

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from drafttrain.decoding.draft import Draft
from drafttrain.decoding.engine import Output
from drafttrain.decoding.stopping import Step, StoppingRule
from drafttrain.errors import UserError
from drafttrain.ops.random import Draws, sample_apart
from drafttrain.ops.sampling import Sampling, seen_along
from drafttrain.ops.tree import ABSENT, ROOT, TreeBlock, below
from drafttrain.ops.upload import upload

Read = Callable[[Tensor, TreeBlock], Output]
"""Reads a level's tokens [B, N], nodes of a tree, and gives logits [B, N, V] and hidden states [B, N, H]."""


def check_shape(widths: Sequence[int], vocabulary: int | None = None) -> None:
    """Refuse a shape that no tree has.

    Raises:
        UserError: no level, one without tokens, or more tokens than there are.
    """
    if not widths:
        raise UserError("a tree needs at least one level, as in tree=[4, 8, 8]")
    most = 1
    for level, width in enumerate(widths, start=1):
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise UserError(f"level {level} of a tree has {width!r} tokens; it must be a whole number of at least 1")
        if vocabulary is not None and width > most * vocabulary:
            raise UserError(
                f"level {level} of the tree {list(widths)} is wider than the vocabulary: {most} x {vocabulary} tokens "
                "are all that there are"
            )
        most = width


class TreeGrowth:
    """The drafting of one tree for a batch.

    Args:
        widths: tokens of each level; fewer levels are drafted where every row's limit is less.
        limits: levels that each row may draft.
        sampling: of the run.
        vocabulary: tokens that may be proposed.
        eos_ids: nothing is drafted behind these.
        name: label of tokens and forwards.
        rule: asked after every level about its likeliest token; what it says holds for the row. None never stops.
        seen_BV: for a repetition penalty, tokens before the tree.
        u_BDN: uniforms by level and place of a drawn tree; None where its tokens are the likeliest.
    """

    def __init__(
        self,
        widths: Sequence[int],
        limits: Sequence[int],
        sampling: Sampling,
        vocabulary: int,
        eos_ids: Collection[int],
        name: str,
        rule: StoppingRule | None = None,
        seen_BV: Tensor | None = None,
        u_BDN: Tensor | None = None,
    ) -> None:
        self.widths = list(widths)[: max(limits)]
        self.limits = list(limits)
        self.sampling = sampling
        # What paths are ranked by: a greedy drafter has a one-hot q, which ranks nothing.
        self._ranking = Sampling(repetition_penalty=sampling.repetition_penalty) if sampling.greedy else sampling
        self.vocabulary = vocabulary
        self.eos_ids = eos_ids
        self.name = name
        self.rule = rule if rule is not None and rule.adaptive else None
        self.seen_BV = seen_BV
        self.u_BDN = u_BDN
        self._tokens_BK: Tensor | None = None
        self._parents_BK: Tensor | None = None

    def run(self, first: Output, read: Read) -> Draft:
        """Grow the tree.

        Args:
            first: logits [B, 1, V] and hidden states [B, 1, H] behind the text.
            read: called for every level but the last.
        """
        device = first.logits.device
        limits_B = upload(self.limits, device)
        going_B, levels_B = limits_B > 0, torch.zeros_like(limits_B)
        if self.rule is not None:
            self.rule.begin(len(self.limits))
        output, block, forwards = first, None, 0
        score_BW = torch.zeros_like(first.logits[:, :, 0], dtype=torch.float64)
        probs: list[Tensor] = []
        for level, width in enumerate(self.widths):
            forwards += 1
            levels_B = levels_B + going_B
            q_BWV = self._distributions(output.logits, level)
            probs.append(q_BWV)
            tokens_BN, from_BN, score_BN = self._children(q_BWV, score_BW, going_B, width, level)
            self._add(tokens_BN, from_BN, score_BN, score_BW.shape[1], level)
            if level + 1 == len(self.widths):
                break
            going_B = going_B & (limits_B > level + 1)
            if self.rule is not None:
                going_B = self._ask(going_B, level + 1, output, q_BWV, tokens_BN, from_BN, score_BN)
                if not going_B.any():
                    break
            score_BW = self._without_ends(tokens_BN, score_BN)
            block = below(block, torch.where(score_BN > -torch.inf, from_BN if level else ROOT, ABSENT))
            output = read(tokens_BN, block)
        exact = self.rule is None and min(self.limits) >= len(self.widths)
        return Draft(
            self._tokens_BK,
            probs_BKV=None if self.u_BDN is None else torch.cat(probs, 1),
            source=self.name,
            forwards={self.name: forwards if exact or len(self.limits) == 1 else levels_B},
            parents_BK=self._parents_BK,
        )

    def _distributions(self, logits_BWV: Tensor, level: int) -> Tensor:
        seen_BWV = None
        if self.seen_BV is not None:
            seen_BWV = self.seen_BV.unsqueeze(1)
            if level:
                width = logits_BWV.shape[1]
                seen_BWV = seen_along(self.seen_BV, self._tokens_BK, self._parents_BK)[:, -width:]
        return self._ranking.probabilities(logits_BWV[..., : self.vocabulary], seen_BWV)

    def _children(
        self, q_BWV: Tensor, score_BW: Tensor, going_B: Tensor, width: int, level: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A level's tokens, the places of their parents in the level above, and the log-probabilities of their paths.

        The last are -inf where there is no token.
        """
        likely = q_BWV.topk(min(width, q_BWV.shape[2]), dim=2)
        paths_BWN = score_BW.unsqueeze(2) + likely.values.double().log()
        paths_BWN = paths_BWN.masked_fill(~going_B[:, None, None], -torch.inf)
        found = paths_BWN.flatten(1).topk(min(width, paths_BWN[0].numel()), dim=1)
        each = likely.values.shape[2]
        from_BN, score_BN = found.indices // each, found.values
        tokens_BN = likely.indices.flatten(1).gather(1, found.indices)
        if self.u_BDN is not None:
            tokens_BN, there_BN = sample_apart(q_BWV, from_BN, self.u_BDN[:, level, : from_BN.shape[1]])
            q_BN = q_BWV[torch.arange(len(q_BWV), device=q_BWV.device).unsqueeze(1), from_BN, tokens_BN]
            drawn_BN = score_BW.gather(1, from_BN) + q_BN.double().log()
            score_BN = torch.where(there_BN & (score_BN > -torch.inf), drawn_BN, -torch.inf)
        return tokens_BN, from_BN, score_BN

    def _add(self, tokens_BN: Tensor, from_BN: Tensor, score_BN: Tensor, above: int, level: int) -> None:
        """Append a level to the tree."""
        if level == 0:
            parents_BN = torch.full_like(from_BN, ROOT)
        else:
            parents_BN = from_BN + self._tokens_BK.shape[1] - above
        parents_BN = parents_BN.masked_fill(score_BN == -torch.inf, ABSENT)
        tokens_BN = tokens_BN.masked_fill(score_BN == -torch.inf, 0)
        self._tokens_BK = tokens_BN if level == 0 else torch.cat([self._tokens_BK, tokens_BN], 1)
        self._parents_BK = parents_BN if level == 0 else torch.cat([self._parents_BK, parents_BN], 1)

    def _without_ends(self, tokens_BN: Tensor, score_BN: Tensor) -> Tensor:
        """Scores of the parents to be: behind an end token nothing follows."""
        for eos in self.eos_ids:
            score_BN = score_BN.masked_fill(tokens_BN == eos, -torch.inf)
        return score_BN

    def _ask(
        self,
        going_B: Tensor,
        number: int,
        output: Output,
        q_BWV: Tensor,
        tokens_BN: Tensor,
        from_BN: Tensor,
        score_BN: Tensor,
    ) -> Tensor:
        """Which rows draft another level, by the likeliest token of this one and the state that it came from."""
        rows_B = torch.arange(len(tokens_BN), device=tokens_BN.device)
        best_B = score_BN.argmax(1)
        parent_B = from_BN[rows_B, best_B]

        def scoring() -> Tensor:
            if not self.sampling.greedy:
                return q_BWV[rows_B, parent_B]
            return self.sampling.scoring.probabilities(output.logits[rows_B, parent_B][..., : self.vocabulary])

        stop_B = self.rule.stop(Step(number, tokens_BN[rows_B, best_B], output.hidden[rows_B, parent_B], scoring))
        return going_B if stop_B is None or number < self.rule.min_length else going_B & ~stop_B


def level_draws(random: Draws, starts: Sequence[int], widths: Sequence[int], device: torch.device) -> Tensor:
    """Uniforms for the tokens of a tree, by level and place: [B, D, N]. Those of the first place are a chain's."""
    each = [random.at("draft" if place == 0 else f"draft {place}", starts, len(widths)) for place in range(max(widths))]
    return torch.stack(each, 2).to(device)
