"""The LongSpec drafter (Yang et al. 2025, arXiv 2502.17421): one block that reads the target's own keys and values.

    x1 = x0 + W_o attention(last `window` tokens)      x0: the target's embedding of the token
    x2 = x1 + W_o attention(target's keys, values)     of one layer, all verified tokens; only W_q and W_o are its own
    x3 = x2 + SwiGLU(x2)                               logits: the target's head over x3

Each part reads a normed state. Embedding and head are the target's, frozen, and not stored. What the windowed part
keeps of a token depends on its id and position alone, so it costs a fixed amount of memory and can be made again from
the last `window` tokens at any time.
"""

# B batch, T time, N query heads, M key heads, D head size, H hidden, S the target's slots

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [B or 1, T, D] of the target's rotary embedding at some positions."""

MODEL_TYPE = "longspec"


class LongSpecConfig(PreTrainedConfig):
    """Shape of a LongSpec drafter; what it shares with its target is the target's.

    Attributes:
        vocab_size, hidden_size, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps, hidden_act,
            max_position_embeddings, attention_bias: as the target has them.
        scaling: of attention scores.
        qk_norm: whether queries and keys are normed, as in the target.
        intermediate_size: of its SwiGLU.
        window: tokens that self-attention sees, the query's own among them.
        kv_layer: the target's layer whose keys and values are read.
        final_norm: whether a norm stands before the head.
        depth: the deepest step it was trained to draft at.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 512,
        intermediate_size: int = 1024,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        scaling: float | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        attention_bias: bool = False,
        qk_norm: bool = False,
        max_position_embeddings: int = 32768,
        window: int = 512,
        kv_layer: int = 0,
        final_norm: bool = True,
        depth: int = 5,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = 1
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.scaling = scaling or self.head_dim**-0.5
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.attention_bias = attention_bias
        self.qk_norm = qk_norm
        self.max_position_embeddings = max_position_embeddings
        self.window = window
        self.kv_layer = kv_layer
        self.final_norm = final_norm
        self.depth = depth
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class Queries(nn.Module):
    """Rotated queries [B, N, T, D] of normed states, and the way back from what was attended to."""

    def __init__(self, config: LongSpecConfig) -> None:
        super().__init__()
        inner = config.num_attention_heads * config.head_dim
        self.heads, self.size = config.num_attention_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.size, config.rms_norm_eps) if config.qk_norm else None

    def queries(self, normed_BTH: Tensor, rotary: Rotary) -> Tensor:
        """[B, N, T, D]."""
        q_BTND = self.q_proj(normed_BTH).unflatten(-1, (self.heads, self.size))
        if self.q_norm is not None:
            q_BTND = self.q_norm(q_BTND)
        return rotated(q_BTND.transpose(1, 2), rotary)

    def output(self, found_BNTD: Tensor) -> Tensor:
        """[B, T, H]."""
        return self.o_proj(found_BNTD.transpose(1, 2).flatten(2))


class WindowedAttention(Queries):
    """Attention over the drafter's own last tokens."""

    def __init__(self, config: LongSpecConfig) -> None:
        super().__init__(config)
        self.key_heads = config.num_key_value_heads
        inner = self.key_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_norm = nn.RMSNorm(self.size, config.rms_norm_eps) if config.qk_norm else None

    def keys_values(self, normed_BTH: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Each [B, M, T, D]; functions of tokens and positions alone."""
        k_BTMD = self.k_proj(normed_BTH).unflatten(-1, (self.key_heads, self.size))
        v_BTMD = self.v_proj(normed_BTH).unflatten(-1, (self.key_heads, self.size))
        if self.k_norm is not None:
            k_BTMD = self.k_norm(k_BTMD)
        return rotated(k_BTMD.transpose(1, 2), rotary), v_BTMD.transpose(1, 2)


class SwiGLU(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: LongSpecConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, normed_BTH: Tensor) -> Tensor:
        """[B, T, H]."""
        return self.down_proj(self.act(self.gate_proj(normed_BTH)) * self.up_proj(normed_BTH))


Attend = Callable[[Tensor], Tensor]
"""What queries [B, N, T, D] find, [B, N, T, D]: whoever calls the block knows keys, values and what may be seen."""


class LongSpecDrafter(PreTrainedModel):
    """The block.

    Args:
        config: its shape.

    Example:
        >>> model = LongSpecDrafter.from_pretrained("runs/q/drafter")
    """

    config_class = LongSpecConfig
    base_model_prefix = ""
    _supports_sdpa = True

    def __init__(self, config: LongSpecConfig) -> None:
        super().__init__(config)
        self.self_norm, self.cross_norm, self.mlp_norm = (
            nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(3)
        )
        self.self_attn = WindowedAttention(config)
        self.cross_attn = Queries(config)
        self.mlp = SwiGLU(config)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps) if config.final_norm else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> None:
        """The target's, and no part of it."""

    def get_output_embeddings(self) -> None:
        """Likewise."""

    def forward(self, embedded_BTH: Tensor, rotary: Rotary, windowed: Callable[..., Tensor], reading: Attend) -> Tensor:
        """The states that the target's head reads, [B, T, H].

        Args:
            embedded_BTH: the target's embeddings.
            rotary: at the tokens' positions.
            windowed: (queries, keys, values) -> what is found in the window.
            reading: what is found in the target's keys and values.
        """
        normed_BTH = self.self_norm(embedded_BTH)
        own = self.self_attn.keys_values(normed_BTH, rotary)
        return self.rest(embedded_BTH, normed_BTH, rotary, lambda queries: windowed(queries, *own), reading)

    def rest(
        self, embedded_BTH: Tensor, normed_BTH: Tensor, rotary: Rotary, windowed: Attend, reading: Attend
    ) -> Tensor:
        """The block behind its own keys and values; it needs to run only where logits are wanted."""
        own, cross = self.self_attn, self.cross_attn
        x_BTH = embedded_BTH + own.output(windowed(own.queries(normed_BTH, rotary)))
        x_BTH = x_BTH + cross.output(reading(cross.queries(self.cross_norm(x_BTH), rotary)))
        return self.norm(x_BTH + self.mlp(self.mlp_norm(x_BTH)))


def rotated(states_BNTD: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of queries or keys; where it has fewer columns than a head, it turns the first ones."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    size = cos.shape[-1]
    turned, kept = states_BNTD[..., :size], states_BNTD[..., size:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned, kept), -1) if kept.shape[-1] else turned


def windowed_attention(
    q_BNTD: Tensor, k_BMTD: Tensor, v_BMTD: Tensor, positions_BT: Tensor, window: int, scaling: float
) -> Tensor:
    """Attention of whole rows over the last `window` positions: memory linear in their length.

    Args:
        q_BNTD, k_BMTD, v_BMTD: rotated.
        positions_BT: rising in every row, [B or 1, T]; what lies `window` or more before a query is not seen.
        window: as in `LongSpecConfig`.
        scaling: of scores.
    """
    length = q_BNTD.shape[2]
    if length <= window:
        mask_BTT = _in_window(positions_BT, positions_BT, window)
        return _attend(q_BNTD, k_BMTD, v_BMTD, mask_BTT.unsqueeze(1), scaling)
    # Blocks of a window's length: a query sees its own block and the one before at most.
    blocks = math.ceil(length / window)
    fill = blocks * window - length
    q, k, v = (_blocked(F.pad(states, (0, 0, 0, fill)), window) for states in (q_BNTD, k_BMTD, v_BMTD))
    batch = len(positions_BT)
    padded_BT = F.pad(positions_BT, (0, fill), value=-(1 << 40))  # padding sees nothing but padding, and is not seen
    at_BCW = padded_BT.view(batch, blocks, window)
    k, v = (torch.cat((_before(states, 0), states), 3) for states in (k, v))
    key_at_BCW = torch.cat((_before(at_BCW, -(1 << 50)), at_BCW), 2)
    mask = _in_window(at_BCW.flatten(0, 1), key_at_BCW.flatten(0, 1), window).unflatten(0, (batch, blocks))
    mask = mask.expand(len(q), -1, -1, -1).flatten(0, 1).unsqueeze(1)
    found = _attend(*(states.flatten(0, 1) for states in (q, k, v)), mask, scaling)
    found = found.unflatten(0, (len(q_BNTD), blocks)).transpose(1, 2).flatten(2, 3)
    return found[:, :, :length]


def lagged_attention(q_BNTD: Tensor, k_BMTD: Tensor, v_BMTD: Tensor, lag_B: Tensor, scaling: float) -> Tensor:
    """Flash noisy training (paper, algorithm 2): the query at t sees the target's keys up to t - lag.

    The j-th drafted token of a round is drafted where the target's last j tokens are not verified yet. Queries are
    shifted, not masked, so that plain causal attention, with any fused kernel, serves every row's own lag.

    Args:
        q_BNTD: the drafter's queries.
        k_BMTD, v_BMTD: the target's, of the same rows.
        lag_B: int64 [B], 0 or more.
        scaling: of scores.

    Returns:
        [B, N, T, D]; the first `lag` positions of a row see nothing, and get zeros.
    """
    length = q_BNTD.shape[2]
    time_T = torch.arange(length, device=q_BNTD.device)
    sources_BT = time_T - lag_B.unsqueeze(1)
    ahead_BT = (time_T + lag_B.unsqueeze(1)).clamp(max=length - 1)
    shifted = q_BNTD.gather(2, ahead_BT[:, None, :, None].expand_as(q_BNTD))
    found = F.scaled_dot_product_attention(
        shifted, k_BMTD, v_BMTD, is_causal=True, scale=scaling, enable_gqa=q_BNTD.shape[1] != k_BMTD.shape[1]
    )
    back_BT = sources_BT.clamp(min=0)
    found = found.gather(2, back_BT[:, None, :, None].expand_as(found))
    return found.masked_fill((sources_BT < 0)[:, None, :, None], 0.0)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])


def _in_window(query_BQ: Tensor, key_BS: Tensor, window: int) -> Tensor:
    ahead_BQS = query_BQ.unsqueeze(2) - key_BS.unsqueeze(1)
    return (ahead_BQS >= 0) & (ahead_BQS < window)


def _blocked(states_BNTD: Tensor, window: int) -> Tensor:
    """[B, blocks, N, window, D]."""
    return states_BNTD.unflatten(2, (-1, window)).transpose(1, 2)


def _before(states: Tensor, fill: int) -> Tensor:
    """Each block's predecessor, [B, blocks, ...]."""
    return torch.cat((torch.full_like(states[:, :1], fill), states[:, :-1]), 1)


AutoConfig.register(MODEL_TYPE, LongSpecConfig, exist_ok=True)
