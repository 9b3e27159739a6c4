"""Documents end to end in one row: a model reads them as it reads each alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.errors import UserError
from drafttrain.models.longspec_states import read_target
from drafttrain.ops.documents import document_attention
from tests.models.test_longspec import family, states

KINDS = ["full_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 3, "layer_types": KINDS},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 3, "layer_types": KINDS, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 3, "layer_types": KINDS, "query_pre_attn_scalar": 16},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_row_is_read_as_its_documents_alone(name):
    model = family(name, **FAMILIES[name]).double()
    lengths, ids = [5, 1, 9], torch.randint(1, 60, (1, 15), generator=torch.Generator().manual_seed(0))
    jumps = torch.tensor([0, 1, 2, 40, 41, 7, *range(3), *range(60, 66)]).unsqueeze(0)
    row = read_target(model, ids, None, 2, jumps, lengths=lengths)
    assert [(part.start, part.stop) for part in row.documents] == [(0, 5), (5, 6), (6, 15)]
    for part in row.documents:
        alone = read_target(model, ids[:, part], torch.ones_like(ids[:, part]), 2, jumps[:, part])
        near = {"atol": 2e-6, "rtol": 0}  # some take softmax in float32
        torch.testing.assert_close(row.hidden_BTH[:, part], alone.hidden_BTH, **near)
        torch.testing.assert_close(row.keys_BMTD[:, :, part], alone.keys_BMTD, **near)
        torch.testing.assert_close(row.values_BMTD[:, :, part], alone.values_BMTD, **near)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.sampled_from([None, 1, 3]), st.sampled_from([None, 5.0]))
def test_attention_of_documents_is_that_of_a_block_diagonal_mask(lengths, window, softcap):
    total = sum(lengths)
    q, k, v = states(1, 4, total, 8), states(1, 2, total, 8, seed=1), states(1, 2, total, 8, seed=2)
    number = torch.tensor([place for place, length in enumerate(lengths) for _ in range(length)])
    ahead = torch.arange(total).unsqueeze(1) - torch.arange(total)
    seen = (number.unsqueeze(1) == number) & (ahead >= 0) & (ahead < (window or total))
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
    attend = document_attention(lengths)
    found, _ = attend(torch.nn.Module(), q, k, v, None, scaling=0.3, softcap=softcap, sliding_window=window)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_attention_sinks_are_refused():
    q = states(1, 2, 3, 8)
    with pytest.raises(UserError, match="attention sinks"):
        document_attention([3])(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2))
