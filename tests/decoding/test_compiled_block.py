"""A compiled LongSpec block gives what it gives uncompiled, for every width, length and batch, with a few graphs."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.longspec import BlockEngine, LongSpec
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import Confidence
from drafttrain.decoding.target_view import TargetView
from drafttrain.ops.sampling import Sampling
from tests.decoding.longspec_pairs import longspec_pair
from tests.decoding.support import greedy_reference

ROUNDING = 1e-5
PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 3, 4, 12, 13, 14, 15, 1]]


@pytest.fixture(scope="module")
def engines():
    """The same block, compiled and not, beside the same target; its ring has as many slots as a cache at first."""
    target, block = longspec_pair(window=192)
    made = []
    for compiled in (True, False):
        engine = Engine(copy.deepcopy(target).double(), compiled=compiled)
        made.append(BlockEngine(copy.deepcopy(block).double(), engine))
    return made


@torch.inference_mode()
def drafted(engine: BlockEngine, prompts: list[list[int]], widths: list[int]) -> list[torch.Tensor]:
    """Logits and states of a few forwards behind prompts, some of them taken back."""
    target = engine.target
    cache, ring = target.new_cache(len(prompts)), engine.new_cache(len(prompts))
    target.read(cache, [prompt[:-1] for prompt in prompts])
    engine.look(TargetView(target, cache))
    engine.read(ring, [prompt[:-1] for prompt in prompts])
    found = []
    for step, width in enumerate(widths):
        tokens = torch.randint(1, 20, (len(prompts), width), generator=torch.Generator().manual_seed(step))
        output = engine.forward(ring, tokens, keep="last")
        found += [output.logits.clone(), output.hidden.clone()]
        if step % 2:
            ring.rollback([length - 1 for length in ring.lengths])
    return found


@pytest.mark.parametrize(
    "prompts",
    [
        PROMPTS[:1],
        pytest.param([PROMPTS[0]] * 2, marks=pytest.mark.slow),
        pytest.param(PROMPTS, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_block_equals_the_other(engines, prompts):
    """Also where the ring has gone round."""
    widths = [1, 2, *[60] * 5, 3, 1]
    for mine, other in zip(*(drafted(engine, prompts, widths) for engine in engines), strict=True):
        assert (mine - other).abs().max() < ROUNDING


def test_other_lengths_and_another_cache_of_the_target_need_no_further_graph(engines):
    compiled, _ = engines
    drafted(compiled, PROMPTS[:1], [1, 2])
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for length in (2, 40, 300):
        drafted(compiled, [[1] * length], [2, 1, 7, 1])
        gc.collect()  # what a graph refers to must live as long as the engine
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_text_is_that_of_the_uncompiled_pair(temperature):
    target, block = longspec_pair()
    prompts = PROMPTS[:1] if temperature == 0 else PROMPTS
    found = []
    for compiled in (True, False):
        engine = Engine(copy.deepcopy(target), compiled=compiled)
        drafter = LongSpec(block, stop=Confidence(0.3, max_length=4))
        done = Decoder(engine, drafter, Sampling(temperature)).generate(prompts, 20)
        assert (drafter.engine.compiled is not None) == compiled
        found.append([(each.token_ids, each.counts.drafted) for each in done])
    assert found[0] == found[1]
    if not temperature:
        assert found[0][0][0] == greedy_reference(target, prompts[0], 20)


def test_the_block_of_a_target_that_is_not_compiled_is_not(engines):
    assert engines[1].compiled is None
