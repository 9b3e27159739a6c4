"""For SGLang: a plain draft model (`STANDALONE`), one candidate a position."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from drafttrain.config import TargetConfig
from drafttrain.export.advice import Advice

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

NAME = "sglang"
CLAIM = "written, not load-tested"


def prepare(model: PreTrainedModel, advice: Advice) -> None:
    """Nothing to change: the number of tokens is an argument of the server."""


def command(target: TargetConfig, folder: Path, advice: Advice) -> str:
    """The command that serves the pair; SGLang counts the token before the draft among the draft tokens."""
    words = ["python", "-m", "sglang.launch_server", "--model-path", target.path]
    words += ["--revision", target.revision] if target.revision else []
    words += ["--trust-remote-code"] if target.trust_remote_code else []
    words += ["--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", str(folder)]
    words += ["--speculative-num-steps", str(advice.tokens), "--speculative-eagle-topk", "1"]
    return shlex.join([*words, "--speculative-num-draft-tokens", str(advice.tokens + 1)])
