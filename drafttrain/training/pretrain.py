"""Training on the reference world's stream: `drafttrain pretrain --config recipes/reference/target.yaml --run D`.

The reference target from nothing, on the text; or a drafter before it is distilled on answers, on the distribution
that its target gives every token of the text. Warm-up, stable, decay: the learning rate stays flat until the last
stretch, so that a longer run is the same run with a later end, and a finished one can be continued from its weights.
Reads RUN/corpus (data_prep/corpus.py), saves as it goes, resumes where it was killed, and leaves the model in
RUN/target or RUN/drafter.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from drafttrain.config import Parsed
from drafttrain.errors import UserError
from drafttrain.evaluation.answers import answer_examples, code_loss, held_out_examples
from drafttrain.evaluation.tasks import KINDS, TASKS
from drafttrain.models.checkpoint import CheckpointInfo, license_of, save_checkpoint
from drafttrain.models.drafters import build_drafter, new_config
from drafttrain.models.fingerprint import tokenizer_hash
from drafttrain.models.loading import Loaded, load_causal_lm, load_target, load_tokenizer, max_context
from drafttrain.models.longspec import LongSpecDrafter
from drafttrain.models.longspec_copying import rows_for, start_copying
from drafttrain.models.longspec_states import block_states, read_target
from drafttrain.ops import causal_attention
from drafttrain.recipe import PretrainConfig, Recipe, StageConfig
from drafttrain.run_folder import RunFolder, write_atomically
from drafttrain.training.arguments import on_one_device
from drafttrain.training.muon import MuonAdamW
from drafttrain.training.positions import Placing
from drafttrain.training.pretrain_data import CODE, DRILLS, Blocks
from drafttrain.training.work_folder import last_checkpoint

PROBES = {"recall/multi_key/prose": 24, "recall/multi_value/distractors": 12, "revise/replace": 6}


def warmup_stable_decay(step: int, warmup: int, decay: int, total: int) -> float:
    """Share of the peak learning rate: linear up over `warmup` steps, flat, linear to zero over the last `decay`."""
    return max(0.0, min(1.0, (step + 1) / max(1, warmup), (total - step) / max(1, decay)))


def weighted_loss(
    model: nn.Module, input_ids: Tensor, weights: Tensor, position_ids: Tensor, teacher: nn.Module | None = None
) -> Tensor:
    """Weighted mean loss of a block [rows, length]; weights belong to the predicted tokens.

    Next-token cross-entropy; with a teacher its forward Kullback-Leibler divergence KL(teacher || model).
    """
    inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
    states = model.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
    weights = weights[:, 1:].flatten()
    if teacher is None:
        return label_loss(model.lm_head.weight, states, weights, input_ids[:, 1:].flatten())
    with torch.no_grad():
        taught = teacher.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
    return teacher_loss(model.lm_head.weight, states, weights, teacher.lm_head.weight, taught)


def longspec_loss(
    block: LongSpecDrafter, input_ids: Tensor, weights: Tensor, placing: Placing, step: int, teacher: nn.Module
) -> Tensor:
    """`weighted_loss` of a LongSpec drafter: rows stand and look behind as `placing` draws for the step."""
    rows = torch.arange(len(input_ids), device=input_ids.device)
    lengths = torch.full_like(rows, input_ids.shape[1])
    positions, lags = placing.positions(lengths, input_ids.shape[1], rows, step), placing.lags(rows, step)
    reading = read_target(teacher, input_ids, None, block.config.kv_layer, positions)
    states = block_states(block, reading, lags)[:, :-1].flatten(0, 1)
    weights = placing.taught(weights[:, 1:], lags, positions[:, :-1]).flatten()
    head = teacher.lm_head.weight
    return teacher_loss(head, states, weights, head, reading.hidden_BTH[:, :-1].flatten(0, 1))


@torch.compile(dynamic=False)
def label_loss(head: Tensor, states: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    """Weighted mean cross-entropy of states [N, H] under a head [V, H]."""
    logits = nn.functional.linear(states, head)
    losses = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return (losses * weights).sum() / weights.sum()


@torch.compile(dynamic=False)
def teacher_loss(head: Tensor, states: Tensor, weights: Tensor, teacher_head: Tensor, taught: Tensor) -> Tensor:
    """Weighted mean KL(teacher || model) of states [N, H], both under their heads [V, H]."""
    log_q = nn.functional.linear(states, head).float().log_softmax(-1)
    log_p = nn.functional.linear(taught, teacher_head).float().log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum() / weights.sum()


class PretrainTrainer(Trainer):
    """The library's loop over blocks in their order, with the weighted loss."""

    def __init__(
        self, *args: object, teacher: nn.Module | None = None, placing: Placing | None = None, **kwargs: object
    ) -> None:
        super().__init__(*args, **kwargs)
        self._teacher = None if teacher is None else teacher.to(self.args.device)
        self._placing = placing

    def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **_: object) -> Tensor:
        """The block's weighted loss, under bf16 autocast.

        Raises:
            UserError: it is not a number; nothing was updated with it.
        """
        # the Trainer's own autocast wraps model.forward, which the loss goes around
        with torch.autocast(self.args.device.type, torch.bfloat16):
            if self._placing is None:
                loss = weighted_loss(model, **inputs, teacher=self._teacher)
            else:  # its rows are placed by the recipe, not by the stream
                ids, weights = inputs["input_ids"], inputs["weights"]
                loss = longspec_loss(model, ids, weights, self._placing, self.state.global_step, self._teacher)
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss is {loss.item()} at step {self.state.global_step}; lower pretrain.learning_rate. "
                "Checkpoints before it are kept."
            )
        return loss


class Probe(TrainerCallback):
    """Now and then, held-out tasks and code: one line on screen and in `probes.jsonl`."""

    def __init__(self, run: Path, tokenizer: PreTrainedTokenizerFast, held_out: Tensor, every: int) -> None:
        self.run, self.tokenizer, self.held_out, self.every = run, tokenizer, held_out, every

    def on_step_end(self, args, state, control, model=None, **_: object) -> None:
        """Measure every `every` steps."""
        if state.global_step % self.every:
            return
        model.eval()
        # every example has a length of its own: eagerly, so that none of them is compiled for
        with torch.compiler.set_stance("force_eager"), torch.autocast(model.device.type, torch.bfloat16):
            row = {"step": state.global_step, "code": round(code_loss(model, self.held_out, 512, 16), 3)}
            for kind, answers in PROBES.items():
                for length in [512, 2048] if kind.startswith("recall") else [160]:
                    examples = held_out_examples(kind, length, answers, self.tokenizer)
                    result = answer_examples(model, self.tokenizer, examples)
                    row[f"{kind}@{length}"] = [round(result.exact_share, 3), round(result.token_share, 3)]
        model.train()
        print(json.dumps(row), flush=True)
        with (self.run / "probes.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def new_model(settings: dict, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama from nothing; what each block adds to the residual stream starts at zero."""
    torch.manual_seed(seed)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    changes = {"vocab_size": len(tokenizer), **ids, **settings}
    model = LlamaForCausalLM(new_config(LlamaConfig(), changes, "pretrain.model"))
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def pretrain(parsed: Parsed) -> None:
    """The verb: train RUN/target, or with --plan say what would be trained.

    Raises:
        UserError: no corpus in the run folder, a stage that cannot be, or as `train`.
    """
    folder = RunFolder(parsed.run)
    settings = parsed.recipe.pretrain
    check_stages(settings.stages)
    new_config(LlamaConfig(), settings.model, "pretrain.model")
    if not (folder.path / "corpus" / "train.npy").is_file():
        raise UserError(f"{folder.path} holds no corpus; run data_prep/corpus.py with the same --run first.")
    if parsed.plan:
        steps = sum(stage.steps for stage in settings.stages)
        tokens = sum(stage.steps * stage.tokens for stage in settings.stages)
        print(f"would train {steps} steps, {tokens / 1e6:.1f}M tokens, into {folder.path}")
        return
    folder.record(parsed, "drafttrain pretrain")
    pair = load_pair(parsed.recipe) if settings.of == "drafter" else None
    model, tokenizer = train(folder.path, settings, pair)
    model.to(torch.bfloat16)
    destination = folder.path / settings.of
    save_checkpoint(destination, model, tokenizer, _info(parsed, pair))
    print(f"the {settings.of} is in {destination}")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A drafter to train, and the frozen target to learn from."""

    drafter: LlamaForCausalLM | LongSpecDrafter
    target: Loaded
    placing: Placing | None = None
    copying: bool = False


def load_pair(recipe: Recipe) -> Pair:
    """The pair of a recipe, the drafter as its section says, before any training.

    Raises:
        UserError: as `load_target` and `build_drafter`, a model that is no plain Llama, or unlike output heads.
    """
    target = load_target(recipe.target)
    drafter = build_drafter(recipe.drafter, target, recipe.seed, recipe.target.trust_remote_code)
    block = drafter if isinstance(drafter, LongSpecDrafter) else None
    for name, model in (("target", target.model), ("drafter", drafter)):
        if not isinstance(model, LlamaForCausalLM) and model is not block:
            raise UserError(f"drafttrain pretrain takes plain Llamas, and this {name} is a {type(model).__name__}.")
    if block is not None:
        context = max_context(target.model)
        placing = Placing.of(recipe.training.positions, context, block.config.depth, recipe.pretrain.seed)
        copying = recipe.drafter.block.copying and recipe.drafter.init_from is None
        return Pair(block, target, placing, copying)
    if drafter.config.vocab_size != target.model.config.vocab_size:
        raise UserError(
            f"the drafter has {drafter.config.vocab_size} output rows and the target {target.model.config.vocab_size}; "
            "drafttrain pretrain compares them row by row, so take one of the target's size."
        )
    return Pair(drafter, target)


def _info(parsed: Parsed, pair: Pair | None) -> CheckpointInfo:
    if pair is None:
        about = "Trained from nothing on the Python standard library's source and on procedural tasks."
        return CheckpointInfo(kind="target", recipe=parsed.resolved, license="Apache-2.0", description=about)
    return CheckpointInfo(
        kind="drafter",
        target=pair.target.fingerprint,
        recipe=parsed.resolved,
        license=license_of(parsed.recipe.target.path),
        description="Trained on the target's distributions over the text of the reference world.",
    )


def check_stages(stages: list[StageConfig]) -> None:
    """Refuse stages that cannot be.

    Raises:
        UserError: there is none, one without lengths or mixture, or an unknown task.
    """
    if not stages:
        raise UserError("pretrain.stages is empty; recipes/reference/target.yaml shows the stages of the reference.")
    known = {CODE, *DRILLS, *KINDS, *TASKS}
    for stage in stages:
        for name, shares in (("lengths", stage.lengths), ("mixture", stage.mixture)):
            if not any(share > 0 for share in shares.values()) or min(shares.values()) < 0:
                raise UserError(f"pretrain.stages: {name} is {shares}, but it needs shares above 0.")
        if unknown := set(stage.mixture) - known:
            raise UserError(
                f"pretrain.stages: no task is called {sorted(unknown)[0]}; known: {', '.join(sorted(known))}."
            )


def train(
    run: Path, settings: PretrainConfig, pair: Pair | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Train, or go on training, the model of a run folder that holds `corpus/`; returns it with its final weights.

    Args:
        run: the run folder.
        settings: of the training.
        pair: the drafter to train and its target; None trains a target.

    Raises:
        UserError: `init_from` is no such model, it or the pair has another tokenizer, or the loss is no number.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "corpus" / "tokenizer")
    held_out = torch.from_numpy(np.load(run / "corpus" / "held_out.npy").astype(np.int32))
    if pair is not None:
        _check_tokenizer(pair.target.tokenizer, tokenizer, f"the target {pair.target.path}")
        model, teacher = pair.drafter, pair.target.model.requires_grad_(False)
    else:
        model, teacher = new_model(settings.model, tokenizer, settings.seed), None
        if settings.init_from:
            _take_weights(model, tokenizer, settings.init_from)
    placing = None if pair is None else pair.placing
    for each in (model, teacher):
        if placing is None and each is not None:
            _compile(each)
    corpus = np.load(run / "corpus" / "train.npy")
    blocks = Blocks(settings.stages, corpus, tokenizer, model.config.max_position_embeddings, settings.seed)
    optimizer = MuonAdamW(model, settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_stable_decay(step, settings.warmup_steps, settings.decay_steps, len(blocks))
    )
    trainer = PretrainTrainer(
        model=model,
        args=_arguments(run, settings, len(blocks)),
        train_dataset=blocks,
        data_collator=lambda items: items[0],
        processing_class=tokenizer,  # saved with every checkpoint, so that a run can be continued from one
        optimizers=(optimizer, schedule),
        # a LongSpec drafter answers nothing by itself
        callbacks=[] if placing else [Probe(run, tokenizer, held_out, settings.save_every)],
        teacher=teacher,
        placing=placing,
    )
    checkpoint = last_checkpoint(run / "pretrain")
    if checkpoint is None and pair is not None and pair.copying:
        explained = start_copying(model, teacher, rows_for(row for block in blocks for row in block["input_ids"]))
        print(f"the block's queries explain {explained:.0%} of the target's")
    _note_settings(run / "pretrain", settings, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if placing is None:
        model.set_attn_implementation("sdpa")
    return model, tokenizer


def _take_weights(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: str) -> None:
    _check_tokenizer(load_tokenizer(path), tokenizer, f"pretrain.init_from {path}")
    try:
        model.load_state_dict(load_causal_lm(path, dtype="float32").state_dict())
    except RuntimeError as error:
        detail = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"pretrain.init_from {path} has another shape than pretrain.model ({detail}).") from None


def _check_tokenizer(found: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast, whose: str) -> None:
    if tokenizer_hash(found) != tokenizer_hash(tokenizer):
        raise UserError(f"{whose} has another tokenizer than the corpus; name a model trained on this corpus.")


def _note_settings(work: Path, settings: PretrainConfig, checkpoint: Path | None) -> None:
    """Keep the settings beside the checkpoints; say so where a run goes on with others, which a longer one does."""
    note, wanted = work / "settings.json", json.loads(json.dumps(dataclasses.asdict(settings)))
    if checkpoint is not None and note.is_file():
        before = json.loads(note.read_text(encoding="utf-8"))
        changed = [name for name, value in wanted.items() if before.get(name) != value]
        if changed:
            print(f"going on from {checkpoint}, trained so far with other pretrain settings: {', '.join(changed)}")
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(wanted, indent=1) + "\n")


def _compile(model: LlamaForCausalLM) -> None:
    """Compile layer by layer: one graph per row length serves all layers, where the whole model takes minutes."""
    model.set_attn_implementation("sdpa" if torch.cuda.is_available() else causal_attention.NAME)
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)


def _arguments(run: Path, settings: PretrainConfig, steps: int) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(run / "pretrain"),
        max_steps=steps,
        per_device_train_batch_size=1,
        use_cpu=not torch.cuda.is_available(),
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=20,
        logging_nan_inf_filter=False,
        report_to=[],
        seed=settings.seed,
        remove_unused_columns=False,
        disable_tqdm=not os.isatty(1),
    )
    return on_one_device(arguments)
