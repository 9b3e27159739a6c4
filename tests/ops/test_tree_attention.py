"""Attention of trees in two parts, against the dense softmax in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drafttrain.ops.tree import ancestry
from drafttrain.ops.tree_attention import TreeMask, _by_products, _flash_cpu, prefix_attention, tree_attention

HEADS, SIZE = 4, 8
PARENTS = torch.tensor([[-1, -1, 0, 0, 1, 2, 5], [-1, 0, 1, 2, -1, 4, 4]])


def states(rows: int, heads: int, tokens: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(heads * 1000 + tokens)
    return (scale * torch.randn(rows, heads, tokens, SIZE, generator=generator)).to(dtype)


def additive(seen_BQT: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(seen_BQT.shape, dtype=dtype).masked_fill(~seen_BQT, -torch.inf)
    return mask.repeat(1, groups, 1).unsqueeze(1)


def reference(query: Tensor, key: Tensor, value: Tensor, starts: list[int], seen_BQT: Tensor, scale: float) -> Tensor:
    """Every row and head by itself: float64, keys repeated."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    rows = []
    for row, start in enumerate(starts):
        scores = query[row].double() @ key[row].transpose(1, 2) * scale
        seen = torch.zeros(scores.shape[1:], dtype=torch.bool)
        seen[:, :start] = True
        seen[:, start : start + seen_BQT.shape[2]] = seen_BQT[row]
        rows.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value[row])
    return torch.stack(rows).transpose(1, 2)


def apart(starts: list[int], dtype: torch.dtype, key_heads: int = 2, before: int = 0, scale: float = 1.0) -> float:
    """The largest error over both trees, whose first ``before`` nodes are keys only."""
    seen = ancestry(PARENTS)[: len(starts), before:]
    slots = max(starts) + PARENTS.shape[1]
    query = states(len(starts), HEADS, seen.shape[1], dtype, scale)
    key, value = states(len(starts), key_heads, slots, dtype, scale), states(len(starts), key_heads, slots, dtype)
    mask = TreeMask.of(additive(seen, HEADS // key_heads, dtype), starts)
    found = tree_attention(query, key, value, mask, 0.3)
    assert found.dtype == dtype
    return float((found - reference(query, key, value, starts, seen, 0.3)).abs().max())


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("starts", [[0], [1], [50], [50, 50], [50, 3], [0, 9], [9, 0]])
def test_it_is_the_softmax_over_everything_seen(starts, key_heads):
    assert apart(starts, torch.float64, key_heads) < 1e-14
    assert 0 < apart(starts, torch.float32, key_heads) < 1e-6


def test_low_precision_is_merged_in_float32():
    assert apart([60, 12], torch.bfloat16) < 2e-2


@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_parts_of_very_unlike_weight_are_merged_exactly(scale):
    """Scores of thousands: one part has all the mass, and exp would overflow."""
    assert apart([40, 7], torch.float64, scale=scale) < 1e-12


@given(st.integers(0, 6), st.lists(st.integers(0, 30), min_size=1, max_size=2))
@settings(max_examples=30, deadline=None)
def test_nodes_read_before_the_block_are_seen_by_ancestry(before, starts):
    assert apart(starts, torch.float64, before=before) < 1e-13


def test_a_mask_that_hides_a_parent_is_found_out():
    """Negative control: the reference sees what the attention does not."""
    seen = ancestry(PARENTS)[:1]
    wrong = seen.clone()
    wrong[0, 2, 0] = False
    query, key, value = states(1, HEADS, 7), states(1, 2, 27), states(1, 2, 27)
    found = tree_attention(query, key, value, TreeMask.of(additive(wrong, 2, torch.float32), [20]), 0.3)
    assert (found - reference(query, key, value, [20], seen, 0.3)).abs().max() > 1e-3


def test_what_lies_in_slots_behind_a_rows_tree_is_never_read():
    starts = [30, 4]
    seen = ancestry(PARENTS)
    query, key, value = states(2, HEADS, 7), states(2, 2, 37), states(2, 2, 37)
    mask = TreeMask.of(additive(seen, 2, torch.float32), starts)
    clean = tree_attention(query, key, value, mask)
    key[1, :, 11:], value[1, :, 11:] = torch.nan, torch.nan
    assert torch.equal(tree_attention(query, key, value, mask), clean)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [1, 7, 1024, 1025, 2500])
def test_products_of_many_rows_are_as_exact_as_the_kernel(dtype, slots):
    """Both against float64; and log-sum-exps to float32, whatever lies in the chunks before."""
    rows = 130
    query, key, value = (
        states(2, 2, rows, dtype, 4.0), states(2, 2, slots, dtype, 2.0), states(2, 2, slots + 1, dtype)[:, :, :slots]
    )  # fmt: skip
    key[:, :, -1] *= 3  # the largest scores come last
    scores = query.double() @ key.double().transpose(2, 3) * 0.3
    exact, exact_lse = scores.softmax(-1) @ value.double(), scores.logsumexp(-1)
    (own, lse), (kernel, _) = _by_products(query, key, value, 0.3), _flash_cpu(query, key, value, scale=0.3)
    assert (lse - exact_lse).abs().max() < 1e-4
    error, other = ((found.double() - exact).square().mean().sqrt() for found in (own, kernel))
    assert error < 1.2 * other + 1e-6
    found, _ = prefix_attention(query, key, value, 0.3)  # takes it from so many rows on
    assert torch.equal(found, own)
