"""How far predicted acceptance can be believed, and what the drafter's own probability predicts without a head.

A head is judged on labels P in [0, 1], the probability that the target accepts a drafted token. With soft labels
every token counts as P accepted and 1 - P rejected tokens, so each score below is its expectation over the
verification's coin and equals the usual score where labels are 0 or 1.

All functions take NumPy arrays [M], one entry a drafted token, and compute in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# M drafted tokens, F columns of features

Array = NDArray[np.float64]

BINS = 15
_TINY = 1e-12


def invert_loss_weight(predicted: ArrayLike, w_acc: float, w_rej: float) -> Array:
    """The acceptance probability behind a prediction that was trained with unequal loss weights.

    The minimiser of -w_acc P log P' - w_rej (1 - P) log(1 - P') is P' = w_acc P / (w_acc P + w_rej (1 - P)); solved
    for P with w = w_rej / w_acc: P = w P' / (1 - P' + w P'). In logits this adds log w.
    """
    predicted = np.asarray(predicted, dtype=np.float64)
    w = w_rej / w_acc
    return w * predicted / (1.0 - predicted + w * predicted)


def log_loss(predicted: ArrayLike, label: ArrayLike) -> float:
    """Mean of -P log P' - (1 - P) log(1 - P'), in nats a token."""
    p, y = _pair(predicted, label)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def binary_kl(predicted: ArrayLike, label: ArrayLike) -> float:
    """Mean KL(P || P') of the two coins, in nats a token: the log loss less what no head could save."""
    _, y = _pair(predicted, label)
    entropy = -np.mean(_xlogx(y) + _xlogx(1 - y))
    return log_loss(predicted, label) - float(entropy)


def brier(predicted: ArrayLike, label: ArrayLike) -> float:
    """Expected squared error of the coin: mean of P (1 - P')^2 + (1 - P) P'^2."""
    p, y = np.asarray(predicted, np.float64), np.asarray(label, np.float64)
    return float(np.mean(y * (1 - p) ** 2 + (1 - y) * p**2))


def auroc(predicted: ArrayLike, label: ArrayLike) -> float:
    """Probability that an accepted token is scored above a rejected one, ties half; NaN when one kind is absent."""
    p, y = np.asarray(predicted, np.float64), np.asarray(label, np.float64)
    _, group = np.unique(p, return_inverse=True)
    accepted = np.bincount(group, weights=y)
    rejected = np.bincount(group, weights=1 - y)
    total = accepted.sum() * rejected.sum()
    if total <= 0:
        return float("nan")
    below = np.cumsum(rejected) - rejected
    return float((accepted * (below + rejected / 2)).sum() / total)


def reliability(predicted: ArrayLike, label: ArrayLike, bins: int = BINS) -> list[dict[str, float]]:
    """Table of a reliability plot: equal-width bins of the prediction, empty ones left out.

    Returns:
        one dict a bin: low, high (its edges), count, predicted and accepted (means in the bin).
    """
    p, y = np.asarray(predicted, np.float64), np.asarray(label, np.float64)
    index = np.clip((p * bins).astype(np.int64), 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    p_sum = np.bincount(index, weights=p, minlength=bins)
    y_sum = np.bincount(index, weights=y, minlength=bins)
    return [
        {
            "low": b / bins,
            "high": (b + 1) / bins,
            "count": int(count[b]),
            "predicted": float(p_sum[b] / count[b]),
            "accepted": float(y_sum[b] / count[b]),
        }
        for b in range(bins)
        if count[b]
    ]


def expected_calibration_error(predicted: ArrayLike, label: ArrayLike, bins: int = BINS) -> float:
    """ECE (Guo et al. 2017, eq. 3): |mean prediction - mean label| over equal-width bins, weighted by count."""
    table = reliability(predicted, label, bins)
    total = sum(row["count"] for row in table)
    return float(sum(row["count"] * abs(row["predicted"] - row["accepted"]) for row in table) / max(total, 1))


def report(predicted: ArrayLike, label: ArrayLike, bins: int = BINS) -> dict[str, object]:
    """All scores of one predictor, with its reliability table."""
    return {
        "tokens": int(np.size(label)),
        "ece": expected_calibration_error(predicted, label, bins),
        "brier": brier(predicted, label),
        "auroc": auroc(predicted, label),
        "kl": binary_kl(predicted, label),
        "log_loss": log_loss(predicted, label),
        "reliability": reliability(predicted, label, bins),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Baselines: what q says without a head


def q_columns(log_q: ArrayLike) -> Array:
    """[M, 2]: log q and log(1 - q), both at least -16, so that sums of them make every power of the odds."""
    log_q = np.minimum(np.asarray(log_q, np.float64), 0.0)
    complement = np.log(np.maximum(-np.expm1(log_q), _TINY))
    return np.stack([np.maximum(log_q, -16.0), np.maximum(complement, -16.0)], axis=-1)


def entropy_columns(entropy: ArrayLike) -> Array:
    """[M, 2]: entropy and its logarithm, at least -16."""
    entropy = np.maximum(np.asarray(entropy, np.float64), 0.0)
    return np.stack([entropy, np.log(np.maximum(entropy, 1.2e-7))], axis=-1)


@dataclass
class Logistic:
    """Logistic regression on soft labels, fitted by Newton's method with a light ridge.

    Attributes:
        mean, scale: [F] standardisation of the columns.
        weight: [F + 1], the intercept last.
    """

    mean: Array
    scale: Array
    weight: Array

    @classmethod
    def fit(cls, columns_MF: Array, label: ArrayLike, ridge: float = 1e-3, steps: int = 50) -> Logistic:
        """Minimise the summed log loss + ridge / 2 |weight|^2 (the intercept is free)."""
        y = np.asarray(label, np.float64)
        mean, scale = columns_MF.mean(axis=0), columns_MF.std(axis=0)
        model = cls(mean, np.where(scale > _TINY, scale, 1.0), np.zeros(columns_MF.shape[1] + 1))
        x = model._design(columns_MF)
        penalty = np.full(x.shape[1], ridge)
        penalty[-1] = _TINY * len(y)
        loss = model._objective(x, y, penalty, model.weight)
        for _ in range(steps):
            p = _sigmoid(x @ model.weight)
            gradient = x.T @ (p - y) + penalty * model.weight
            hessian = (x * (p * (1 - p) + 1e-9)[:, None]).T @ x + np.diag(penalty)
            step = np.linalg.solve(hessian, gradient)
            # Newton overshoots where the sigmoid is flat: halve until the objective falls.
            size = 1.0
            while size > 1e-6 and (new := model._objective(x, y, penalty, model.weight - size * step)) > loss:
                size /= 2
            if size <= 1e-6 or loss - new < 1e-10 * max(abs(loss), 1.0):
                break
            model.weight, loss = model.weight - size * step, new
        return model

    def __call__(self, columns_MF: Array) -> Array:
        """Predicted acceptance [M]."""
        return _sigmoid(self._design(columns_MF) @ self.weight)

    def _design(self, columns_MF: Array) -> Array:
        standard = (columns_MF - self.mean) / self.scale
        return np.concatenate([standard, np.ones((len(standard), 1))], axis=1)

    @staticmethod
    def _objective(x: Array, y: Array, penalty: Array, weight: Array) -> float:
        logit = x @ weight
        return float(np.sum(np.logaddexp(0.0, logit) - y * logit) + 0.5 * np.sum(penalty * weight**2))


@dataclass
class Isotonic:
    """The best non-decreasing function of one number in squared error (pool adjacent violators).

    Attributes:
        knots, values: [L] ascending inputs and fitted values; linear between knots, constant outside.
    """

    knots: Array
    values: Array

    @classmethod
    def fit(cls, x: ArrayLike, label: ArrayLike) -> Isotonic:
        """Fit on numbers x [M] and labels [M]; equal x share one value."""
        knots, group = np.unique(np.asarray(x, np.float64), return_inverse=True)
        weight = np.bincount(group).astype(np.float64)
        mean = np.bincount(group, weights=np.asarray(label, np.float64)) / weight
        blocks: list[list[float]] = []  # [mean, weight, number of knots]
        for m, w in zip(mean.tolist(), weight.tolist(), strict=True):
            blocks.append([m, w, 1])
            while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
                m2, w2, n2 = blocks.pop()
                m1, w1, n1 = blocks[-1]
                blocks[-1] = [(m1 * w1 + m2 * w2) / (w1 + w2), w1 + w2, n1 + n2]
        values = np.repeat([b[0] for b in blocks], [int(b[2]) for b in blocks])
        return cls(knots, values)

    def __call__(self, x: ArrayLike) -> Array:
        """Predicted acceptance [M]."""
        return np.interp(np.asarray(x, np.float64), self.knots, self.values)


class Baselines:
    """Predictors that read only q: what a head must beat to earn its place.

    `raw_q` is q(Y) itself (the confidence rule), `logistic_q` and `isotonic_q` are fitted to q(Y), and
    `logistic_q_entropy` to q(Y) and the entropy of q.

    Args:
        log_q, entropy, label: arrays [M] of the training tokens.
    """

    def __init__(self, log_q: ArrayLike, entropy: ArrayLike, label: ArrayLike) -> None:
        self._logistic_q = Logistic.fit(q_columns(log_q), label)
        self._isotonic_q = Isotonic.fit(log_q, label)
        self._logistic_q_entropy = Logistic.fit(_both_columns(log_q, entropy), label)

    def __call__(self, log_q: ArrayLike, entropy: ArrayLike) -> dict[str, Array]:
        """Predictions of each baseline [M] for other tokens."""
        return {
            "raw_q": np.exp(np.minimum(np.asarray(log_q, np.float64), 0.0)),
            "logistic_q": self._logistic_q(q_columns(log_q)),
            "isotonic_q": self._isotonic_q(log_q),
            "logistic_q_entropy": self._logistic_q_entropy(_both_columns(log_q, entropy)),
        }


def _both_columns(log_q: ArrayLike, entropy: ArrayLike) -> Array:
    return np.concatenate([q_columns(log_q), entropy_columns(entropy)], axis=1)


def _pair(predicted: ArrayLike, label: ArrayLike) -> tuple[Array, Array]:
    """Float64 copies, the prediction kept inside (0, 1) so that its logarithms are finite."""
    p = np.clip(np.asarray(predicted, np.float64), _TINY, 1 - _TINY)
    return p, np.asarray(label, np.float64)


def _xlogx(x: Array) -> Array:
    return np.where(x > 0, x * np.log(np.maximum(x, _TINY)), 0.0)


def _sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0)))
