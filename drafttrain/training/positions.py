"""Positions under which short rows train long contexts, and the lags of flash noisy training.

Anchor-offset indices (LongSpec, algorithm 1): the first tokens, which attention sinks on, keep their places, and the
rest of the row stands somewhere in the length to be served. What lies between is nowhere, so a row of 1,024 tokens
costs what it costs; but distances between 1,024 and the offset do not occur. `multi_gap` has several jumps, the first
behind the anchors and the others anywhere, and so trains middle distances too. Right behind a jump the target itself is
astray, for what it would lean on is suddenly far away; from there nothing is learnt (`settling`).

All draws are functions of (seed, sample id, step): a resumed run, or another number of processes, draws the same.
"""

# B batch, T time, G gaps

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from drafttrain.errors import UserError
from drafttrain.ops.random import uniform
from drafttrain.recipe import PositionsConfig


@dataclass(frozen=True)
class Placing:
    """Where rows stand and how far behind they look.

    Attributes:
        kind: plain, anchor_offset or multi_gap.
        anchors: first tokens of a row that keep their places.
        served: positions that will be served; no row reaches beyond them.
        gaps: jumps of `multi_gap`.
        share: of the rows that are moved; the others stay where they are.
        settling: tokens behind each jump whose predictions are not learnt.
        depth: lags are drawn from 1 .. depth.
        seed: of all draws.
    """

    kind: str
    anchors: int
    served: int
    gaps: int
    share: float
    settling: int
    depth: int
    seed: int

    @classmethod
    def of(cls, config: PositionsConfig, context: int, depth: int, seed: int) -> Placing:
        """What a recipe asks for.

        Args:
            config: the recipe's section.
            context: positions of the target.
            depth: of the drafter.
            seed: of the recipe.

        Raises:
            UserError: more positions are to be served than the target has.
        """
        served = context if config.served is None else config.served
        if served > context:
            raise UserError(f"training.positions.served is {served}, but the target has {context} positions; lower it.")
        gaps = 1 if config.kind == "anchor_offset" else config.gaps
        return cls(config.kind, config.anchors, served, gaps, config.share, config.settling, depth, seed)

    def positions(self, lengths_B: Tensor, width: int, samples_B: Tensor, step: int) -> Tensor:
        """Positions of padded rows, int64 [B, T], rising by 1 but where a row jumps.

        Args:
            lengths_B: real tokens of each row.
            width: T.
            samples_B: sample ids.
            step: of the training.
        """
        time_1T = torch.arange(width, device=lengths_B.device).unsqueeze(0)
        if self.kind == "plain":
            return time_1T.expand(len(lengths_B), -1)
        key_B1, gap_1G = self._keys(samples_B, step).unsqueeze(1), torch.arange(self.gaps, device=lengths_B.device)
        lengths_B1 = lengths_B.unsqueeze(1)
        room_B1 = (self.served - lengths_B1).clamp(min=0)
        moved_B1 = uniform(self.seed, "moved", key_B1, torch.zeros_like(key_B1)) < self.share
        # Sorted offsets: what the row has jumped behind each gap.
        offsets_BG = (uniform(self.seed, "offset", key_B1, gap_1G) * (room_B1 + 1)).long().sort(1).values * moved_B1
        places_BG = uniform(self.seed, "gap", key_B1, gap_1G) * (lengths_B1 - self.anchors).clamp(min=0)
        places_BG = places_BG.long().add_(self.anchors)
        places_BG[:, 0] = self.anchors
        jumps_BG = offsets_BG.diff(dim=1, prepend=torch.zeros_like(offsets_BG[:, :1]))
        behind_BGT = time_1T.unsqueeze(1) >= places_BG.unsqueeze(2)
        return time_1T + (behind_BGT * jumps_BG.unsqueeze(2)).sum(1)

    def lags(self, samples_B: Tensor, step: int) -> Tensor:
        """How many of the target's last tokens each row's queries do without: int64 [B] in 1 .. depth."""
        key_B = self._keys(samples_B, step)
        return 1 + (uniform(self.seed, "lag", key_B, torch.zeros_like(key_B)) * self.depth).long()

    def taught(self, weights_BT: Tensor, lags_B: Tensor, positions_BT: Tensor) -> Tensor:
        """Weights of the positions that predict, without those that see nothing of the target or follow a jump.

        Args:
            weights_BT: of the next token, at the position that predicts it.
            lags_B: as drawn; the first `lag` positions of a row have none of the target's keys in sight.
            positions_BT: as drawn.
        """
        time_T = torch.arange(weights_BT.shape[1], device=weights_BT.device)
        jumps_BT = F.pad(positions_BT.diff(dim=1) > 1, (1, 0)).cumsum(1)
        settled_BT = jumps_BT == F.pad(jumps_BT, (self.settling, 0))[:, : len(time_T)]
        return weights_BT * (settled_BT & (time_T >= lags_B.unsqueeze(1)))

    def _keys(self, samples_B: Tensor, step: int) -> Tensor:
        mixed_B = uniform(self.seed, "row", samples_B, torch.full_like(samples_B, step))
        return (mixed_B * 2.0**53).long()
