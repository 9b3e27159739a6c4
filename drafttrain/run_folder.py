"""The run folder: where the steps of a recipe leave their results for each other, under fixed names."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from drafttrain.errors import UserError

if TYPE_CHECKING:
    from drafttrain.config import Parsed


class RunFolder:
    """Paths of a run and the record of what ran in it.

    Args:
        path: the folder given with --run; made by `create` (or `record`), never by looking at it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def prompts(self) -> Path:
        """Prompt records, made with the responses."""
        return self.path / "prompts"

    @property
    def responses(self) -> Path:
        """The target's answers."""
        return self.path / "responses"

    @property
    def drafter(self) -> Path:
        """The distilled drafter, a Hugging Face folder."""
        return self.path / "drafter"

    @property
    def readings(self) -> Path:
        """What a LongSpec drafter learns of the target."""
        return self.path / "readings"

    @property
    def traces(self) -> Path:
        """Accept/reject traces of the pair."""
        return self.path / "traces"

    @property
    def step_traces(self) -> Path:
        """Accept/reject traces of a LongSpec drafter, step by step."""
        return self.path / "step_traces"

    @property
    def head(self) -> Path:
        """The acceptance head."""
        return self.path / "head"

    @property
    def bigrams(self) -> Path:
        """The bigram table of Max-Gram drafters."""
        return self.path / "bigrams.safetensors"

    @property
    def report(self) -> Path:
        """Where report.json, report.md and report.html lie: the run folder itself."""
        return self.path

    @property
    def plots(self) -> Path:
        """PNG plots of the report."""
        return self.path / "plots"

    @property
    def samples(self) -> Path:
        """JSONL of answers with the source of every token."""
        return self.path / "samples"

    @property
    def recipe(self) -> Path:
        """The recipe as resolved by the last program."""
        return self.path / "recipe.yaml"

    @property
    def commands(self) -> Path:
        """One JSON line per program that ran."""
        return self.path / "commands.jsonl"

    def create(self) -> RunFolder:
        """Make the folder and prove that it can be written.

        Raises:
            UserError: it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".write-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise UserError(
                f"cannot write to the run folder {self.path} ({reason}); choose another with --run."
            ) from None
        return self

    def require(self, path: Path, made_by: str) -> Path:
        """`path` if it exists.

        Raises:
            UserError: it does not; names the program that makes it.
        """
        if not path.exists():
            raise UserError(f"{path} does not exist; make it first with `{made_by} --run {self.path}`.")
        return path

    def record(self, parsed: Parsed, program: str, argv: list[str] | None = None) -> None:
        """Keep the recipe as resolved and append the command that ran; the first process only."""
        from drafttrain.distributed import is_main

        if not is_main():
            return
        self.create()
        write_atomically(self.recipe, parsed.to_yaml())
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "program": program,
            "command": shlex.join(sys.argv if argv is None else argv),
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        }
        with self.commands.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to start what would fill the disk.

    Args:
        folder: where it will be written; need not exist yet.
        needed: bytes, an estimate.
        what: what is written, e.g. "the traces".

    Raises:
        UserError: less is free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{what} need about {needed / 2**30:.1f} GiB and {place} has {free / 2**30:.1f} GiB free; "
            "free some space or choose another place with --run."
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that it is there whole or not at all, even after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
