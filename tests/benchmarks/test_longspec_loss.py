"""The loss by place: it is the divergence of what decoding would draft, binned as it says, and drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.longspec_loss import binned, divergences, draw, summary
from drafttrain.models.loading import Loaded
from drafttrain.models.longspec_states import read_target
from tests.decoding.longspec_pairs import longspec_pair


def test_a_divergence_is_that_of_the_two_distributions():
    target, block = longspec_pair()
    ids = torch.randint(0, 24, (1, 20), generator=torch.Generator().manual_seed(0))
    reading = read_target(target, ids, None, block.config.kv_layer)
    found = divergences(Loaded(target, None, None, ""), block, reading, step=2)
    assert found.shape == (20,) and (found > 0).all()
    first = divergences(Loaded(target, None, None, ""), block, reading, step=1)
    assert not torch.allclose(found, first)  # another step reads less
    log_p = target(ids).logits[0, 7].float().log_softmax(-1)
    assert first[7] <= -log_p.min() + 5


def test_bins_are_weighted_means():
    losses, weights = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([1.0, 0.5, 0.0, 0.0])
    assert binned(losses, weights, np.array([0.0, 2.0, 4.0])) == [pytest.approx(2.5 / 1.5), None]


def test_figures_and_picture(tmp_path):
    rows = [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0], [2.0, 1.0, 1.0, 1.0, None, 1.0, 1.0, 5.0]]
    edges = np.linspace(0, 800, 9)
    found = summary("a", rows, edges, window=100)
    assert found["loss_end_a"] == 4 and found["loss_growth_a"] == 4
    assert found["loss_a_low"] <= found["loss_a"] <= found["loss_a_high"]
    draw({"edges": edges.tolist(), "step": 1, "losses": {"a": rows, "b": rows}}, 300, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
