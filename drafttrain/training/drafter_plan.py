"""`train_drafter.py --plan`: what would run, on a real rendered example, with estimates; fails on what fails later.

Weights are not read: shapes come from config.json, so that a plan for a large pair takes seconds anywhere.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import nn

from drafttrain.config import Parsed, Recipe, TargetConfig
from drafttrain.distributed import say
from drafttrain.models.drafters import inner, sketch_drafter, without_storage
from drafttrain.models.fingerprint import Fingerprint, architecture_hash, tokenizer_hash
from drafttrain.models.loading import (
    DTYPES,
    Loaded,
    check_folder,
    default_device,
    load_model_config,
    load_tokenizer,
    max_context,
)
from drafttrain.run_folder import RunFolder, require_space
from drafttrain.training.drafter_data import ResponseDataset, Row, marked, read_responses, require_trainable
from drafttrain.training.drafter_program import (
    WORK_FOLDER,
    check_settings,
    drafter_arguments,
    left_out,
    longest,
    placing_of,
    zero_stage,
)
from drafttrain.training.held_out import TOKENS
from drafttrain.training.readings import check_readings, manifest_of
from drafttrain.training.work_folder import global_batch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, TrainingArguments

EFFICIENCY = 0.4
"""Share of a device's matrix speed that training is taken to reach in the estimate of time."""


@dataclass(frozen=True)
class Shapes:
    """The pair without its weights.

    Attributes:
        target: its model has no storage.
        drafter: likewise.
        target_bytes: per weight of the target, as it is loaded.
        cache_bytes: per key or value, and per weight of the drafter while it decodes.
    """

    target: Loaded
    drafter: nn.Module
    target_bytes: float
    cache_bytes: int

    @property
    def context(self) -> int:
        """Positions that both models have."""
        return min(max_context(self.target.model), max_context(inner(self.drafter)))


def plan(parsed: Parsed) -> None:
    """Print the recipe, an example with the trained tokens marked, and estimates.

    Raises:
        UserError: whatever would stop the run: no or another target's responses, another tokenizer, no trainable
            token, impossible settings, too little disk.
    """
    recipe, run = parsed.recipe, RunFolder(parsed.run)
    sections = {name: parsed.resolved[name] for name in ("target", "drafter", "training", "seed")}
    say(yaml.safe_dump(sections, sort_keys=False, allow_unicode=True).rstrip())
    check_settings(recipe)
    shapes = read_shapes(parsed)
    folder = run.require(run.responses, "data_prep/responses.py")
    prints = shapes.target.fingerprint.to_dict()
    parts = {name: prints[name] for name in ("tokenizer", "architecture")}
    responses, train, tune = read_responses(folder, parts)
    max_length = longest(recipe.training, shapes.context)
    data = require_trainable(ResponseDataset(train, max_length), folder)
    stored = _readings(parsed, shapes, responses, data) if recipe.training.readings == "stored" else []
    held_out = ResponseDataset(tune, max_length)
    stage = zero_stage(recipe.training.arguments)
    given = {name: value for name, value in recipe.training.arguments.items() if name != "deepspeed"}
    arguments = drafter_arguments(
        replace(recipe, training=replace(recipe.training, arguments=given)), run.path / WORK_FOLDER
    )
    say("\n--- one example; [[ ]] marks the tokens that are trained ---")
    say(marked(data[0], shapes.target.tokenizer))
    say("\n--- what would run (estimates, not measured on these weights) ---")
    for line in (
        *_data(data, held_out),
        *stored,
        *_work(parsed, shapes, arguments, data),
        *_memory(parsed, shapes, arguments, data, held_out, stage),
        _disk(run.path, recipe, shapes, arguments, data),
        _time(recipe, shapes, arguments, data),
    ):
        say(line)


def read_shapes(parsed: Parsed) -> Shapes:
    """Tokenizer and shapes of both models.

    Raises:
        UserError: no such model, another tokenizer, or a drafter that cannot be made.
    """
    settings = parsed.recipe.target
    check_folder(settings.path, weights=True)
    tokenizer = load_tokenizer(settings.path, settings.revision, settings.trust_remote_code)
    config = load_model_config(settings.path, settings.revision, settings.trust_remote_code)
    model = without_storage(config, settings.trust_remote_code)
    prints = Fingerprint(tokenizer_hash(tokenizer), architecture_hash(config), "")
    target = Loaded(model, tokenizer, prints, settings.path)
    served = (DTYPES.get(settings.dtype) or config.dtype or torch.float32).itemsize
    drafter = sketch_drafter(parsed.recipe.drafter, target, settings.trust_remote_code)
    if parsed.recipe.drafter.kind == "longspec":
        placing_of(parsed.recipe, target, drafter)
    return Shapes(target, drafter, _bytes_per_weight(settings, served), served)


def _bytes_per_weight(settings: TargetConfig, served: int) -> float:
    """Of a target whose values take `served` bytes where they are not quantized."""
    quantization = settings.quantization or {}
    if quantization.get("load_in_4bit") or quantization.get("bits") == 4:
        return 0.56  # with the scales
    if quantization:
        return 1.06
    return float(served)


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _readings(parsed: Parsed, shapes: Shapes, responses: dict[str, Any], data: ResponseDataset) -> list[str]:
    run, drafter = RunFolder(parsed.run), shapes.drafter
    folder = run.require(run.readings, "data_prep/readings.py")
    prints = shapes.target.fingerprint.to_dict()
    known = {name: value for name, value in prints.items() if value}
    placing = placing_of(parsed.recipe, shapes.target, drafter)
    dtype = DTYPES.get(parsed.recipe.target.dtype) or shapes.target.model.config.dtype or torch.float32
    found = check_readings(folder, manifest_of(known, drafter.config.kv_layer, dtype, placing, responses, data))
    size = sum(shard["bytes"] for shard in found["shards"])
    return [f"readings of the target: {size:,} bytes in {len(found['shards'])} shards, mapped into memory"]


def _data(data: ResponseDataset, held_out: ResponseDataset) -> list[str]:
    lines = [f"train: {len(data)} responses, {data.tokens:,} trained of {sum(data.lengths):,} tokens a pass"]
    if data.dropped:
        lines.append(left_out(data))
    return [*lines, f"held out for tau and the choice of the best weights: {len(held_out)} responses"]


def _work(parsed: Parsed, shapes: Shapes, arguments: TrainingArguments, data: ResponseDataset) -> list[str]:
    training = parsed.recipe.training
    losses = " + ".join(f"{weight:g} {name}" for name, weight in training.losses.items())
    total, trained = _count(shapes.drafter), _count(shapes.drafter, trainable=True)
    share = "" if total == trained else f", {trained:,} of them trained"
    policy = f", {training.on_policy_fraction:.0%} of the steps on-policy" if training.on_policy_fraction else ""
    return [
        f"target: {_count(shapes.target.model):,} parameters; drafter: {total:,} parameters{share}",
        f"loss: {losses} at temperature {training.temperature:g}{policy}",
        f"training: {_steps(arguments, data)} steps of {global_batch(arguments)} responses, learning rate "
        f"{arguments.learning_rate:g}, tau measured {training.tau_evaluations} times",
    ]


def _steps(arguments: TrainingArguments, data: ResponseDataset) -> int:
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(math.ceil(len(data) / global_batch(arguments)) * arguments.num_train_epochs)


def _memory(
    parsed: Parsed,
    shapes: Shapes,
    arguments: TrainingArguments,
    data: ResponseDataset,
    held_out: ResponseDataset,
    stage: int,
) -> list[str]:
    """Bytes on one device by what they are for; ZeRO and FSDP divide some of them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    weights_split, state_split = (world if stage == 3 or fsdp else 1), (world if stage >= 2 or fsdp else 1)
    drafter, config = shapes.drafter, inner(shapes.drafter).config.get_text_config()
    size = DTYPES[parsed.recipe.drafter.dtype].itemsize
    trained = _count(drafter, trainable=True)
    moments = 2 if "8bit" in arguments.optim else 8
    tokens = arguments.per_device_train_batch_size * max(data.lengths)
    head = _head(drafter, shapes).weight
    caches = _caches(parsed, shapes, arguments, data, held_out)
    parts = {
        "target": _held(parsed, shapes, held_out) * shapes.target_bytes / weights_split,
        "drafter, gradients and optimizer": _count(drafter) * size / weights_split
        + trained * (size + moments) / state_split,
        "copy of the drafter that decodes": _count(drafter) * shapes.cache_bytes if caches else 0,
        "keys and values while decoding": caches,
        "activations": tokens * _activation(config, arguments),
        "output heads": head.numel() * 4 + 8 * 4 * parsed.recipe.training.chunk_tokens * len(head),
    }
    lines = [f"  {_gigabytes(value):>10}  {name}" for name, value in parts.items()]
    split = f" of {world}" if world > 1 else ""
    return [f"memory of one process{split}: {_gigabytes(sum(parts.values()))}", *lines]


def _held(parsed: Parsed, shapes: Shapes, held_out: ResponseDataset) -> int:
    """Weights of the target that stay: all, or without its layers where readings are stored and nothing decodes."""
    training, model = parsed.recipe.training, shapes.target.model
    decodes = training.on_policy_fraction > 0 or (training.tau_evaluations and len(held_out))
    if training.readings == "live" or decodes:
        return _count(model)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum(weight.numel() for weight in {weight for part in ends for weight in part.parameters()})


def _caches(
    parsed: Parsed, shapes: Shapes, arguments: TrainingArguments, data: ResponseDataset, held_out: ResponseDataset
) -> int:
    """Bytes of keys and values: of both models while tau is measured, of the drafter while it writes on-policy."""
    training = parsed.recipe.training
    target, drafter = (
        cache_values(model.config.get_text_config()) for model in (shapes.target.model, inner(shapes.drafter))
    )
    if parsed.recipe.drafter.kind == "longspec":  # its ring does not grow with the text
        drafter = 0
    values = 0
    if training.tau_evaluations and len(held_out):
        rows = min(arguments.per_device_eval_batch_size, training.tau_prompts, len(held_out))
        values = rows * max(_decoded(row) for row in held_out.select(len(held_out))) * (target + drafter)
    if training.on_policy_fraction:
        values = max(values, arguments.per_device_train_batch_size * max(data.lengths) * drafter)
    return values * shapes.cache_bytes


def _decoded(row: Row) -> int:
    """Tokens of a held-out prompt and of what is decoded behind it."""
    return min(row["prompt_length"] + TOKENS, len(row["input_ids"]))


def cache_values(config: PretrainedConfig) -> int:
    """Keys and values of one token in all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size


def _head(model: nn.Module, shapes: Shapes) -> nn.Module:
    """The output head that a model is taught through: a LongSpec drafter's is its target's."""
    return inner(model).get_output_embeddings() or shapes.target.model.get_output_embeddings()


def _activation(config: object, arguments: TrainingArguments) -> float:
    """Bytes a token that backward needs: all of a layer's intermediate values, or its input when checkpointed."""
    size = 2 if arguments.bf16 or arguments.fp16 else 4
    inside = 12 * config.hidden_size + 4 * config.intermediate_size
    if arguments.gradient_checkpointing:
        return size * (config.num_hidden_layers * config.hidden_size + inside)
    return size * config.num_hidden_layers * inside


def _disk(run: Path, recipe: Recipe, shapes: Shapes, arguments: TrainingArguments, data: ResponseDataset) -> str:
    checkpoints = (arguments.save_total_limit or 2) + 1
    needed = checkpoints * 12 * _count(shapes.drafter, trainable=True) + 4 * _count(shapes.drafter)
    require_space(run, needed, "the drafter and its checkpoints")
    width = shapes.target.model.config.get_text_config().hidden_size
    again = arguments.num_train_epochs > 1 and recipe.drafter.kind != "longspec"
    states = data.tokens * width * math.ceil(shapes.target_bytes) if again else 0
    more = f", and {_gigabytes(states)} for the target's states, if there is room" if states else ""
    return f"disk: {_gigabytes(needed)} at most while training, most of it for checkpoints{more}"


def _time(recipe: Recipe, shapes: Shapes, arguments: TrainingArguments, data: ResponseDataset) -> str:
    """Operations of all steps at a share of the matrix speed measured now."""
    share = _steps(arguments, data) * global_batch(arguments) / len(data)
    target = _head(shapes.target.model, shapes).weight.numel()
    own = inner(shapes.drafter).get_output_embeddings()
    drafter = 0 if own is None else own.weight.numel()
    tokens = sum(data.lengths)
    if recipe.drafter.kind == "longspec":  # it reads the target at other positions in every pass, or from files
        reads = share if recipe.training.readings == "live" else 0.0
    else:
        reads = min(share, 1.0)  # the target's states are stored when they are needed again
    operations = 2 * (_count(shapes.target.model) - target) * reads * tokens + 2 * target * share * data.tokens
    operations += 6 * share * ((_count(shapes.drafter) - drafter) * tokens + drafter * data.tokens)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    speed = matrix_speed(torch.bfloat16 if arguments.bf16 else torch.float32)
    minutes = operations / (world * EFFICIENCY * speed) / 60
    told = f"about {minutes:.0f} min" if minutes >= 1 else "under a minute"
    return (
        f"time: {told} at {EFFICIENCY:.0%} of the {speed / 1e12:.2f} TFLOP/s that {default_device()} reaches now "
        f"({operations:.1e} operations; measuring tau comes on top)"
    )


def matrix_speed(dtype: torch.dtype) -> float:
    """Operations a second of a matrix product on this process's device."""
    device = default_device()
    size = 4096 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        (left @ right).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _count(model: nn.Module, trainable: bool = False) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trainable)


def _gigabytes(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
