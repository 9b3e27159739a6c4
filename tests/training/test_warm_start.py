"""A warm head says what the regression says, until it has learned more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.training.calibration import Baselines, binary_kl, invert_loss_weight
from drafttrain.training.warm_start import warm_start


def tokens(count=3000):
    generator = np.random.default_rng(0)
    q, entropy = generator.uniform(0.02, 0.999, count), generator.uniform(0.01, 3, count)
    return np.log(q), entropy, 1 / (1 + np.exp(-(0.7 * np.log(q / (1 - q)) + 2 - entropy)))


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("w_rej", [1.0, 6.0])
def test_it_predicts_as_the_regression_whatever_the_state(depth, w_rej):
    log_q, entropy, label = tokens()
    features = ("log_q", "entropy", "step", "token")
    config = AcceptanceHeadConfig(8, depth=depth, features=features, w_rej=w_rej, embeddings=(5, 4))
    head = AcceptanceHead(config)
    assert warm_start(head, log_q, entropy, label)
    states, embeddings = torch.randn(len(label), 8), torch.randn(len(label), 4)
    scalars = [torch.from_numpy(values).float() for values in (np.exp(log_q), entropy, np.ones_like(label))]
    raw = torch.sigmoid(head(states, *scalars, embeddings)).detach().double().numpy()
    predicted = invert_loss_weight(raw, 1.0, w_rej)
    regression = Baselines(log_q, entropy, label)(log_q, entropy)["logistic_q_entropy"]
    assert binary_kl(predicted, label) <= binary_kl(regression, label) + 1e-3


def test_every_weight_can_still_learn():
    log_q, entropy, label = tokens(50)
    head = AcceptanceHead(AcceptanceHeadConfig(8, depth=1, embeddings=(5, 4), features=("log_q", "token")))
    warm_start(head, log_q, entropy, label)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    before = {name: value.detach().clone() for name, value in head.named_parameters()}
    states, embeddings = torch.randn(50, 8), torch.randn(50, 4)
    for _ in range(3):
        logit = head(states, torch.from_numpy(np.exp(log_q)).float(), None, None, embeddings)
        torch.nn.functional.binary_cross_entropy_with_logits(logit, torch.from_numpy(label).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(value, before[name]) for name, value in head.named_parameters())


def test_a_head_without_scalars_keeps_its_random_weights():
    head = AcceptanceHead(AcceptanceHeadConfig(8, features=()))
    before = head.output.weight.detach().clone()
    assert not warm_start(head, *tokens(10))
    assert torch.equal(head.output.weight, before)
