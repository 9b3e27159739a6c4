"""Trees of tokens: parents, ancestry, depth. A chain is the tree in which every token's parent is the one before it.

Parents come before their children and siblings in their order, so a tree is an array of parents. What a token may
attend to is its ancestors and itself; its position is that of the tree plus its depth, whatever slot it is kept in.
"""

# B batch, K nodes, Q tokens read at once, T tokens of the tree so far (the last Q of them are being read)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT = -1
"""Parent of a tree's first tokens: the last token of the text, which is not one of its nodes."""

ABSENT = -2
"""Parent of padding, which is nobody's ancestor and sees itself alone."""


@dataclass(frozen=True)
class TreeBlock:
    """A block of tokens that are nodes of one tree, with those of its nodes that were read just before them.

    Attributes:
        seen_BQT: bool, what each token of the block may attend to of the tree; itself among it.
        depth_BT: int64, position of each node behind the tree's first.
    """

    seen_BQT: Tensor
    depth_BT: Tensor

    @property
    def size(self) -> int:
        """T."""
        return self.depth_BT.shape[1]

    @property
    def before(self) -> int:
        """Nodes that were read before this block."""
        return self.size - self.seen_BQT.shape[1]

    @staticmethod
    def below_root(parents_BK: Tensor) -> TreeBlock:
        """The root and all nodes as one block of K + 1 tokens: what a target reads."""
        whole_BK = torch.where(parents_BK >= ROOT, parents_BK + 1, ABSENT)
        root_B1 = torch.full_like(whole_BK[:, :1], ABSENT)
        seen_BKK = ancestry(torch.cat([root_B1, whole_BK], 1))
        return TreeBlock(seen_BKK, seen_BKK.sum(2) - 1)


def ancestry(parents_BK: Tensor) -> Tensor:
    """Ancestors of every node, itself among them: bool [B, K, K].

    Args:
        parents_BK: int64, of each node the index of an earlier one; a negative number for none.
    """
    width = parents_BK.shape[1]
    one_hot_BKK = parents_BK.unsqueeze(2) == torch.arange(width, device=parents_BK.device)
    seen_BKK = torch.eye(width, device=parents_BK.device) + one_hot_BKK
    for _ in range(max(width - 2, 0).bit_length()):  # each product doubles how far is seen
        seen_BKK = (seen_BKK @ seen_BKK).clamp_(max=1)
    return seen_BKK > 0


def below(previous: TreeBlock | None, parents_BQ: Tensor) -> TreeBlock:
    """The next block of a tree that grows downwards.

    Args:
        previous: the block that the parents are in; None where they are the root.
        parents_BQ: int64, indices within that block, or `ABSENT`.
    """
    batch, width = parents_BQ.shape
    own_BQQ = torch.eye(width, dtype=torch.bool, device=parents_BQ.device).expand(batch, -1, -1)
    if previous is None:
        return TreeBlock(own_BQQ, torch.zeros_like(parents_BQ))
    index_BQ = parents_BQ.clamp(min=0)
    above_BQT = previous.seen_BQT.gather(1, index_BQ.unsqueeze(2).expand(-1, -1, previous.size))
    above_BQT = above_BQT & (parents_BQ >= 0).unsqueeze(2)
    depth_BQ = above_BQT.sum(2)
    return TreeBlock(torch.cat([above_BQT, own_BQQ], 2), torch.cat([previous.depth_BT, depth_BQ], 1))


def depth_of(parents: Sequence[int]) -> int:
    """Nodes of the longest path.

    Example:
        >>> depth_of([ROOT, ROOT, 0, ABSENT])
        2
    """
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent == ABSENT else 1 if parent == ROOT else depths[parent] + 1)
    return max(depths, default=0)
