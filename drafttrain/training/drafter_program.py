"""What `train_drafter.py` does: responses in, a distilled drafter and its real tokens per round out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.config import Parsed, Recipe, TargetConfig, TrainingConfig, resolve_path
from drafttrain.dialogue import end_tokens
from drafttrain.distributed import barrier, is_main, say
from drafttrain.errors import UserError
from drafttrain.models.checkpoint import CheckpointInfo, license_of, read_info, save_checkpoint
from drafttrain.models.drafters import build_drafter, inner
from drafttrain.models.fingerprint import weights_hash
from drafttrain.models.loading import Loaded, load_target, max_context
from drafttrain.models.longspec_copying import rows_for, start_copying
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder, write_atomically
from drafttrain.training.arguments import check_arguments, training_arguments
from drafttrain.training.drafter_data import Collator, Epochs, ResponseDataset, read_responses, require_trainable
from drafttrain.training.losses import mixed
from drafttrain.training.work_folder import clear_unless_same, global_batch, last_checkpoint, remove, step_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

    from drafttrain.training.drafter_trainer import DrafterTrainer
    from drafttrain.training.held_out import HeldOut
    from drafttrain.training.on_policy import OnPolicy
    from drafttrain.training.positions import Placing
    from drafttrain.training.readings import StoredReadings

WORK_FOLDER = "drafter-training"
"""Folder of the run with the Trainer's checkpoints; only the finished drafter goes to drafter/."""

LOG = "training_log.json"
"""File of the run with everything the Trainer logged."""


@dataclass(frozen=True)
class Inputs:
    """Everything that a drafter is made of, checked.

    Attributes:
        target: loaded and frozen.
        drafter: to be trained, on the CPU.
        train, tune: responses to train on and held-out ones.
        vocabulary: leading token ids that stand for text; both models have rows for them.
        ends: tokens that end an answer.
        responses: the manifest of all responses.
        key: changes with anything that changes the drafter.
    """

    target: Loaded
    drafter: nn.Module
    train: ResponseDataset
    tune: ResponseDataset
    vocabulary: int
    ends: frozenset[int]
    responses: dict[str, Any]
    key: str

    @property
    def context(self) -> int:
        """Positions that both models have."""
        return min(max_context(self.target.model), max_context(inner(self.drafter)))


def train_drafter(parsed: Parsed) -> None:
    """Distil the drafter of a run and save it; every process calls it.

    A drafter that was finished with the same settings is kept; a run that was interrupted goes on where it was.

    Raises:
        UserError: as `read_inputs`, and a loss that is no number.
    """
    check_settings(parsed.recipe)
    run = RunFolder(parsed.run).create()
    inputs, folder = read_inputs(parsed), run.path / WORK_FOLDER
    if is_finished(run, inputs.key):
        say(f"{run.drafter} is already trained with these settings.")
        remove(folder)
        return
    from drafttrain.training.drafter_trainer import is_complete

    readings = stored_readings(parsed.recipe, inputs, run)
    run.record(parsed, "drafttrain/train_drafter.py")
    if inputs.train.dropped:
        say(left_out(inputs.train))
    # TrainingArguments comes after the models: DeepSpeed's would partition them while they are loaded.
    arguments = drafter_arguments(parsed.recipe, folder)
    clear_unless_same(folder, inputs.key, arguments)
    checkpoint = last_checkpoint(folder, is_complete)
    if checkpoint is None and parsed.recipe.drafter.kind == "longspec":
        fit_queries(parsed.recipe, inputs)
    trainer = make_trainer(parsed.recipe, inputs, arguments, run.path, checkpoint, readings)
    store_states(trainer, inputs, folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    drafter = trainer.trained()
    if is_main():
        log = json.dumps(trainer.state.log_history, indent=1) + "\n"
        write_atomically(run.path / LOG, log)
        save_drafter(run, drafter, trainer, parsed, inputs)
        remove(folder)
    barrier()
    say(_summary(run, trainer))


def check_settings(recipe: Recipe) -> None:
    """Refuse impossible settings before anything is loaded.

    Raises:
        UserError: names the setting.
    """
    mixed(recipe.training.losses)
    check_arguments(recipe.training.arguments)
    zero_stage(recipe.training.arguments)
    if recipe.training.readings == "stored":
        if recipe.drafter.kind != "longspec":
            raise UserError("training.readings stored is for drafter.kind longspec; leave it out.")
        if not recipe.training.packing:
            raise UserError("training.readings stored are read end to end; leave training.packing on.")
    Sampling(**dataclasses.asdict(recipe.responses.sampling))


def read_inputs(parsed: Parsed) -> Inputs:
    """Load the models and responses of a run and check that they belong together.

    Raises:
        UserError: missing or damaged responses, another target's answers, another tokenizer, no trainable token,
            an architecture whose head cannot be distilled.
    """
    from drafttrain.training.distill_head import check_head

    run, recipe = RunFolder(parsed.run), parsed.recipe
    folder = run.require(run.responses, "data_prep/responses.py")
    target = load_target(_placed(recipe))
    manifest, train, tune = read_responses(folder, target.fingerprint, parsed.accept_new_target)
    drafter = build_drafter(recipe.drafter, target, recipe.seed, recipe.target.trust_remote_code)
    for model in (target.model, *([] if recipe.drafter.kind == "longspec" else [inner(drafter)])):
        check_head(model)
    if recipe.drafter.kind == "longspec":
        placing_of(recipe, target, drafter)  # refused before anything is read
    context = min(max_context(target.model), max_context(inner(drafter)))
    max_length = longest(recipe.training, context)
    return Inputs(
        target=target,
        drafter=drafter,
        train=require_trainable(ResponseDataset(train, max_length), folder),
        tune=ResponseDataset(tune, max_length),
        vocabulary=1 + max(target.tokenizer.get_vocab().values()),
        ends=end_tokens(target.tokenizer, target.model.generation_config),
        responses=manifest,
        key=settings_key(recipe, manifest, target, drafter),
    )


def fit_queries(recipe: Recipe, inputs: Inputs) -> None:
    """Where the recipe wants it, start a new LongSpec drafter as one that copies."""
    if recipe.drafter.block.copying and recipe.drafter.init_from is None:
        rows = rows_for(inputs.train[number]["input_ids"] for number in range(len(inputs.train)))
        explained = start_copying(inputs.drafter, inputs.target.model, rows)
        say(f"the block's queries explain {explained:.0%} of the target's")


def _placed(recipe: Recipe) -> TargetConfig:
    """The target section, with the weights in host memory first where ZeRO-3 or FSDP will split them."""
    split = zero_stage(recipe.training.arguments) == 3 or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if split and recipe.target.device_map is None and recipe.target.quantization is None:
        return dataclasses.replace(recipe.target, device_map="cpu")
    return recipe.target


def zero_stage(arguments: Mapping[str, Any]) -> int:
    """Stage of ZeRO that DeepSpeed is asked for, 0 without it.

    Raises:
        UserError: its configuration is missing or no JSON.
    """
    asked = arguments.get("deepspeed")
    if asked is None:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0"))
    if isinstance(asked, str):
        file = Path(resolve_path(asked))
        if not file.is_file():
            raise UserError(f"training.arguments.deepspeed is {asked}, which does not exist.")
        try:
            asked = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{file} is not valid JSON; give a DeepSpeed configuration.") from None
    return int(asked.get("zero_optimization", {}).get("stage", 0))


def longest(training: TrainingConfig, context: int) -> int:
    """Tokens that sequences are cut to.

    Raises:
        UserError: `training.max_length` is beyond the models' context or leaves no room for the drafter to write.
    """
    asked = context if training.max_length is None else training.max_length
    if asked > context:
        raise UserError(f"training.max_length is {asked}, which is beyond the models' context, {context}; lower it.")
    if training.on_policy_fraction > 0 and asked <= training.on_policy_tokens:
        raise UserError(
            f"training.on_policy_tokens is {training.on_policy_tokens}, which does not fit into sequences of {asked}."
        )
    return asked


def left_out(data: ResponseDataset) -> str:
    """Says how many responses are of no use."""
    return f"left out: {data.dropped} responses without a token to train within {data.max_length} tokens"


def settings_key(recipe: Recipe, manifest: dict[str, Any], target: Loaded, drafter: nn.Module) -> str:
    """Hash of all that decides what the drafter will be."""
    settings = {
        "drafter": dataclasses.asdict(recipe.drafter),
        "weights": weights_hash(drafter),  # a path may hold other ones by now
        "training": dataclasses.asdict(recipe.training),
        "seed": recipe.seed,
        "sampling": dataclasses.asdict(recipe.responses.sampling) if recipe.training.on_policy_fraction else None,
        "target": target.fingerprint.to_dict(),
        "responses": manifest,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


def drafter_arguments(recipe: Recipe, folder: Path) -> TrainingArguments:
    """TrainingArguments of the drafter."""
    from drafttrain.training.drafter_trainer import DEFAULTS, FIXED

    given = dict(recipe.training.arguments)
    keep_best = given.pop("load_best_model_at_end", True)
    arguments = training_arguments(given, folder, "training", DEFAULTS, **FIXED, seed=recipe.seed)
    if recipe.training.tau_evaluations and keep_best:
        # Set afterwards: the Trainer insists on a common rhythm of saving and evaluating, ours is a share of the data.
        arguments.load_best_model_at_end = True
        arguments.metric_for_best_model, arguments.greater_is_better = "tau", True
    return arguments


def make_trainer(
    recipe: Recipe,
    inputs: Inputs,
    arguments: TrainingArguments,
    run: Path,
    checkpoint: Path | None = None,
    readings: StoredReadings | None = None,
) -> DrafterTrainer:
    """The Trainer, ready to run; where readings are stored and nothing decodes, the target loses its layers."""
    from drafttrain.training.drafter_trainer import Distillation, DrafterTrainer
    from drafttrain.training.sharding import drop_layers

    training, pad = recipe.training, inputs.target.tokenizer.pad_token_id
    held_out = _held_out(training, inputs, arguments.per_device_eval_batch_size)
    if held_out is None:
        arguments.load_best_model_at_end, arguments.metric_for_best_model = False, None
    arguments.eval_on_start = held_out is not None and checkpoint is None
    longspec: dict[str, Any] = {}
    kind = DrafterTrainer
    if recipe.drafter.kind == "longspec":
        from drafttrain.training.longspec_trainer import LongSpecTrainer

        kind = LongSpecTrainer
        longspec = {"placing": placing_of(recipe, inputs.target, inputs.drafter), "packing": training.packing}
    distillation = Distillation(
        loss=mixed(training.losses),
        temperature=training.temperature,
        chunk_tokens=training.chunk_tokens,
        vocabulary=inputs.vocabulary,
        evaluations=training.tau_evaluations,
        on_policy=_on_policy(recipe, inputs, pad),
    )
    if readings is not None and held_out is None and distillation.on_policy is None:
        drop_layers(inputs.target.model)
    trainer = kind(
        inputs.drafter,
        inputs.target.model,
        arguments,
        distillation,
        Epochs(inputs.train, recipe.seed, global_batch(arguments)),
        Collator(pad),
        run,
        held_out,
        resumed=step_of(checkpoint) if checkpoint else 0,
        **longspec,
    )
    trainer.states = readings
    return trainer


def placing_of(recipe: Recipe, target: Loaded, drafter: nn.Module) -> Placing:
    """Where the rows of a LongSpec drafter stand.

    Raises:
        UserError: more positions are to be served than the target has.
    """
    from drafttrain.training.positions import Placing

    return Placing.of(recipe.training.positions, max_context(target.model), drafter.config.depth, recipe.seed)


def stored_readings(recipe: Recipe, inputs: Inputs, run: RunFolder) -> StoredReadings | None:
    """What a LongSpec drafter learns of its target, where the recipe wants it from files.

    Raises:
        UserError: there are no such files, or they are of something else.
    """
    if recipe.training.readings == "live":
        return None
    from drafttrain.training.readings import StoredReadings, manifest_of

    folder, target = run.require(run.readings, "data_prep/readings.py"), inputs.target
    placing, layer = placing_of(recipe, target, inputs.drafter), inputs.drafter.config.kv_layer
    prints, data = target.fingerprint.to_dict(), inputs.train
    return StoredReadings(folder, manifest_of(prints, layer, target.model.dtype, placing, inputs.responses, data), data)


def store_states(trainer: DrafterTrainer, inputs: Inputs, folder: Path) -> None:
    """Compute the target's states once where they are read more than once and fit on the disk; all ranks call it."""
    from drafttrain.models.longspec import LongSpecDrafter
    from drafttrain.training.state_file import StateFile
    from drafttrain.training.target_states import TargetStates

    passes, target = trainer.args.num_train_epochs, trainer.target
    if passes <= 1 or target.sharded or isinstance(trainer.replica.model, LongSpecDrafter):
        return  # a LongSpec drafter reads the target's keys, at other positions in every pass
    needed = TargetStates.bytes_needed(target, inputs.train)
    path = folder / "target-states.bin"
    if not StateFile.fits(path, needed):
        say(
            f"the target's states ({needed / 2**30:.1f} GiB) do not fit on the disk of {folder}: it runs in every pass."
        )
        return
    trainer.states = TargetStates(path, target, inputs.train, trainer.data_collator, inputs.key)


def _held_out(training: TrainingConfig, inputs: Inputs, batch: int) -> HeldOut | None:
    from drafttrain.training.held_out import HeldOut

    if not training.tau_evaluations:
        return None
    if len(inputs.tune):
        held_out = HeldOut.of(
            inputs.tune,
            training.tau_prompts,
            training.tau_length,
            inputs.vocabulary,
            inputs.ends,
            inputs.context,
            batch,
        )
        if held_out.prompts:
            return held_out
    say("no responses of the split tune: tau is not measured, and the last weights are taken instead of the best.")
    return None


def _on_policy(recipe: Recipe, inputs: Inputs, pad: int) -> OnPolicy | None:
    from drafttrain.training.on_policy import OnPolicy

    training = recipe.training
    if training.on_policy_fraction <= 0:
        return None
    return OnPolicy(
        fraction=training.on_policy_fraction,
        tokens=training.on_policy_tokens,
        sampling=Sampling(**dataclasses.asdict(recipe.responses.sampling)),
        vocabulary=inputs.vocabulary,
        eos_ids=inputs.ends,
        max_length=inputs.train.max_length,
        pad_id=pad,
        seed=recipe.seed,
    )


def is_finished(run: RunFolder, key: str) -> bool:
    """Whether the run's drafter was made with these settings from these responses."""
    if not (run.drafter / "drafttrain.json").is_file():
        return False
    return read_info(run.drafter).extra.get("key") == key


def save_drafter(run: RunFolder, drafter: Any, trainer: DrafterTrainer, parsed: Parsed, inputs: Inputs) -> None:
    """Write the drafter, drafttrain.json and model card, whole or not at all."""
    kept = trainer.state.best_global_step or trainer.state.global_step
    measured = {point["step"]: point for point in trainer.history.points}.get(kept, {})
    metrics = {name: value for name, value in measured.items() if name != "seconds"}
    info = CheckpointInfo(
        kind="longspec" if parsed.recipe.drafter.kind == "longspec" else "drafter",
        target=inputs.target.fingerprint,
        recipe=parsed.resolved,
        metrics=metrics,
        license=license_of(parsed.recipe.target.path),
        description=(
            f"Distilled on {len(inputs.train)} responses ({inputs.train.tokens} tokens) of the target. tau: tokens per "
            f"round, bonus included, of greedy decoding on held-out prompts with {parsed.recipe.training.tau_length} "
            "drafted tokens a round."
        ),
        extra={"key": inputs.key, "tau_history": trainer.history.points},
    )
    save_checkpoint(run.drafter, drafter, inputs.target.tokenizer, info)


def _summary(run: RunFolder, trainer: DrafterTrainer) -> str:
    from drafttrain.training.held_out import tables

    lines = [f"drafter in {run.drafter}"]
    if trainer.history.points:
        lines += ["held out, greedy, tokens per round (tau) as training went on:", tables(trainer.history.points)]
    return "\n".join(lines)
