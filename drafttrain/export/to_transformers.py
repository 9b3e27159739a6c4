"""For `transformers`: assisted generation takes the folder as `assistant_model`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drafttrain.config import TargetConfig
from drafttrain.export.advice import Advice

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

NAME = "transformers"
CLAIM = "reloaded and compared; a test of drafttrain runs `generate(assistant_model=...)` with such a folder"


def prepare(model: PreTrainedModel, advice: Advice) -> None:
    """Let `generate` draft the advised number of tokens; its own default is 20, cut by a confidence of 0.4."""
    model.generation_config.num_assistant_tokens = advice.tokens
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0


def command(target: TargetConfig, folder: Path, advice: Advice) -> str:
    """How it is used: Python, for there is nothing to serve."""
    where = f'"{target.path}"' + (f', revision="{target.revision}"' if target.revision else "")
    where += ", trust_remote_code=True" if target.trust_remote_code else ""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})\n"
        f"target = AutoModelForCausalLM.from_pretrained({where})\n"
        f'drafter = AutoModelForCausalLM.from_pretrained("{folder}")\n'
        'inputs = tokenizer("...", return_tensors="pt")\n'
        "target.generate(**inputs, assistant_model=drafter)"
    )
