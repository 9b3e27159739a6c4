"""What is known of a target before its weights are loaded, and the estimates that --plan prints."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafttrain.config import Parsed, TargetConfig
from drafttrain.dialogue import end_tokens
from drafttrain.errors import UserError
from drafttrain.models.drafters import without_storage
from drafttrain.models.loading import DTYPES, check_folder, load_model_config, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TargetFacts:
    """A target's tokenizer and sizes, from its small files alone.

    Attributes:
        tokenizer: the target's.
        config: its transformers config.
        context: tokens it can read and write together.
        ends: tokens that end an answer.
        bytes_per_value: of a weight or a cache entry, before any quantization.
        trust_remote_code: whether the model's own code may run.
    """

    tokenizer: "PreTrainedTokenizerBase"
    config: "PretrainedConfig"
    context: int
    ends: frozenset[int]
    bytes_per_value: int
    trust_remote_code: bool

    def weight_bytes(self) -> int:
        """Bytes of all weights, counted on a model without storage."""
        model = without_storage(self.config, self.trust_remote_code)
        return sum(weight.numel() for weight in model.parameters()) * self.bytes_per_value

    def cache_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token of one row."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * heads * size * self.bytes_per_value


def target_facts(settings: TargetConfig) -> TargetFacts:
    """Tokenizer, config and sizes of a target.

    Raises:
        UserError: there is no such model, or its files are damaged.
    """
    from transformers import GenerationConfig

    check_folder(settings.path, weights=True)
    tokenizer = load_tokenizer(settings.path, settings.revision, settings.trust_remote_code)
    where = {"revision": settings.revision or "main"}
    config = load_model_config(settings.path, settings.revision, settings.trust_remote_code)
    try:
        generation = GenerationConfig.from_pretrained(settings.path, **where)
    except OSError:  # many checkpoints have none; the config then holds the end token
        generation = GenerationConfig.from_model_config(config)
    dtype = DTYPES.get(settings.dtype) or config.dtype
    size = 4 if dtype is None else dtype.itemsize
    context = config.get_text_config().max_position_embeddings
    ends = end_tokens(tokenizer, generation)
    return TargetFacts(tokenizer, config, context, ends, size, settings.trust_remote_code)


def show_recipe(parsed: Parsed, sections: Sequence[str]) -> None:
    """Print the sections of the resolved recipe that a program uses."""
    import yaml

    chosen: dict[str, Any] = {name: parsed.resolved[name] for name in (*sections, "seed")}
    print(yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True).rstrip())


def check_disk(run: Path, needed: int) -> str:
    """Disk that is needed and there, in words.

    Raises:
        UserError: the disk is too small, or the place cannot be written.
    """
    place = run.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise UserError(f"cannot write to {place}; choose another run folder with --run.")
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(f"{run} needs about {gigabytes(needed)} and {place} has {gigabytes(free)} free; make room.")
    return f"{gigabytes(needed)} at most, {gigabytes(free)} free"


def gigabytes(number: int) -> str:
    """Bytes for people."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
