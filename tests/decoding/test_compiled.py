"""Compiled forwards give what uncompiled ones give, for every width, length and batch, with a few graphs in all."""

from __future__ import annotations

import copy

import pytest
import torch

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import Confidence
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.ops.sampling import Sampling
from drafttrain.ops.tree import TreeBlock, below
from tests.conftest import build_llama
from tests.decoding.support import pair
from tests.ops.test_attention import build, own_logits

ROUNDING = 1e-4  # of float32


@pytest.fixture(scope="module")
def engines():
    """The same model, compiled and not; in float32, for which graphs have an attention of their own."""
    model = build_llama(40, layers=1, initializer_range=0.3)
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


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("name", ["llama-biased-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3"])
def test_families_compile_and_give_their_own_logits(name):
    """In fp32: a ragged batch, a rejected block rolled back, a block and single steps behind it, windows binding."""
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 64, (length,), generator=generator).tolist() for length in (19, 8, 13)]
    expected = [own_logits(model, row) for row in rows]
    for lengths in ((19, 8, 13), (19,)):
        engine = Engine(model, compiled=True).checked()
        cache = engine.new_cache(len(lengths))
        engine.read(cache, [row[:-6] for row in rows[: len(lengths)]])
        engine.forward(cache, torch.full((len(lengths), 5), 7))
        cache.rollback([length - 6 for length in lengths])
        pieces = [slice(-6, -2), slice(-2, -1), slice(-1, None)]
        found = [
            engine.forward(cache, torch.tensor([row[piece] for row in rows[: len(lengths)]])).logits for piece in pieces
        ]
        assert engine.compiled.graphs
        for row, logits in enumerate(torch.cat(found, 1)):
            assert (logits - expected[row][-6:]).abs().max() < 1e-5


TREE = torch.tensor([[-1, -1, 0, 0, 1, 4], [-1, 0, 1, -2, -1, 4], [-1, 0, 0, 0, 1, 2]])


@torch.inference_mode()
def read_trees(engine: Engine, prompts: list[list[int]]) -> list[torch.Tensor]:
    """A tree with its root, and below it another in two levels, as target and drafter read them."""
    rows = len(prompts)
    cache = engine.new_cache(rows, 64)
    engine.read(cache, prompts)
    starts = list(cache.lengths)
    whole = engine.forward(cache, tokens(rows, 7), tree=TreeBlock.below_root(TREE[:rows])).logits
    cache.keep_path(starts, [[0, 2, 5]] * rows)
    level = below(None, torch.zeros(rows, 3, dtype=torch.int64))
    first = engine.forward(cache, tokens(rows, 3), tree=level).logits
    second = engine.forward(cache, tokens(rows, 4), tree=below(level, torch.tensor([[1, 0, 2, 2]] * rows))).logits
    return [whole, first, second]


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c != "single" else ()) for c in CASES])
def test_compiled_trees_are_read_as_the_others(engines, case):
    prompts = CASES[case][0][:3]
    made = set(engines[0].compiled.graphs)
    for mine, other in zip(*(read_trees(engine, prompts) for engine in engines), strict=True):
        assert torch.allclose(mine, other, atol=ROUNDING)
    assert any(graph.tree for graph in engines[0].compiled.graphs if graph not in made)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2", "gemma3"])
def test_compiled_trees_of_families_whose_windows_bind(name):
    prompts = [list(range(1, 20)), list(range(3, 11)), [5, 6, 7]]
    model = build(name).double()
    found = [read_trees(Engine(copy.deepcopy(model), compiled=compiled), prompts) for compiled in (True, False)]
    for mine, other in zip(*found, strict=True):
        assert torch.allclose(mine, other, atol=ROUNDING)


@pytest.mark.slow
def test_trees_of_all_shapes_are_read_by_one_graph(engines):
    compiled, _ = engines
    target = Decoder(compiled, TreeDrafter(compiled, [2, 3]), Sampling(0.0))
    target.generate([[1, 2, 3]], 12)
    made = len(compiled.compiled.graphs)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for widths in ([4, 8, 8], [3, 5], [2, 2, 2, 2]):
            Decoder(compiled, TreeDrafter(compiled, widths), Sampling(0.0)).generate([[5, 2, 3, 9]], 25)
    assert len(compiled.compiled.graphs) == made
