"""The states of a LongSpec drafter over whole rows, as it is trained: the target is read once, with all its keys.

The same positions drive the frozen target and the block, so that short rows may stand at any places of a long text
(`positions`), and each row's queries look at the target's keys from a lag behind (`longspec.lagged_attention`).
Several documents may lie end to end in one row; none of them sees another, in target or block.
"""

# B batch, T time, M key heads, D head size, H hidden

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from drafttrain.models.logits import LogitShape
from drafttrain.models.longspec import LongSpecDrafter, Rotary, lagged_attention, windowed_attention
from drafttrain.models.shared_target import RotaryOf
from drafttrain.ops.cache import captured_layer
from drafttrain.ops.documents import documents_apart


@dataclass(frozen=True)
class Reading:
    """What a target tells a block about some rows.

    Attributes:
        embedded_BTH: its embeddings of the tokens.
        hidden_BTH: its last states, after the final norm; None where they are kept apart.
        keys_BMTD, values_BMTD: of the layer that is read.
        rotary: at the positions.
        positions_BT: of the tokens, [B or 1, T].
        lengths: of the documents that lie end to end in the one row, B = 1; None where every row is a document.
    """

    embedded_BTH: Tensor
    hidden_BTH: Tensor | None
    keys_BMTD: Tensor
    values_BMTD: Tensor
    rotary: Rotary
    positions_BT: Tensor
    lengths: tuple[int, ...] | None = None

    @property
    def documents(self) -> list[slice]:
        """The stretches of time that see nothing of each other."""
        if self.lengths is None:
            return [slice(None)]
        ends = list(itertools.accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]


@torch.no_grad()
def read_target(
    target: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    layer: int,
    positions_BT: Tensor | None = None,
    decoder: nn.Module | None = None,
    lengths: Sequence[int] | None = None,
) -> Reading:
    """Run the target over whole rows.

    Args:
        target: frozen.
        ids_BT: token ids.
        mask_BT: 1 on tokens, 0 on padding, which is on the right; None without padding.
        layer: whose keys and values are kept.
        positions_BT: rising, all distances between neighbours 1 or more; None counts from 0.
        decoder: what runs instead of the target's own decoder (an engine that splits it).
        lengths: of the documents of a single row without padding, each of which is read by itself.
    """
    if positions_BT is None:
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).unsqueeze(0)
    embedded: list[Tensor] = []
    # The engine of a split target gathers the embedding only while the decoder runs.
    hook = target.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[2]))
    config = target.config.get_text_config()
    apart = contextlib.nullcontext(mask_BT) if lengths is None else documents_apart(config, lengths, ids_BT.device)
    try:
        with apart as mask:
            found = captured_layer(
                target.get_decoder() if decoder is None else decoder,
                config.num_hidden_layers,
                layer,
                input_ids=ids_BT,
                attention_mask=mask,
                position_ids=positions_BT,
            )
    finally:
        hook.remove()
    embedded_BTH, hidden_BTH, keys, values = (states.to(ids_BT.device) for states in (embedded[0], *found))
    rotary = RotaryOf(target)(embedded_BTH, positions_BT)
    packed = None if lengths is None else tuple(lengths)
    return Reading(embedded_BTH, hidden_BTH, keys, values, rotary, positions_BT, packed)


def block_states(
    block: LongSpecDrafter, reading: Reading, lag_B: Tensor, forward: Callable[..., Tensor] | None = None
) -> Tensor:
    """The block's states at every token, [B, T, H]: the target's head over them gives its logits.

    Args:
        block: whose shape and dtype.
        reading: of the rows.
        lag_B: how many of the target's last tokens each row's (each document's) queries do without, 1 or more: 1 at
            the first drafted token of a round, k at the k-th.
        forward: the block's, where calling it is not calling that.
    """
    config, dtype = block.config, block.self_norm.weight.dtype
    scaling = config.scaling
    embedded_BTH, keys, values, cos, sin = (
        states.to(dtype) for states in (reading.embedded_BTH, reading.keys_BMTD, reading.values_BMTD, *reading.rotary)
    )

    documents, at_BT = reading.documents, reading.positions_BT
    lags = lag_B.split(len(lag_B) // len(documents))

    def windowed(q_BNTD: Tensor, *own: Tensor) -> Tensor:
        found = [
            windowed_attention(*(each[:, :, part] for each in (q_BNTD, *own)), at_BT[:, part], config.window, scaling)
            for part in documents
        ]
        return torch.cat(found, 2)

    def look(q_BNTD: Tensor) -> Tensor:
        found = [
            lagged_attention(*(each[:, :, part] for each in (q_BNTD, keys, values)), lag, scaling)
            for part, lag in zip(documents, lags, strict=True)
        ]
        return torch.cat(found, 2)

    return (forward or block)(embedded_BTH, (cos, sin), windowed, look)


class BesideTarget:
    """A block and its target as one causal LM: the distribution of the first drafted token behind every token.

    Args:
        block: a LongSpec drafter.
        target: its target.
    """

    def __init__(self, block: LongSpecDrafter, target: PreTrainedModel) -> None:
        self.block, self.target = block, target

    @property
    def config(self) -> PreTrainedConfig:
        """The block's."""
        return self.block.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return self.block.dtype

    @property
    def device(self) -> torch.device:
        """Of both."""
        return self.block.device

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of both."""
        yield from (*self.block.parameters(), *self.target.parameters())

    def get_input_embeddings(self) -> nn.Module:
        """The target's."""
        return self.target.get_input_embeddings()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        """Logits of whole rows."""
        reading = read_target(self.target, input_ids, None, self.block.config.kv_layer)
        states_BTH = block_states(self.block, reading, torch.ones_like(input_ids[:, 0]))
        logits_BTV = self.target.get_output_embeddings()(states_BTH)
        return CausalLMOutput(logits=LogitShape.of(self.target.config.get_text_config()).apply(logits_BTV))
