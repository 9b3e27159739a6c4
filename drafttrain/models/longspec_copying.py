"""LongSpec drafters that copy from their first step: their queries are fitted, not trained, to be the target's own.

What a target copies, its induction heads find: their keys say which tokens stand before a place, their queries which
tokens stand here. A LongSpec drafter reads such keys, but has to learn queries that fit, which takes gradient descent
most of a short training. Yet they are nearly linear in the last three tokens, so here

    windowed attention   heads that look one or two tokens back, whatever the tokens are
    its values, W_o      what the queries need of these tokens, of as many dimensions as the values have
    W_q of the reading   least squares: the target's queries of that layer, from what the block then has

A head that looks a distance o back has scores that depend on the distance alone: all its keys are nearly one vector,
made from the direction that embeddings share, and turned by the rotary embedding; its queries are that vector turned
back by o. Pairs that turn fast say where, pairs that hardly turn take off the mean, so that keys of unlike length do
not matter.
"""

# B batch, T time, N query heads, M key heads, D head size, H hidden, Q = N D, V = M D, O offsets

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from drafttrain.errors import UserError
from drafttrain.models.longspec import LongSpecConfig, LongSpecDrafter, windowed_attention
from drafttrain.models.longspec_states import Reading, read_target
from drafttrain.models.shared_target import RotaryOf, decoder_layers

OFFSETS = (1, 2)
PAIRS = 4
"""Of rotary pairs that turn fastest, and of those that turn slowest."""

SHARPNESS = 25.0
"""Score, in nats, of one fast pair at its best; the next token's is then 15 to 20 nats below in all."""

MEAN = 0.85
"""What is taken off, as a share of the fast pairs' best score."""

RIDGE = 1e-3
TOKENS = 50_000
"""Of training text that queries are fitted on."""


@dataclass(frozen=True)
class _Lesson:
    """Some rows: what the target says of them, and its queries [B, T, Q] before they are turned."""

    reading: Reading
    query_BTQ: Tensor


@torch.no_grad()
def start_copying(block: LongSpecDrafter, target: PreTrainedModel, rows: Sequence[Tensor]) -> float:
    """Set a new block's windowed attention and its queries of the target's keys.

    Args:
        block: shaped for the target, on the CPU; its norms, the reading's W_o and its SwiGLU stay as they are.
        target: frozen.
        rows: token ids [B, T] of the text it will be trained on, some 50,000 tokens in all.

    Returns:
        the share of the variance of the target's queries that the block's explain on these rows.

    Raises:
        UserError: as `check_copying`.
    """
    check_copying(target, block.config)
    dtype = block.dtype
    block.float()
    lessons = [_lesson(block, target, ids_BT) for ids_BT in rows]
    _look_back(block, target, lessons)
    here_QH, *behind = _needed(block, lessons)
    _carry(block, here_QH, dict(zip(OFFSETS, behind, strict=True)), lessons)
    explained = _fit_queries(block, lessons)
    block.to(dtype)
    return explained


def check_copying(target: PreTrainedModel, config: LongSpecConfig) -> None:
    """Refuse what cannot be fitted.

    Args:
        target: its weights may be without storage.
        config: of the block.

    Raises:
        UserError: the target makes its queries in one piece with keys and values, or has too few rotary pairs.
    """
    remedy = "set drafter.block.copying to false."
    if not hasattr(decoder_layers(target)[config.kv_layer].self_attn, "q_proj"):
        raise UserError(
            f"{type(target).__name__} has no q_proj, whose queries a block that copies is fitted to; {remedy}"
        )
    width = int(config.head_dim * getattr(target.config.get_text_config(), "partial_rotary_factor", 1.0))
    if width < 4 * PAIRS:
        raise UserError(f"heads with {width // 2} rotary pairs cannot tell distances apart; {remedy}")


def rows_for(texts: Iterable[Sequence[int]]) -> list[Tensor]:
    """The first texts, as many as queries are fitted on, each [1, T]."""
    found, total = [], 0
    for ids in texts:
        found.append(torch.tensor([list(ids)]))
        total += len(ids)
        if total >= TOKENS:
            break
    return found


def _lesson(block: LongSpecDrafter, target: PreTrainedModel, ids_BT: Tensor) -> _Lesson:
    projection = decoder_layers(target)[block.config.kv_layer].self_attn.q_proj
    found: list[Tensor] = []
    hook = projection.register_forward_hook(lambda *call: found.append(call[2]))
    try:
        reading = read_target(target, ids_BT, None, block.config.kv_layer)
    finally:
        hook.remove()
    parts = (reading.embedded_BTH, reading.hidden_BTH, reading.keys_BMTD, reading.values_BMTD)
    cos, sin = (part.cpu() for part in reading.rotary)
    reading = Reading(*(part.cpu() for part in parts), (cos, sin), reading.positions_BT.cpu())
    return _Lesson(reading, found[0].float().cpu())


def _look_back(block: LongSpecDrafter, target: PreTrainedModel, lessons: Sequence[_Lesson]) -> None:
    """Windowed attention by distance: head n looks OFFSETS[n % O] back."""
    own, config = block.self_attn, block.config
    at_1O = torch.tensor([[0, *OFFSETS]], device=target.device)
    states_1OH = torch.zeros(1, at_1O.shape[1], config.hidden_size, device=target.device)
    cos_OD, sin_OD = (part[0].float().cpu() for part in RotaryOf(target)(states_1OH, at_1O))
    pairs = cos_OD.shape[1] // 2
    cos_OP, sin_OP = (part[1:, :pairs] / cos_OD[:1, :pairs] for part in (cos_OD, sin_OD))  # without its scale
    fast_P, slow_P = torch.zeros(2, pairs)
    scale = (config.scaling * cos_OD[0, :pairs].square()).reciprocal()
    fast_P[:PAIRS] = (SHARPNESS * scale[:PAIRS]).sqrt()
    slow_P[-PAIRS:] = (MEAN * SHARPNESS * scale[-PAIRS:]).sqrt()
    rest = torch.zeros(config.head_dim - 2 * pairs)
    key_D = torch.cat([fast_P + slow_P, torch.zeros(pairs), rest])
    turned = [
        torch.cat([fast_P * cos_P - slow_P, -fast_P * sin_P, rest]) for cos_P, sin_P in zip(cos_OP, sin_OP, strict=True)
    ]
    shared_H = _shared_direction([block.self_norm(each.reading.embedded_BTH.float()) for each in lessons])
    for head in range(config.num_attention_heads):
        _rows(own.q_proj, head, config.head_dim).copy_(torch.outer(turned[head % len(OFFSETS)], shared_H))
    for head in range(config.num_key_value_heads):
        _rows(own.k_proj, head, config.head_dim).copy_(torch.outer(key_D, shared_H))
    for projection in (own.q_proj, own.k_proj, own.v_proj):
        if projection.bias is not None:
            projection.bias.zero_()
    for norm, vector_D in ((own.q_norm, turned[0]), (own.k_norm, key_D)):
        if norm is not None:  # it undoes whatever length the product with the shared direction has
            norm.weight.fill_(vector_D.square().mean().sqrt())


def _needed(block: LongSpecDrafter, lessons: Sequence[_Lesson]) -> list[Tensor]:
    """The queries as a linear function of the token's own normed state and of the normed embeddings behind it.

    Returns:
        [Q, H] for the token itself and for each offset.
    """
    pairs = []
    for each in lessons:
        embedded_BTH = each.reading.embedded_BTH.float()
        normed_BTH = block.self_norm(embedded_BTH)
        behind = [_shifted(normed_BTH, offset) for offset in OFFSETS]
        pairs.append((torch.cat([block.cross_norm(embedded_BTH), *behind], -1), each.query_BTQ))
    return list(_least_squares(pairs).split(block.config.hidden_size, 1))


def _carry(block: LongSpecDrafter, here_QH: Tensor, behind: dict[int, Tensor], lessons: Sequence[_Lesson]) -> None:
    """Values that keep what queries need of earlier tokens, and the way into directions that queries read."""
    own, config = block.self_attn, block.config
    size, heads = config.head_dim, config.num_attention_heads
    group = heads // config.num_key_value_heads
    states_NH = torch.cat([block.self_norm(each.reading.embedded_BTH.float()).flatten(0, 1) for each in lessons])
    covariance = states_NH.T @ states_NH / len(states_NH)
    root_HH = torch.linalg.cholesky(covariance + RIDGE * covariance.diag().mean() * torch.eye(len(covariance)))
    served = [tuple(sorted({OFFSETS[head % len(OFFSETS)] for head in range(key * group, (key + 1) * group)}))
              for key in range(config.num_key_value_heads)]  # fmt: skip
    into_QV = torch.zeros(len(here_QH), heads * size)
    for offsets in set(served):
        keys = [key for key, each in enumerate(served) if each == offsets]
        needed = torch.cat([behind[offset] for offset in offsets])
        # The best of that many dimensions, where states count as often as they occur.
        best_VH = torch.linalg.svd(needed @ root_HH, full_matrices=False).Vh[: len(keys) * size]
        value_VH, back_HV = best_VH @ torch.linalg.inv(root_HH), root_HH @ best_VH.T
        for place, key in enumerate(keys):
            share = slice(place, None, len(keys))  # the strongest are dealt to all heads alike
            rows = _rows(own.v_proj, key, size)
            rows.zero_()
            rows[: len(value_VH[share])] = value_VH[share]
            for head in range(key * group, (key + 1) * group):
                found = behind[OFFSETS[head % len(OFFSETS)]] @ back_HV[:, share]
                into_QV[:, head * size : head * size + found.shape[1]] = found
    length = torch.cat([each.reading.embedded_BTH.float().flatten(0, 1) for each in lessons]).square().mean(1).sqrt()
    read_QH = here_QH * block.cross_norm.weight
    gram_QQ = read_QH @ read_QH.T
    inverse_HQ = read_QH.T @ torch.linalg.inv(gram_QQ + 10 * RIDGE * gram_QQ.diag().mean() * torch.eye(len(gram_QQ)))
    own.o_proj.weight.copy_(length.mean() * inverse_HQ @ into_QV)


def _fit_queries(block: LongSpecDrafter, lessons: Sequence[_Lesson]) -> float:
    """W_q of the reading, from what the block then has; returns the explained share of variance."""
    projection = block.cross_attn.q_proj
    pairs = [(block.cross_norm(_behind_window(block, each.reading)), each.query_BTQ) for each in lessons]
    projection.weight.copy_(_least_squares(pairs))
    if projection.bias is not None:
        projection.bias.zero_()
    wrong = sum(float((query - projection(normed)).square().sum()) for normed, query in pairs)
    queries_NQ = torch.cat([query.flatten(0, 1) for _, query in pairs])
    return 1 - wrong / float((queries_NQ - queries_NQ.mean(0)).square().sum())


def _behind_window(block: LongSpecDrafter, reading: Reading) -> Tensor:
    """The states that read the target, [B, T, H]."""
    embedded_BTH, cos, sin = (states.float() for states in (reading.embedded_BTH, *reading.rotary))
    own, normed_BTH, config = block.self_attn, block.self_norm(embedded_BTH), block.config
    keys, values = own.keys_values(normed_BTH, (cos, sin))
    queries = own.queries(normed_BTH, (cos, sin))
    found = windowed_attention(queries, keys, values, reading.positions_BT, config.window, config.scaling)
    return embedded_BTH + own.output(found)


def _shared_direction(states: Sequence[Tensor]) -> Tensor:
    """The vector [H] whose product with all states is as near to 1 as can be."""
    return _least_squares([(each, torch.ones_like(each[..., :1])) for each in states])[0]


def _least_squares(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """W [out, in] of the least sum of (y - W x)^2 over pairs of x [B, T, in] and y [B, T, out], with a ridge."""
    gram = sum(x.flatten(0, 1).T @ x.flatten(0, 1) for x, _ in pairs)
    product = sum(x.flatten(0, 1).T @ y.flatten(0, 1) for x, y in pairs)
    return torch.linalg.solve(gram + RIDGE * gram.diag().mean() * torch.eye(len(gram)), product).T


def _shifted(states_BTH: Tensor, offset: int) -> Tensor:
    """The states of the tokens before, zeros at first."""
    return nn.functional.pad(states_BTH, (0, 0, offset, 0))[:, : states_BTH.shape[1]]


def _rows(projection: nn.Linear, head: int, size: int) -> Tensor:
    return projection.weight[head * size : (head + 1) * size]
