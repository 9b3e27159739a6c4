"""Attention of few rows over many keys gives what the softmax gives, in every shape, mask and split of the keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.ops import narrow_attention as narrow
from drafttrain.ops.attention import folded_attention
from drafttrain.ops.narrow_attention import graph_attention, load, narrow_attention

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module", autouse=True)
def loaded():
    load()


@pytest.fixture
def threads():
    """Sets their number, for a test."""
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(batch: int, heads: int, rows: int, slots: int, size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, and keys and values that are part of larger storage."""
    query = made((batch, heads, rows, size), dtype, 0)
    return [query, *(made((batch, heads, slots + 9, size), dtype, seed)[:, :, :slots] for seed in (1, 2))]


def expected(query, key, value, mask, scale=None) -> torch.Tensor:
    query, key, value = (each.double() for each in (query, key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores[..., slots_before(key, mask) :] += mask.double()
    return scores.softmax(-1) @ value


def slots_before(key: torch.Tensor, mask: torch.Tensor) -> int:
    return key.shape[2] - mask.shape[3]


def hiding(batch: int, rows: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    """A mask that leaves every row its last slot."""
    hidden = made((batch, 1, rows, slots), torch.float32, 3) < 0
    hidden[..., -1] = False
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.one_of(st.integers(1, 40), st.integers(60, 200)),
    st.integers(1, 300),
    st.sampled_from([2, 10, 16, 48, 64, 80, 128, 258]),
    st.sampled_from(list(ROUNDING)),
    st.data(),
)
def test_it_is_the_softmax(batch, heads, rows, slots, size, dtype, data):
    query, key, value = inputs(batch, heads, rows, slots, size, dtype)
    masked = data.draw(st.integers(0, slots))
    shape = data.draw(st.sampled_from([(1, 1), (1, rows), (batch, 1), (batch, rows)]))
    mask = hiding(*shape, masked, dtype) if masked else None
    found = narrow_attention(query, key, value, mask)
    assert (found.double() - expected(query, key, value, mask)).abs().max() < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("batch", "heads", "slots"), [(1, 1, 511), (1, 1, 1025), (1, 1, 2000), (2, 1, 1537)])
def test_keys_are_shared_out_among_threads(threads, dtype, batch, heads, slots):
    query, key, value = inputs(batch, heads, 6, slots, 64, dtype)
    mask = hiding(batch, 6, 700 if slots > 700 else 9, dtype)
    threads(1)
    whole = narrow_attention(query, key, value, mask, 0.3)
    for count in (2, 3, 4, 9):
        threads(count)
        shared = narrow_attention(query, key, value, mask, 0.3)
        assert (shared.double() - whole.double()).abs().max() < ROUNDING[dtype]
    assert (whole.double() - expected(query, key, value, mask, 0.3)).abs().max() < ROUNDING[dtype]


def test_large_scores_do_not_overflow_and_a_row_that_sees_nothing_finds_nothing():
    query, key, value = inputs(2, 1, 3, 130, 32, torch.float32)
    mask = torch.zeros(2, 1, 3, 130)
    mask[1, 0, 2] = -torch.inf
    found = narrow_attention(1000 * query, key, value, mask)
    assert (found[1, 0, 2] == 0).all()
    seen = expected(1000 * query, key, value, mask)
    seen[1, 0, 2] = 0
    assert (found.double() - seen).abs().max() < 1e-3


def test_what_is_no_number_stays_none():
    query, key, value = inputs(1, 2, 3, 70, 32, torch.float32)
    key[0, 1, 40, 5] = torch.nan
    found = narrow_attention(query, key, value)
    assert found[0, 1].isnan().all() and not found[0, 0].isnan().any()


def test_expanded_and_permuted_inputs_are_read_as_they_are():
    query, key, value = inputs(3, 2, 4, 90, 16, torch.float32)
    mask = hiding(1, 1, 30, torch.float32)
    wanted = expected(query, key, value, mask)
    permuted = query.transpose(1, 2).contiguous().transpose(1, 2)
    found = narrow_attention(permuted, key, value, mask.expand(3, 1, 4, 30))
    assert (found.double() - wanted).abs().max() < ROUNDING[torch.float32]


def test_mixed_types_are_refused():
    query, key, value = inputs(1, 1, 2, 9, 16, torch.float32)
    with pytest.raises(RuntimeError, match="one type"):
        narrow_attention(query, key.bfloat16(), value)


def test_without_a_compiler_graphs_attend_by_the_other_kernel(monkeypatch, capsys):
    monkeypatch.setattr(narrow, "_loaded", None)
    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", broken)
    assert not narrow.load()
    assert "no compiler" in "".join(capsys.readouterr())
    query, key, value = inputs(1, 2, 4, 50, 16, torch.float32)
    found, _ = graph_attention(torch.nn.Module(), query, key, value, hiding(1, 4, 9, torch.float32))
    assert found.shape == (1, 4, 2, 16)


def broken(*_: object) -> None:
    raise RuntimeError("no compiler")


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float64, None), (torch.float32, 5.0), (torch.float32, None)])
@pytest.mark.parametrize("masked", [0, 4, 50])
def test_in_graphs_it_stands_for_folded_attention(dtype, softcap, masked):
    """In types and with caps that it does not know it is folded attention; a short mask speaks of the last slots."""
    query = made((2, 4, 3, 16), dtype, 0)
    _, key, value = inputs(2, 2, 1, 50, 16, dtype)
    mask = hiding(1, 6, masked, dtype) if masked else None
    full = torch.nn.functional.pad(mask, (50 - masked, 0)) if masked else None
    found, _ = graph_attention(torch.nn.Module(), query, key, value, mask, None, softcap)
    wanted, _ = folded_attention(torch.nn.Module(), query, key, value, full, None, softcap)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < ROUNDING[torch.float32]
