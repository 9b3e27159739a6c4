"""Fingerprints of models: what a data set, drafter or head was made with, told apart part by part.

Three parts. Another tokenizer or architecture makes records meaningless and is always refused; other weights (the
target was fine-tuned further) are refused unless the person says so. Weights are hashed from a fixed sample of each
tensor, so that large models cost seconds, and after rounding to bfloat16, so that the same checkpoint loaded in float32
or bfloat16 is the same model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from drafttrain.errors import UserError

SAMPLE = 256
"""Entries of each tensor that are hashed: spread evenly, first and last included."""

_PROBE = (
    "def f(x):\n\treturn x + 1  # Z\u00fcrich, \u6771\u4eac, 3.14159, don't; A\u00a0B \U0001f600\r\n\n\n    The end..."
)
"""Text whose encoding tells apart tokenizers that have the same entries but split or merge differently."""

_ARCHITECTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "tie_word_embeddings",
    "rope_parameters",
    "rms_norm_eps",
    "layer_norm_epsilon",
    "sliding_window",
    "layer_types",
    "attention_bias",
    "mlp_bias",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
)
"""Keys of a model's config that decide what its weights compute; a fixed list, for configs gain keys with versions."""


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model: hex strings for its tokenizer, architecture and weights."""

    tokenizer: str
    architecture: str
    weights: str

    @classmethod
    def from_dict(cls, parts: dict[str, str]) -> Fingerprint:
        """The inverse of `to_dict`."""
        return cls(parts["tokenizer"], parts["architecture"], parts["weights"])

    def to_dict(self) -> dict[str, str]:
        """Plain strings for manifests and drafttrain.json."""
        return asdict(self)

    @property
    def short(self) -> str:
        """Eight characters of all parts together, for people."""
        return _hash(self.tokenizer, self.architecture, self.weights)[:8]

    def differing(self, other: Fingerprint) -> list[str]:
        """Names of the parts that differ."""
        return [
            part for part in ("tokenizer", "architecture", "weights") if getattr(self, part) != getattr(other, part)
        ]

    def require(
        self,
        other: Fingerprint,
        what: str,
        accept_new_weights: bool = False,
        remedy: str = "make it again for this model",
    ) -> None:
        """Refuse a model that is not the recorded one (`self`).

        Args:
            other: fingerprint of the model at hand.
            what: start of the sentence, e.g. "the head in runs/q/head was trained for the drafter in runs/q/drafter".
            accept_new_weights: whether other weights are tolerated (--accept-new-target).
            remedy: what to do, in the imperative.

        Raises:
            UserError: tokenizer or architecture differ, or weights do and that is not accepted.
        """
        parts = self.differing(other)
        if not parts or (parts == ["weights"] and accept_new_weights):
            return
        flag = " or pass --accept-new-target" if parts == ["weights"] else ""
        verb = "differs" if parts == ["tokenizer"] or parts == ["architecture"] else "differ"
        raise UserError(
            f"{what}, but that was {self.short} and this is {other.short} ({', '.join(parts)} {verb}); {remedy}{flag}."
        )


def fingerprint(model: nn.Module, tokenizer: Any) -> Fingerprint:
    """Fingerprint of a causal LM and its tokenizer; the weights must be whole (not yet sharded by ZeRO or FSDP)."""
    return Fingerprint(tokenizer_hash(tokenizer), architecture_hash(model.config), weights_hash(model))


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of the entries with their ids and of the encoding of a probe; chat templates do not count."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    probe = tokenizer.encode(_PROBE, add_special_tokens=False)
    return _hash(json.dumps([entries, probe]))


def architecture_hash(config: Any) -> str:
    """Hash of the settings that decide what weights compute; dtype, context length and kernels do not count."""
    values = config.get_text_config().to_dict()
    return _hash(json.dumps({key: values.get(key) for key in _ARCHITECTURE}, sort_keys=True, default=str))


def weights_hash(model: nn.Module) -> str:
    """Hash of a fixed sample of each tensor, rounded to bfloat16; integer tensors (quantized weights) as they are."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(_tensors(model), key=lambda pair: pair[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, tied ones under each name, offloaded ones fetched module by module."""
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        with _fetched(module, own):
            for name, tensor in module.state_dict(keep_vars=True).items():
                if "." not in name and isinstance(tensor, Tensor):
                    yield f"{prefix}.{name}", tensor.detach()


def _fetched(module: nn.Module, own: dict[str, Tensor]) -> Any:
    if any(hasattr(tensor, "ds_id") for tensor in own.values()):
        raise RuntimeError(
            "the weights are partitioned by ZeRO-3: take the fingerprint before TrainingArguments is made"
        )
    if any(tensor.is_meta for tensor in own.values()):
        from accelerate.utils import align_module_device

        return align_module_device(module)
    return nullcontext()


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    if flat.numel() > SAMPLE:
        # integer arithmetic: float linspace would lose the last positions of tensors beyond 2^24 entries
        indices = torch.arange(SAMPLE, device=flat.device) * (flat.numel() - 1) // (SAMPLE - 1)
        flat = flat[indices]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return flat.cpu().contiguous().numpy().tobytes()


def _hash(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
