"""Loading: what was saved comes back; what cannot be loaded is one sentence."""

import json
import os

import pytest
import torch
from huggingface_hub import constants

from drafttrain.config import Recipe, TargetConfig
from drafttrain.errors import UserError, run_program
from drafttrain.models.fingerprint import fingerprint
from drafttrain.models.loading import (
    HTTPError,
    check_same_tokenizer,
    drafter_path,
    load_causal_lm,
    load_drafter,
    load_model_config,
    load_random,
    load_target,
    load_tokenizer,
    max_context,
    quantization_config,
    shared_vocabulary,
    vocabulary_size,
)
from drafttrain.run_folder import RunFolder
from tests.conftest import build_llama, build_tokenizer


@pytest.fixture
def saved(tmp_path, tiny_target, tiny_tokenizer):
    folder = tmp_path / "model"
    tiny_target.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def refusal(function, *arguments, **keywords):
    with pytest.raises(UserError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_target_comes_back_whole_frozen_and_in_eval_mode(saved, tiny_target, tiny_tokenizer):
    loaded = load_target(TargetConfig(path=str(saved)))
    ids = torch.tensor([tiny_tokenizer.encode("def add(left")])
    assert torch.equal(loaded.model(ids).logits, tiny_target(ids).logits)
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.fingerprint == fingerprint(tiny_target, tiny_tokenizer) and loaded.path == str(saved)
    assert loaded.tokenizer.chat_template == tiny_tokenizer.chat_template


def test_a_target_says_how_it_is_loaded_again(saved):
    loaded = load_target(TargetConfig(path=str(saved), revision="main", trust_remote_code=True))
    assert (loaded.path, loaded.revision, loaded.trust_remote_code) == (str(saved), "main", True)


def test_dtype_is_as_stored_or_as_asked(saved):
    assert load_causal_lm(saved).dtype == torch.float32
    assert load_causal_lm(saved, dtype="bfloat16").dtype == torch.bfloat16
    assert load_drafter(saved, dtype="float64").model.dtype == torch.float64
    assert "did you mean bfloat16?" in refusal(load_causal_lm, saved, dtype="bfloat")


def test_a_model_loaded_to_be_trained_keeps_its_gradients(saved):
    assert all(parameter.requires_grad for parameter in load_causal_lm(saved).parameters())


def test_a_device_map_is_passed_on(saved):
    loaded = load_target(TargetConfig(path=str(saved), device_map={"": "cpu"}))
    assert loaded.model.device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be such a device")
def test_a_device_that_is_not_there_is_one_sentence(saved):
    assert "cannot be loaded" in refusal(load_target, TargetConfig(path=str(saved), device_map={"": "cuda:7"}))


def test_a_drafter_whose_replacement_was_interrupted_is_the_runs(tmp_path):
    (tmp_path / ".drafter.old").mkdir()
    assert drafter_path(Recipe(), RunFolder(tmp_path)) == str(tmp_path / "drafter")


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "model", "a/b/c"])
def test_a_missing_folder_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(load_causal_lm, path).startswith(f"{path} does not exist")


def test_a_hub_name_that_cannot_be_got_is_one_sentence(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    told = refusal(load_causal_lm, "nobody/no-such-model")
    assert told.startswith("nobody/no-such-model is no folder here") and "run again" in told


def test_an_interrupted_download_is_one_sentence(monkeypatch):
    from transformers import AutoModelForCausalLM

    for error in (OSError("Connection broken: 3 bytes read"), HTTPError("peer closed\nconnection")):

        def broken(*arguments, error=error, **keywords):
            raise error

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
        assert "what was downloaded is kept" in refusal(load_causal_lm, "owner/model")


def test_a_disk_that_fills_while_downloading_stays_a_full_disk(monkeypatch, capsys):
    from transformers import AutoModelForCausalLM

    def full(*arguments, **keywords):
        raise OSError(28, os.strerror(28), "/cache/blob")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(SystemExit) as stop:
        run_program(load_causal_lm)("owner/model")
    assert stop.value.code == 2 and "disk is full" in capsys.readouterr().err


def test_a_folder_without_config_or_weights_is_named(saved, tmp_path):
    assert "no config.json" in refusal(load_causal_lm, tmp_path)
    assert "is a file" in refusal(load_causal_lm, saved / "config.json")
    (saved / "model.safetensors").unlink()
    assert "holds no weights" in refusal(load_causal_lm, saved)


def test_pickled_weights_are_never_opened(saved, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (saved / "model.safetensors").unlink()
    torch.save(Bomb(), saved / "pytorch_model.bin")
    assert "pickled weights only (pytorch_model.bin)" in refusal(load_causal_lm, saved)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_weights_are_named(saved, keep):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(len(whole) * keep)])
    assert "damaged or truncated" in refusal(load_causal_lm, saved)


def test_a_missing_shard_of_the_weights_is_refused(saved, tiny_target):
    (saved / "model.safetensors").unlink()
    tiny_target.save_pretrained(saved, max_shard_size="20KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_causal_lm(saved)
    shards[-1].unlink()
    assert str(saved) in refusal(load_causal_lm, saved)


def test_weights_that_do_not_fit_the_config_are_refused_not_drawn_at_random(saved):
    path = saved / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "lack model.layers.2." in refusal(load_causal_lm, saved)
    path.write_text(json.dumps({**config, "hidden_size": 16}))
    assert "cannot be loaded" in refusal(load_causal_lm, saved)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "unheard_of"}'])
def test_a_damaged_config_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    for load in (load_causal_lm, load_model_config):
        assert str(saved) in refusal(load, saved)


def test_code_of_the_model_runs_only_when_asked(saved, tmp_path):
    path = saved / "config.json"
    remote = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    path.write_text(json.dumps({"model_type": "evil", "auto_map": remote}))
    (saved / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    assert "trust_remote_code" in refusal(load_causal_lm, saved)
    assert not (tmp_path / "ran").exists()


def test_a_missing_or_damaged_tokenizer_is_refused(saved):
    (saved / "tokenizer.json").write_text("{")
    assert "cannot be loaded" in refusal(load_tokenizer, saved)
    (saved / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(load_tokenizer, saved)


def test_a_tokenizer_without_padding_pads_with_its_end(saved, tiny_tokenizer):
    path = saved / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("pad_token")
    path.write_text(json.dumps(config))
    assert load_tokenizer(saved).pad_token == "<|end|>"


def test_padded_vocabularies_share_the_shorter_width(tiny_target, tiny_tokenizer):
    wider = build_llama(len(tiny_tokenizer) + 28, layers=1)
    assert vocabulary_size(wider) == len(tiny_tokenizer) + 28
    assert shared_vocabulary(tiny_target, wider) == shared_vocabulary(wider, tiny_target) == len(tiny_tokenizer)
    assert max_context(wider) == 512


def test_another_tokenizer_is_refused_and_the_first_difference_named(tiny_tokenizer):
    check_same_tokenizer(tiny_tokenizer, build_tokenizer())
    told = refusal(check_same_tokenizer, tiny_tokenizer, build_tokenizer(270), "runs/q/drafter")
    assert told.startswith("runs/q/drafter has another tokenizer than the target (token ")
    larger = build_tokenizer()
    larger.add_tokens(["<|more|>"])
    assert "entries in the target" in refusal(check_same_tokenizer, tiny_tokenizer, larger)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptqq", "bits": 4}, "did you mean gptq?"),
        ({"quant_method": "gptq"}, "'bits'"),
        ({"quant_method": "fp8", "wait_block_size": [1, 1]}, "wait_block_size"),
        ({"bits": 4}, "quant_method"),
    ],
)
def test_impossible_quantization_is_one_sentence(settings, words):
    told = refusal(quantization_config, settings)
    assert told.startswith("target.quantization") and words in told


def test_quantization_settings_become_the_config_of_their_method():
    config = quantization_config({"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert type(config).__name__ == "BitsAndBytesConfig" and config.load_in_8bit
    assert quantization_config({"quant_method": "bitsandbytes"}).load_in_4bit


# ---- random weights ----


@pytest.fixture
def shape_only(tmp_path, tiny_target, tiny_tokenizer):
    """A folder that holds config.json and a tokenizer, no weights."""
    folder = tmp_path / "shape"
    tiny_target.config.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_random_weights_need_a_shape_and_a_tokenizer_alone(shape_only, tiny_target):
    assert "holds no weights" in refusal(load_target, TargetConfig(path=str(shape_only)))
    loaded = load_random(TargetConfig(path=str(shape_only), dtype="bfloat16"), seed=0)
    model = loaded.model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in tiny_target.named_parameters()
    }
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert load_random(TargetConfig(path=str(shape_only)), seed=0).model.dtype == torch.float32  # as stored


def test_random_weights_are_of_their_seed_and_leave_the_programs_own_draws_alone(shape_only):
    config = TargetConfig(path=str(shape_only), dtype="float32")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    prints = [load_random(config, seed).fingerprint for seed in (0, 0, 1)]
    assert torch.rand(1) == expected
    assert prints[0] == prints[1] and prints[0].differing(prints[2]) == ["weights"]


def test_random_weights_are_neither_quantized_nor_spread_over_devices(shape_only):
    path = str(shape_only)
    assert "not quantized" in refusal(load_random, TargetConfig(path=path, quantization={"quant_method": "fp8"}), 0)
    assert "one device" in refusal(load_random, TargetConfig(path=path, device_map="auto"), 0)
    assert "one device" in refusal(load_random, TargetConfig(path=path, device_map={"": "cpu"}), 0)
    assert load_random(TargetConfig(path=path, device_map="cpu"), 0).model.device == torch.device("cpu")
