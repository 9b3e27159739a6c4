"""A tiny pair on disk with responses, for tests of the distillation."""

import json
from pathlib import Path

import torch
import yaml

from drafttrain.config import TargetConfig
from drafttrain.dialogue import end_tokens
from drafttrain.models.loading import load_target
from drafttrain.records import ShardedWriter
from tests.conftest import build_llama, build_tokenizer

RECIPE = {
    "drafter": {"kind": "cut", "layers": [0]},
    "training": {
        "tau_evaluations": 2,
        "tau_prompts": 3,
        "tau_length": 3,
        "arguments": {
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "disable_tqdm": True,
        },
    },
}


def save_target(folder: Path, **config) -> Path:
    """A random Llama of two layers with tokenizer."""
    tokenizer = build_tokenizer()
    build_llama(len(tokenizer), layers=2, eos_token_id=5, **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_responses(folder: Path, target: Path, rows: int = 24, shortest: int = 1) -> Path:
    """Random responses of very different lengths, a sixth of them held out."""
    loaded = load_target(TargetConfig(path=str(target)))
    assert 5 in end_tokens(loaded.tokenizer, loaded.model.generation_config)
    manifest = {"kind": "responses", "fingerprints": {"target": loaded.fingerprint.to_dict()}}
    writer = ShardedWriter(folder, manifest, rows, 8)
    generator = torch.Generator().manual_seed(0)
    for shard in writer.pending():
        made = []
        for row in writer.source_range(shard):
            prompt, response = (
                torch.randint(6, 300, (int(torch.randint(low, high, (), generator=generator)),), generator=generator)
                for low, high in ((2, 8), (shortest, 24))
            )
            made.append(
                {
                    "prompt_id": f"p{row}",
                    "split": "tune" if row % 6 == 5 else "train",
                    "task": "noise",
                    "source": "test",
                    "turn": 0,
                    "prompt_ids": prompt.tolist(),
                    "response_ids": response.tolist(),
                    "finish_reason": "length",
                    "text": "",
                }
            )
        writer.write(shard, made)
    writer.finish()
    return folder


def make_run(folder: Path, rows: int = 24, **changes) -> tuple[Path, Path]:
    """Target, responses and recipe.

    Returns:
        the recipe file and the run folder.
    """
    target = save_target(folder / "target")
    run = folder / "run"
    save_responses(run / "responses", target, rows)
    return write_recipe(folder / "recipe.yaml", target, **changes), run


def write_recipe(path: Path, target: Path, drafter=None, training=None, arguments=None, **sections) -> Path:
    """The recipe above with changes."""
    recipe = {"target": {"path": str(target)}, **json.loads(json.dumps(RECIPE)), **sections}
    recipe["drafter"] = drafter or recipe["drafter"]
    recipe["training"] |= training or {}
    recipe["training"]["arguments"] |= arguments or {}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
