"""When cutting a prompt down pays: the cost of a prefill by its length, and break-even lengths."""

# n tokens of a prompt

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drafttrain.decoding.engine import Engine


@dataclass(frozen=True)
class PrefillCost:
    """Seconds of reading n tokens: fixed + linear * n + quadratic * n^2.

    The linear part are the model's matrices, the quadratic one its attention.
    """

    fixed: float
    linear: float
    quadratic: float

    def seconds(self, length: float) -> float:
        """Of a prompt of so many tokens."""
        return self.fixed + self.linear * length + self.quadratic * length**2

    @classmethod
    def fitted(cls, lengths: Sequence[int], seconds: Sequence[float]) -> PrefillCost:
        """Least squares of relative errors, no part below zero."""
        n, y = np.asarray(lengths, float), np.asarray(seconds, float)
        columns = np.stack([np.ones_like(n), n, n**2], 1) / y[:, None]
        active = [0, 1, 2]
        while True:
            found = np.zeros(3)
            found[active] = np.linalg.lstsq(columns[:, active], np.ones_like(n), rcond=None)[0]
            if (found >= 0).all():
                return cls(*map(float, found))
            active.remove(int(found.argmin()))

    @classmethod
    def measured(cls, engine: Engine, lengths: Sequence[int] = (256, 1024, 4096), repeats: int = 3) -> PrefillCost:
        """Time an engine's prefill of random tokens; the fastest of a few repeats at each length counts."""
        most = engine.max_positions or max(lengths)
        lengths = [length for length in lengths if length <= most]
        found = []
        for length in lengths:
            tokens = torch.randint(0, engine.entries, (length,), generator=torch.Generator().manual_seed(0)).tolist()
            times = []
            for _ in range(repeats):
                cache = engine.new_cache(1, length)
                started = time.perf_counter()
                with torch.inference_mode():
                    engine.read(cache, [tokens])
                if engine.device.type == "cuda":
                    torch.cuda.synchronize(engine.device)
                times.append(time.perf_counter() - started)
            found.append(min(times))
        return cls.fitted(lengths, found)


def compression_pays(target: PrefillCost, drafter: PrefillCost, length: int, count: int) -> bool:
    """Whether drafter and target together read a compressed prompt sooner than the target reads all of it."""
    return drafter.seconds(length) + target.seconds(count) < target.seconds(length)


def break_even(target: PrefillCost, drafter: PrefillCost, share: float, longest: int = 1 << 20) -> int | None:
    """The shortest prompt whose compression to a share of its tokens pays, None where none up to ``longest`` does."""

    def pays(length: int) -> bool:
        return compression_pays(target, drafter, length, int(share * length))

    if not pays(longest):
        return None
    low, high = 0, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
