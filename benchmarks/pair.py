"""The reference pair, and held-out questions and rows of the reference world: what the benchmarks run on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_prep.corpus import train_modules
from data_prep.prompts import SPLITS, prompts_of
from drafttrain.config import PromptsConfig, TargetConfig
from drafttrain.dialogue import end_tokens
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.questions import Limits, Question, choose, questions_of
from drafttrain.evaluation.runner import answer
from drafttrain.evaluation.schema import AUTOREGRESSIVE
from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.models.loading import Loaded, load_drafter, load_target, max_context
from drafttrain.ops.sampling import Sampling
from drafttrain.recipe import StageConfig
from drafttrain.training.pretrain_data import Blocks

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"

METHOD = "Model(drafter, length=5)"
GREEDY = Sampling(0.0)

SPARE = 3
"""Prompts made for every one that is asked: a share stays with the training split, near-duplicates go."""

LONGEST = 512
"""Tokens of a prompt from a file; a few of MBPP's are thousands long, and a batch reads all rows at that length."""

HELD_OUT = 10**6
"""Blocks of a stream from here on are for measuring."""

_MODULES = 40
"""Of the standard library, for code and where a task has room."""

_BATCH = 16


def reference_models(head: bool = False, compiled: bool = False) -> Models:
    """The committed pair as it is stored, in bfloat16; its engines come in any dtype.

    Args:
        head: with its acceptance head, SpecDec++ in the published form, which methods call "head".
        compiled: all models as compiled graphs.
    """
    target = load_target(TargetConfig(path=str(CHECKPOINTS / "reference-target"), dtype="bfloat16"))
    drafter = load_drafter(str(CHECKPOINTS / "reference-drafter"), "bfloat16")
    ends = end_tokens(target.tokenizer, target.model.generation_config)
    pair = {"target": target.fingerprint, "drafter": drafter.fingerprint}
    heads = {"head": AcceptanceHead.load(CHECKPOINTS / "reference-head", **pair)} if head else {}
    return Models(target, drafter, heads, ends, "bfloat16", compiled=compiled)


def stream(target: Loaded, mixture: Mapping[str, float], tokens: int, length: int) -> Blocks:
    """Rows of the reference world's training stream.

    Args:
        target: for its tokenizer and context.
        mixture: shares of tasks.
        tokens: of a block.
        length: of every row.
    """
    stage = StageConfig(2 * HELD_OUT, tokens, {length: 1.0}, dict(mixture))
    text = "".join(itertools.islice((module.text for module in train_modules()), _MODULES))
    code = np.array(target.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.uint16)
    return Blocks([stage], code, target.tokenizer, max_context(target.model))


def held_out_questions(
    models: Models,
    mixture: Mapping[str, int],
    limit: int,
    lengths: Mapping[str, int],
    files: Sequence[tuple[Path, int]] = (),
) -> list[Question]:
    """Turns of conversations that nothing was trained on, in mixed order.

    Args:
        models: later turns are asked behind the target's own answers.
        mixture: conversations of each task of the reference world.
        limit: most new tokens of an answer.
        lengths: tokens of a conversation of each task.
        files: prompt files of outside make, and how many prompts of each are taken at most.
    """
    asked = {task: SPARE * count for task, count in mixture.items()}
    sizes = {task: lengths[task] for task in mixture}
    world = PromptsConfig(mixture=asked, lengths=sizes, held_out=0.45, near_duplicate=1.0)
    records = [record for record in _records(world, models) if record["split"] != "train"]
    chosen = []
    for task, count in mixture.items():
        chosen += choose([record for record in records if record["task"] == task], SPLITS, count)
    for path, count in files:
        settings = PromptsConfig(path=str(path), near_duplicate=1.0, max_tokens=LONGEST)
        chosen += _records(settings, models)[:count]
    random.Random(0).shuffle(chosen)
    decoder = models.decoder(AUTOREGRESSIVE, GREEDY, 0)
    limits = Limits(limit, models.context, _BATCH)
    return questions_of(chosen, models.tokenizer, limits, lambda turns: answer(decoder, turns))


def _records(settings: PromptsConfig, models: Models) -> list[dict]:
    return prompts_of(settings, models.tokenizer, models.context).records
