"""Forwards over trees: every node's logits are those of its path read as a text."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from drafttrain.decoding.engine import Engine
from drafttrain.ops.tree import ABSENT, ROOT, TreeBlock, below
from tests.ops.test_attention import FAMILIES, build

PARENTS = torch.tensor([[ROOT, ROOT, 0, 0, 1, 4, 5, ABSENT], [ROOT, 0, 1, 2, 3, ROOT, 5, 6]])
TOKENS = torch.tensor([[3, 9, 4, 5, 6, 7, 8, 0], [2, 3, 4, 5, 6, 7, 8, 9]])
LEVELS = (2, 3, 1)


def path_of(row: int, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.insert(0, TOKENS[row, node].item())
        node = PARENTS[row, node].item()
    return path


@pytest.fixture(params=[1, 1 << 30], ids=["hybrid", "folded"])
def form(request, monkeypatch):
    monkeypatch.setattr("drafttrain.decoding.engine.HYBRID_SLOTS", request.param)
    return request.param


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("texts", [[[5, 1, 2, 8, 8, 3, 1]], [[5, 1, 2, 8, 8, 3, 1], [4, 2]], [[7], [1, 2, 3]]])
@torch.inference_mode()
def test_every_node_is_read_behind_its_own_path(family, texts, form):
    model = build(family).double()
    engine, rows = Engine(model), len(texts)
    cache = engine.new_cache(rows)
    engine.read(cache, [text[:-1] for text in texts])
    block = torch.cat([torch.tensor([text[-1:] for text in texts]), TOKENS[:rows]], 1)
    found = engine.forward(cache, block, tree=TreeBlock.below_root(PARENTS[:rows])).logits
    for row, text in enumerate(texts):
        for node in range(-1, PARENTS.shape[1]):
            if node >= 0 and PARENTS[row, node] == ABSENT:
                continue
            alone = engine.new_cache(1)
            read = engine.forward(alone, torch.tensor([text + path_of(row, node)]), keep="last").logits
            assert torch.allclose(found[row, node + 1], read[0, 0], atol=1e-10)


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_tree_read_level_by_level_is_the_tree_read_at_once(family, form):
    """As drafters grow it: nodes of earlier levels lie in the cache already; rows are of unlike lengths."""
    engine = Engine(build(family).double())
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randint(0, 60, (2, width), generator=generator) for width in LEVELS]
    chosen = [torch.tensor([[ROOT, ROOT], [ROOT, ABSENT]]), torch.tensor([[1, 0, 1], [0, ABSENT, 0]])]
    chosen.append(torch.tensor([[2], [0]]))
    parents = torch.tensor([[ROOT, ROOT, 1, 0, 1, 4], [ROOT, ABSENT, 0, ABSENT, 0, 2]])
    texts = [[5, 1, 2, 8, 8, 3, 1], [4, 2, 2]]
    whole, parts = engine.new_cache(2), engine.new_cache(2)
    for cache in (whole, parts):
        engine.read(cache, texts)
    tree, found = None, []
    for tokens, above in zip(levels, chosen, strict=True):
        tree = below(tree, above)
        found.append(engine.forward(parts, tokens, tree=tree).logits)
    root = TreeBlock.below_root(parents)
    expected = engine.forward(
        whole, torch.cat(levels, 1), tree=TreeBlock(root.seen_BQT[:, 1:, 1:], (root.depth_BT[:, 1:] - 1).clamp(min=0))
    ).logits
    assert torch.allclose(torch.cat(found, 1), expected, atol=1e-10)


@torch.inference_mode()
def test_the_text_goes_on_behind_an_accepted_path(form):
    engine = Engine(build("llama").double())
    texts = [[5, 1, 2, 8, 8, 3, 1], [4, 2]]
    cache = engine.new_cache(2)
    engine.read(cache, [text[:-1] for text in texts])
    starts = list(cache.lengths)
    block = torch.cat([torch.tensor([text[-1:] for text in texts]), TOKENS], 1)
    engine.forward(cache, block, tree=TreeBlock.below_root(PARENTS))
    cache.keep_path(starts, [[0, 2, 5, 6], [0, 1, 2]])
    found = engine.forward(cache, torch.tensor([[8], [11]])).logits
    for row, text in enumerate([texts[0] + [9, 6, 7, 8], texts[1] + [2, 3, 11]]):
        alone = engine.forward(engine.new_cache(1), torch.tensor([text]), keep="last").logits
        assert torch.allclose(found[row], alone[0], atol=1e-10)


@torch.inference_mode()
def test_windows_that_bind_hide_ancestors_too():
    """A window of 3 over a path of 6 nodes: checked against the model's own attention, which knows no trees."""
    config = hf.MistralConfig(
        **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3},
    )
    torch.manual_seed(0)
    model = hf.MistralForCausalLM(config).double().eval()
    engine = Engine(model)
    cache = engine.new_cache(1)
    engine.read(cache, [[5, 1, 2]])
    parents = torch.tensor([[ROOT, 0, 0, 1, 3, 4, 5]])
    tokens = torch.tensor([[7, 3, 4, 9, 8, 6, 2, 1]])
    found = engine.forward(cache, tokens, tree=TreeBlock.below_root(parents)).logits[0, -1]
    own = model(torch.tensor([[5, 1, 2, 7, 3, 4, 8, 6, 2, 1]])).logits[0, -1]
    assert torch.allclose(found, own, atol=1e-10)
