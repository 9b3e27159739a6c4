"""What a LongSpec drafter takes from its target: embeddings, rotary angles, one layer's keys and values, logits."""

# B batch, T time, M key heads, D head size, H hidden

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drafttrain.errors import UserError
from drafttrain.models.longspec import LongSpecConfig, Rotary, rotated
from drafttrain.ops.cache import captured_layer

FULL = "full_attention"


class RotaryOf:
    """The rotary embedding of a target's full-attention layers.

    Args:
        model: the target.

    Raises:
        UserError: it has none.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._module = getattr(model.get_decoder(), "rotary_emb", None)
        if self._module is None:
            raise UserError(
                f"{type(model).__name__} has no rotary embedding, which a LongSpec drafter shares; take another target."
            )
        takes_kind = "layer_type" in inspect.signature(self._module.forward).parameters
        self._more: dict[str, Any] = {"layer_type": FULL} if takes_kind else {}

    def __call__(self, states: Tensor, positions_BT: Tensor) -> Rotary:
        """Cosines and sines in the dtype of `states`."""
        return self._module.forward(states, positions_BT, **self._more)  # hooks of engines that split it stay out


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """A target's layers."""
    count = model.config.get_text_config().num_hidden_layers
    children = model.get_decoder().children()
    return next(child for child in children if isinstance(child, nn.ModuleList) and len(child) == count)


def layer_kinds(config: Any) -> list[str]:
    """The kind of attention of every layer of a target."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return list(kinds)
    kind = FULL if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def readable_layer(config: Any, asked: int | None) -> int:
    """The layer whose keys and values are read: the last one of full attention unless asked otherwise.

    Raises:
        UserError: there is none, or the one asked for is not there or sees a window only.
    """
    kinds = layer_kinds(config)
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    if not full:
        raise UserError(
            f"no layer of this {config.get_text_config().model_type} target is full attention, so none holds the whole "
            "context for a LongSpec drafter; take another target."
        )
    if asked is None:
        return full[-1]
    layer = asked + len(kinds) if asked < 0 else asked
    if not 0 <= layer < len(kinds):
        raise UserError(f"drafter.block.kv_layer is {asked}; the target has layers 0 to {len(kinds) - 1}.")
    if layer not in full:
        raise UserError(
            f"drafter.block.kv_layer is {asked}, a {kinds[layer].replace('_', '-')} layer of the target; its last "
            f"layer of full attention is {full[-1]}."
        )
    return layer


@torch.no_grad()
def check_readable(model: PreTrainedModel, config: LongSpecConfig) -> None:
    """Make sure that the layer's keys turn with the positions as a LongSpec drafter's queries do.

    The same tokens are read at two places: relative positions are alike, so each key must be the other's, turned.

    Raises:
        UserError: the keys have another shape, or turn otherwise or not at all.
    """
    tokens_BT = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    layers = model.config.get_text_config().num_hidden_layers
    ahead, at_BT = 3, torch.arange(8, device=model.device).unsqueeze(0)
    found = []
    for positions_BT in (at_BT, at_BT + ahead):
        _, keys, values = captured_layer(
            model.get_decoder(), layers, config.kv_layer, input_ids=tokens_BT, position_ids=positions_BT
        )
        found.append(keys)
    name, layer = type(model).__name__, config.kv_layer
    heads, size = keys.shape[1], config.head_dim
    if {keys.shape[3], values.shape[3]} != {size} or config.num_attention_heads % heads:
        raise UserError(
            f"layer {layer} of {name} keeps {heads} heads with keys of {keys.shape[3]} and values of "
            f"{values.shape[3]}, which queries of {config.num_attention_heads} heads of {size} cannot read; take "
            "another target or another layer."
        )
    cos, sin = (part.double() for part in RotaryOf(model)(found[0], torch.full_like(at_BT[:, :1], ahead)))
    norm = (cos.square() + sin.square()).sqrt()
    if cos.shape[-1] > size:
        raise UserError(f"the rotary embedding of {name} is wider than its heads; take another target.")
    expected_keys = rotated(found[0].double(), (cos / norm, sin / norm))
    apart = (found[1].double() - expected_keys).norm() / expected_keys.norm()
    if not apart < 0.1:
        raise UserError(
            f"the keys of layer {layer} of {name} do not turn with their positions as a LongSpec drafter's queries do; "
            "name another layer (drafter.block.kv_layer) or take another target."
        )
