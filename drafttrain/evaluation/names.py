"""What decoding settings are called in reports and on the screen."""

from __future__ import annotations

import dataclasses

from drafttrain.config import SamplingConfig
from drafttrain.ops.sampling import Sampling


def sampling_of(config: SamplingConfig) -> Sampling:
    """The setting as the decoder wants it.

    Raises:
        UserError: it is impossible.
    """
    return Sampling(**dataclasses.asdict(config))


def sampling_name(config: SamplingConfig) -> str:
    """A decoding setting for people: `greedy`, or `temperature 0.8, top-p 0.9`."""
    parts = ["greedy"]
    if not sampling_of(config).greedy:
        parts = [f"temperature {config.temperature:g}"]
        parts += [f"top-k {config.top_k}"] if config.top_k else []
        parts += [f"top-p {config.top_p:g}"] if config.top_p < 1 else []
        parts += [f"min-p {config.min_p:g}"] if config.min_p else []
    parts += [f"repetition penalty {config.repetition_penalty:g}"] if config.repetition_penalty != 1 else []
    return ", ".join(parts)
