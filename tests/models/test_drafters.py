"""Every kind of drafter, for every family that a recipe names, is an ordinary causal LM with the target's tokenizer."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from data_prep.planning import target_facts
from drafttrain.config import DrafterConfig, LoraConfig, TargetConfig
from drafttrain.errors import UserError
from drafttrain.models import abreast
from drafttrain.models.drafters import build_drafter, inner, is_lora, layer_numbers, merged, sketch_drafter
from drafttrain.models.fingerprint import fingerprint
from drafttrain.models.loading import Loaded
from tests.conftest import build_llama, build_tokenizer

FAMILIES = [
    (LlamaForCausalLM, LlamaConfig),
    (MistralForCausalLM, MistralConfig),
    (Qwen2ForCausalLM, Qwen2Config),
    (Qwen3ForCausalLM, Qwen3Config),
    (GemmaForCausalLM, GemmaConfig),
    (Gemma2ForCausalLM, Gemma2Config),
    (Gemma3ForCausalLM, Gemma3TextConfig),
]
IDS = torch.tensor([[7, 3, 11, 200, 5, 90]])


def load(model, tokenizer) -> Loaded:
    model.requires_grad_(False)
    return Loaded(model, tokenizer, fingerprint(model, tokenizer), "memory")


def family(model, config, layers=4, **changes):
    settings = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    return model(config(**settings | changes)).eval()


def logits(model):
    with torch.no_grad():
        return inner(model)(IDS, use_cache=False).logits


@pytest.mark.parametrize(("model", "config"), FAMILIES)
def test_a_cut_with_all_layers_is_the_target(model, config, tiny_tokenizer):
    target = load(family(model, config), tiny_tokenizer)
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[0, 1, 2, 3]), target)
    assert type(drafter) is model
    assert torch.equal(logits(drafter), logits(target.model))
    assert all(parameter.requires_grad for parameter in drafter.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_folded_layers_are_in_the_embeddings_of_a_cut(tied, tiny_tokenizer):
    target = load(family(LlamaForCausalLM, LlamaConfig, tie_word_embeddings=tied), tiny_tokenizer)
    settings = DrafterConfig(kind="cut", layers=[2, 3], fold=2)
    drafter = build_drafter(settings, target)
    alone = torch.tensor([[7], [200]])  # a token alone is read as the target reads it, all layers together
    with torch.no_grad():
        torch.testing.assert_close(drafter(alone).logits, target.model(alone).logits)
    assert torch.equal(drafter.lm_head.weight, target.model.lm_head.weight)
    assert not drafter.config.tie_word_embeddings
    sketched = {name: value.shape for name, value in sketch_drafter(settings, target).named_parameters()}
    assert sketched == {name: value.shape for name, value in drafter.named_parameters()}


def test_what_cannot_be_folded_is_told(tiny_tokenizer):
    target = load(family(LlamaForCausalLM, LlamaConfig), tiny_tokenizer)
    with pytest.raises(UserError, match=r"drafter\.fold is 2, but drafter\.layers keeps layer 1"):
        build_drafter(DrafterConfig(kind="cut", layers=[1, 3], fold=2), target)
    scaled = load(family(GemmaForCausalLM, GemmaConfig), tiny_tokenizer)
    with pytest.raises(UserError, match="scales or places its embeddings"):
        build_drafter(DrafterConfig(kind="cut", layers=[1, 3], fold=1), scaled)


@pytest.mark.parametrize(("model", "config"), [each for each in FAMILIES if each[1].model_type in abreast.FAMILIES])
def test_layers_abreast_add_up_what_each_adds(model, config, tiny_tokenizer):
    target = load(family(model, config), tiny_tokenizer)
    for layer in target.model.model.layers:  # norms and biases that a wide layer must not mix up
        for name, weight in layer.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                torch.nn.init.normal_(weight, 1.0, 0.3)
    ids = IDS[:, :4]  # within a sliding window
    settings = DrafterConfig(kind="cut", layers=[0, 1, 2, 3], abreast=2)
    drafter = build_drafter(settings, target)
    with torch.no_grad():
        found = drafter(ids, use_cache=False, output_hidden_states=True).hidden_states[1]
        layers, states = target.model.model.layers[:2], target.model.get_input_embeddings()(ids)
        positions = torch.arange(ids.shape[1])[None]
        around = {"position_embeddings": target.model.model.rotary_emb(states, positions), "attention_mask": None}
        read = states + sum(layer.self_attn(layer.input_layernorm(states), **around)[0] for layer in layers)
        expected = read + sum(layer.mlp(layer.post_attention_layernorm(read)) for layer in layers)
    torch.testing.assert_close(found, expected)
    sketched = {name: value.shape for name, value in sketch_drafter(settings, target).named_parameters()}
    assert sketched == {name: value.shape for name, value in drafter.named_parameters()}


def test_heads_abreast_keep_their_size_where_the_configuration_leaves_it_out():
    config = Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
    assert abreast.widened(config, [[0, 1], [2, 3]])["head_dim"] == 16


def test_what_cannot_stand_abreast_is_told(tiny_tokenizer):
    llama, gemma = (load(family(*each), tiny_tokenizer) for each in (FAMILIES[0], (GemmaForCausalLM, GemmaConfig)))
    kinds = ["full_attention", "sliding_attention"] * 2
    mixed = load(family(Qwen2ForCausalLM, Qwen2Config, layer_types=kinds, use_sliding_window=True), tiny_tokenizer)
    for layers, number, target, sentence in (
        ([0, 1, 2], 2, llama, "does not divide into rows of 2"),
        ([0, 1, 2], 3, llama, "which do not divide the hidden size"),
        ([0, 1], 2, gemma, "knows llama, mistral, qwen2 layers, not gemma"),
        ([0, 1], 2, mixed, "layers of unlike attention side by side"),
    ):
        with pytest.raises(UserError, match=sentence):
            build_drafter(DrafterConfig(kind="cut", layers=layers, abreast=number), target)


@pytest.mark.parametrize(("model", "config"), FAMILIES)
def test_a_cut_keeps_the_chosen_layers_and_what_is_shared(model, config, tiny_tokenizer):
    target = load(family(model, config), tiny_tokenizer)
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[0, -1]), target)
    assert drafter.config.num_hidden_layers == 2
    own, theirs = drafter.model.layers[1].state_dict(), target.model.model.layers[3].state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    assert torch.equal(drafter.get_input_embeddings().weight, target.model.get_input_embeddings().weight)
    kinds = getattr(target.model.config, "layer_types", None)
    if kinds is not None:
        assert drafter.config.layer_types == [kinds[0], kinds[3]]


def test_a_cut_does_not_share_memory_with_the_frozen_target(tiny_tokenizer):
    target = load(build_llama(layers=2), tiny_tokenizer)
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[0]), target)
    before = target.fingerprint.weights
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(1)
    assert fingerprint(target.model, tiny_tokenizer).weights == before


def test_a_cut_of_a_quantized_target_reads_the_weights_of_the_same_revision(tiny_tokenizer, monkeypatch):
    asked, target = {}, load(build_llama(), tiny_tokenizer)
    target.model.is_quantized = True

    def stored(path, **how):
        asked.update(how, path=path)
        return build_llama(seed=5)

    monkeypatch.setattr("drafttrain.models.drafters.load_causal_lm", stored)
    target = replace(target, path="owner/model", revision="abc", trust_remote_code=True)
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[0, 1]), target)
    assert asked == {"path": "owner/model", "dtype": "float32", "revision": "abc", "trust_remote_code": True}
    assert torch.equal(logits(drafter), logits(build_llama(seed=5)))


def test_a_cut_survives_saving_and_loading(tiny_tokenizer, tmp_path):
    target = load(family(Qwen3ForCausalLM, Qwen3Config, tie_word_embeddings=True), tiny_tokenizer)
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[1, 2], dtype="bfloat16"), target)
    drafter.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(drafter))


@pytest.mark.parametrize(("model", "config"), FAMILIES)
def test_a_new_drafter_takes_after_the_target(model, config, tiny_tokenizer):
    target = load(family(model, config), tiny_tokenizer)
    changes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    drafter = build_drafter(DrafterConfig(kind="new", config=changes), target)
    assert type(drafter) is model
    assert logits(drafter).shape == logits(target.model).shape
    assert drafter.config.max_position_embeddings == target.model.config.max_position_embeddings
    assert drafter.generation_config.eos_token_id == target.model.generation_config.eos_token_id


def test_new_weights_follow_the_seed(tiny_tokenizer):
    target = load(build_llama(), tiny_tokenizer)
    one, same, other = (build_drafter(DrafterConfig(kind="new"), target, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(logits(one), logits(same)) and not torch.equal(logits(one), logits(other))


def test_a_new_drafter_may_be_of_another_family(tiny_tokenizer):
    target = load(build_llama(), tiny_tokenizer)
    changes = {
        "model_type": "qwen3",
        "num_hidden_layers": 1,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    drafter = build_drafter(DrafterConfig(kind="new", config={**changes, "num_key_value_heads": 1}), target)
    assert type(drafter) is Qwen3ForCausalLM and drafter.config.vocab_size == target.model.config.vocab_size


def test_a_pretrained_drafter_may_be_padded_to_another_vocabulary(tiny_tokenizer, tmp_path):
    target = load(build_llama(), tiny_tokenizer)
    drafter = build_llama(vocab_size=320, layers=1, hidden=16)
    drafter.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    for config in (DrafterConfig(kind="pretrained", path=str(tmp_path)), DrafterConfig(init_from=str(tmp_path))):
        assert torch.equal(logits(build_drafter(config, target)), logits(drafter))


def test_lora_trains_updates_only_and_merges_into_a_plain_model(tiny_tokenizer):
    target = load(build_llama(), tiny_tokenizer)
    config = DrafterConfig(kind="cut", layers=[0, 1], lora=LoraConfig(r=2, alpha=4))
    model = build_drafter(config, target)
    assert is_lora(model)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert torch.equal(logits(model), logits(target.model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    expected = logits(model)
    plain = merged(model)
    assert type(plain) is LlamaForCausalLM and set(plain.state_dict()) == set(target.model.state_dict())
    assert torch.allclose(logits(plain), expected, atol=1e-5) and not torch.allclose(expected, logits(target.model))


def test_updates_of_lora_start_from_the_seed(tiny_tokenizer):
    target, config = load(build_llama(), tiny_tokenizer), DrafterConfig(kind="cut", layers=[0], lora=LoraConfig(r=2))
    starts = []
    for seed in (0, 0, 1):
        weights = dict(build_drafter(config, target, seed=seed).named_parameters())
        starts.append(next(weight for name, weight in weights.items() if "lora_A" in name))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (DrafterConfig(kind="cut"), "layers is empty"),
        (DrafterConfig(kind="cut", layers=[5]), "layers 0 to 1"),
        (DrafterConfig(kind="cut", layers=[1, 0]), "in the target's order"),
        (DrafterConfig(kind="cut", layers=[0], dtype="fp32"), "drafter.dtype"),
        (DrafterConfig(kind="pretrained"), "drafter.path is not set"),
        (DrafterConfig(kind="new", config={"num_layers": 1}), "did you mean num_hidden_layers"),
        (DrafterConfig(kind="new", config={"model_type": "lama"}), "no such family"),
        (DrafterConfig(kind="new", config={"hidden_size": 30}), "makes no model"),
        (DrafterConfig(kind="new", config={"vocab_size": 64}), "the drafter has 64 output rows"),
        (DrafterConfig(kind="new", lora=LoraConfig()), "has none"),
        (DrafterConfig(kind="cut", layers=[0], lora=LoraConfig(target_modules=["no_such_layer"])), "drafter.lora"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(config, sentence, tiny_tokenizer):
    with pytest.raises(UserError, match=sentence) as refusal:
        build_drafter(config, load(build_llama(), tiny_tokenizer))
    assert "\n" not in str(refusal.value)


def test_another_tokenizer_is_refused(tiny_tokenizer, tmp_path):
    build_llama().save_pretrained(tmp_path)
    build_tokenizer(280).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="another tokenizer than the target"):
        build_drafter(DrafterConfig(init_from=str(tmp_path)), load(build_llama(), tiny_tokenizer))


def test_layers_count_from_either_end():
    assert layer_numbers([0, 2, -1], 10) == [0, 2, 9]


def test_the_shape_of_a_model_with_its_own_code_is_known_before_it_is_loaded(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    own = tmp_path / "own"
    build_llama(len(tiny_tokenizer)).save_pretrained(own)
    tiny_tokenizer.save_pretrained(own)
    (own / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    values = json.loads((own / "config.json").read_text())
    values |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (own / "config.json").write_text(json.dumps(values))
    config = DrafterConfig(kind="pretrained", path=str(own))
    model = sketch_drafter(config, load(build_llama(len(tiny_tokenizer)), tiny_tokenizer), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    facts = target_facts(TargetConfig(path=str(own), trust_remote_code=True))
    assert facts.weight_bytes() == 4 * sum(weight.numel() for weight in model.parameters())
