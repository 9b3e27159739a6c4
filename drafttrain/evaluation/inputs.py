"""The prompts of an evaluation: those of the run, or for a probe made from the file it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drafttrain.config import Parsed, PromptsConfig
from drafttrain.errors import UserError
from drafttrain.evaluation.questions import Record, answers_of, choose
from drafttrain.records import read_records
from drafttrain.run_folder import RunFolder

TUNING_PER_TASK = 8
"""Tuning prompts of a task that are answered where a run has no traces for a setting."""


@dataclass(frozen=True)
class Inputs:
    """Prompts by what they are for, everything there is, and the right answers known of it by prompt and turn.

    Where there are no tuning prompts, a quarter of the test prompts are `tune` too: then they are not `apart`.
    """

    test: list[Record]
    tune: list[Record]
    references: Mapping[tuple[str, int], str]
    apart: bool = True
    everything: Sequence[Record] = ()


def inputs_of(parsed: Parsed, tokenizer: Any, context: int, write: bool = True) -> Inputs:
    """Read the prompts of the run, or make them where nothing has been prepared.

    Where they have been answered they stay as they are: a recipe that says nothing of prompts takes them, one that asks
    for others is refused.

    Args:
        parsed: the recipe.
        tokenizer: the target's.
        context: tokens the target can read and write together.
        write: keep prompts that are made in the run folder.

    Raises:
        UserError: there are none, no test prompt among them, or the run's are not those of this recipe or tokenizer.
    """
    run = RunFolder(parsed.run)
    records = _made(parsed, tokenizer, context, run, write)
    per_task = parsed.recipe.evaluate.prompts_per_task
    tune, test = split(records, per_task) if run.responses.exists() else split_probe(records, per_task)
    if not test:
        raise UserError(
            f"{run.prompts} has no test prompts; hold some out with prompts.held_out, or give more prompts."
        )
    return Inputs(test, tune or test[: max(1, len(test) // 4)], references(records), bool(tune), records)


def split(records: Sequence[Record], per_task: int) -> tuple[list[Record], list[Record]]:
    """Tuning and test prompts of a run that trained on its train split."""
    return choose(records, ("tune",), TUNING_PER_TASK), choose(records, ("test",), per_task)


def split_probe(records: Sequence[Record], per_task: int) -> tuple[list[Record], list[Record]]:
    """Tuning and test prompts where nothing was trained: settings are chosen on a third of each task, at most 8.

    Of the reference world's prompts only the held-out ones count: the target itself was trained on what the others are
    made of.
    """
    if any(record["kind"] for record in records):
        records = [record for record in records if record["split"] != "train"]
    everything = choose(records, ("train", "tune", "test"), len(records))
    tune, test = [], []
    for task in dict.fromkeys(record["task"] for record in everything):
        mine = [record for record in everything if record["task"] == task]
        count = min(TUNING_PER_TASK, len(mine) // 3)
        tune += mine[:count]
        test += mine[count : count + per_task]
    return tune, choose(test, ("train", "tune", "test"), per_task)


def references(records: Sequence[Record]) -> dict[tuple[str, int], str]:
    """Right answers by prompt and turn."""
    return {
        (record["prompt_id"], turn): answer
        for record in records
        if record["reference"]
        for turn, answer in enumerate(answers_of(record))
    }


def _made(parsed: Parsed, tokenizer: Any, context: int, run: RunFolder, write: bool) -> list[Record]:
    # The one step back: a probe has no prompts of its own.
    from data_prep.prompts import ensure_prompts, prompts_manifest, prompts_of

    asked_for = (parsed.recipe.prompts, tokenizer, context)
    if run.responses.exists():
        parts = ("fingerprints",) if parsed.recipe.prompts == PromptsConfig() else ("fingerprints", "settings")
        manifest = prompts_manifest(*asked_for)
        return list(read_records(run.prompts, "prompts", {part: manifest[part] for part in parts}))
    if not write:
        return prompts_of(*asked_for).records
    ensure_prompts(*asked_for, run)
    return list(read_records(run.prompts, "prompts"))
