"""Compiled forwards give what uncompiled ones give, for every width, length and batch, with a few graphs in all."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import Confidence
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama
from tests.decoding.support import pair

ROUNDING = 1e-5  # of rotary embeddings and norms, which the library computes in float32


@pytest.fixture(scope="module")
def engines():
    """The same model, compiled and not."""
    model = build_llama(40, layers=1, initializer_range=0.3).double()
    return Engine(model, compiled=True), Engine(copy.deepcopy(model))


@torch.inference_mode()
def read(engine: Engine, pieces: list[tuple[torch.Tensor, list[int] | None]], prompts: list[list[int]], keep: str):
    """The outputs of a few forwards behind prompts."""
    cache = engine.new_cache(len(prompts), 64)
    engine.read(cache, prompts)
    return [engine.forward(cache, tokens, counts, keep) for tokens, counts in pieces]


def tokens(rows: int, width: int) -> torch.Tensor:
    return torch.randint(1, 40, (rows, width), generator=torch.Generator().manual_seed(7 * rows + width))


CASES = {
    "single": ([[3, 1, 4, 1, 5]], [(1, 1), (1, 3), (1, 1), (1, 6), (1, 2)]),
    "aligned": ([[3, 1, 4], [2, 7, 1], [8, 2, 8], [6, 6, 6]], [(4, 1), (4, 4), (4, 2)]),
    "ragged": ([[3, 1, 4, 1], [2, 7], [9]], [(3, 1), (3, 4), (3, 3)]),
}


COMBINATIONS = [(case, keep) for keep in ("all", "last") for case in CASES]


@pytest.mark.parametrize(
    ("case", "keep"),
    [pytest.param(*each, marks=pytest.mark.slow if each != ("single", "all") else ()) for each in COMBINATIONS],
)
def test_a_compiled_forward_equals_the_other(engines, case, keep):
    prompts, shapes = CASES[case]
    pieces = [(tokens(*shape), None) for shape in shapes]
    for mine, other in zip(*(read(engine, pieces, prompts, keep) for engine in engines), strict=True):
        assert torch.allclose(mine.logits, other.logits, atol=ROUNDING)
        assert torch.allclose(mine.hidden, other.hidden, atol=ROUNDING)


@pytest.mark.slow
def test_nothing_is_compiled_again_while_widths_lengths_and_batches_change(engines):
    compiled, _ = engines
    for rows in (1, 3):
        read(compiled, [(tokens(rows, 1), None), (tokens(rows, 2), None)], [[1, 2]] * rows, "all")
    made = len(compiled.compiled.graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, prompt, widths in ((1, 9, (1, 7, 2)), (1, 33, (4, 1, 9)), (2, 5, (2, 1, 5)), (5, 12, (1, 3, 8))):
            read(compiled, [(tokens(rows, width), None) for width in widths], [[1] * prompt] * rows, "all")
    assert len(compiled.compiled.graphs) == made


def test_storage_that_grows_while_decoding_is_followed(engines):
    compiled, plain = engines
    pieces = [(tokens(1, 40), None) for _ in range(9)]  # beyond the first 256 slots
    for mine, other in zip(*(read(engine, pieces, [[1, 2]], "all") for engine in (compiled, plain)), strict=True):
        assert torch.allclose(mine.logits, other.logits, atol=ROUNDING)


@pytest.mark.slow
def test_a_batch_of_which_rows_leave_decodes_as_it_does_uncompiled():
    target, drafter = pair()
    prompts, limits = [[1, 5, 3], [2], [7, 8, 9, 10], [4, 4]], [3, 14, 9, 20]
    found = []
    for compiled in (True, False):
        engines = [Engine(copy.deepcopy(model), compiled=compiled) for model in (target, drafter)]
        decoder = Decoder(engines[0], ModelDrafter(engines[1], stop=Confidence(0.3, max_length=4)), Sampling(0.7))
        found.append([completion.token_ids for completion in decoder.generate(prompts, limits)])
    assert found[0] == found[1]


SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        hf.Qwen2Config(**SIZES, num_hidden_layers=2, num_key_value_heads=2),
        hf.Qwen3Config(**SIZES, num_hidden_layers=2, num_key_value_heads=1),
        hf.MistralConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6),
        hf.Gemma2Config(**SIZES, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6),
        hf.Gemma3TextConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, sliding_window=6),
    ],
    ids=lambda config: config.model_type,
)
def test_families_compile(config):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).double().eval()
    engines = Engine(model, compiled=True).checked(), Engine(copy.deepcopy(model))
    pieces = [(tokens(1, width), None) for width in (1, 3, 1, 5, 1, 2)]
    for mine, other in zip(*(read(engine, pieces, [[3, 1, 4]], "all") for engine in engines), strict=True):
        assert torch.allclose(mine.logits, other.logits, atol=ROUNDING)
    assert engines[0].compiled.graphs
