"""For vLLM: a plain draft model (`method: draft_model`), beside the target's own folder."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING

from drafttrain.config import TargetConfig
from drafttrain.export.advice import Advice

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

NAME = "vllm"
CLAIM = "written, not load-tested"


def prepare(model: PreTrainedModel, advice: Advice) -> None:
    """Nothing to change: the number of tokens is an argument of the server."""


def command(target: TargetConfig, folder: Path, advice: Advice) -> str:
    """The command that serves the pair."""
    settings = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": advice.tokens}
    words = ["vllm", "serve", target.path]
    words += ["--revision", target.revision] if target.revision else []
    words += ["--trust-remote-code"] if target.trust_remote_code else []
    return shlex.join([*words, "--speculative-config", json.dumps(settings)])
