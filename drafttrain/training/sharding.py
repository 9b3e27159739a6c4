"""Both models of a distillation under whatever splits them: nothing, DDP, ZeRO-2, ZeRO-3 or FSDP.

The frozen target has an engine of its own, sharded where the drafter's is, and is never a submodule of the drafter: no
optimizer, checkpoint or gradient hook sees it. The `Replica` is the drafter as it will be served, whole on every rank,
for everything that decodes while training.
"""

# B batch, T time, H hidden

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drafttrain.errors import UserError
from drafttrain.models.drafters import inner
from drafttrain.models.longspec_states import Reading, read_target
from drafttrain.training.distill_head import OutputHead, output_head

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


class FrozenTarget:
    """The target while a drafter learns from it: hidden states, output head, and no gradient.

    Args:
        model: in eval mode, without gradients, whole.
        accelerator: of the drafter's Trainer; decides how the target is split.

    Attributes:
        model: to decode with, inside `whole_head`.
        sharded: whether forwards are collective, so that all ranks must make the same ones.

    Raises:
        UserError: FSDP version 1, which cannot run a model's parts on their own.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator) -> None:
        self.model = model
        self._decoder: nn.Module = model.get_decoder()
        fixed = getattr(model, "is_quantized", False) or _is_dispatched(model)
        kind = "plain" if fixed else _sharding(accelerator)
        self.sharded = kind != "plain"
        if kind == "zero3":
            self._decoder = _zero3(model, accelerator)
        elif kind == "fsdp":
            _fsdp(model, accelerator)
        elif not fixed:
            model.to(accelerator.device)

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Last hidden states [B, T, H], after the final norm."""
        hidden_BTH = self._decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state
        return hidden_BTH.to(ids_BT.device)

    def reading(
        self,
        ids_BT: Tensor,
        mask_BT: Tensor | None,
        layer: int,
        positions_BT: Tensor,
        lengths: Sequence[int] | None = None,
    ) -> Reading:
        """What a LongSpec drafter learns from; arguments as of `read_target`."""
        return read_target(self.model, ids_BT, mask_BT, layer, positions_BT, self._decoder, lengths)

    @contextlib.contextmanager
    def whole_embedding(self) -> Iterator[None]:
        """Context in which the model's input embedding is whole, to be used apart from the decoder."""
        with gathered(list(self.model.get_input_embeddings().parameters())):
            yield

    @contextlib.contextmanager
    def head(self, device: torch.device) -> Iterator[OutputHead]:
        """The output head, whole while the context lasts; gathered once where the target is sharded."""
        with self.whole_head():
            head = output_head(self.model)
            bias = None if head.bias_V is None else head.bias_V.to(device)
            yield OutputHead(head.weight_VH.to(device), bias, head.shape)

    @contextlib.contextmanager
    def whole_head(self) -> Iterator[None]:
        """Context in which the model's output head is whole, for decoding."""
        with gathered(list(self.model.get_output_embeddings().parameters())):
            yield


class Replica:
    """The drafter as it will be served: a copy in the target's dtype, whole on this rank.

    Decoding with it makes no collective calls, whatever splits the trained weights.

    Args:
        drafter: before it is taught or wrapped.
        dtype: in which it will be served.
        device: of this rank.

    Attributes:
        trained_in: dtype of the original.
    """

    def __init__(self, drafter: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.trained_in: torch.dtype = inner(drafter).dtype
        self.model = cast_parameters(copy.deepcopy(drafter).to(device), dtype).eval().requires_grad_(False)
        self._parameters = dict(self.model.named_parameters())

    @property
    def causal_lm(self) -> PreTrainedModel:
        """What an engine decodes with: the causal LM, LoRA layers in place."""
        return inner(self.model)

    @torch.no_grad()
    def refresh(self, trained: nn.Module) -> Replica:
        """Take over the trained weights; all ranks call it."""
        for name, parameter in whole_parameters(trained):
            self._parameters[name].copy_(parameter)
        return self


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the weights in place; buffers not, for loaded models keep rotary frequencies in float32 in any dtype."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of an unwrapped model, each whole while it is looked at; all ranks go through them together."""
    for name, parameter in model.named_parameters():
        for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
            name = name.replace(wrapper, "")
        with gathered([parameter]):
            detached = parameter.detach()
            yield name, detached.full_tensor() if hasattr(detached, "full_tensor") else detached


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Context in which parameters that ZeRO-3 keeps in parts are whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _sharding(accelerator: Accelerator) -> str:
    state = accelerator.state
    if state.deepspeed_plugin is not None:
        return "zero3" if state.deepspeed_plugin.zero_stage == 3 else "plain"
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return "plain"
    if plugin.fsdp_version != 2:
        raise UserError(
            "FSDP version 1 cannot split a frozen target; set fsdp_version: 2 in the accelerate config "
            "(recipes/accelerate/fsdp.yaml does)."
        )
    return "fsdp"


def _is_dispatched(model: PreTrainedModel) -> bool:
    """Whether `target.device_map` spread the model over several places."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def _zero3(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """The decoder in a ZeRO-3 engine without optimizer. An untied output head stays whole on every rank."""
    import deepspeed

    model.get_output_embeddings().to(accelerator.device)
    own: dict[str, Any] = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"])
    own = {name: value for name, value in own.items() if name != "offload_optimizer" and value != "auto"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": own,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "fp16": {"enabled": model.dtype == torch.float16},
        "zero_allow_untested_optimizer": True,
    }
    decoder = model.get_decoder()
    deepspeed.zero.Init(module=decoder, config_dict_or_path=config)
    engine, *_ = deepspeed.initialize(model=decoder, config=config)
    engine.eval()
    return engine


def _fsdp(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Each layer on its own, so that any part of the model can run; embeddings, norm and head stay whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    for tensor in [*model.parameters(), *model.buffers()]:
        if not hasattr(tensor, "full_tensor"):
            tensor.data = tensor.data.to(accelerator.device)


def drop_layers(model: PreTrainedModel) -> None:
    """Free a target's layers where its embedding, rotary embedding and head are all that is used."""
    decoder, layers = model.get_decoder(), _layers(model)
    for name, child in decoder.named_children():
        if child is layers:
            setattr(decoder, name, nn.ModuleList())


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    count = model.config.get_text_config().num_hidden_layers
    children = model.get_decoder().children()
    lists = (child for child in children if isinstance(child, nn.ModuleList) and len(child) == count)
    return next(lists, nn.ModuleList())
