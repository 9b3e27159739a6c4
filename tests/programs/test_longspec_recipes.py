"""The recipes of LongSpec drafters, all stages, on tiny random weights of their targets' architectures."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from drafttrain.models.checkpoint import read_info
from drafttrain.models.loading import AutoDrafter
from tests.conftest import build_tokenizer
from tests.programs.test_responses import environment
from tests.programs.test_train_drafter import tool

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "longspec"

SHAPES = {
    "llama3.1-8b": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen3-8b": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-32b": {"model_type": "qwen3", "head_dim": 16, "num_attention_heads": 8, "num_key_value_heads": 1},
}
"""What is peculiar to each: scaled rotary frequencies; heads wider than the hidden size, normed; many of them a key."""

ZERO = {"llama3.1-8b": 2, "qwen3-8b": 2, "qwen3-32b": 3}
"""What the recipes' own comments name."""


def save_tiny(folder: Path, name: str) -> Path:
    tokenizer = build_tokenizer()
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "eos_token_id": 5,
    }
    shape = values | SHAPES[name]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(path: Path, about: str) -> Path:
    texts = [f"{about} {number}: " + "apple pear " * (2 + number % 5) for number in range(14)]
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in texts))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
@pytest.mark.parametrize("name", SHAPES)
def test_all_stages_run_and_run_again_do_nothing(tmp_path, name, launcher):
    target = save_tiny(tmp_path / "target", name)
    file, task = prompts(tmp_path / "prompts.jsonl", "tell"), prompts(tmp_path / "task.jsonl", "write")
    small = {
        "target.path": target,
        "target.dtype": "float32",
        "drafter.block.window": 8,
        "prompts.near_duplicate": 1.0,
        "responses.max_new_tokens": 12,
        "training.positions.served": 256,
        "training.max_length": 64,
        "training.tau_evaluations": 1,
        "training.tau_prompts": 2,
        "training.arguments.per_device_train_batch_size": 2,
        "training.arguments.gradient_accumulation_steps": 2,
        "training.arguments.num_train_epochs": 2,
        "training.arguments.bf16": "false",
        "training.arguments.use_cpu": "true",
    }
    launch = f"{tool('accelerate')} launch --multi_gpu --num_processes 2 --main_process_port 29671"
    if launcher == "deepspeed":
        small["training.arguments.deepspeed"] = ROOT / "recipes" / "deepspeed" / f"zero{ZERO[name]}.json"
        launch = f"{tool('deepspeed')} --num_accelerators 2 --master_port 29672"
        del small["training.arguments.use_cpu"]
    settings = environment() | {"LAUNCH": launch}
    if launcher == "deepspeed":
        del settings["ACCELERATE_USE_CPU"]  # it finds out by itself
    more = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    run = tmp_path / "run"
    command = [str(RECIPES / "stages.sh"), str(RECIPES / f"{name}.yaml"), str(run), str(task), *more]
    command += ["--prompts.source", "file", "--prompts.path", str(file)]
    for repeat in range(2):
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        assert ("is already trained with these settings" in done.stdout) == (repeat == 1)
    for stage in ("short", "long", "task"):
        info, drafter = read_info(run / stage / "drafter"), AutoDrafter.from_pretrained(run / stage / "drafter")
        assert info.kind == "longspec" and info.metrics["tau"] >= 1
        assert (drafter.config.window, drafter.config.kv_layer, drafter.config.depth) == (8, 1, 5)
