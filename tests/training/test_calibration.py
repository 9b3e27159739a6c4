"""Calibration scores against definitions written out, and baselines against what they must find."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.training import calibration

inside = st.floats(0.001, 0.999)
weight = st.floats(0.1, 20.0)


@given(inside, weight, weight)
def test_inverting_the_loss_weight_undoes_it(p, w_acc, w_rej):
    distorted = calibration.invert_loss_weight(p, w_rej, w_acc)
    assert calibration.invert_loss_weight(distorted, w_acc, w_rej) == pytest.approx(p, rel=1e-9)


@pytest.mark.parametrize(("p", "said"), [(0.8, 0.40), (0.9, 0.60), (0.95, 0.76), (0.98, 0.89), (0.99, 0.94)])
def test_the_published_weight_of_six_distorts_as_computed_by_hand(p, said):
    assert calibration.invert_loss_weight(p, 6, 1) == pytest.approx(said, abs=0.006)


@given(inside, weight, weight)
def test_the_distorted_probability_minimises_the_weighted_loss(p, w_acc, w_rej):
    best = float(calibration.invert_loss_weight(p, w_rej, w_acc))

    def loss(x):
        return -w_acc * p * np.log(x) - w_rej * (1 - p) * np.log(1 - x)

    for other in (best * 0.99, best + (1 - best) * 0.01):
        assert loss(best) <= loss(other) + 1e-12


def _slow_auroc(p, y):
    wins = sum(
        y[i] * (1 - y[j]) * (1.0 if p[i] > p[j] else 0.5 if p[i] == p[j] else 0.0)
        for i in range(len(p))
        for j in range(len(p))
    )
    return wins / (sum(y) * (len(y) - sum(y)))


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.floats(0.01, 0.99)), min_size=2, max_size=12))
def test_auroc_of_soft_labels_counts_every_pair(rows):
    p, y = [row[0] for row in rows], [row[1] for row in rows]
    assert calibration.auroc(p, y) == pytest.approx(_slow_auroc(p, y), abs=1e-9)


def test_auroc_is_undefined_without_rejections():
    assert np.isnan(calibration.auroc([0.3, 0.4], [1.0, 1.0]))


@given(st.lists(st.tuples(inside, st.floats(0, 1)), min_size=1, max_size=20))
def test_kl_is_zero_for_the_label_itself_and_positive_elsewhere(rows):
    p, y = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    assert calibration.binary_kl(y, y) == pytest.approx(0, abs=1e-9)
    assert calibration.binary_kl(p, y) >= -1e-9


def test_soft_scores_equal_the_expectation_over_hard_labels():
    p, y = np.array([0.3, 0.8]), np.array([0.25, 0.5])
    hard = [(0, 0, 0.375), (0, 1, 0.375), (1, 0, 0.125), (1, 1, 0.125)]
    for score in (calibration.brier, calibration.log_loss):
        expected = sum(chance * score(p, np.array([a, b])) for a, b, chance in hard)
        assert score(p, y) == pytest.approx(expected)


def test_ece_sees_a_constant_bias_and_reliability_counts_everything():
    p = np.linspace(0.05, 0.75, 200)
    assert calibration.expected_calibration_error(p, p + 0.2) == pytest.approx(0.2)
    assert calibration.expected_calibration_error(p, p) == pytest.approx(0)
    table = calibration.reliability(np.append(p, [0.0, 1.0]), np.append(p, [0.0, 1.0]))
    assert sum(row["count"] for row in table) == 202
    assert all(row["low"] - 1e-12 <= row["predicted"] <= row["high"] for row in table)


def test_logistic_regression_recovers_its_own_model():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(4000, 3))
    truth = 1 / (1 + np.exp(-(x @ [1.5, -0.7, 0.0] + 0.4)))
    model = calibration.Logistic.fit(x, truth)
    assert np.abs(model(x) - truth).max() < 1e-3


def test_logistic_regression_survives_separable_labels():
    x = np.linspace(-1, 1, 50)[:, None]
    model = calibration.Logistic.fit(x, (x[:, 0] > 0).astype(float))
    assert np.isfinite(model.weight).all()
    assert model(np.array([[0.9]])) > 0.99


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1)), min_size=1, max_size=15))
def test_isotonic_is_monotone_keeps_the_mean_and_beats_constants(rows):
    x, y = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    model = calibration.Isotonic.fit(x, y)
    assert (np.diff(model.values) >= -1e-12).all()
    assert model(x).mean() == pytest.approx(y.mean(), abs=1e-9)
    assert ((model(x) - y) ** 2).sum() <= ((y - y.mean()) ** 2).sum() + 1e-9


def test_baselines_are_ordered_as_their_information():
    generator = np.random.default_rng(1)
    log_q = np.log(generator.uniform(0.02, 0.999, 6000))
    entropy = generator.uniform(0, 3, 6000)
    label = 1 / (1 + np.exp(-(2 * log_q + 2 - 1.0 * entropy)))
    baselines = calibration.Baselines(log_q, entropy, label)
    kl = {name: calibration.binary_kl(p, label) for name, p in baselines(log_q, entropy).items()}
    assert kl["logistic_q_entropy"] < 0.5 * kl["logistic_q"]
    assert kl["logistic_q"] < kl["raw_q"]
    assert kl["isotonic_q"] < kl["raw_q"]


def test_the_baselines_take_certain_and_impossible_tokens():
    log_q = np.array([0.0, -np.inf, -1e-9, -40.0])
    columns = calibration.q_columns(log_q)
    assert np.isfinite(columns).all()
    assert np.isfinite(calibration.entropy_columns(np.zeros(2))).all()
