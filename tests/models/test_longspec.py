"""The block: what it attends to, what it shares with its target, what it is saved as."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from drafttrain.config import BlockConfig
from drafttrain.errors import UserError
from drafttrain.models.loading import AutoDrafter, load_causal_lm, load_drafter
from drafttrain.models.longspec import LongSpecDrafter, lagged_attention, windowed_attention
from drafttrain.models.longspec_new import block_config, new_block
from drafttrain.models.shared_target import check_readable
from tests.conftest import build_llama


def states(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def family(name: str, **settings):
    """A tiny random model of a family, three layers, grouped queries and heads that do not divide the hidden size."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **values | settings)
    return AutoModelForCausalLM.from_config(config).eval()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_windowed_attention_is_that_of_a_band(length, window, seed):
    """By blocks or whole, with positions that jump: each query sees the keys less than a window before it."""
    generator = torch.Generator().manual_seed(seed)
    steps = 1 + (torch.rand(2, length, generator=generator) < 0.1) * torch.randint(
        0, 9, (2, length), generator=generator
    )
    positions = steps.cumsum(1)
    q, k, v = states(2, 4, length, 8), states(2, 2, length, 8, seed=1), states(2, 2, length, 8, seed=2)
    ahead = positions.unsqueeze(2) - positions.unsqueeze(1)
    mask = ((ahead >= 0) & (ahead < window)).unsqueeze(1)
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(windowed_attention(q, k, v, positions, window, 0.3), expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.lists(st.integers(0, 6), min_size=2, max_size=2))
def test_a_lagged_query_sees_keys_up_to_its_lag_behind(length, lags):
    q, k, v = states(2, 4, length, 8), states(2, 2, length, 8, seed=1), states(2, 2, length, 8, seed=2)
    found = lagged_attention(q, k, v, torch.tensor(lags), 0.3)
    for row, lag in enumerate(lags):
        for time in range(length):
            keys = slice(0, max(0, time - lag + 1))
            expected = torch.zeros(4, 8, dtype=torch.float64)
            if keys.stop:
                expected = scaled_dot_product_attention(
                    q[row : row + 1, :, time : time + 1], k[row : row + 1, :, keys], v[row : row + 1, :, keys],
                    scale=0.3, enable_gqa=True,
                )[0, :, 0]  # fmt: skip
            torch.testing.assert_close(found[row, :, time], expected)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("qwen2", {"head_dim": 8}),
        ("mistral", {"sliding_window": None}),
        ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    ],
)
def test_families_can_be_read_and_started_from(name, settings):
    target = family(name, **settings)
    block = new_block(target, BlockConfig(warm_start=1), torch.float32, 0)
    check_readable(target, block.config)
    kinds = getattr(target.config, "layer_types", None) or ["full_attention"] * 3
    assert kinds[block.config.kv_layer] == "full_attention"
    assert block.config.qk_norm == ("3" in name)


def test_a_wider_block_starts_as_the_layer_that_it_starts_from():
    target = family("llama")
    narrow = new_block(target, BlockConfig(warm_start=1), torch.float32, 0)
    wide = new_block(target, BlockConfig(warm_start=1, intermediate_size=60), torch.float32, 0)
    states = torch.randn(2, 5, target.config.hidden_size)
    torch.testing.assert_close(wide.mlp(states), narrow.mlp(states))
    assert wide.mlp.gate_proj.weight[48:].abs().min() > 0  # or the new neurons would never learn
    assert wide.mlp.up_proj.weight[48:].abs().min() > 0


def test_a_target_without_a_layer_of_full_attention_is_refused():
    with pytest.raises(UserError, match="no layer of this mistral target is full attention"):
        block_config(family("mistral", sliding_window=16), BlockConfig())


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"kv_layer": 7}, "kv_layer is 7; the target has layers 0 to 2"),
        ({"kv_layer": 0}, "kv_layer is 0, a sliding-attention layer of the target"),
        ({"warm_start": -9}, "warm_start is -9; the target has layers 0 to 2"),
        ({"warm_start": 1, "intermediate_size": 4}, "intermediate_size is 4, but the layer to start from has 48"),
    ],
)
def test_impossible_wishes_are_refused_in_a_sentence(wish, message):
    target = family("gemma3_text", layer_types=["sliding_attention", "full_attention", "full_attention"])
    with pytest.raises(UserError, match=message):
        new_block(target, BlockConfig(**wish), torch.float32, 0)


def test_a_target_whose_keys_do_not_turn_is_refused():
    target = family("smollm3", no_rope_layers=[1, 1, 0], layer_types=None)
    with pytest.raises(UserError, match="do not turn"):
        check_readable(target, new_block(target, BlockConfig(), torch.float32, 0).config)
    check_readable(target, new_block(target, BlockConfig(kv_layer=1), torch.float32, 0).config)


def test_outputs_that_start_at_zero_leave_the_tokens_own_prediction():
    target = build_llama(24, layers=2, hidden=16)
    block = new_block(target, BlockConfig(zero_outputs=True), torch.float32, 0)
    embedded = torch.randn(1, 3, 16)
    rotary = target.model.rotary_emb(embedded, torch.arange(3).unsqueeze(0))
    found = block(embedded, rotary, lambda q, k, v: torch.randn_like(q), torch.randn_like)
    torch.testing.assert_close(found, target.model.norm(embedded))


def test_neither_embedding_nor_head_is_stored_and_autodrafter_loads_it(tmp_path, tiny_tokenizer):
    target = build_llama(len(tiny_tokenizer))
    block = new_block(target, BlockConfig(window=7, warm_start=1, depth=3), torch.float32, 0)
    block.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert not [name for name in block.state_dict() if "embed" in name or "head" in name]
    loaded = AutoDrafter.from_pretrained(tmp_path)
    assert isinstance(loaded, LongSpecDrafter)
    assert (loaded.config.window, loaded.config.kv_layer, loaded.config.depth) == (7, 1, 3)
    for name, weight in block.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    assert not any(weight.requires_grad for weight in load_drafter(str(tmp_path)).model.parameters())
    with pytest.raises(UserError, match="cannot stand alone"):
        load_causal_lm(tmp_path)
