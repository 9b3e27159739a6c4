"""What is exported: the drafter of a run, a plain model by now, and what it was."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.config import Parsed
from drafttrain.errors import UserError
from drafttrain.models.checkpoint import INFO, CheckpointInfo, read_info
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.models.loading import check_same_tokenizer, drafter_path, load_drafter, load_tokenizer
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOADABLE = ("drafter", "target")
"""Kinds of checkpoints that are ordinary causal LMs; no engine loads any other kind of ours."""


@dataclass(frozen=True)
class Source:
    """A drafter to be exported.

    Attributes:
        path: where it was read.
        original: the model as it was trained.
        tokenizer: its tokenizer, which is the target's.
        info: what the checkpoint says of itself.
        fingerprint: of the model as stored.
    """

    path: str
    original: PreTrainedModel
    tokenizer: Any
    info: CheckpointInfo
    fingerprint: Fingerprint


def load_source(parsed: Parsed) -> Source:
    """The drafter that a run trained, or the one that drafter.path names.

    Raises:
        UserError: there is none, it is of a kind that no engine loads, or it has another tokenizer than the target.
    """

    recipe, run = parsed.recipe, RunFolder(parsed.run)
    refuse_unloadable(recipe.drafter.path)
    path = drafter_path(recipe, run)
    refuse_unloadable(path)
    info = read_info(path) if (Path(path) / INFO).exists() else CheckpointInfo("drafter", recipe=parsed.resolved)
    loaded = load_drafter(path, trust_remote_code=recipe.target.trust_remote_code)
    target = recipe.target
    tokenizer = load_tokenizer(target.path, target.revision, target.trust_remote_code)
    check_same_tokenizer(tokenizer, loaded.tokenizer, path)
    return Source(path, loaded.model, loaded.tokenizer, info, loaded.fingerprint)


def refuse_unloadable(path: str | None) -> None:
    """Refuse checkpoints that only the bundled decoder can use.

    Raises:
        UserError: says so.
    """
    if path is None or not (Path(path) / INFO).exists():
        return
    kind = read_info(path).kind
    if kind not in LOADABLE:
        raise UserError(
            f"{path} is of the kind {kind.replace('_', ' ')}, which no other engine loads; it works with the bundled "
            "decoder only (drafttrain evaluate), so export a plain drafter instead."
        )


def exported_info(source: Source, consumer: str, tokens: int, usage: str) -> CheckpointInfo:
    """What the export says of itself: all that the source said, and how it is used."""
    description = f"{source.info.description}\n\n{usage}".strip()
    extra = {**source.info.extra, "export": {"consumer": consumer, "num_speculative_tokens": tokens}}
    return dataclasses.replace(source.info, kind="drafter", description=description, extra=extra)
