"""Split attention in plain torch, step by step as the kernels compute it, against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.ops.attention import folded_attention
from drafttrain.ops.split_attention import (
    reach_of,
    serves,
    split_attention,
    split_attention_layer,
    split_attention_reference,
)
from tests.ops.split_cases import CASES, Case, definition, inputs


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_equals_its_definition_whatever_lies_beyond_the_live_slots(case):
    arguments = inputs(case._replace(dtype=torch.float64))
    expected = definition(*arguments)
    assert torch.allclose(split_attention(*arguments), expected, atol=1e-12)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_the_rounding_of_each_dtype(dtype, rounding):
    arguments = inputs(Case(dtype=dtype, window=11))
    out = split_attention(*arguments)
    assert out.dtype == dtype
    assert (out - definition(*arguments)).abs().max() < rounding


@settings(deadline=None, max_examples=60)
@given(
    st.builds(
        Case,
        groups=st.integers(1, 8),
        key_heads=st.integers(1, 3),
        size=st.sampled_from([8, 12]),
        width=st.integers(1, 16),
        first=st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple),
        window=st.none() | st.integers(1, 60),
        slots=st.just(64),
        softcap=st.sampled_from([0.0, 1.5]),
        dtype=st.just(torch.float64),
    ),
    st.integers(1, 9),
    st.sampled_from([1, 4, 16, 64]),
)
def test_into_how_many_parts_the_keys_are_split_does_not_matter(case, splits, block):
    arguments = inputs(case)
    out = split_attention_reference(*arguments, splits=splits, block=block)
    assert torch.allclose(out, split_attention_reference(*arguments, splits=1, block=1), atol=1e-12)
    assert torch.allclose(out, definition(*arguments), atol=1e-12)


def test_as_a_layer_it_equals_masked_attention():
    """What models call: the same arguments, another mask."""
    query, keys, values, reach, scale, _ = inputs(Case(dtype=torch.float64))
    keys, values = keys.nan_to_num(), values.nan_to_num()
    visible = torch.arange(64) <= reach[:, :, :, :1] + torch.arange(3).repeat(2)[:, None]
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    module = torch.nn.Module()
    for scaling, softcap in ((scale, None), (None, None), (0.3, 2.0)):
        expected, _ = folded_attention(module, query, keys, values, mask, scaling, softcap)
        out, _ = split_attention_layer(module, query, keys, values, reach, scaling, softcap, dropout=0.0)
        assert torch.allclose(out, expected, atol=1e-12)
    with pytest.raises(ValueError, match="sinks"):
        split_attention_layer(module, query, keys, values, reach, s_aux=torch.zeros(4))


def test_a_lost_split_is_noticed(monkeypatch):
    """Negative control: the comparisons above can fail."""
    from drafttrain.ops import split_attention as module

    monkeypatch.setattr(module, "_merged", lambda one, other: one)
    arguments = inputs(Case(dtype=torch.float64))
    assert (split_attention_reference(*arguments) - definition(*arguments)).abs().max() > 1e-2


def test_the_operator_keeps_what_torch_asks_of_one():
    arguments = inputs(Case(dtype=torch.float64))
    found = torch.library.opcheck(split_attention, arguments, test_utils=("test_schema", "test_faketensor"))
    assert found == {"test_schema": "SUCCESS", "test_faketensor": "SUCCESS"}


def test_only_what_the_kernels_can_read_is_theirs():
    keys = torch.zeros(1, 2, 8, 64)
    assert not serves(torch.device("cpu"), [(keys, keys)])
    cuda = torch.device("cuda")
    assert not serves(cuda, [(keys, keys), (keys.double(), keys.double())])
    assert not serves(cuda, [(keys, keys[..., :32])])
    wide = torch.zeros(1, 2, 8, 512)
    assert not serves(cuda, [(wide, wide)])


def test_reach_is_a_mask_that_models_hand_through():
    reach = reach_of(torch.tensor([4, 0]), 3)
    assert reach.shape == (2, 1, 1, 2)
    assert reach[:, 0, 0].tolist() == [[4, 3], [0, 3]]
    assert reach_of(torch.tensor([4]), None)[0, 0, 0, 1] > 1 << 29
