"""Where a drafter comes from: a new small model, one cut from the target, or a pretrained one; LoRA on any that has
learned something already.

All of them are ordinary causal LMs of transformers with the target's tokenizer, so whatever loads the target loads the
drafter.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drafttrain.config import DrafterConfig, LoraConfig, nearest
from drafttrain.errors import UserError
from drafttrain.models.abreast import side_by_side, widened
from drafttrain.models.loading import (
    DTYPES,
    AutoDrafter,
    Loaded,
    check_folder,
    check_same_tokenizer,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    vocabulary_size,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_TOKENS_ALONE = 1024
"""Tokens of the vocabulary that are read at a time."""

_NOT_INHERITED = ("quantization_config", "architectures", "torch_dtype", "dtype", "auto_map")


def build_drafter(config: DrafterConfig, target: Loaded, seed: int = 0, trust_remote_code: bool = False) -> nn.Module:
    """The drafter that a recipe asks for, on the CPU, trainable, in `config.dtype`.

    Args:
        config: the recipe's drafter section.
        target: whose tokenizer it must have, and whose layers or settings it may take.
        seed: of new weights.
        trust_remote_code: let the code of a pretrained drafter run.

    Returns:
        a `PreTrainedModel` (a `LongSpecDrafter` for kind longspec), or a peft model around one.

    Raises:
        UserError: impossible settings, no such model, or another tokenizer than the target's.
    """
    if config.dtype not in DTYPES:
        raise UserError(f"drafter.dtype is {config.dtype}; choose one of {', '.join(DTYPES)}.")
    if config.kind == "longspec":
        return _longspec(config, target, seed)
    if config.init_from is not None:
        model = _pretrained(config.init_from, config, target, trust_remote_code)
    elif config.kind == "cut":
        model = _cut(config, target)
    elif config.kind == "pretrained":
        if config.path is None:
            raise _no_path()
        model = _pretrained(config.path, config, target, trust_remote_code)
    else:
        model = _new(config, target, seed)
    _check_vocabulary(model, target)
    return _adapted(model.requires_grad_(True), config, seed)


def sketch_drafter(config: DrafterConfig, target: Loaded, trust_remote_code: bool = False) -> nn.Module:
    """The shape of `build_drafter`'s result without storage, from small files alone; raises what that would raise.

    Args:
        config: the recipe's drafter section.
        target: its model may be without storage too.
        trust_remote_code: let the code of a pretrained drafter run.
    """
    if config.kind == "longspec":
        from drafttrain.models.longspec import LongSpecDrafter
        from drafttrain.models.longspec_new import block_config

        with torch.device("meta"):
            return LongSpecDrafter(block_config(target.model, config.block))
    path = config.init_from or (config.path if config.kind == "pretrained" else None)
    if path is not None:
        check_folder(path, weights=True)
        check_same_tokenizer(target.tokenizer, load_tokenizer(path, trust_remote_code=trust_remote_code), path)
        shape = load_model_config(path, trust_remote_code=trust_remote_code)
    elif config.kind == "cut":
        shape = _cut_config(target.model.config, config)[0]
    elif config.kind == "pretrained":
        raise _no_path()
    else:
        shape = new_config(target.model.config, config.config)
    model = without_storage(shape, trust_remote_code)
    _check_vocabulary(model, target)
    with torch.device("meta"):
        return _adapted(model, config, seed=0)


def _longspec(config: DrafterConfig, target: Loaded, seed: int) -> PreTrainedModel:
    """A block for this target, new or from a checkpoint.

    Raises:
        UserError: the target cannot be read, LoRA is asked for, or the checkpoint is of another shape than the recipe.
    """
    from drafttrain.models.longspec_new import block_config, new_block
    from drafttrain.models.shared_target import check_readable

    if config.lora is not None:
        raise UserError("drafter.lora adapts causal LMs; a LongSpec drafter is small enough to be trained whole.")
    if config.init_from is None:
        model = new_block(target.model, config.block, DTYPES[config.dtype], seed)
    else:
        model = AutoDrafter.from_pretrained(config.init_from, config.dtype)
        check_continues(model.config, block_config(target.model, config.block), config.init_from)
        model.config.depth = config.block.depth
    check_readable(target.model, model.config)
    return model.requires_grad_(True)


def check_continues(found: PretrainedConfig, wanted: PretrainedConfig, path: str) -> None:
    """Refuse a checkpoint that is not the block of the recipe.

    Raises:
        UserError: names the first setting that differs.
    """
    for name, value in wanted.to_dict().items():
        if name in _OF_THE_BLOCK and getattr(found, name, None) != value:
            raise UserError(
                f"drafter.init_from {path} has {name} {getattr(found, name, None)} where the recipe makes it {value}; "
                "give both the same drafter.block."
            )


_OF_THE_BLOCK = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "window",
    "kv_layer",
    "final_norm",
    "qk_norm",
    "attention_bias",
)


def without_storage(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal LM of this shape that takes no memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def merged(model: nn.Module) -> PreTrainedModel:
    """The plain model: LoRA updates added into the weights in place, anything else as it is."""
    return model.merge_and_unload() if is_lora(model) else model


def is_lora(model: nn.Module) -> bool:
    """Whether the model carries LoRA updates."""
    return hasattr(model, "merge_and_unload")


def inner(model: nn.Module) -> PreTrainedModel:
    """The causal LM inside a peft model, its LoRA layers in place; a plain model itself."""
    return model.get_base_model() if is_lora(model) else model


def layer_numbers(asked: list[int], layers: int) -> list[int]:
    """Layers of a cut, counted from 0.

    Raises:
        UserError: none, one that the target does not have, or out of order.
    """
    if not asked:
        raise UserError(f"drafter.kind is cut but drafter.layers is empty; name layers of the target's {layers}.")
    numbers = [layer + layers if layer < 0 else layer for layer in asked]
    wrong = [layer for layer, number in zip(asked, numbers, strict=True) if not 0 <= number < layers]
    if wrong:
        raise UserError(f"drafter.layers names layer {wrong[0]}; the target has layers 0 to {layers - 1}.")
    if sorted(set(numbers)) != numbers:
        raise UserError(f"drafter.layers is {asked}; name each layer once, in the target's order.")
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# New


def _new(config: DrafterConfig, target: Loaded, seed: int) -> PreTrainedModel:
    model = _random(new_config(target.model.config, config.config), config.dtype, seed)
    return _take_generation_config(model, target)


def _random(config: PretrainedConfig, dtype: str, seed: int) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()


def new_config(target: PretrainedConfig, changes: dict[str, Any], section: str = "drafter.config") -> PretrainedConfig:
    """Configuration of a new drafter: the target's (vocabulary, positions, family) with the recipe's changes.

    With another `model_type` only what every family has is taken over: vocabulary, special tokens, context length.

    Args:
        target: what is changed.
        changes: by the recipe.
        section: where it says so, for messages.

    Raises:
        UserError: unknown family or key, or values that do not go together.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    values = _inheritable(target)
    family = changes.get("model_type", values["model_type"])
    try:
        known = AutoConfig.for_model(family).to_dict()
    except (ValueError, KeyError):
        raise UserError(f"{section}.model_type is {family}; transformers knows no such family.") from None
    if family != values["model_type"]:
        shared = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
        values = {name: values[name] for name in shared if name in values}
    for name in changes:
        if name not in known and name not in values:
            guess = nearest(name, list(known))
            hint = f"; did you mean {guess}?" if guess else "."
            raise UserError(f"{section}: {family} has no setting {name}{hint}")
    values = {**_resized(values, changes), **changes}
    values.pop("model_type", None)
    try:
        config = AutoConfig.for_model(family, **values)
        without_storage(config)
    except (StrictDataclassError, ValueError, TypeError, ZeroDivisionError, KeyError, RuntimeError) as error:
        raise UserError(f"{section} makes no model: {' '.join(str(error).split()).rstrip('.')}.") from error
    return config


def _inheritable(config: PretrainedConfig) -> dict[str, Any]:
    values = config.get_text_config().to_dict()
    return {name: value for name, value in values.items() if name not in _NOT_INHERITED and not name.startswith("_")}


def _resized(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings that depend on changed ones, dropped so that the family's own rule fills them in."""
    values = copy.deepcopy(values)
    if "num_hidden_layers" in changes:
        for name in _per_layer(values):
            values[name] = _repeated(values[name], changes["num_hidden_layers"])
    if ("hidden_size" in changes or "num_attention_heads" in changes) and "head_dim" not in changes:
        values.pop("head_dim", None)
    if "num_attention_heads" in changes and "num_key_value_heads" not in changes:
        values.pop("num_key_value_heads", None)
    return values


def _repeated(entries: list[Any], layers: int) -> list[Any]:
    return [entries[index % len(entries)] for index in range(layers)]


def _per_layer(values: dict[str, Any]) -> list[str]:
    """Settings that are lists with an entry a layer (`layer_types`, `no_rope_layers`, ...)."""
    layers = values.get("num_hidden_layers")
    return [
        name for name, value in values.items() if "layer" in name and isinstance(value, list) and len(value) == layers
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Cut


def _cut(config: DrafterConfig, target: Loaded) -> PreTrainedModel:
    source = target.model
    shape, rows = _cut_config(source.config, config)
    if getattr(source, "is_quantized", False) or any(weight.is_meta for weight in source.parameters()):
        where = {"revision": target.revision, "trust_remote_code": target.trust_remote_code}
        source = load_causal_lm(target.path, dtype=config.dtype, **where)  # its weights as they are, not as served
    model = _random(shape, config.dtype, seed=0)
    missing, unexpected = model.load_state_dict(_chosen_layers(source, rows), strict=False)
    if missing or unexpected:
        raise UserError(f"{type(source).__name__} cannot be cut by layers ({[*missing, *unexpected][0]} does not fit).")
    if config.fold:
        model.get_input_embeddings().weight.data.copy_(_read_alone(source, config.fold))
    return _take_generation_config(model, target)


@torch.no_grad()
def _read_alone(source: PreTrainedModel, layers: int) -> torch.Tensor:
    """Each token's state behind the first layers where it stands alone, [V, H].

    First layers look around little: what they do to a token is mostly its own. So as input embeddings these states let
    later layers do without them, the heads that copy above all.

    Raises:
        UserError: the model does something to its embeddings before the first layer, and would do it to these.
    """
    table_VH = source.get_input_embeddings().weight
    states = []
    for tokens_N in torch.arange(len(table_VH), device=table_VH.device).split(_TOKENS_ALONE):
        hidden = source.get_decoder()(tokens_N[:, None], output_hidden_states=True, use_cache=False).hidden_states
        if not torch.equal(hidden[0][:, 0], table_VH[tokens_N]):
            raise UserError(f"drafter.fold: {type(source).__name__} scales or places its embeddings; leave it out.")
        states.append(hidden[layers][:, 0])
    return torch.cat(states)


def _cut_config(target: PretrainedConfig, config: DrafterConfig) -> tuple[PretrainedConfig, list[list[int]]]:
    """The settings of the cut, and for each of its layers the target's layers that it is made of."""
    numbers = layer_numbers(config.layers, target.get_text_config().num_hidden_layers)
    if config.fold > numbers[0]:
        raise UserError(f"drafter.fold is {config.fold}, but drafter.layers keeps layer {numbers[0]}; fold fewer.")
    values = _inheritable(target)
    if config.fold:
        values["tie_word_embeddings"] = False
    rows = [numbers[at : at + config.abreast] for at in range(0, len(numbers), config.abreast)]
    for name in _per_layer(values):
        values[name] = [values[name][row[0]] for row in rows]
    values["num_hidden_layers"] = len(rows)
    if config.abreast > 1:
        values |= widened(target.get_text_config(), rows)
    return type(target.get_text_config())(**values), rows


def _chosen_layers(source: PreTrainedModel, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The target's state under the names of the cut model; everything outside the layers is shared by both."""
    prefix = _layer_prefix(source)
    layers: dict[int, dict[str, torch.Tensor]] = {}
    state = {}
    for name, tensor in source.state_dict().items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            layers.setdefault(int(number), {})[rest] = tensor
        else:
            state[name] = tensor
    for index, row in enumerate(rows):
        layer = layers[row[0]] if len(row) == 1 else side_by_side([layers[number] for number in row])
        state |= {f"{prefix}{index}.{rest}": tensor for rest, tensor in layer.items()}
    return state


def _layer_prefix(model: PreTrainedModel) -> str:
    """Name of the list of decoder layers with its dot, e.g. "model.layers."."""
    layers, decoder = model.config.get_text_config().num_hidden_layers, model.get_decoder()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == layers
        and any(module is child for child in decoder.children())
    ]
    if len(found) != 1:
        raise UserError(f"{type(model).__name__} keeps its layers in no single list; it cannot be cut by layers.")
    return f"{found[0]}."


# ---------------------------------------------------------------------------------------------------------------------
# Pretrained, LoRA and checks


def _pretrained(path: str, config: DrafterConfig, target: Loaded, trust_remote_code: bool) -> PreTrainedModel:
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_same_tokenizer(target.tokenizer, tokenizer, path)
    return load_causal_lm(path, dtype=config.dtype, trust_remote_code=trust_remote_code)


def _check_vocabulary(model: PreTrainedModel, target: Loaded) -> None:
    entries = 1 + max(target.tokenizer.get_vocab().values())
    for name, size in (("drafter", vocabulary_size(model)), ("target", vocabulary_size(target.model))):
        if size < entries:
            raise UserError(
                f"the {name} has {size} output rows but the tokenizer {entries} entries; take another {name}."
            )


def _no_path() -> UserError:
    return UserError("drafter.kind is pretrained but drafter.path is not set; name a causal LM.")


def _adapted(model: PreTrainedModel, config: DrafterConfig, seed: int) -> nn.Module:
    if config.lora is None:
        return model
    if config.kind == "new" and config.init_from is None:
        raise UserError("drafter.lora adapts trained weights, a new drafter has none; remove it or set init_from.")
    return _with_lora(model, config.lora, seed)


def _with_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> nn.Module:
    import peft

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"drafter.lora cannot be used: {' '.join(str(error).split()).rstrip('.')}.") from None


def _take_generation_config(model: PreTrainedModel, target: Loaded) -> PreTrainedModel:
    """End tokens and the like, which readers of the checkpoint look for there."""
    model.generation_config = copy.deepcopy(target.model.generation_config)
    return model
