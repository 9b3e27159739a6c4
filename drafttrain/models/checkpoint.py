"""Checkpoints: a Hugging Face folder, plus drafttrain.json (what it is and what made it) and a model card.

A folder appears under its final name whole or not at all. It is written beside its place and renamed; an older one is
moved aside first and put back if the process dies between the two renames.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from drafttrain import __version__
from drafttrain.config import REPOSITORY
from drafttrain.errors import UserError
from drafttrain.models.fingerprint import Fingerprint

INFO = "drafttrain.json"
SCHEMA_VERSION = 1

_TITLES = {
    "target": "Target model",
    "drafter": "Drafter",
    "acceptance_head": "Acceptance head",
    "longspec": "LongSpec drafter",
}


@dataclass
class CheckpointInfo:
    """What a checkpoint is and what made it.

    Attributes:
        kind: target, drafter, acceptance_head, longspec.
        target: fingerprint of the target that it serves; None for a target itself.
        recipe: the resolved recipe (`Parsed.resolved`).
        metrics: plain numbers and lists, shown in the model card.
        license: SPDX id for the model card; None says that the target's licence applies.
        description: a paragraph for the model card: what it is for, what it was trained on.
        extra: what a kind needs besides, e.g. the drafter's fingerprint of an acceptance head.
        versions, git_commit: filled in when saving.
    """

    kind: str
    target: Fingerprint | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    license: str | None = None
    description: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for drafttrain.json."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["target"] = self.target.to_dict() if self.target else None
        return {"schema_version": SCHEMA_VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CheckpointInfo:
        """The inverse of `to_dict`; keys of later versions are ignored."""
        known = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        known["target"] = Fingerprint.from_dict(known["target"]) if known.get("target") else None
        return cls(**known)


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: Any,
    tokenizer: Any,
    info: CheckpointInfo,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint, replacing an older one of this name. One process calls it.

    Args:
        folder: final place.
        model: anything with `save_pretrained(folder)`, which must write safetensors.
        tokenizer: saved beside it; None for models without one (heads).
        info: completed with versions and git commit.
        check: looks at what was written before it gets its name; where it raises, the older one stays.

    Returns:
        `folder`.

    Raises:
        UserError: something that is no checkpoint of ours stands there.
    """
    folder = Path(folder)
    restore_interrupted(folder)
    refuse_foreign(folder)
    info.versions, info.git_commit = versions(), git_commit()
    temporary = _beside(folder, "new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / INFO).write_text(json.dumps(info.to_dict(), indent=1) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(model_card(folder.name, info), encoding="utf-8")
        _sync(temporary)
        if check is not None:
            check(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _swap(temporary, folder)
    return folder


def read_info(folder: str | os.PathLike[str]) -> CheckpointInfo:
    """What a checkpoint is.

    Raises:
        UserError: it is no checkpoint of ours, or drafttrain.json is damaged or newer than this program.
    """
    folder = Path(folder)
    restore_interrupted(folder)
    path = folder / INFO
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("schema_version", 0) > SCHEMA_VERSION:
            raise UserError(f"{path} was written by a newer drafttrain; update this one.")
        return CheckpointInfo.from_dict(values)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is no checkpoint of drafttrain (no {INFO}); train one there or check the path."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is damaged; train it again or restore the file.") from None


def restore_interrupted(folder: Path) -> None:
    """Put an older checkpoint back when a process died between moving it aside and renaming the new one in."""
    aside = _beside(folder, "old")
    if not folder.exists() and aside.exists():
        os.rename(aside, folder)


def refuse_foreign(folder: Path) -> None:
    """Refuse to replace what this program did not write.

    Raises:
        UserError: names it.
    """
    if folder.exists() and not (folder / INFO).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no checkpoint of drafttrain; move it away or choose another folder.")


def versions() -> dict[str, str]:
    """Versions of what decides results."""
    names = ("torch", "transformers", "accelerate", "deepspeed", "peft", "tokenizers")
    found = {"drafttrain": __version__}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout this code runs from, `+changes` when it was edited; None outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None
    try:
        commit = _git("rev-parse", "HEAD")
        return f"{commit}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def license_of(folder: str | os.PathLike[str]) -> str | None:
    """The licence that a model folder's card states, None when it states none."""
    import yaml

    card = Path(folder) / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    return front.get("license") if isinstance(front, dict) else None


def model_card(name: str, info: CheckpointInfo) -> str:
    """README.md of a checkpoint: what it is, for which target, how it fared, what made it, its licence."""
    import yaml

    front: dict[str, Any] = {"license": info.license or "other", "library_name": "transformers"}
    front["tags"] = ["speculative-decoding", "drafttrain", info.kind]
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {_TITLES.get(info.kind, info.kind)}: {name}",
    ]
    if info.description:
        lines += ["", info.description]
    if info.target is not None:
        path = info.recipe.get("target", {}).get("path", "unknown")
        lines += ["", f"Made for the target `{path}`, fingerprint `{info.target.short}`; refused beside another."]
    if info.metrics:
        lines += ["", "## Figures", "", "| figure | value |", "|---|---|"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in _flat(info.metrics)]
    lines += ["", "## Licence", "", info.license or "The licence of the target that it was derived from."]
    lines += ["", "## Made by", "", ", ".join(f"{name} {version}" for name, version in info.versions.items())]
    lines += [f"Commit {info.git_commit}." if info.git_commit else ""]
    if info.recipe:
        lines += ["", "## Recipe", "", "```yaml", yaml.safe_dump(info.recipe, sort_keys=False).strip(), "```"]
    return "\n".join(lines) + "\n"


def _flat(metrics: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in metrics.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(_cell(entry) for entry in value)
    return str(value)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(temporary: Path, folder: Path) -> None:
    aside = _beside(folder, "old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        os.rename(folder, aside)
    os.rename(temporary, folder)
    shutil.rmtree(aside, ignore_errors=True)
