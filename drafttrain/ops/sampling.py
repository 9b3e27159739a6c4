"""From logits to the distribution that is sampled: the same function for the target's p and the drafter's q.

Greedy decoding is not a small temperature but a separate rule, switched on everywhere at once at temperature
<= 1e-5: the argmax of the (penalised) logits, no softmax, no draw.
"""

# B batch, K positions, V vocabulary

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from drafttrain.errors import UserError
from drafttrain.ops.tree import TreeBlock

GREEDY_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Applied in this order: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divides the logits; <= 1e-5 is greedy.
        top_k: keep the k most probable tokens (ties with the k-th stay); 0 keeps all.
        top_p: keep the fewest tokens, most probable first, whose mass reaches top_p (ties with the last stay); 1 keeps
            all.
        min_p: drop tokens less probable than min_p times the most probable; 0 keeps all.
        repetition_penalty: logits of tokens seen before are divided by it when positive and multiplied when
            negative (Keskar et al. 2019); 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "at least 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps every token)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 is off)"),
        }
        for name, (fine, rule) in checks.items():
            if not fine:
                raise UserError(f"sampling.{name} is {getattr(self, name)}, but it must be {rule}")

    @property
    def greedy(self) -> bool:
        """Whether the next token is the argmax."""
        return self.temperature <= GREEDY_TEMPERATURE

    @property
    def penalised(self) -> bool:
        """Whether the distribution depends on which tokens came before."""
        return self.repetition_penalty != 1.0

    @property
    def scoring(self) -> Sampling:
        """The distribution in which a drafter's confidence is measured.

        It is the one sampled; greedy decoding has a one-hot q that says nothing, so there it is the plain softmax at
        temperature 1. Stopping rules, traces and the acceptance head's features all use this.
        """
        return _PLAIN if self.greedy else self

    def choose(self, logits_BKV: Tensor, seen_BKV: Tensor | None = None) -> Tensor:
        """The greedy token of every position: int64 [..., K]."""
        if self.penalised:
            logits_BKV = self._penalise(widened(logits_BKV), seen_BKV)
        if not logits_BKV.is_cpu:
            return logits_BKV.argmax(-1)
        # torch is slow at bfloat16, and at more than one row: NumPy searches those up to ten times faster.
        wide_BKV = logits_BKV if logits_BKV.dtype == torch.float32 else widened(logits_BKV)
        if wide_BKV.numel() == wide_BKV.shape[-1]:
            return wide_BKV.argmax(-1)
        if wide_BKV.requires_grad:
            wide_BKV = wide_BKV.detach()
        return torch.from_numpy(np.asarray(wide_BKV.numpy().argmax(-1)))

    def probabilities(self, logits_BKV: Tensor, seen_BKV: Tensor | None = None) -> Tensor:
        """The distribution the next token is drawn from.

        Args:
            logits_BKV: any float dtype; computed in float32, or float64 where the logits are.
            seen_BKV: bool, which tokens occurred before each position; needed with a repetition penalty only. It may
                cover a larger vocabulary than the logits.

        Returns:
            probabilities [..., V], float32 or float64; one-hot when greedy.
        """
        if self.greedy:
            tokens_BK = self.choose(logits_BKV, seen_BKV)
            return torch.zeros_like(widened(logits_BKV)).scatter_(-1, tokens_BK.unsqueeze(-1), 1.0)
        logits_BKV = self._penalise(widened(logits_BKV), seen_BKV)
        if self.temperature != 1.0:
            logits_BKV = logits_BKV / self.temperature
        if 0 < self.top_k < logits_BKV.shape[-1]:
            kth_BK1 = logits_BKV.topk(self.top_k, dim=-1).values[..., -1:]
            logits_BKV = logits_BKV.masked_fill(logits_BKV < kth_BK1, -torch.inf)
        probs_BKV = logits_BKV.softmax(-1)
        if self.top_p == 1.0 and self.min_p == 0.0:
            return probs_BKV
        least_BK1 = _least_in_nucleus(probs_BKV, self.top_p)
        if self.min_p > 0.0:
            least_BK1 = torch.maximum(least_BK1, self.min_p * probs_BKV.amax(-1, keepdim=True))
        probs_BKV = probs_BKV.masked_fill(probs_BKV < least_BK1, 0.0)
        return probs_BKV / probs_BKV.sum(-1, keepdim=True)

    def _penalise(self, logits_BKV: Tensor, seen_BKV: Tensor | None) -> Tensor:
        if not self.penalised:
            return logits_BKV
        if seen_BKV is None:
            raise ValueError("a repetition penalty needs the tokens seen so far")
        penalty = self.repetition_penalty
        penalised_BKV = torch.where(logits_BKV > 0, logits_BKV / penalty, logits_BKV * penalty)
        return torch.where(seen_BKV[..., : logits_BKV.shape[-1]], penalised_BKV, logits_BKV)


_PLAIN = Sampling()


def log_probability_and_entropy(probs_BV: Tensor, tokens_B: Tensor) -> tuple[Tensor, Tensor]:
    """What stopping rules and heads know of a drafted token: log q(Y) and the entropy of q in nats, each [...]."""
    log_q_B = probs_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1).log()
    return log_q_B, torch.special.entr(probs_BV).sum(-1)


def seen_tokens(rows: list[list[int]], vocabulary: int, device: torch.device) -> Tensor:
    """Which tokens occur in each row: bool [B, V]."""
    seen_BV = torch.zeros(len(rows), vocabulary, dtype=torch.bool, device=device)
    for row, tokens in enumerate(rows):
        index = torch.tensor(tokens, device=device)
        seen_BV[row, index[index < vocabulary]] = True
    return seen_BV


def seen_along(seen_BV: Tensor, tokens_BK: Tensor, parents_BK: Tensor | None = None) -> Tensor:
    """Which tokens were seen at each position of a drafted block: bool [B, K + 1, V].

    Position k sees the committed tokens and the first k drafted ones, so a penalty acts within the block exactly as it
    would one token at a time; with the parents of a tree it sees the k-th token and those above it.
    """
    batch, width = tokens_BK.shape
    if parents_BK is not None:
        path_BKK = TreeBlock.below_root(parents_BK).seen_BQT[:, :, 1:].to(torch.uint8)
        index_BKK = tokens_BK.unsqueeze(1).expand_as(path_BKK)
        counts_BKV = torch.zeros(batch, width + 1, seen_BV.shape[1], dtype=torch.uint8, device=seen_BV.device)
        return (counts_BKV.scatter_add_(2, index_BKK, path_BKK) > 0) | seen_BV.unsqueeze(1)
    seen_BKV = seen_BV.new_zeros(batch, width + 1, seen_BV.shape[1])
    seen_BKV[:, 1:].scatter_(2, tokens_BK.unsqueeze(2), True)
    seen_BKV[:, 0] = seen_BV
    return seen_BKV.cumsum(1, dtype=torch.int32) > 0


def widened(logits: Tensor) -> Tensor:
    """Logits in the precision that everything here is computed in: float32, or float64 where they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _least_in_nucleus(probs_BKV: Tensor, top_p: float) -> Tensor:
    """The probability of the last token that is needed to reach ``top_p`` (Holtzman et al. 2020): [..., 1].

    A token stays if those more probable than it have less mass than top_p, that is if it and those below it have more
    than the rest. Only values are sorted, which NumPy does ten times faster than torch on a CPU.
    """
    if top_p == 1.0:
        return torch.zeros_like(probs_BKV[..., :1])
    if probs_BKV.device.type == "cpu":
        rising_BKV = torch.from_numpy(np.sort(probs_BKV.detach().numpy(), axis=-1))
    else:
        rising_BKV = probs_BKV.sort(dim=-1).values
    mass_BKV = rising_BKV.cumsum(-1, dtype=torch.float64)
    total_BK1 = mass_BKV[..., -1:]
    index_BK1 = torch.searchsorted(mass_BKV, (1 - top_p) * total_BK1, right=True)
    return rising_BKV.gather(-1, index_BK1.clamp_(max=probs_BKV.shape[-1] - 1))
