"""When reading a part of a prompt pays: what reading takes by length, and break-even lengths."""

# n tokens of a prompt

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Seconds:
    """What is done over n tokens takes fixed + linear * n + quadratic * n^2 seconds.

    The linear part are a model's matrices, the quadratic one its attention.
    """

    fixed: float
    linear: float
    quadratic: float

    def of(self, length: float) -> float:
        """At so many tokens."""
        return self.fixed + self.linear * length + self.quadratic * length**2

    @classmethod
    def fitted(cls, lengths: Sequence[int], seconds: Sequence[float]) -> Seconds:
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


@dataclass(frozen=True)
class CompressionCost:
    """What prompt compression takes and saves; measured by `drafttrain.context.timing`.

    Attributes:
        target: the target's reading.
        choosing: all that comes before it: the drafter's reading, drafting ahead, scores.
    """

    target: Seconds
    choosing: Seconds

    def compressed(self, length: int, count: float) -> float:
        """Seconds until so many tokens of a prompt of that length are chosen and read."""
        return self.choosing.of(length) + self.target.of(count)

    def pays(self, length: int, count: float) -> bool:
        """Whether that is sooner than reading all of it."""
        return self.compressed(length, count) < self.target.of(length)

    def break_even(self, share: float, protected: int = 0, longest: int = 1 << 20) -> int | None:
        """The shortest prompt whose compression to a share of its tokens pays, and that of all longer ones does, too.

        Args:
            share: of the prompt that is read.
            protected: tokens that are read in any case; no prompt is compressed to fewer.
            longest: prompt that is looked at.

        Returns:
            tokens, or None where the longest one does not pay.
        """
        low, high = math.ceil(protected / share) - 1, longest
        if not self.pays(longest, share * longest):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.pays(middle, share * middle) else (middle, high)
        return high
