"""Drafts put together: one behind another, in rows of unlike lengths and of tokens of every kind."""

# B batch, K drafted tokens, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from drafttrain.decoding.draft import Draft
from drafttrain.errors import UserError


def join(first: Draft | None, second: Draft) -> Draft:
    """The tokens of one draft and behind them, in every row, those of another.

    Every token keeps the distribution it was drawn from, or stays deterministic; forwards add up.

    Raises:
        UserError: one of them is a tree and the other has tokens.
    """
    if first is None:
        return second
    forwards = _added(first.forwards, second.forwards)
    if second.width == 0:
        return replace(first, forwards=forwards)
    if first.width == 0:
        return replace(second, forwards=forwards)
    if first.parents_BK is not None or second.parents_BK is not None:
        raise UserError(
            "a tree cannot be drafted beside or behind other tokens; put it last in FirstOf and decode one row at a "
            "time, or draft a chain"
        )
    device = second.tokens_BK.device if first.tokens_BK.device.type == "cpu" else first.tokens_BK.device
    first, second = first.to(device), second.to(device)
    lengths = [first.lengths(), second.lengths()]
    total = [a + b for a, b in zip(*lengths, strict=True)]
    width = max(total)
    index_BK = None
    if first.length_B is not None or width < first.width + second.width:
        index_BK = _order(lengths[0], first.width, width, device)
    tokens_BK = torch.cat([first.tokens_BK, second.tokens_BK], 1)
    probs_BKV, sampled_BK = _proposals(first, second)
    if index_BK is not None:
        last = tokens_BK.shape[1] - 1
        index_BK = index_BK.clamp(max=last)
        tokens_BK = tokens_BK.gather(1, index_BK)
        if probs_BKV is not None:
            probs_BKV = probs_BKV.gather(1, index_BK.unsqueeze(2).expand(-1, -1, probs_BKV.shape[2]))
        if sampled_BK is not None:
            sampled_BK = sampled_BK.gather(1, index_BK)
    source: str | list[list[str]] = first.source
    if not isinstance(source, str) or source != second.source:
        source = [a + b for a, b in zip(_labels(first, lengths[0]), _labels(second, lengths[1]), strict=True)]
    origins = None
    if first.origins is not None or second.origins is not None:
        origins = [a + b for a, b in zip(_origins(first, lengths[0]), _origins(second, lengths[1]), strict=True)]
    length_B = None if min(total) == width else torch.tensor(total, device=device)
    return Draft(tokens_BK, length_B, probs_BKV, sampled_BK, source, forwards, origins)


def cut(draft: Draft, lengths: list[int]) -> Draft:
    """The first ``lengths[b]`` tokens of each row, no wider than need be."""
    width = max(lengths)
    return replace(
        draft,
        tokens_BK=draft.tokens_BK[:, :width],
        length_B=None if min(lengths) == width else torch.tensor(lengths, device=draft.tokens_BK.device),
        probs_BKV=None if draft.probs_BKV is None else draft.probs_BKV[:, :width],
        sampled_BK=None if draft.sampled_BK is None else draft.sampled_BK[:, :width],
        source=draft.source if isinstance(draft.source, str) else _labels(draft, lengths),
        origins=None if draft.origins is None else _origins(draft, lengths),
    )


def rows_behind(prefix: Draft | None, draft: Draft | None, rows: int) -> list[list[int]]:
    """The tokens of each row of prefix ++ draft. Reads from the device."""
    before, own = ([[]] * rows if each is None or each.width == 0 else each.rows() for each in (prefix, draft))
    return [first + second for first, second in zip(before, own, strict=True)]


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two rows share."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _order(first: list[int], behind: int, width: int, device: torch.device) -> Tensor:
    """Where in the two drafts side by side the tokens of the joined one stand: int64 [B, width]."""
    column_K = torch.arange(width)
    first_B1 = torch.tensor(first).unsqueeze(1)
    return torch.where(column_K < first_B1, column_K, behind - first_B1 + column_K).to(device)


def _proposals(first: Draft, second: Draft) -> tuple[Tensor | None, Tensor | None]:
    """Distributions of both drafts side by side, and which tokens were drawn from them."""
    declared = [draft.probs_BKV for draft in (first, second) if draft.probs_BKV is not None]
    if not declared:
        return None, None
    vocabulary = max(probs.shape[2] for probs in declared)
    parts, masks = [], []
    for draft in (first, second):
        probs_BKV = draft.probs_BKV
        if probs_BKV is None:
            probs_BKV = declared[0].new_zeros(*draft.tokens_BK.shape, vocabulary)
        parts.append(pad(probs_BKV, (0, vocabulary - probs_BKV.shape[2])))
        sampled_BK = draft.sampled_BK
        if sampled_BK is None:
            sampled_BK = torch.full_like(draft.tokens_BK, draft.probs_BKV is not None, dtype=torch.bool)
        masks.append(sampled_BK)
    mixed = len(declared) < 2 or first.sampled_BK is not None or second.sampled_BK is not None
    return torch.cat(parts, 1), torch.cat(masks, 1) if mixed else None


def _labels(draft: Draft, lengths: list[int]) -> list[list[str]]:
    return [[draft.label(row, column) for column in range(length)] for row, length in enumerate(lengths)]


def _origins(draft: Draft, lengths: list[int]) -> list[list[int | None]]:
    return [[draft.origin(row, column) for column in range(length)] for row, length in enumerate(lengths)]


def _added(first: dict[str, Tensor | int], second: dict[str, Tensor | int]) -> dict[str, Tensor | int]:
    """Forwards of both, by member."""
    found = dict(first)
    for name, count in second.items():
        if name not in found:
            found[name] = count
            continue
        before = found[name]
        if isinstance(before, Tensor) and isinstance(count, Tensor):
            count = count.to(before.device)
        found[name] = before + count
    return found
