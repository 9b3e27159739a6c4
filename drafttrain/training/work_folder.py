"""The folder where a Trainer keeps its checkpoints until what it trains is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from drafttrain.distributed import barrier, is_main, say, world_size

if TYPE_CHECKING:
    from transformers import TrainingArguments


def global_batch(arguments: TrainingArguments) -> int:
    """Responses of one optimizer step over all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def clear_unless_same(folder: Path, key: str, arguments: TrainingArguments) -> None:
    """Remove what an interrupted run with other settings left behind; its checkpoints are no start for this one.

    Args:
        folder: the work folder, made where it is missing.
        key: changes with anything that changes what is trained.
        arguments: the global batch decides which responses a step counts, the processes who has which part of a
            checkpoint.
    """
    key, note = f"{key} {global_batch(arguments)} {world_size()}", folder / "key.txt"
    if is_main():
        if folder.exists() and (not note.is_file() or note.read_text(encoding="utf-8") != key):
            say(f"starting over: what lies in {folder} was made with other settings.")
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(key, encoding="utf-8")
    barrier()


def remove(folder: Path) -> None:
    """Remove a work folder, if it is there, when what was trained is saved; the first process only."""
    if is_main() and folder.exists():
        shutil.rmtree(folder)


def has_whole_state(checkpoint: Path) -> bool:
    """Whether a checkpoint of one process was written to its end: trainer_state.json comes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def last_checkpoint(folder: Path, finished: Callable[[Path], bool] = has_whole_state) -> Path | None:
    """The newest checkpoint in a folder that was written to its end, None if there is none.

    Args:
        folder: with `checkpoint-<step>` folders; need not exist.
        finished: tells of such a folder whether nothing is missing in it.
    """
    newest_first = sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True)
    return next((path for path in newest_first if finished(path)), None)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done when a checkpoint was written."""
    return int(checkpoint.name.rsplit("-", 1)[1])
