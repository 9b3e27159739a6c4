"""Every recipe of a pair parses, plans, and trains a step on tiny random weights of its own architecture."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from drafttrain.config import parse
from drafttrain.decoding.expression import parse_method, resolved
from drafttrain.models.checkpoint import read_info
from drafttrain.train_drafter import main
from drafttrain.training.drafter_plan import cache_values
from drafttrain.training.pretrain import check_stages, load_pair
from tests.conftest import build_tokenizer
from tests.training.drafting import save_responses

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

TINY = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "eos_token_id": 5,
    "bos_token_id": 0,
    "pad_token_id": 1,
}

PAIRS = {
    "reference/pair.yaml": (LlamaConfig(**TINY, num_hidden_layers=12, tie_word_embeddings=True), None),
    "reference/pair_small.yaml": (LlamaConfig(**TINY, num_hidden_layers=12, tie_word_embeddings=True), None),
    "reference/adaptive.yaml": (
        LlamaConfig(**TINY, num_hidden_layers=12, tie_word_embeddings=True),
        LlamaConfig(**TINY, num_hidden_layers=2),
    ),
    "qwen3-8b-0.6b-24gb.yaml": (
        Qwen3Config(**TINY, num_hidden_layers=3),
        Qwen3Config(**TINY | {"vocab_size": 320}, num_hidden_layers=2, tie_word_embeddings=True),
    ),
    "llama3.1-8b-1b-8gpu.yaml": (
        LlamaConfig(**TINY, num_hidden_layers=3, rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        }),
        LlamaConfig(**TINY, num_hidden_layers=2, tie_word_embeddings=True),
    ),
}  # fmt: skip


LONGSPEC = {
    "longspec/llama3.1-8b.yaml": LlamaConfig(**TINY | {"max_position_embeddings": 32768}, num_hidden_layers=3),
    "longspec/qwen3-8b.yaml": Qwen3Config(**TINY | {"max_position_embeddings": 40960}, num_hidden_layers=3),
    "longspec/qwen3-32b.yaml": Qwen3Config(
        **TINY | {"max_position_embeddings": 40960, "num_attention_heads": 8, "num_key_value_heads": 1},
        num_hidden_layers=3,
    ),
}


def save(config, folder):
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("recipe", LONGSPEC)
def test_a_longspec_recipe_plans_and_trains_on_tiny_weights_of_its_architecture(recipe, tmp_path, capsys):
    words = ["--config", str(RECIPES / recipe), "--run", str(tmp_path / "run")]
    words += ["--target.path", save(LONGSPEC[recipe], tmp_path / "target")]
    save_responses(tmp_path / "run" / "responses", tmp_path / "target", rows=12)
    main([*words, "--plan"])
    assert "memory of one process" in capsys.readouterr().out
    main([*words, "--training.arguments.max_steps", "1", "--training.tau_evaluations", "1"])
    drafter = AutoConfig.from_pretrained(tmp_path / "run" / "drafter")
    assert drafter.model_type == "longspec" and drafter.kv_layer == 2
    assert drafter.qk_norm == recipe.startswith("longspec/qwen3")


@pytest.fixture(params=PAIRS)
def command(request, tmp_path):
    """The recipe's own command with tiny models in the place of its own."""
    target, drafter = PAIRS[request.param]
    words = ["--config", str(RECIPES / request.param), "--run", str(tmp_path / "run")]
    words += ["--target.path", save(target, tmp_path / "target")]
    if drafter is not None:
        words += ["--drafter.path", save(drafter, tmp_path / "drafter")]
    save_responses(tmp_path / "run" / "responses", tmp_path / "target", rows=12)
    return words


def test_a_recipe_plans_and_trains_on_tiny_weights_of_its_architecture(command, tmp_path, capsys):
    main([*command, "--plan"])
    out = capsys.readouterr().out
    assert "memory of one process" in out and "[[" in out
    main([*command, "--training.arguments.max_steps", "1", "--training.tau_evaluations", "1"])
    folder = tmp_path / "run" / "drafter"
    assert read_info(folder).metrics["step"] == 1
    target, drafter = (AutoConfig.from_pretrained(path) for path in (tmp_path / "target", folder))
    assert drafter.model_type == target.model_type and drafter.num_hidden_layers < target.num_hidden_layers


def test_the_reference_drafter_is_cut_as_its_recipe_says(tmp_path):
    path = save(LlamaConfig(**TINY, num_hidden_layers=12, tie_word_embeddings=True), tmp_path / "target")
    words = ["--config", str(RECIPES / "reference/drafter.yaml"), "--run", str(tmp_path), "--target.path", path]
    recipe = parse("", ("pretrain",), words).recipe
    check_stages(recipe.pretrain.stages)
    pair = load_pair(recipe)
    assert pair.drafter.config.num_hidden_layers == 2 and pair.drafter.config.num_attention_heads == 8


def test_the_caches_of_the_24gb_recipe_take_what_it_says():
    shared = {"num_key_value_heads": 8, "head_dim": 128}
    target, drafter = (Qwen3Config(**shared, num_hidden_layers=layers) for layers in (36, 28))
    assert 2 * (cache_values(target) + cache_values(drafter)) == 2**18  # bfloat16: 0.25 MiB a token
    assert "0.25 MiB a token of both models" in (RECIPES / "qwen3-8b-0.6b-24gb.yaml").read_text(encoding="utf-8")


def test_the_head_of_the_reference_longspec_drafter_is_one_that_its_traces_can_train():
    recipe = parse("", [], ["--config", str(RECIPES / "reference/longspec_head.yaml"), "--run", "r"]).recipe
    assert recipe.drafter.path.endswith("checkpoints/reference-longspec") and recipe.head.state == "producing"
    assert recipe.head.data in ("exact", "expected")
    for method in recipe.evaluate.methods:
        assert resolved(parse_method(method), allow_code=False).members <= {"drafter", "head"}


def test_the_reference_pairs_share_their_responses():
    pair, small = (
        parse("", [], ["--config", str(RECIPES / "reference" / name), "--run", "r"]).recipe
        for name in ("pair.yaml", "pair_small.yaml")
    )
    for section in ("target", "prompts", "responses", "seed"):
        assert getattr(pair, section) == getattr(small, section)
