from __future__ import annotations

import pytest
import torch
import transformers as hf

from drafttrain.decoding.engine import Engine, pad
from drafttrain.errors import UserError
from drafttrain.models.drafters import without_storage
from tests.conftest import build_llama, with_other_logits

ROWS = [[5, 9, 3, 7, 2], [8, 1], [4, 4, 6]]


@pytest.fixture(scope="module")
def model():
    return build_llama(40, layers=2)


def test_the_hidden_state_is_the_last_one_after_the_norm(model):
    engine = Engine(model)
    with torch.inference_mode():
        output = engine.forward(engine.new_cache(1), torch.tensor([ROWS[0]]))
        own = model(torch.tensor([ROWS[0]]), output_hidden_states=True)
    assert (output.hidden - own.hidden_states[-1]).abs().max() < 1e-5
    assert (output.logits - own.logits).abs().max() < 1e-5


@torch.inference_mode()
def test_last_means_the_last_real_token_of_each_row(model):
    engine = Engine(model)
    tokens, counts = pad(ROWS, engine.device)
    every = engine.forward(engine.new_cache(3), tokens, counts)
    last = engine.forward(engine.new_cache(3), tokens, counts, keep="last")
    for row, count in enumerate(counts):
        assert torch.allclose(last.logits[row, 0], every.logits[row, count - 1])
        assert torch.allclose(last.hidden[row, 0], every.hidden[row, count - 1])


@torch.inference_mode()
def test_padding_is_overwritten_by_what_comes_next(model):
    engine = Engine(model)
    cache = engine.new_cache(3)
    tokens, counts = pad(ROWS, engine.device)
    engine.forward(cache, tokens, counts, keep=None)
    assert cache.lengths == [5, 2, 3]
    ragged = engine.forward(cache, torch.tensor([[11], [12], [13]])).logits
    for row, (text, token) in enumerate(zip(ROWS, (11, 12, 13), strict=True)):
        alone = engine.forward(engine.new_cache(1), torch.tensor([[*text, token]]), keep="last").logits
        assert torch.allclose(ragged[row], alone[0], atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_reading_in_chunks_changes_nothing(model, chunk):
    engine = Engine(model, chunk=chunk)
    cache = engine.new_cache(3)
    engine.read(cache, ROWS)
    whole = Engine(model)
    expected = whole.new_cache(3)
    whole.read(expected, ROWS)
    step = torch.tensor([[1], [2], [3]])
    assert torch.allclose(engine.forward(cache, step).logits, whole.forward(expected, step).logits, atol=1e-5)


@torch.inference_mode()
def test_padding_rows_of_the_vocabulary_are_cut_off(model):
    narrow = Engine(model, vocabulary=30)
    tokens = torch.tensor([ROWS[0]])
    logits = narrow.forward(narrow.new_cache(1), tokens).logits
    whole = Engine(model)
    assert torch.equal(logits, whole.forward(whole.new_cache(1), tokens).logits[..., :30])
    with pytest.raises(UserError, match="41 tokens does not fit a model with 40"):
        Engine(model, vocabulary=41)


def test_decoding_puts_a_model_in_evaluation_mode(model):
    model.train()
    Engine(model).new_cache(1)
    assert not model.training


LINEAR = ["linear_attention", "full_attention"]
ROLLED_BACK_NEVER = {
    "mamba": lambda: hf.MambaConfig(num_hidden_layers=1),
    "mamba2": lambda: hf.Mamba2Config(num_hidden_layers=1),
    "falcon_mamba": lambda: hf.FalconMambaConfig(num_hidden_layers=1),
    "recurrent_gemma": lambda: hf.RecurrentGemmaConfig(num_hidden_layers=3),
    "rwkv": lambda: hf.RwkvConfig(num_hidden_layers=1),
    "jamba": lambda: hf.JambaConfig(num_hidden_layers=2, num_experts=2, attn_layer_period=2, attn_layer_offset=1),
    "bamba": lambda: hf.BambaConfig(num_hidden_layers=2, attn_layer_indices=[1]),
    "falcon_h1": lambda: hf.FalconH1Config(num_hidden_layers=1),
    "qwen3_next": lambda: hf.Qwen3NextConfig(num_hidden_layers=2, layer_types=LINEAR, num_experts=2),
    "qwen3_5_text": lambda: hf.Qwen3_5TextConfig(num_hidden_layers=2, layer_types=LINEAR),
    "lfm2": lambda: hf.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]),
    "minimax": lambda: hf.MiniMaxConfig(num_hidden_layers=2, layer_types=LINEAR, num_local_experts=2),
    "llama4_text": lambda: hf.Llama4TextConfig(num_hidden_layers=4, num_local_experts=1),
}


@pytest.mark.parametrize("family", ROLLED_BACK_NEVER)
def test_layers_that_cannot_be_rolled_back_are_refused_by_their_family(family):
    """Recurrent, hybrid, convolving and chunked ones."""
    with pytest.raises(UserError, match=rf"^{family} .*cannot be rolled back.*; use a model whose layers"):
        Engine(without_storage(ROLLED_BACK_NEVER[family]()))


def test_parts_of_a_model_in_unlike_dtypes_are_refused_before_they_meet():
    model = build_llama(40)
    model.lm_head.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"LlamaForCausalLM has an embedding in torch.float32 and a head in torch.bf"):
        Engine(model)
    model.lm_head.to(torch.float32)
    model.model.layers[1].mlp.to(torch.bfloat16)
    with pytest.raises(UserError, match=r"load it in one dtype, not torch.bfloat16 and torch.float32\.$"):
        Engine(model).checked()


def test_parts_of_a_model_on_unlike_devices_are_refused_without_a_device_map():
    model = build_llama(40)
    model.model.layers[1].to("meta")
    with pytest.raises(UserError, match="the weights of LlamaForCausalLM lie on cpu and meta without a device map"):
        Engine(model)


@torch.inference_mode()
def test_positions_end_where_rotations_begin_to_depend_on_the_length_of_the_text():
    """Read in two pieces, the first one short, a longer text would not be what the model reads."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    lengths = {"max_position_embeddings": 64, "original_max_position_embeddings": 16}
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "pad_token_id": 0, "initializer_range": 0.2}
    model = hf.Phi3ForCausalLM(hf.Phi3Config(**SMALL, **sizes, **lengths, rope_parameters=rope)).eval()
    engine = Engine(model)
    assert engine.max_positions == 16
    tokens = torch.arange(20).unsqueeze(0)
    for length, alike in ((16, True), (20, False)):
        cache = engine.new_cache(1)
        engine.forward(cache, tokens[:, :9], keep=None)
        logits = engine.forward(cache, tokens[:, 9:length]).logits
        assert ((logits - model(tokens[:, :length]).logits[:, 9:]).abs().max() < 1e-5) == alike


def test_the_text_part_of_a_model_with_pictures_is_read():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    config = hf.Gemma3Config(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 16})
    engine = Engine(hf.Gemma3ForConditionalGeneration(config))
    assert engine.checked() is engine  # it has read tokens as the model itself does
    assert (engine.layers, engine.groups) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_that_is_read_as_it_reads_itself_passes(dtype):
    engine = Engine(build_llama(40, initializer_range=0.3).to(dtype), vocabulary=30)
    assert engine.checked() is engine


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "model",
    [
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL)),
        lambda: hf.BloomForCausalLM(hf.BloomConfig(**SMALL)),
        lambda: hf.GPTNeoForCausalLM(
            hf.GPTNeoConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["local"], 1]])
        ),
        lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1)),
    ],
    ids=["falcon", "bloom", "gpt-neo", "gpt-oss"],
)
def test_a_family_that_the_decoder_cannot_read_is_refused_in_a_sentence(model):
    with pytest.raises(UserError, match="cannot be read by the bundled decoder"):
        Engine(model()).checked()


def test_a_model_whose_logits_are_not_understood_is_refused():
    """HyperCLOVA X multiplies by the setting that Granite divides by."""
    with pytest.raises(UserError, match="other logits"):
        Engine(with_other_logits(build_llama(40))).checked()
