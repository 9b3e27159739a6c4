"""What `train_head.py` does: traces in, acceptance head and its calibration out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import keyword
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.config import HeadConfig, Parsed, Recipe
from drafttrain.distributed import barrier, is_main, say
from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig, load_config
from drafttrain.models.checkpoint import CheckpointInfo, read_info, save_checkpoint
from drafttrain.models.fingerprint import Fingerprint, weights_hash
from drafttrain.models.loading import Loaded, drafter_path, is_longspec, load_drafter, load_target
from drafttrain.models.longspec_states import BesideTarget
from drafttrain.records import read_manifest, read_records
from drafttrain.run_folder import RunFolder
from drafttrain.training.arguments import training_arguments
from drafttrain.training.head_data import COLUMNS, STEP_COLUMNS, HeadDataset, Layout
from drafttrain.training.work_folder import clear_unless_same, global_batch, last_checkpoint, remove

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from drafttrain.training.head_trainer import HeadTrainer, States

METRICS = "metrics.json"


@dataclass(frozen=True)
class Inputs:
    """Everything that a head is made of, checked.

    Attributes:
        drafter: loaded and frozen.
        config: of the head to be trained.
        layout: how the traces are read.
        train, tune: records of the two splits.
        folder: where the head goes.
        work: the Trainer's checkpoints and the drafter's states, kept apart from the finished head.
        key: changes with anything that changes the head.
    """

    drafter: Loaded
    config: AcceptanceHeadConfig
    layout: Layout
    train: Dataset
    tune: Dataset
    folder: Path
    work: Path
    key: str


def read_inputs(parsed: Parsed) -> Inputs:
    """Open traces and drafter of a run and check that they belong together.

    Raises:
        UserError: missing or damaged traces, another drafter than the traced one, no trainable token, settings that do
            not go together.
    """
    run, recipe = RunFolder(parsed.run), parsed.recipe
    if not run.step_traces.exists():
        run.require(run.traces, "data_prep/traces.py")
    path = drafter_path(recipe, run)
    by_step = is_longspec(path)
    folder, kind = (run.step_traces, "step_traces") if by_step else (run.traces, "traces")
    manifest = read_manifest(run.require(folder, "data_prep/traces.py"), kind)
    # its states in the dtype that it is traced and served in
    drafter = load_drafter(path, recipe.target.dtype, recipe.target.trust_remote_code)
    drafter.model.requires_grad_(False)
    prints = {"drafter": drafter.fingerprint.to_dict()}
    if by_step:
        beside = load_target(recipe.target)
        prints["target"] = beside.fingerprint.to_dict()
        drafter = dataclasses.replace(drafter, model=BesideTarget(drafter.model, beside.model))
    columns = STEP_COLUMNS if by_step else COLUMNS
    records = read_records(folder, kind, {"fingerprints": prints}, columns, parsed.accept_new_target)
    target = Fingerprint.from_dict(manifest["fingerprints"]["target"])
    config = head_config(recipe.head, manifest, drafter, target)
    layout = Layout.of(manifest)
    layout.check(config)
    train, tune = (_split(records, name) for name in ("train", "tune"))
    if not any(len(ids) for ids in train["response_ids"]):
        raise UserError(f"{folder} holds no drafted token of the split train to learn from; trace more responses.")
    name = _folder_name(recipe.head.folder)
    places = (run.path / name, run.path / f"{name}-training")
    start = start_head(recipe.head, config, parsed.accept_new_target)
    return Inputs(drafter, config, layout, train, tune, *places, _key(recipe, manifest, drafter, start))


def head_config(
    settings: HeadConfig, manifest: dict[str, Any], drafter: Loaded, target: Fingerprint
) -> AcceptanceHeadConfig:
    """Configuration of the head that a recipe asks for.

    Raises:
        UserError: impossible settings.
    """
    shared = {item.name for item in dataclasses.fields(AcceptanceHeadConfig)}
    given = {name: value for name, value in dataclasses.asdict(settings).items() if name in shared}
    given["features"] = tuple(settings.features)
    given["mixing"] = settings.mixing if settings.data == "mixed" else 0.0
    embeddings_VE = drafter.model.get_input_embeddings().weight
    if isinstance(drafter.model, BesideTarget):
        _check_block_head(settings)
        given["max_length"] = min(settings.max_length, drafter.model.config.depth)
        given["min_length"] = min(settings.min_length, given["max_length"])
    return AcceptanceHeadConfig(
        hidden_size=drafter.model.config.get_text_config().hidden_size,
        embeddings=tuple(embeddings_VE.shape) if "token" in settings.features else None,
        **given,
        sampling=manifest["sampling"],
        target=target,
        drafter=drafter.fingerprint,
    )


def _check_block_head(settings: HeadConfig) -> None:
    if settings.state != "producing" or settings.data not in ("exact", "expected"):
        raise UserError(
            f"head.state {settings.state} with head.data {settings.data} is not for LongSpec drafters, whose states "
            "are of one step each; take head.state producing and head.data exact or expected."
        )


def train_head(parsed: Parsed) -> None:
    """Train the head of a run, judge it on held-out responses and save it; every process calls it.

    A head that was finished with the same settings is kept; a run that was interrupted goes on where it was.

    Raises:
        UserError: as `read_inputs`, and a loss that is no number.
    """
    run = RunFolder(parsed.run).create()
    inputs = read_inputs(parsed)
    if is_finished(inputs):
        say(f"{inputs.folder} is already trained with these settings.")
        remove(inputs.work)
        return
    run.record(parsed, "drafttrain/train_head.py")
    arguments = head_arguments(parsed.recipe, inputs)
    clear_unless_same(inputs.work, inputs.key, arguments)
    checkpoint = last_checkpoint(inputs.work)
    trainer = make_trainer(parsed.recipe, inputs, arguments, parsed.accept_new_target)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    head = trainer.trained_head().settle(inputs.drafter.model.get_input_embeddings().weight.cpu())
    metrics = judge(trainer)
    if is_main():
        save_head(head, metrics, parsed, inputs)
        remove(inputs.work)
    barrier()
    say(_summary(metrics, inputs.folder))


def make_trainer(
    recipe: Recipe, inputs: Inputs, arguments: TrainingArguments, accept_new_target: bool = False
) -> HeadTrainer:
    """The Trainer, ready to run."""
    from transformers import set_seed

    from drafttrain.training import calibration
    from drafttrain.training.head_data import features_and_labels
    from drafttrain.training.head_trainer import HeadTrainer, HeldOut
    from drafttrain.training.warm_start import warm_start

    set_seed(recipe.seed)
    train = HeadDataset(inputs.train, inputs.layout, inputs.config, recipe.seed, global_batch(arguments))
    known = features_and_labels(train)
    head = start_head(recipe.head, inputs.config, accept_new_target)
    if recipe.head.init_from is None:
        warm_start(head, *known)
    exact = dataclasses.replace(inputs.config, data="exact", mixing=0.0)
    tune = HeadDataset(inputs.tune, inputs.layout, exact, recipe.seed, shuffle=False)
    train_states = _states("train", train, inputs)
    held_out = None
    if len(inputs.tune):
        held_out = HeldOut(tune, _states("tune", tune, inputs), calibration.Baselines(*known))
    return HeadTrainer(head, arguments, train, train_states, held_out)


def head_arguments(recipe: Recipe, inputs: Inputs) -> TrainingArguments:
    """TrainingArguments of the head; without held-out responses nothing is evaluated."""
    from drafttrain.training.head_trainer import DEFAULTS, FIXED

    defaults = dict(DEFAULTS)
    if not len(inputs.tune):
        say("no responses of the split tune: the head is neither evaluated nor is its best epoch chosen.")
        defaults |= {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}
    fixed = FIXED | {"seed": recipe.seed}
    return training_arguments(recipe.head.arguments, inputs.work, "head", defaults, **fixed)


def start_head(settings: HeadConfig, config: AcceptanceHeadConfig, accept_new_target: bool = False) -> AcceptanceHead:
    """A new head, or the one that `head.init_from` names, continued with this recipe's settings.

    Raises:
        UserError: that head has another shape, reads another state, or belongs to another pair.
    """
    head = AcceptanceHead(config)
    if settings.init_from is None:
        return head
    pair = {"target": config.target, "drafter": config.drafter, "accept_new_target": accept_new_target}
    earlier = AcceptanceHead.load(settings.init_from, **pair)
    for name in ("hidden_size", "state", "depth", "tied", "features", "token_rank"):
        old, new = getattr(earlier.config, name), getattr(config, name)
        if old != new:
            raise UserError(f"head.init_from {settings.init_from} has {name} {old}, the recipe {new}; make them agree.")
    head.load_state_dict(earlier.state_dict())
    return head


def judge(trainer: HeadTrainer) -> dict[str, Any]:
    """Calibration report on held-out responses, with the training curve; every process calls it."""
    metrics = trainer.held_out_report()
    metrics["curve"] = [
        {name: value for name, value in entry.items() if name in _CURVE or name.startswith("eval_")}
        for entry in trainer.state.log_history
        if "loss" in entry or any(name.startswith("eval_") for name in entry)
    ]
    return metrics


_CURVE = ("step", "epoch", "loss", "learning_rate", "grad_norm")


def save_head(head: AcceptanceHead, metrics: dict[str, Any], parsed: Parsed, inputs: Inputs) -> None:
    """Write head, metrics.json, drafttrain.json and model card, whole or not at all."""
    info = CheckpointInfo(
        kind="acceptance_head",
        target=inputs.config.target,
        recipe=parsed.resolved,
        metrics=_headline(metrics),
        description=(
            f"Predicts whether the target accepts a drafted token, from the drafter's {inputs.config.state} state. For "
            f"the drafter `{inputs.config.drafter.short}`; labels at sampling {dict(inputs.config.sampling)}."
        ),
        extra={"drafter": inputs.config.drafter.to_dict(), "key": inputs.key},
    )
    save_checkpoint(inputs.folder, _WithMetrics(head, metrics), None, info)


def is_finished(inputs: Inputs) -> bool:
    """Whether the head is there, made with these settings from these traces."""
    if not (inputs.folder / "drafttrain.json").is_file():
        return False
    return read_info(inputs.folder).extra.get("key") == inputs.key and load_config(inputs.folder) is not None


class _WithMetrics:
    """Saves metrics.json with the head, so that the folder appears with both or not at all."""

    def __init__(self, head: AcceptanceHead, metrics: dict[str, Any]) -> None:
        self._head, self._metrics = head, metrics

    def save_pretrained(self, folder: Path) -> None:
        """Write both."""
        self._head.save_pretrained(folder)
        (folder / METRICS).write_text(json.dumps(self._metrics, indent=1) + "\n", encoding="utf-8")


def _states(name: str, dataset: HeadDataset, inputs: Inputs) -> States:
    """States of a data set, from a store where they stay the same and the disk has room."""
    from drafttrain.training.head_states import StateStore, states_of
    from drafttrain.training.state_file import StateFile

    states = states_of(inputs.drafter.model, dataset.config)
    if dataset.config.data == "mixed":
        return states
    path = inputs.work / f"states-{name}.bin"
    if not StateFile.fits(path, StateStore.bytes_needed(dataset, states)):
        say(f"{name}: the drafter's states do not fit on the disk of {inputs.work}; they are computed in every epoch.")
        return states
    key = f"{inputs.key} {name} {dataset.config.state} {dataset.config.data}"
    return StateStore(path, states, dataset, key)


def _split(records: Dataset, name: str) -> Dataset:
    rows = [row for row, split in enumerate(records["split"]) if split == name]
    return records.select(rows)


def _folder_name(name: str) -> str:
    taken = {"prompts", "responses", "drafter", "traces", "plots", "samples"}
    if not name.isidentifier() or keyword.iskeyword(name) or name in taken:
        raise UserError(
            f"head.folder is {name!r}, but it must be a name of letters, digits and _ that no other step uses: methods "
            "are written with it."
        )
    return name


def _key(recipe: Recipe, manifest: dict[str, Any], drafter: Loaded, start: AcceptanceHead) -> str:
    settings = {
        "head": dataclasses.asdict(recipe.head),
        "weights": weights_hash(start) if recipe.head.init_from else None,  # a path may hold other ones by now
        "seed": recipe.seed,
        "traces": manifest,
        "drafter": drafter.fingerprint.to_dict(),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _headline(metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures that the model card shows: everything but tables and curve."""
    shown = {name: metrics[name] for name in ("responses", "tokens", "accepted") if name in metrics}
    for predictor, scores in metrics.get("predictors", {}).items():
        shown[predictor] = {name: scores[name] for name in ("auroc", "kl", "brier", "ece")}
    return shown


def _summary(metrics: dict[str, Any], folder: Path) -> str:
    lines = [f"acceptance head in {folder}"]
    predictors = metrics.get("predictors", {})
    if predictors:
        lines.append(f"held out: {metrics['tokens']} drafted tokens, {metrics['accepted']:.1%} accepted")
        lines.append(f"  {'predictor':20} {'AUROC':>8} {'KL':>8} {'Brier':>8} {'ECE':>8}")
        for name, scores in predictors.items():
            figures = " ".join(f"{scores[figure]:8.4f}" for figure in ("auroc", "kl", "brier", "ece"))
            lines.append(f"  {name:20} {figures}")
    return "\n".join(lines)
