"""Graphs on a GPU: the same numbers as without, nothing allocated and no waiting once they are captured."""

from __future__ import annotations

import copy

import pytest
import torch

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama
from tests.decoding.support import pair

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 12, 3, 1, 1], [4, 4], [6, 2, 6]]
LIMITS = [30, 14, 9, 20, 11]


def on_gpu(model: torch.nn.Module, compiled: bool, dtype: torch.dtype | None = None) -> Engine:
    return Engine(copy.deepcopy(model).to("cuda", dtype), compiled=compiled)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("rows", [1, 5])
def test_float64_decodes_are_the_same(temperature, rows):
    """Masked attention: the kernels do not read float64."""
    found = []
    for compiled in (True, False):
        target, drafter = (on_gpu(model, compiled) for model in pair())
        decoder = Decoder(target, ModelDrafter(drafter, 4), Sampling(temperature), eos_ids={23})
        found.append([each.token_ids for each in decoder.generate(PROMPTS[-rows:], LIMITS[-rows:])])
        if compiled:
            assert not target.compiled.refused and target.compiled.captured and drafter.compiled.captured
    assert found[0] == found[1]


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_kernels_give_the_logits_of_the_uncaptured_path(dtype, rounding):
    model = build_llama(64, hidden=256, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05)
    outputs = []
    for compiled in (True, False):
        engine = on_gpu(model, compiled, dtype)
        cache = engine.new_cache(3, 300)
        engine.read(cache, [list(range(40)), [3], [9, 8, 7]])
        tokens = torch.arange(18, device="cuda").reshape(3, 6)
        found = [engine.forward(cache, tokens), engine.forward(cache, tokens[:, :1], keep="last")]
        cache.rollback([30, 4, 5])
        found.append(engine.forward(cache, tokens[:, :3]))
        outputs.append(found)
        if compiled:
            assert engine.compiled._split and not engine.compiled.refused and engine.compiled.captured == 3
    for mine, other in zip(*outputs, strict=True):
        spread = other.logits.float().std()
        assert (mine.logits.float() - other.logits.float()).abs().max() < rounding * spread


def test_the_steady_state_allocates_nothing_and_captures_nothing():
    target, drafter = (on_gpu(model, True, torch.bfloat16) for model in pair())
    decoder = Decoder(target, ModelDrafter(drafter, 4), Sampling(0.0))

    def state() -> tuple[int, ...]:
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats()
        names = ("num_device_alloc", "num_device_free", "allocated_bytes.all.current", "reserved_bytes.all.current")
        return *(stats[name] for name in names), target.compiled.captured, drafter.compiled.captured

    def generate() -> None:
        for prompt in ([1, 5, 3], [7, 2], [9, 9, 9, 4]):
            decoder.generate([prompt], 60)

    generate()
    generate()
    before = state()
    generate()
    assert state() == before


def test_a_round_waits_for_the_device_once():
    """The read of the reply. Drafting and verifying only queue work, for a single row and for ragged ones."""
    target, drafter = (on_gpu(model, True, torch.bfloat16) for model in pair())
    for prompts in ([[1, 5, 3]], [[1, 5, 3], [2], [7, 8]]):
        decoder = Decoder(target, ModelDrafter(drafter, 4), Sampling(0.0))
        decoder.generate(prompts, 40)
        read, reads = decoder._read, []

        def watched_read(draft, *found, read=read, reads=reads):
            torch.cuda.set_sync_debug_mode("default")
            reply = read(draft, *found)
            torch.cuda.set_sync_debug_mode("error")  # from here on, waiting raises
            reads.append(reply)
            return reply

        decoder._read = watched_read
        start = decoder._start

        def unwatched_start(*arguments, start=start):
            start(*arguments)
            torch.cuda.set_sync_debug_mode("error")

        decoder._start = unwatched_start
        try:
            completions = decoder.generate(prompts, 40)
            with pytest.raises(RuntimeError, match="synchroniz"):
                torch.ones(1, device="cuda").item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(reads) == max(each.counts.rounds for each in completions)
