"""The committed acceptance head belongs to the committed pair and knows something of it."""

import math

import torch

from benchmarks.pair import CHECKPOINTS
from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.models.checkpoint import read_info
from drafttrain.models.loading import load_drafter


def test_the_reference_head_is_made_for_the_reference_pair():
    drafter = load_drafter(str(CHECKPOINTS / "reference-drafter"), "bfloat16")
    made_for = read_info(CHECKPOINTS / "reference-drafter").target
    head = AcceptanceHead.load(CHECKPOINTS / "reference-head", target=made_for, drafter=drafter.fingerprint)
    assert (head.state, head.config.depth, head.config.tied, head.features) == ("consumed", 3, True, ())
    scores = head.score(torch.randn(64, head.config.hidden_size), None, None, None)
    assert ((scores > 0) & (scores < 1)).all() and not math.isclose(scores.min(), scores.max(), abs_tol=0.05)
