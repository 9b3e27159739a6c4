"""Layers of a model side by side: one wide layer that adds up what they would each have added to its input.

A step of a small drafter costs by its depth, every kernel waiting for the one before, more than by its width. So
neighbours among the target's last layers, which change what passes through them little, are read at once and not in
turn. For layers 1..n with attentions A_i and feed-forwards F_i (their norms included), the wide layer is

    h = x + A_1(x) + ... + A_n(x),    y = h + F_1(h) + ... + F_n(h)

It is an ordinary layer of the same architecture with n times the heads and the inner width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drafttrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FAMILIES = ("llama", "mistral", "qwen2")
"""Model types whose layers are exactly x + A(norm(x)), h + F(norm(h)), with nothing shared between heads."""

_WIDENED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
_NORM_OF = {"self_attn": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}
_INTO = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")  # rows side by side
_OUT = ("o_proj", "down_proj")  # columns side by side


def widened(config: PretrainedConfig, rows: list[list[int]]) -> dict[str, int]:
    """Settings of a model that differ when each of its layers is a row of this model's layers.

    Raises:
        UserError: another family, rows of unequal length or unlike layers, or more heads than the family allows.
    """
    abreast = len(rows[0])
    if config.model_type not in FAMILIES:
        raise UserError(f"drafter.abreast knows {', '.join(FAMILIES)} layers, not {config.model_type}; leave it out.")
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    if any(len({kinds[number] for number in row}) > 1 for row in rows):
        raise UserError("drafter.abreast would put layers of unlike attention side by side; choose others.")
    if len(rows[-1]) != abreast:
        raise UserError(f"drafter.layers does not divide into rows of {abreast} (drafter.abreast); name more or fewer.")
    heads = config.num_attention_heads * abreast
    if config.hidden_size % heads:
        raise UserError(
            f"drafter.abreast {abreast} makes {heads} heads, which do not divide the hidden size "
            f"{config.hidden_size}; choose another number."
        )
    own_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"head_dim": own_size} | {name: getattr(config, name) * abreast for name in _WIDENED}


def side_by_side(layers: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """State of the wide layer from the states of its layers, in float32.

    Each layer's norm has weights of its own; they move into the projections behind it, and the wide norm has ones.
    """
    return {name: _joined(name, layers) for name in layers[0]}


def _joined(name: str, layers: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    parts = [layer[name].float() for layer in layers]
    if name in _NORM_OF.values():
        return torch.ones_like(parts[0])
    block, projection, kind = name.split(".")
    if projection in _OUT:
        return torch.cat(parts, 1) if kind == "weight" else torch.stack(parts).sum(0)
    if projection not in _INTO:
        raise UserError(f"drafter.abreast does not know {name}, which these layers have; leave it out.")
    if kind == "weight":
        parts = [part * layer[_NORM_OF[block]].float() for part, layer in zip(parts, layers, strict=True)]
    return torch.cat(parts)
