"""New LongSpec drafters: shaped by their target, from random weights or from one of its layers."""

# N heads, D head size, H hidden

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drafttrain.config import BlockConfig
from drafttrain.errors import UserError
from drafttrain.models.longspec import LongSpecConfig, LongSpecDrafter
from drafttrain.models.longspec_copying import check_copying
from drafttrain.models.shared_target import decoder_layers, readable_layer

_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def block_config(target: PreTrainedModel, block: BlockConfig) -> LongSpecConfig:
    """The shape of a drafter for a target.

    Args:
        target: its weights may be without storage.
        block: the recipe's wishes.

    Raises:
        UserError: the target has no layer that can be read, or none to copy with as is wished.
    """
    config = target.config.get_text_config()
    kv_layer = readable_layer(config, block.kv_layer)
    shared = {name: getattr(config, name) for name in _SHARED if getattr(config, name, None) is not None}
    attention = getattr(decoder_layers(target)[kv_layer], "self_attn", None)
    shaped = LongSpecConfig(
        **shared,
        intermediate_size=block.intermediate_size or config.intermediate_size,
        hidden_act=getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", "silu"),
        attention_bias=getattr(getattr(attention, "q_proj", None), "bias", None) is not None,
        scaling=getattr(attention, "scaling", None),
        window=block.window,
        kv_layer=kv_layer,
        final_norm=block.final_norm,
        depth=block.depth,
        initializer_range=getattr(config, "initializer_range", 0.02),
    )
    norm = getattr(attention, "q_norm", None)
    shaped.qk_norm = norm is not None and norm.weight.shape == (shaped.head_dim,)
    if block.copying:
        check_copying(target, shaped)
    return shaped


def new_block(target: PreTrainedModel, block: BlockConfig, dtype: torch.dtype, seed: int) -> LongSpecDrafter:
    """A drafter that has learnt nothing yet, on the CPU.

    Args:
        target: with its weights.
        block: as for `block_config`.
        dtype: of the weights.
        seed: of random ones.

    Raises:
        UserError: as `block_config`, or the layer to start from is not there or of another build.
    """
    config = block_config(target, block)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LongSpecDrafter(config)
    if config.final_norm:
        _take(model.norm, target.get_decoder().norm)
    if block.warm_start is not None:
        _start_from(model, target, block)
    if block.zero_outputs:
        for projection in (model.self_attn.o_proj, model.cross_attn.o_proj, model.mlp.down_proj):
            nn.init.zeros_(projection.weight)
    return model.to(dtype).eval()


@torch.no_grad()
def _start_from(model: LongSpecDrafter, target: PreTrainedModel, block: BlockConfig) -> None:
    layers = decoder_layers(target)
    number = block.warm_start + len(layers) if block.warm_start < 0 else block.warm_start
    if not 0 <= number < len(layers):
        raise UserError(
            f"drafter.block.warm_start is {block.warm_start}; the target has layers 0 to {len(layers) - 1}."
        )
    width = layers[number].mlp.down_proj.in_features
    if model.config.intermediate_size < width:
        raise UserError(
            f"drafter.block.intermediate_size is {model.config.intermediate_size}, but the layer to start from has "
            f"{width}; take that or more."
        )
    layer, read = layers[number], layers[model.config.kv_layer]
    before_mlp = "pre_feedforward_layernorm" if hasattr(layer, "pre_feedforward_layernorm") else _AFTER
    try:
        for ours, theirs in (
            (model.self_norm, layer.input_layernorm),
            (model.cross_norm, read.input_layernorm),
            (model.mlp_norm, getattr(layer, before_mlp)),
        ):
            _take(ours, theirs)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            _take(getattr(model.self_attn, name), getattr(layer.self_attn, name, None))
        for name in ("q_proj", "o_proj", "q_norm"):
            _take(getattr(model.cross_attn, name), getattr(read.self_attn, name, None))
        _widen(model.mlp, layer.mlp)
    except (AttributeError, RuntimeError) as error:
        raise UserError(
            f"layers of {type(target).__name__} are of another build than the block "
            f"({' '.join(str(error).split())[:120]}); leave drafter.block.warm_start out."
        ) from None


_AFTER = "post_attention_layernorm"


@torch.no_grad()
def _take(ours: nn.Module | None, theirs: nn.Module | None) -> None:
    """Copy a projection or a norm."""
    if ours is None:
        return
    if isinstance(ours, nn.RMSNorm):
        ours.weight.copy_(_scale(theirs, len(ours.weight)))
        return
    ours.weight.copy_(theirs.weight)
    if ours.bias is not None:
        ours.bias.copy_(theirs.bias)


def _widen(ours: nn.Module, theirs: nn.Module) -> None:
    """Take a SwiGLU's neurons; those that there are more of stay random and say nothing yet."""
    width = theirs.down_proj.in_features
    for name in ("gate_proj", "up_proj"):
        getattr(ours, name).weight[:width] = getattr(theirs, name).weight
    ours.down_proj.weight.zero_()
    ours.down_proj.weight[:, :width] = theirs.down_proj.weight


def _scale(norm: nn.Module, size: int) -> Tensor:
    """What a norm multiplies by, however it stores that (Gemma: less one): its answer to ones."""
    weight = next(norm.parameters())
    return norm(torch.ones(1, size, dtype=weight.dtype, device=weight.device))[0]
