"""What architectures do to logits behind the output head."""

# N tokens, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LogitShape:
    """What an architecture does to the product of hidden state and head: scale it, then squash it into +-softcap."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> LogitShape:
        """Gemma 2 caps logits, Granite divides and Cohere multiplies them; others leave them as they are."""
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def apply(self, logits_NV: Tensor) -> Tensor:
        """Logits as the model gives them, from the bare product."""
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def log_probs(self, logits_NV: Tensor, temperature: float) -> Tensor:
        """log softmax(shape(logits) / temperature)."""
        shaped_NV = self.apply(logits_NV)
        return (shaped_NV if temperature == 1.0 else shaped_NV / temperature).log_softmax(-1)
