"""Our attention and cache against each family's own forward, in fp32, on tiny random weights."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import drafttrain.decoding.engine as engine_module
from drafttrain.decoding.engine import Engine, pad
from drafttrain.ops.attention import FOLD_ROWS

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    "llama-biased-tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {"attention_bias": True, "tie_word_embeddings": True}),
    "llama-multi-head": (hf.LlamaForCausalLM, hf.LlamaConfig, {"num_key_value_heads": 4}),
    "llama-multi-query": (hf.LlamaForCausalLM, hf.LlamaConfig, {"num_key_value_heads": 1, "head_dim": 6}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {}),
    "qwen2-sliding": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {"head_dim": 12}),
    "qwen3-sliding-biased": (
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "attention_bias": True},
    ),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {"head_dim": 8, "sliding_window": 6}),
    "mistral-full": (hf.MistralForCausalLM, hf.MistralConfig, {"head_dim": 8, "sliding_window": None}),
    "gemma2": (
        hf.Gemma2ForCausalLM,
        hf.Gemma2Config,
        {
            "head_dim": 12,
            "sliding_window": 5,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        {"head_dim": 12, "sliding_window": 5, "layer_types": SLIDING, "query_pre_attn_scalar": 20},
    ),
    "granite": (
        hf.GraniteForCausalLM,
        hf.GraniteConfig,
        {"logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7},
    ),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig, {"logit_scale": 0.25}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"num_key_value_heads": ...}),
    "gpt-neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {"num_key_value_heads": ...}),
}


def build(name: str) -> torch.nn.Module:
    model_class, config_class, extra = FAMILIES[name]
    torch.manual_seed(0)
    settings = {name: value for name, value in (BASE | extra).items() if value is not ...}  # ... is no such setting
    model = model_class(config_class(**settings)).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for weight in model.parameters():  # biases of zero and norms of one would hide that they are left out
            weight += 0.1 * torch.randn_like(weight)
    return model


def own_logits(model: torch.nn.Module, row: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0]


@pytest.fixture(params=FAMILIES)
def model(request):
    return build(request.param)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (length,), generator=generator).tolist() for length in (19, 8, 13)]


@torch.inference_mode()
def test_prefill_verify_and_decode_of_a_ragged_batch(model, rows):
    """Chunked prefill, a block behind unequal lengths, a rejected block rolled back, single steps: 1e-5 everywhere."""
    reference = [own_logits(model, row) for row in rows]
    engine = Engine(model, chunk=4)
    cache = engine.new_cache(3)
    engine.read(cache, [row[:-6] for row in rows])
    engine.forward(cache, torch.full((3, 5), 7))
    cache.rollback([len(row) - 6 for row in rows])
    block = engine.forward(cache, torch.tensor([row[-6:-1] for row in rows])).logits
    step = engine.forward(cache, torch.tensor([row[-1:] for row in rows])).logits
    for row, expected in enumerate(reference):
        assert (block[row] - expected[-6:-1]).abs().max() < 1e-5
        assert (step[row] - expected[-1:]).abs().max() < 1e-5


@torch.inference_mode()
def test_a_single_row_without_masks(model, rows):
    """Where all rows agree the first chunk is causal and single steps need no mask at all."""
    reference = own_logits(model, rows[0])
    engine = Engine(model)
    cache = engine.new_cache(1)
    first = engine.forward(cache, torch.tensor([rows[0][:9]])).logits
    steps = [engine.forward(cache, torch.tensor([[token]])).logits for token in rows[0][9:]]
    assert (torch.cat([first, *steps], 1)[0] - reference).abs().max() < 1e-5


@torch.inference_mode()
def test_a_prompt_is_read_without_the_last_layers_attention(model, rows, monkeypatch):
    """Nothing that stays depends on it: every layer's keys and values are those of a forward with logits."""
    engine = Engine(model, chunk=7)
    read, whole = engine.new_cache(3), engine.new_cache(3)
    asked = []
    own = engine_module.attention

    def watched(module, *args, **kwargs):
        asked.append(module.layer_idx)
        return own(module, *args, **kwargs)

    monkeypatch.setattr(engine_module, "attention", watched)
    engine.read(read, rows)
    assert set(asked) == {0, 1}
    engine.forward(whole, *pad(rows, engine.device))
    for one, other in zip(read.layers, whole.layers, strict=True):
        for row, text in enumerate(rows):
            for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
                assert (mine[row, :, : len(text)] - theirs[row, :, : len(text)]).abs().max() < 1e-5


@torch.inference_mode()
def test_wide_blocks_share_the_mask_instead_of_folding(rows):
    model = build("llama")
    long = (rows[0] * 20)[: FOLD_ROWS // 2 + 40]
    reference = own_logits(model, long)
    engine = Engine(model)
    cache = engine.new_cache(1)
    engine.read(cache, [long[:10]])
    wide = engine.forward(cache, torch.tensor([long[10:]])).logits
    assert 2 * len(long[10:]) > FOLD_ROWS
    assert (wide[0] - reference[10:]).abs().max() < 1e-5


@torch.inference_mode()
def test_a_mask_that_shows_the_future_is_noticed(rows, monkeypatch):
    """Negative control: the comparison above can fail."""
    model = build("llama")
    reference = own_logits(model, rows[0])
    engine = Engine(model)
    cache = engine.new_cache(1)
    engine.read(cache, [rows[0][:9]])
    monkeypatch.setattr(type(cache), "visible", lambda self, q, window=None: q.unsqueeze(2) * 0 == torch.zeros(14))
    block = engine.forward(cache, torch.tensor([rows[0][9:14]])).logits
    assert (block[0] - reference[9:14]).abs().max() > 1e-2


WINDOWED = ("qwen2-sliding", "qwen3-sliding-biased", "mistral", "gemma2", "gemma3")


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "forget"),
    [*((name, "window") for name in WINDOWED), ("gemma2", "softcap"), ("gemma3", "embedding scale")],
)
def test_what_a_family_has_beyond_attention_binds(rows, name, forget, monkeypatch):
    """Negative control: without its windows, capped scores or scaled embedding a model would fail the tests above."""
    model = build(name)
    expected = own_logits(model, rows[0])
    engine = Engine(model)
    if forget == "window":
        engine.windows = dict.fromkeys(engine.windows)
    elif forget == "softcap":
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    else:
        monkeypatch.setattr(model.model.embed_tokens, "forward", lambda ids: model.model.embed_tokens.weight[ids])
    found = engine.forward(engine.new_cache(1), torch.tensor([rows[0]])).logits[0]
    assert (found - expected).abs().max() > 1e-3


@torch.inference_mode()
def test_dropped_keys_are_as_if_masked(rows):
    """Slots are not positions: after dropping slots, attention equals the model's own with those keys masked."""
    model = build("llama")
    row = rows[0]
    dropped = [2, 3, 7]
    additive = torch.full((len(row), len(row)), -torch.inf).triu(1)
    additive[10:, dropped] = -torch.inf
    with torch.no_grad():
        reference = model(torch.tensor([row]), attention_mask=additive[None, None]).logits[0]
    engine = Engine(model)
    cache = engine.new_cache(1)
    engine.read(cache, [row[:10]])
    cache.keep_slots(0, torch.tensor([slot for slot in range(10) if slot not in dropped]))
    block = engine.forward(cache, torch.tensor([row[10:15]])).logits[0]
    steps = [engine.forward(cache, torch.tensor([[token]])).logits[0] for token in row[15:]]
    assert (torch.cat([block, *steps]) - reference[10:]).abs().max() < 1e-5


def test_the_model_keeps_its_own_attention(rows):
    model = build("llama")
    engine = Engine(model)
    with torch.inference_mode():
        engine.forward(engine.new_cache(1), torch.tensor([rows[0]]))
    assert model.config._attn_implementation == "eager"


def test_what_the_attention_lacks_is_refused(rows):
    from drafttrain.ops.attention import attention

    q = torch.zeros(1, 4, 1, 8)
    kv = torch.zeros(1, 2, 3, 8)
    with pytest.raises(ValueError, match="needs a mask"):
        attention(torch.nn.Module(), q, kv, kv, None)
    with pytest.raises(ValueError, match="sinks"):
        attention(torch.nn.Module(), q, kv, kv, torch.zeros(1, 1, 1, 3), s_aux=torch.zeros(4))
