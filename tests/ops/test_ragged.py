"""A ragged cache against the model's own attention with masks, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.decoding.engine import Engine
from drafttrain.ops.attention import windows_by_layer
from drafttrain.ops.ragged import RaggedCache
from tests.ops.test_attention import build, own_logits

CPU = torch.device("cpu")


def dropped(engine: Engine, text: list[int], kept: list[list[list[int]]], room: int = 4) -> RaggedCache:
    """A text of which each layer and head keeps its own slots."""
    dense = engine.new_cache(1)
    engine.read(dense, [text])
    counts = [[[len(slots) for slots in heads]] for heads in kept]
    cache = RaggedCache(counts, [len(text)], [len(text)], windows_by_layer(engine.config), CPU, room)
    for layer, heads in enumerate(kept):
        keys, values = (each[0, :, : len(text)] for each in (dense.layers[layer].keys, dense.layers[layer].values))
        cache.fill(layer, 0, keys, values, [torch.tensor(slots) for slots in heads], torch.arange(len(text)))
    return cache


class Hiding:
    """The model's own attention, with some keys hidden from later queries, each layer and head its own."""

    def __init__(self, model: torch.nn.Module, text: int, kept: list[list[list[int]]]) -> None:
        self.model, self.text, self.kept = model, text, kept

    def logits(self, row: list[int]) -> torch.Tensor:
        from drafttrain.ops.attention import attending_by

        size = len(row)

        def attend(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
            groups = query.shape[1] // key.shape[1]
            hidden = torch.ones(size, size, dtype=torch.bool).triu(1).repeat(key.shape[1], 1, 1)
            for head, slots in enumerate(self.kept[module.layer_idx]):
                gone = [at for at in range(self.text) if at not in slots]
                hidden[head, self.text :, gone] = True
            if window := windows_by_layer(self.model.config)[module.layer_idx]:
                hidden |= torch.ones(size, size, dtype=torch.bool).tril(-window)
            key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
            scores = query @ key.transpose(2, 3) * (scaling or query.shape[3] ** -0.5)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(hidden.repeat_interleave(groups, 0), -torch.inf)
            return (scores.softmax(-1) @ value).transpose(1, 2), None

        with attending_by(self.model.config, attend), torch.no_grad():
            return self.model(torch.tensor([row]), use_cache=False).logits[0]


ROW = [7, 3, 9, 9, 1, 22, 40, 5, 6, 8, 33, 2, 17, 50, 4, 4, 21, 60, 11]
UNEVEN = [[[0, 3, 9], [1, 2, 5, 8]], [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [9]], [[2, 9], [0, 7]]]
EVEN = [[[0, 3, 9], [1, 2, 8]], [[5, 6], [0, 9]], [[1, 2, 3, 9], [0, 7, 8, 9]]]


@torch.inference_mode()
@pytest.mark.parametrize("kept", [UNEVEN, EVEN], ids=["uneven", "even"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2-sliding", "gemma2", "gemma3", "mistral"])
def test_dropped_keys_are_as_if_masked_in_every_layer_and_head(family, kept):
    model = build(family).double()
    expected = Hiding(model, 10, kept).logits(ROW)[10:]
    engine = Engine(model)
    cache = dropped(engine, ROW[:10], kept)
    block = engine.forward(cache, torch.tensor([ROW[10:14]])).logits[0]
    cache.rollback([12])
    again = engine.forward(cache, torch.tensor([ROW[12:14]])).logits[0]
    steps = [engine.forward(cache, torch.tensor([[token]])).logits[0] for token in ROW[14:]]  # beyond the first room
    found = torch.cat([block[:2], again, *steps])
    assert (found - expected).abs().max() < 1e-5  # eager norms and rotations are float32 in some families
    assert (block - expected[:4]).abs().max() < 1e-5


@torch.inference_mode()
def test_what_was_dropped_binds():
    """Negative control: keeping other keys gives other logits."""
    engine = Engine(build("llama").double())
    expected = Hiding(engine.model, 10, UNEVEN).logits(ROW)[10:]
    cache = dropped(engine, ROW[:10], EVEN)
    assert (engine.forward(cache, torch.tensor([ROW[10:]])).logits[0] - expected).abs().max() > 1e-3


@torch.inference_mode()
def test_rows_of_a_batch_are_what_they_are_alone():
    engine = Engine(build("gemma3").double())
    texts = [ROW[:10], ROW[2:9]]
    choices = [UNEVEN, [[[0, 4], [3]], [[6], [6]], [[0, 1, 2, 3, 4, 5, 6], [5]]]]
    single = [dropped(engine, text, kept, 3) for text, kept in zip(texts, choices, strict=True)]
    both = RaggedCache(
        [[list(map(len, kept[layer])) for kept in choices] for layer in range(3)],
        [10, 7],
        [10, 7],
        windows_by_layer(engine.config),
        CPU,
        3,
    )
    for row, cache in enumerate(single):
        for layer in range(3):
            for kept in cache.held(layer, 0):
                arena = cache._arenas[layer]
                mine = both._arenas[layer]
                mine.allocate(kept.keys, kept.values)
                for head in range(kept.heads.start, kept.heads.stop):
                    size = arena.kept[0][head]
                    for ours, theirs in ((mine.keys, arena.keys), (mine.values, arena.values)):
                        at, old = mine.offsets[row][head], arena.offsets[0][head]
                        ours[at : at + size] = theirs[old : old + size]
                    mine.positions[at : at + size] = arena.positions[old : old + size]
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    together = engine.forward(both, tokens, counts=[4, 2]).logits
    alone = [engine.forward(cache, tokens[row : row + 1]).logits[0] for row, cache in enumerate(single)]
    assert (together[0] - alone[0]).abs().max() < 1e-12
    assert (together[1, :2] - alone[1][:2]).abs().max() < 1e-12
    single[1].rollback([9])
    both.keep([1])
    step = torch.tensor([[9]])
    left, right = engine.forward(both, step).logits, engine.forward(single[1], step).logits
    assert (left - right).abs().max() < 1e-12


def numbers(cache: RaggedCache, layer: int, row: int) -> list[list[int]]:
    return [head[:, 0].int().tolist() for kept in cache.held(layer, row) for head in kept.keys]


KEPT = st.lists(st.lists(st.sets(st.integers(0, 5)), min_size=2, max_size=2), min_size=1, max_size=3)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 4), st.integers(0, 2**20)),
        st.tuples(st.just("rollback"), st.integers(0, 2**20)),
        st.tuples(st.just("leave"), st.integers(0, 9)),
    ),
    max_size=10,
)


@settings(deadline=None, max_examples=60)
@given(KEPT, STEPS)
def test_a_ragged_cache_holds_what_lists_would_hold(kept, steps):
    """One layer, two heads; keys are numbers."""
    slots = [[sorted(head) for head in row] for row in kept]
    cache = RaggedCache([[list(map(len, row)) for row in slots]], [6] * len(kept), [6] * len(kept), [None], CPU, 1)
    rows = []
    for row, heads in enumerate(slots):
        states = (torch.arange(6.0) + 10 * row).reshape(1, 6, 1).repeat(2, 1, 2)
        cache.fill(0, row, states, -states, [torch.tensor(head, dtype=torch.long) for head in heads], torch.arange(6))
        rows.append([[10 * row + slot for slot in head] for head in heads])
    tails: list[list[int]] = [[] for _ in rows]
    fresh = 100
    for name, *given_ in steps:
        if name == "write":
            width, seed = given_
            block = torch.arange(fresh, fresh + len(rows) * width).reshape(len(rows), width)
            fresh += block.numel()
            states = block[:, None, :, None].float().expand(-1, 2, -1, 2)
            cache.open(width)
            assert cache.query_positions().tolist() == [[6 + len(t) + i for i in range(width)] for t in tails]
            cache.write(0, states, -states)
            counts = [(seed >> 3 * row) % (width + 1) for row in range(len(rows))]
            cache.advance(counts)
            tails = [tail + new[:count] for tail, new, count in zip(tails, block.tolist(), counts, strict=True)]
        elif name == "rollback":
            lengths = [(given_[0] >> 3 * row) % (len(tail) + 1) for row, tail in enumerate(tails)]
            cache.rollback([6 + length for length in lengths])
            tails = [tail[:length] for tail, length in zip(tails, lengths, strict=True)]
        elif len(rows) > 1:
            gone = given_[0] % len(rows)
            left = [row for row in range(len(rows)) if row != gone]
            cache.keep(left)
            rows, tails = [rows[row] for row in left], [tails[row] for row in left]
        assert cache.lengths == [6 + len(tail) for tail in tails]
        for row, tail in enumerate(tails):
            assert numbers(cache, 0, row) == [head + tail for head in rows[row]]


@torch.inference_mode()
def test_a_rollback_into_what_was_dropped_is_refused():
    cache = dropped(Engine(build("llama")), ROW[:10], EVEN)
    with pytest.raises(ValueError, match="cannot be rolled back into"):
        cache.rollback([9])


@torch.inference_mode()
def test_memory_is_what_is_kept():
    engine = Engine(build("llama"))
    cache = dropped(engine, ROW[:10], EVEN, room=5)
    slots = sum(len(head) + 5 for layer in EVEN for head in layer)
    assert cache.memory_bytes() == slots * (2 * 8 * 4 + 4)


@torch.inference_mode()
def test_the_model_keeps_its_own_attention_also_after_an_exception():
    model = build("llama").double()
    before = own_logits(model, ROW)
    engine = Engine(model)
    cache = dropped(engine, ROW[:10], EVEN)
    cache.attend = None
    with pytest.raises(TypeError):
        engine.forward(cache, torch.tensor([ROW[10:]]))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(own_logits(model, ROW), before)
