"""`transformers.TrainingArguments` from the free part of a recipe, with mistakes told in a sentence."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.config import nearest, resolve_path
from drafttrain.errors import UserError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_arguments(arguments: Mapping[str, Any], section: str = "training") -> None:
    """Refuse names that TrainingArguments does not have.

    Args:
        arguments: `training.arguments` or `head.arguments` of a recipe.
        section: which, for the message.

    Raises:
        UserError: names the nearest known argument.
    """
    from transformers import TrainingArguments

    known = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]
    for name in arguments:
        if name not in known:
            guess = nearest(name, known)
            hint = f"; did you mean {guess}?" if guess else "; see transformers.TrainingArguments."
            raise UserError(f"{section}.arguments: transformers.TrainingArguments has no {name}{hint}")


def training_arguments(
    arguments: Mapping[str, Any],
    output_dir: str | Path,
    section: str = "training",
    defaults: Mapping[str, Any] | None = None,
    **fixed: Any,
) -> TrainingArguments:
    """TrainingArguments of a program.

    Args:
        arguments: what the recipe says.
        output_dir: where the Trainer keeps its checkpoints; the recipe may not move it.
        section: for messages.
        defaults: values that the recipe overrides.
        **fixed: values that the program needs and the recipe may not change.

    Raises:
        UserError: unknown name, one that the program fixes, or a value that transformers refuses.
    """
    from transformers import TrainingArguments

    check_arguments(arguments, section)
    # YAML reads the word `no` as false, which transformers does not take for a strategy.
    arguments = {k: "no" if v is False and k.endswith("_strategy") else v for k, v in arguments.items()}
    if isinstance(arguments.get("deepspeed"), str):
        arguments["deepspeed"] = resolve_path(arguments["deepspeed"])
    defaults = {**_placement(arguments, section), **(defaults or {})}
    fixed["output_dir"] = str(output_dir)
    for name in arguments:
        if name in fixed and arguments[name] != fixed[name]:
            raise UserError(f"{section}.arguments.{name} is set by the program to {fixed[name]}; remove it.")
    try:
        return on_one_device(TrainingArguments(**{**defaults, **arguments, **fixed}))
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"{section}.arguments cannot be used: {' '.join(str(error).split()).rstrip('.')}.") from error


def on_one_device(arguments: TrainingArguments) -> TrainingArguments:
    """A process without launcher takes one GPU of several, not nn.DataParallel, which would split what a batch is."""
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _placement(arguments: Mapping[str, Any], section: str) -> dict[str, Any]:
    """What the Trainer must be told so that processes without an accelerator train together, not each for itself.

    Raises:
        UserError: DeepSpeed without a launcher.
    """
    import torch

    deepspeed = arguments.get("deepspeed") is not None or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed and "LOCAL_RANK" not in os.environ:
        raise UserError(
            f"{section}.arguments.deepspeed needs a launcher; start the program with deepspeed or accelerate."
        )
    if torch.cuda.is_available():
        return {}
    placement: dict[str, Any] = {"use_cpu": True}  # whatever else there is: models are loaded to CUDA or the CPU
    if deepspeed:
        _join_on_cpu()
        placement["accelerator_config"] = {"use_configured_state": True}
    return placement


def _join_on_cpu() -> None:
    """accelerate takes DeepSpeed without an accelerator for a single process unless it is told the backend."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    before = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo")
    finally:
        if before is None:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]
