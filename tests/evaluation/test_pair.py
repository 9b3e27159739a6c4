"""Engines of a pair know every token that their own model knows, however few its drafter has."""

import pytest
import torch
import transformers as hf

from drafttrain.errors import UserError
from drafttrain.evaluation.pair import Models, load_other
from drafttrain.models.bigrams import learn
from drafttrain.models.checkpoint import CheckpointInfo, save_checkpoint
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.models.loading import Loaded
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama, build_tokenizer

GREEDY = Sampling(0.0)


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    nobody = Fingerprint("t", "a", "w")
    padded = build_llama(len(tiny_tokenizer) + 20, layers=1, hidden=16)
    short = build_llama(len(tiny_tokenizer) - 20, layers=1, hidden=16, max_position_embeddings=128)
    target, drafter = (Loaded(model, tiny_tokenizer, nobody, "tiny") for model in (padded, short))
    return Models(target, drafter, {}, frozenset(), "float32")


def test_the_target_keeps_the_tokens_that_its_drafter_lacks(models, tiny_tokenizer):
    target, drafter = models.engines()
    assert target.vocabulary == models.vocabulary == len(tiny_tokenizer)
    assert drafter.vocabulary == len(tiny_tokenizer) - 20


def test_the_context_is_that_of_the_shorter_model(models):
    assert models.context == 128


@torch.inference_mode()
def test_a_mixture_of_experts_is_read_in_float64_too(models, tiny_tokenizer):
    sizes = {"vocab_size": len(tiny_tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    experts = hf.MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    loaded = Loaded(hf.MixtralForCausalLM(experts).eval(), tiny_tokenizer, models.target.fingerprint, "tiny")
    pair = Models(loaded, models.drafter, {}, frozenset(), "float32")
    tokens = torch.tensor([[1, 2, 3]])
    usual, precise = (pair.engines(dtype)[0] for dtype in ("float32", "float64"))
    logits = [engine.forward(engine.new_cache(1), tokens).logits.double() for engine in (usual, precise)]
    assert torch.allclose(*logits, atol=1e-5)
    assert usual.config._experts_implementation != "eager"


def test_further_models_are_members_by_name(models, tiny_tokenizer):
    more = Loaded(build_llama(len(tiny_tokenizer), layers=1, hidden=16), tiny_tokenizer, models.target.fingerprint, "m")
    table = learn([[1, 2]], len(tiny_tokenizer), "t")
    pair = Models(models.target, models.drafter, {}, frozenset(), "float32", others={"small": more}, bigrams=table)
    assert set(pair.members()) == {"drafter", "small", "bigrams"}
    cascade = pair.decoder("Then((Reviewed(drafter, inner=Reviewed(small, inner=MaxGram(bigrams))), 2))", GREEDY, 0)
    assert (
        cascade.generate([[1, 2, 3]], 8)[0].token_ids
        == pair.decoder("Autoregressive()", GREEDY, 0).generate([[1, 2, 3]], 8)[0].token_ids
    )


def test_a_further_model_of_another_tokenizer_or_with_a_taken_name_is_refused(models, tmp_path):
    other = build_tokenizer(40)
    save_checkpoint(tmp_path / "m", build_llama(len(other), layers=1, hidden=16), other, CheckpointInfo("m"))
    with pytest.raises(UserError, match="another tokenizer than the target"):
        load_other("small", str(tmp_path / "m"), {}, models.target, "float32")
    for name in ("drafter", "bigrams", "not a name"):
        with pytest.raises(UserError, match="taken or no name"):
            load_other(name, str(tmp_path / "m"), {}, models.target, "float32")
