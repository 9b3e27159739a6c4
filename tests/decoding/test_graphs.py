"""Captured forwards: the same tokens as uncaptured ones, few graphs, storages that are lent again as if new.

A stand-in for the CUDA recorder runs the captured function anew at every replay, on the buffers it was captured with:
what would be stale or of the wrong size on a GPU is so here.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.decoding import graphs
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.graphs import GraphForward, Recording, StoragePool, filled, slots_for
from drafttrain.decoding.loop import Conversation, Decoder
from drafttrain.decoding.stopping import Confidence
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.ops.sampling import Sampling
from tests.decoding.support import pair
from tests.ops.test_attention import build

ROUNDING = 1e-5  # of rotary embeddings and norms, which the library computes in float32


class StandIn:
    """Replays by running again into the outputs of the first run."""

    def __init__(self) -> None:
        self.replays = 0

    def record(self, run) -> Recording:
        outputs = tuple(output.clone() for output in run())

        def replay() -> None:
            self.replays += 1
            for static, fresh in zip(outputs, run(), strict=True):
                static.copy_(fresh)

        return Recording(replay, outputs)


def captured(model: torch.nn.Module, recorder: object | None = None, fuse: bool = False) -> Engine:
    """An engine whose short forwards are captured by a stand-in."""
    engine = Engine(model)
    engine.compiled = GraphForward(engine, recorder or StandIn(), fuse)
    return engine


@pytest.fixture(params=[True, False], ids=["split", "masked"])
def split(request, monkeypatch):
    """Both attentions: the kernels' (in plain torch) and the masked one."""
    monkeypatch.setattr(graphs, "serves", lambda device, storages: request.param)
    return request.param


def shapes(engine: Engine) -> list[tuple[int, int]]:
    """Rows and widths of all graphs of the storages that are free."""
    return sorted({(key.rows, key.width) for storage in engine.compiled.pool.free for key in storage.graphs})


# ---- one forward ----


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "qwen2-sliding", "gpt2"])
def test_families_read_ragged_blocks_as_they_do_uncaptured(name, split):
    model = build(name).double()
    rows = [[5, 9, 2, 33, 7, 1, 6, 8, 3, 4], [8, 3], [11, 60, 4, 9, 9]]
    found = []
    for engine in (captured(model), Engine(model)):
        cache = engine.new_cache(3)
        engine.read(cache, rows)
        outputs = [engine.forward(cache, torch.arange(3 * width).reshape(3, width)) for width in (4, 1, 1, 6)]
        cache.rollback([4, 2, 6])
        outputs.append(engine.forward(cache, torch.full((3, 2), 5), [2, 1, 0], keep="last"))
        outputs.append(engine.forward(cache, torch.full((3, 2), 6), keep="last"))
        found.append(outputs)
    assert engine.compiled is None
    for mine, other in zip(*found, strict=True):
        assert mine.logits.shape == other.logits.shape
        assert torch.allclose(mine.logits, other.logits, atol=ROUNDING)
        assert torch.allclose(mine.hidden, other.hidden, atol=ROUNDING)


@torch.inference_mode()
def test_an_output_is_not_overwritten_by_the_next_forward(split):
    engine = captured(pair()[0])
    cache = engine.new_cache(1)
    engine.read(cache, [[1, 2, 3]])
    first = engine.forward(cache, torch.tensor([[4]]))
    kept = [x.clone() for x in first]
    engine.forward(cache, torch.tensor([[9]]))
    assert all(torch.equal(x, y) for x, y in zip(first, kept, strict=True))


# ---- whole decodes ----

PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 12, 3, 1, 1], [4, 4], [6, 2, 6]]
LIMITS = [3, 14, 9, 20, 11]


def decode(engines: list[Engine], sampling: Sampling, prompts=PROMPTS, limits=LIMITS, **rule) -> list[list[int]]:
    drafter = ModelDrafter(engines[1], **rule or {"length": 4})
    decoder = Decoder(engines[0], drafter, sampling, eos_ids={23}, seed=2)
    return [completion.token_ids for completion in decoder.generate(prompts, limits)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rule", [{"length": 4}, {"stop": Confidence(0.4, max_length=5)}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("rows", [1, 5])
def test_decodes_are_the_same_while_rows_leave(temperature, rule, rows, split):
    models = pair()
    sampling = Sampling(temperature)
    plain = decode(
        [Engine(model) for model in models], sampling, PROMPTS[-rows:], LIMITS[-rows:], **copy.deepcopy(rule)
    )
    engines = [captured(model) for model in models]
    assert decode(engines, sampling, PROMPTS[-rows:], LIMITS[-rows:], **copy.deepcopy(rule)) == plain
    assert all(engine.compiled.captured for engine in engines)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_trees_are_read_beside_the_graphs_in_the_same_storages(temperature, split):
    """Chains between them, where budgets end, by graphs; what a tree left behind is overwritten or never seen."""
    found = []
    for make in (captured, Engine):
        target, drafter = (make(model) for model in pair())
        decoder = Decoder(target, TreeDrafter(drafter, [3, 4, 2]), Sampling(temperature), eos_ids=(4,))
        completions = [*decoder.generate(PROMPTS, LIMITS), *decoder.generate(PROMPTS, LIMITS)]
        found.append([completion.token_ids for completion in completions])
        if make is captured:
            assert drafter.compiled.captured and not drafter.compiled.refused
    assert found[0] == found[1]


def test_later_calls_capture_nothing_and_see_nothing_of_earlier_ones(split):
    models = pair()
    engines = [captured(model) for model in models]
    sampling = Sampling(0.0)
    others = [*PROMPTS[:4], [3, 3, 3, 3]]
    texts = [decode(engines, sampling), decode(engines, sampling, others)]
    made = [engine.compiled.captured for engine in engines]
    for engine in engines:
        assert len(engine.compiled.pool.free) == 1, "the caches of the decoders that are gone"
        with torch.inference_mode():
            for keys, values in engine.compiled.pool.free[0].tensors:
                keys.fill_(torch.nan)
                values.fill_(torch.inf)
    assert [decode(engines, sampling), decode(engines, sampling, others)] == texts
    assert [engine.compiled.captured for engine in engines] == made
    assert [len(engine.compiled.pool.free) for engine in engines] == [1, 1]


def test_one_decoder_uses_one_storage_over_and_over(split):
    engine = captured(pair()[0])
    decoder = Decoder(engine, sampling=Sampling(0.0))
    storages = set()
    for prompt in ([1, 2, 3], [4, 5, 6, 7], [3, 9]):
        decoder.generate([prompt], 8)
        storages.add(id(decoder._cache.storage))
    assert len(storages) == 1 and engine.compiled.captured == 1 and not engine.compiled.pool.free


def test_batches_are_filled_up_so_that_leaving_rows_need_few_graphs(split):
    target = captured(pair()[0])
    decoder = Decoder(target, sampling=Sampling(0.0))
    decoder.generate([[1, 2, 3]] * 16, list(range(2, 18)))
    del decoder
    assert {rows for rows, _ in shapes(target)} == {16, 12, 8, 6, 4, 3, 2, 1}


def test_a_sequence_may_outgrow_its_storage(split):
    """Addresses change, so the graphs of the storage go; so do ranges of keys, for masked attention."""
    model = pair()[0]
    found = []
    for engine in (captured(model), Engine(model)):
        with torch.inference_mode():
            cache = engine.new_cache(2)
            engine.read(cache, [[1, 2], [3]])
            tokens = torch.arange(60).reshape(2, 30) % 24
            found.append([engine.forward(cache, tokens).logits for _ in range(13)])
    assert cache.slots > 256
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, atol=ROUNDING)


@torch.inference_mode()
def test_rows_that_fill_up_a_batch_write_nothing_beyond_their_storage(split):
    """They have no length of their own, nor that of a longer batch which the same buffers served before."""
    model = pair()[0]
    engine, plain = captured(model), Engine(model)
    longer = engine.new_cache(6, 400)
    engine.read(longer, [[1, 2, 3] * 100] * 6)
    engine.forward(longer, torch.ones(6, 1, dtype=torch.int64))
    logits = []
    for each in (engine, plain):
        cache = each.new_cache(5, 20)
        each.read(cache, [[1, 2], [3], [4], [5], [6, 7, 8]])
        logits.append(each.forward(cache, torch.ones(5, 1, dtype=torch.int64)).logits)
    assert torch.allclose(*logits, atol=ROUNDING)
    assert not engine.compiled.refused


@torch.inference_mode()
def test_only_so_many_graphs_are_kept_those_used_last(monkeypatch):
    monkeypatch.setattr(graphs, "_MOST_GRAPHS", 2)
    engine = captured(pair()[0])
    cache = engine.new_cache(1)
    engine.read(cache, [[1]])
    for width in (1, 2, 1, 3, 1):
        engine.forward(cache, torch.ones(1, width, dtype=torch.int64))
    assert [key.width for key in cache.storage.graphs] == [3, 1]
    assert engine.compiled.captured == 3


def test_a_chat_goes_on_in_its_storage(split):
    models = pair()
    texts = []
    for engines in ([captured(model) for model in models], [Engine(model) for model in models]):
        chat = Conversation(Decoder(engines[0], ModelDrafter(engines[1], 3), Sampling(0.0)))
        first = chat.reply([1, 5, 3], 9).token_ids
        texts.append([first, chat.reply([1, 5, 3, *first, 8, 2], 9).token_ids])
    assert texts[0] == texts[1]


# ---- refusals ----


class Unable:
    """A recorder on which a capture fails, at the end too, as a real one does."""

    def record(self, run) -> Recording:
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_a_model_that_cannot_be_captured_is_decoded_eagerly_and_one_line_says_why(caplog):
    models = pair()
    engines = [captured(models[0], Unable()), Engine(models[1])]
    assert decode(engines, Sampling(0.0)) == decode([Engine(model) for model in models], Sampling(0.0))
    [record] = caplog.records
    assert "LlamaForCausalLM cannot be captured" in record.message
    assert "not permitted when stream is capturing" in record.message
    assert engines[0].compiled.refused


def test_kernels_that_do_not_run_are_done_without(caplog, monkeypatch):
    def broken(*arguments):
        raise OSError("no C compiler")

    monkeypatch.setattr(graphs, "serves", lambda device, storages: True)
    monkeypatch.setattr(graphs, "split_attention", broken)
    models = pair()
    engines = [captured(models[0]), Engine(models[1])]
    assert decode(engines, Sampling(0.0)) == decode([Engine(model) for model in models], Sampling(0.0))
    [record] = caplog.records
    assert "no C compiler" in record.message
    assert engines[0].compiled.captured


def test_layers_on_several_devices_are_not_captured(caplog):
    engine = Engine(pair()[0])
    engine.model.lm_head.to("meta")  # a second device
    assert GraphForward(engine).refused
    assert "several devices" in caplog.text


def test_a_forward_that_does_not_compile_is_captured_as_it_is(caplog, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(graphs, "compiled", lambda function: broken)
    models = pair()
    engines = [captured(models[0], fuse=True), Engine(models[1])]
    assert decode(engines, Sampling(0.0)) == decode([Engine(model) for model in models], Sampling(0.0))
    [record] = caplog.records
    assert "cannot be compiled" in record.message
    assert engines[0].compiled.captured


@pytest.mark.slow
def test_compiled_forwards_are_captured(split):
    """One compilation serves every width, batch and range of keys."""
    models = pair(layers=1)
    engines = [captured(models[0], fuse=True), Engine(models[1])]
    assert decode(engines, Sampling(0.0)) == decode([Engine(model) for model in models], Sampling(0.0))
    assert engines[0].compiled._fuse
    assert len(engines[0].compiled._compiled) <= 4 < engines[0].compiled.captured


# ---- the pool ----


def test_the_smallest_storage_that_is_large_enough_is_lent():
    pool = StoragePool(1)
    small, large = pool.take(1, 256), pool.take(4, 512)
    pool.give(large)
    pool.give(small)
    assert pool.take(1, 200) is small
    assert pool.take(1, 200) is large
    assert pool.take(1, 200) not in (small, large)


def test_a_new_storage_replaces_those_it_can_stand_in_for():
    pool = StoragePool(1)
    small, wide, long = pool.take(2, 256), pool.take(8, 256), pool.take(1, 2048)
    for storage in (small, wide, long):
        pool.give(storage)
    pool.take(4, 1024)
    assert pool.free == [wide, long]


def test_a_cache_that_is_dropped_gives_its_storage_back_at_once():
    engine = captured(pair()[0])
    gc.disable()
    try:
        cache = engine.new_cache(2, 100)
        storage = cache.storage
        assert not engine.compiled.pool.free
        del cache
        assert engine.compiled.pool.free == [storage]
    finally:
        gc.enable()


def test_an_engine_that_is_dropped_frees_its_storages_at_once():
    engine = captured(pair()[0])
    with torch.inference_mode():
        cache = engine.new_cache(1)
        engine.read(cache, [[1, 2]])
    storage = weakref.ref(cache.storage)
    gc.disable()
    try:
        del cache, engine
        assert storage() is None
    finally:
        gc.enable()


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(0, 200_000))
def test_sizes_are_filled_up_by_little(rows, capacity):
    assert rows <= filled(rows) <= max(rows * 3 / 2, 2)
    assert filled(filled(rows)) == filled(rows)
    assert capacity <= slots_for(capacity) <= max(capacity * 9 / 8, capacity + 256)
    assert slots_for(slots_for(capacity)) == slots_for(capacity)
