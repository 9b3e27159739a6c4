"""Counter-based random numbers: a draw is a function of (seed, purpose, sample id, position) and of nothing else.

So a batch, a rank or a resumed run draws exactly what a single run would draw, on a CPU as on a GPU: the hash is
integer arithmetic (the splitmix64 finaliser of Steele et al. 2014), vectorised in int64, which wraps around.
"""

# B batch, K positions, T table columns, V vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from drafttrain.ops.upload import upload

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def uniform(seed: int, purpose: str, ids: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers keyed by sample and position.

    Args:
        seed: the run's seed.
        purpose: what the number is for; draws of different purposes are independent.
        ids: int64 sample ids, broadcast against ``positions``.
        positions: int64 positions in the sequence.

    Returns:
        float64 in [0, 1) with 53 random bits, of the broadcast shape.
    """
    key = _signed(_key(seed, purpose))
    state = _mix(_mix(ids * _signed(_GOLDEN) + key) + positions * _signed(_GOLDEN))
    return _shift_right(state, 11).double() * 2.0**-53


def sample(probs_BV: Tensor, u_B: Tensor) -> Tensor:
    """Draw from a distribution by inverting its cumulative sum, summed in float64.

    A token of probability zero is never drawn: the first entry that exceeds the threshold has just grown.

    Args:
        probs_BV: non-negative weights [..., V]; they need not sum to one, but not to zero either.
        u_B: float64 uniforms [...] in [0, 1).

    Returns:
        int64 token ids [...].
    """
    cumulative_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    threshold_B1 = u_B.unsqueeze(-1) * cumulative_BV[..., -1:]
    token_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
    return token_B1.squeeze(-1).clamp_(max=probs_BV.shape[-1] - 1)


def sample_apart(probs_BWV: Tensor, from_BN: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from several distributions at once, from each without replacement.

    The n-th draw is from the distribution that ``from_BN`` names, without the tokens that earlier draws took from it:
    the cumulative sum is inverted with their intervals left out.

    Args:
        probs_BWV: W distributions a row.
        from_BN: int64 in 0 .. W - 1.
        u_BN: float64 uniforms in [0, 1).

    Returns:
        int64 token ids [B, N]; and bool [B, N], false where the distribution had no tokens left.
    """
    cumulative_BWV = probs_BWV.cumsum(-1, dtype=torch.float64)
    if probs_BWV.device.type != "cpu":
        return _apart_on_device(cumulative_BWV, from_BN, u_BN)
    drawn = [_apart(*row) for row in zip(cumulative_BWV.numpy(), from_BN.tolist(), u_BN.tolist(), strict=True)]
    tokens, present = zip(*drawn, strict=True)
    return torch.tensor(tokens), torch.tensor(present)


def _apart(cumulative_WV: np.ndarray, names: list[int], uniforms: list[float]) -> tuple[list[int], list[bool]]:
    """`sample_apart` of a row in memory, where a number costs less than an operator."""
    taken: dict[int, list[tuple[float, float]]] = {}
    tokens, present = [], []
    for name, u in zip(names, uniforms, strict=True):
        cumulative_V, spans = cumulative_WV[name], sorted(taken.setdefault(name, []))
        total = float(cumulative_V[-1])
        left = total
        for low, high in spans:
            left -= high - low
        threshold = u * left
        for low, high in spans:  # rounding leads into none of them
            if threshold >= low:
                threshold = max(threshold + (high - low), high)
        token = int(cumulative_V.searchsorted(threshold, side="right"))
        present.append(left > _NOTHING_LEFT * total and token < len(cumulative_V))
        token = min(token, len(cumulative_V) - 1)
        taken[name].append((float(cumulative_V[token - 1]) if token else 0.0, float(cumulative_V[token])))
        tokens.append(token)
    return tokens, present


def _apart_on_device(cumulative_BWV: Tensor, from_BN: Tensor, u_BN: Tensor) -> tuple[Tensor, Tensor]:
    """The same steps for all rows at once, without a read from the device."""
    rows_B = torch.arange(len(u_BN), device=u_BN.device)
    lows_BN, highs_BN = torch.zeros_like(u_BN), torch.zeros_like(u_BN)
    tokens, present = [], []
    for number, (from_B, u_B) in enumerate(zip(from_BN.unbind(1), u_BN.unbind(1), strict=True)):
        cumulative_BV = cumulative_BWV[rows_B, from_B]
        taken_BN = from_BN[:, :number] == from_B.unsqueeze(1)
        low_BN, order_BN = lows_BN[:, :number].masked_fill(~taken_BN, torch.inf).sort(1)
        high_BN = highs_BN[:, :number].masked_fill(~taken_BN, torch.inf).gather(1, order_BN)
        size_BN = (high_BN - low_BN).nan_to_num_(0.0)
        total_B = cumulative_BV[:, -1]
        left_B = total_B
        for size_B in size_BN.unbind(1):  # one by one, as in memory: sums in another order are not the same
            left_B = left_B - size_B
        threshold_B = u_B * left_B
        for low_B, high_B in zip(low_BN.unbind(1), high_BN.unbind(1), strict=True):
            beyond_B = torch.maximum(threshold_B + (high_B - low_B), high_B)
            threshold_B = torch.where(threshold_B >= low_B, beyond_B, threshold_B)
        token_B = torch.searchsorted(cumulative_BV, threshold_B.unsqueeze(1), right=True).squeeze(1)
        there_B = (left_B > _NOTHING_LEFT * total_B) & (token_B < cumulative_BWV.shape[2])
        token_B = token_B.clamp(max=cumulative_BWV.shape[2] - 1)
        highs_BN[:, number] = cumulative_BV.gather(1, token_B.unsqueeze(1)).squeeze(1)
        lows_BN[:, number] = torch.where(
            token_B > 0, cumulative_BV.gather(1, (token_B - 1).clamp(min=0).unsqueeze(1)).squeeze(1), 0.0
        )
        tokens.append(token_B)
        present.append(there_B)
    return torch.stack(tokens, 1), torch.stack(present, 1)


_NOTHING_LEFT = 1e-9
"""Of the mass: less is what rounding leaves of it when all tokens have been taken."""


def sample_id(prompt_id: str, turn: int) -> int:
    """The key of a turn's draws: 63 bits of a hash, the same on every machine."""
    digest = hashlib.blake2b(f"{prompt_id}\0{turn}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Draws:
    """The uniforms of the rows of a batch, hashed in tables so that a decoding round only reads a slice.

    Args:
        seed: the run's seed.
        sample_ids: one id a row.
        origins: the first position of each row that will be asked for.
        device: where the draws are used.
    """

    def __init__(self, seed: int, sample_ids: Sequence[int], origins: Sequence[int], device: torch.device) -> None:
        self.seed = seed
        self.device = device
        self.sample_ids = list(sample_ids)
        self.origins = list(origins)
        self._tables: dict[str, Tensor] = {}

    def at(self, purpose: str, starts: Sequence[int], width: int) -> Tensor:
        """Uniforms for positions starts[b] .. starts[b] + width - 1 of each row: float64 [B, width].

        Raises:
            ValueError: a start lies before the row's origin.
        """
        columns = [start - origin for start, origin in zip(starts, self.origins, strict=True)]
        if min(columns) < 0:
            raise ValueError("draws asked for a position before the row's origin")
        table_BT = self._table(purpose, max(columns) + width)
        first = columns[0]
        if all(column == first for column in columns):
            return table_BT[:, first : first + width]
        index_BK = upload(columns, self.device).unsqueeze(1) + torch.arange(width, device=self.device)
        return table_BT.gather(1, index_BK)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        self.sample_ids = [self.sample_ids[row] for row in rows]
        self.origins = [self.origins[row] for row in rows]
        self._tables = {purpose: table[list(rows)] for purpose, table in self._tables.items()}

    def _table(self, purpose: str, columns: int) -> Tensor:
        table_BT = self._tables.get(purpose)
        if table_BT is None or table_BT.shape[1] < columns:
            width = max(256, 2 * columns)
            ids_B1 = torch.tensor(self.sample_ids, device=self.device).unsqueeze(1)
            origins_B1 = torch.tensor(self.origins, device=self.device).unsqueeze(1)
            positions_BT = origins_B1 + torch.arange(width, device=self.device)
            table_BT = self._tables[purpose] = uniform(self.seed, purpose, ids_B1, positions_BT)
        return table_BT


def _key(seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts int64 arithmetically, so the copies of the sign bit are masked away."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _shift_right(x, 31)
