"""Token mixing: one training sequence with a drafted token at most positions (SpecDec++, section 3.3).

The published head reads the drafter's state *after* a drafted token, and a sequence has room for one token a position.
So the drafter is shown Z, in which every response position keeps the target's token X with probability r and
otherwise takes the drafter's token Y; the loss is taken where Z = Y. Almost every Y is then trained in one pass,
at the price that Z before it is a patchwork while its label assumes the target's own prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from drafttrain.ops.random import uniform

# T response tokens


def mix_tokens(
    response_T: Tensor, draft_T: Tensor, rate: float, *, seed: int, epoch: int, sample: int
) -> tuple[Tensor, Tensor]:
    """Z and where it carries a drafted token.

    Draws depend on (seed, epoch, sample, position) only: every rank, restart and batch size mixes alike, and each
    epoch anew.

    Args:
        response_T: X, the target's tokens (int64).
        draft_T: Y, the drafter's tokens at the same positions (int64).
        rate: r, probability that a position keeps X, in [0, 1].
        sample: number of the response, see `ops.random.sample_id`.

    Returns:
        (Z [T], trained [T] bool): trained is Z = Y, which holds where X was kept but equals Y, too.

    Raises:
        ValueError: the two sequences differ in length, or the rate is no probability.
    """
    if response_T.shape != draft_T.shape:
        raise ValueError(f"{len(response_T)} response tokens but {len(draft_T)} drafted ones")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"mixing rate {rate} is not between 0 and 1")
    positions = torch.arange(len(response_T))
    u_T = uniform(seed, f"token mixing, epoch {epoch}", torch.full_like(positions, sample), positions)
    mixed_T = torch.where(u_T < rate, response_T, draft_T)
    return mixed_T, mixed_T == draft_T
