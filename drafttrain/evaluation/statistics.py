"""Figures from summed counts, and how sure one may be of them.

Every figure of a report is a function of *sums* over prompts (tokens, seconds, rounds, ...), never a mean of ratios.
So one bootstrap serves them all: resample prompts, sum their counts, apply the function to the sums.

Legend: P prompts, C counts per prompt, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

LEAST_EXPECTED = 5.0
"""Cells of a chi-square test are merged until each expects this many observations (Cochran's rule)."""


_SINGLE = object()
"""The stratum of all prompts that are alone in theirs."""


@dataclass
class Interval:
    """A figure and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def bootstrap(
    counts_PC: np.ndarray,
    figure: Callable[[np.ndarray], np.ndarray],
    strata: Sequence[Hashable],
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """95 % percentile interval of a figure of summed counts, resampling whole prompts within each stratum.

    Strata are the tasks: the mixture is fixed before anything is measured, so a resample must keep it. Counts of
    two methods on the same prompt stand in the same row, which makes the interval a paired one. Tasks with a single
    prompt show no spread of their own and are resampled together.

    Args:
        counts_PC: [P, C] counts, one row a prompt.
        figure: maps sums [..., C] to values [...].
        strata: P labels.
        resamples: how many resamples (R).
        seed: of the resampling; equal inputs give equal intervals.

    Raises:
        ValueError: there is no prompt, or as many labels as prompts are not given.
    """
    counts_PC = np.asarray(counts_PC, dtype=np.float64)
    if len(counts_PC) == 0 or len(counts_PC) != len(strata):
        raise ValueError(f"{len(counts_PC)} rows of counts and {len(strata)} labels")
    random = np.random.default_rng(seed)
    sizes = Counter(strata)
    strata = [label if sizes[label] > 1 else _SINGLE for label in strata]
    sums_RC = np.zeros((resamples, counts_PC.shape[1]))
    for stratum in dict.fromkeys(strata):
        rows = counts_PC[[label == stratum for label in strata]]
        # How often each prompt is drawn is all that the sums depend on: one small matrix product instead of a gather.
        sums_RC += random.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=resamples) @ rows
    values = np.sort(figure(sums_RC))
    edge = int(0.025 * (resamples - 1))  # order statistics, for between infinite ones there is nothing
    return Interval(float(figure(counts_PC.sum(axis=0))), float(values[edge]), float(values[-1 - edge]))


def rate_ratio(sums: np.ndarray) -> np.ndarray:
    """Speed-up from sums [..., 4] of tokens and seconds of a method, then tokens and seconds of its baseline."""
    return (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same sequence, in [0, 1]; 0 when it is shorter than n."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def chi_square(observed: Counter, expected: dict[Hashable, float]) -> ChiSquare:
    """Pearson's test of counts against probabilities, rare cells merged.

    Args:
        observed: how often each outcome was seen.
        expected: probability of each outcome, summing to 1. An outcome seen but not listed (or listed with
            probability 0) is impossible: the p-value is then 0.

    Raises:
        ValueError: nothing was observed.
    """
    total = sum(observed.values())
    if total == 0:
        raise ValueError("no observations to test")
    if any(count and expected.get(outcome, 0.0) <= 0 for outcome, count in observed.items()):
        return ChiSquare(float("inf"), 1, 0.0, total)
    cells = _merge([(total * p, observed[outcome]) for outcome, p in expected.items() if p > 0])
    if len(cells) < 2:
        return ChiSquare(0.0, 0, 1.0, total)
    statistic = sum((seen - mean) ** 2 / mean for mean, seen in cells)
    return ChiSquare(statistic, len(cells) - 1, chi_square_tail(statistic, len(cells) - 1), total)


@dataclass(frozen=True)
class ChiSquare:
    """Pearson's statistic, its degrees of freedom, the tail probability beyond it, and the observations."""

    statistic: float
    degrees: int
    p_value: float
    observations: int


def _merge(cells: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Pool the rarest cells, in order of expectation, until every pool expects `LEAST_EXPECTED`."""
    merged: list[tuple[float, int]] = []
    mean, seen = 0.0, 0
    for cell_mean, cell_seen in sorted(cells):
        mean, seen = mean + cell_mean, seen + cell_seen
        if mean >= LEAST_EXPECTED:
            merged.append((mean, seen))
            mean, seen = 0.0, 0
    if mean > 0 and merged:
        last_mean, last_seen = merged.pop()
        merged.append((last_mean + mean, last_seen + seen))
    return merged


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(chi-square with `degrees` > statistic), by the regularised upper incomplete gamma function."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@dataclass
class SurpriseSum:
    """Sums over emitted tokens for a test that they were drawn from the distributions p that they are held against.

    log p(x) of a token drawn from p has mean -H(p) and a known variance, whatever came before. So the sum of
    log p(x) + H(p) over all tokens of all prompts is a martingale, and divided by its standard deviation it is a
    standard normal in the limit. Tokens taken too often from the head of p, or from another distribution such as
    the drafter's, shift it by a constant a token, so the score grows with the square root of the tokens.
    """

    tokens: int = 0
    excess: float = 0.0
    variance: float = 0.0
    impossible: int = 0

    def add(self, p_TV: torch.Tensor, ids_T: torch.Tensor) -> None:
        """Count T tokens against their distributions, p in float64."""
        log_p_TV = p_TV.clamp_min(torch.finfo(torch.float64).tiny).log()
        mean_T = (p_TV * log_p_TV).sum(-1)
        square_T = (p_TV * log_p_TV.square()).sum(-1)
        chosen_T1 = ids_T.unsqueeze(-1)
        possible_T = p_TV.gather(-1, chosen_T1).squeeze(-1) > 0
        surprise_T = log_p_TV.gather(-1, chosen_T1).squeeze(-1) - mean_T
        self.tokens += len(ids_T)
        self.impossible += int((~possible_T).sum())
        self.excess += float(surprise_T[possible_T].sum())
        self.variance += float((square_T - mean_T.square()).clamp_min(0)[possible_T].sum())

    @property
    def z(self) -> float:
        """The score: standard normal when the tokens were drawn from p; infinite when one was impossible."""
        if self.impossible:
            return float("inf")
        return self.excess / self.variance**0.5 if self.variance > 1e-12 else 0.0
