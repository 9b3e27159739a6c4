"""A model's states along drafts that leave a sequence, for many drafts at once.

At position i of a response X the drafter proposes Y_i. Where Y_i != X_i the draft leaves the response, and whatever
asks for the drafter's state after reading Y_i (a `consumed` acceptance head), or for what the drafter would propose
next, would need a forward pass over X_<i, Y_i of its own. Here all of them share one: the response is read once, and
the branches are appended behind it, each seeing its own prefix X_<i and its own chain only (a 4-D mask), at the
positions that its tokens would have.

Gradients are not kept: drafters are frozen wherever this is used.
"""

# B sequences, L tokens, W branches, D tokens of a branch, S cache slots, T response tokens, M rejected positions,
# R tokens of a run, H hidden

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drafttrain.ops.attention import attending, layer_windows, prepare_mask
from drafttrain.ops.cache import DenseCache


class Branches:
    """A batch of sequences that has been read, and chains of tokens grown from points inside it.

    Args:
        model: a decoder-only transformers model.
        sequences: token ids of every row, not empty.

    Attributes:
        hidden_BLH: last hidden state (after the final norm) after every token; beyond a row's end it means nothing.

    Example:
        >>> branches = Branches(model, [prompt + response])
        >>> branches.root([[len(prompt) + 3, len(prompt) + 7]])  # two branches, after 3 and 7 response tokens
        >>> hidden_BWH = branches.extend(torch.tensor([[41, 97]]))  # states after their first tokens
    """

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._config = model.config.get_text_config()
        self._length = max(map(len, sequences))
        weight = model.get_input_embeddings().weight
        device = weight.device
        tokens_BL = torch.tensor([[*row, *[0] * (self._length - len(row))] for row in sequences], device=device)
        tokens_BL.clamp_(max=len(weight) - 1)  # a token that the drafter lacks is read as its last, as in decoding
        self._cache = DenseCache(self._config.num_hidden_layers, len(sequences), device, self._length)
        self._windows = layer_windows(self._config)
        self._cache.open(self._length)
        positions_1L = self._cache.query_positions()
        masks = {kind: self._causal(positions_1L, window) for kind, window in self._windows.items()}
        self.hidden_BLH = self._read(tokens_BL, positions_1L, masks)
        self._roots_BW = torch.zeros(len(sequences), 0, dtype=torch.long, device=device)
        self._depth = 0

    def root(self, roots: Sequence[Sequence[int]]) -> None:
        """Start branches: branch w of row b continues the first roots[b][w] >= 1 tokens of that row.

        Earlier branches are forgotten. Rows may have unequal numbers of branches; the places left over are padding.
        """
        width = max(map(len, roots), default=0)
        padded = [[*row, *[1] * (width - len(row))] for row in roots]
        self._roots_BW = torch.tensor(padded, device=self._roots_BW.device).reshape(len(padded), width)
        self._cache.rollback([self._length] * self._cache.rows)
        self._depth = 0

    def extend(self, tokens_BW: Tensor) -> Tensor:
        """Append one token to every branch: the last hidden states after reading it, [B, W, H]."""
        positions_BW = self._roots_BW + self._depth
        self._cache.open(positions_BW.shape[1])
        masks = {kind: self._branch_mask(window) for kind, window in self._windows.items()}
        self._depth += 1
        return self._read(tokens_BW, positions_BW, masks)

    @torch.no_grad()
    def _read(self, tokens_BQ: Tensor, positions_BQ: Tensor, masks: dict[str, Tensor]) -> Tensor:
        with attending(self._config):
            hidden_BQH = self._model.get_decoder()(
                input_ids=tokens_BQ,
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                position_ids=positions_BQ,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
        self._cache.advance()
        return hidden_BQH

    def _causal(self, positions_1L: Tensor, window: int | None) -> Tensor:
        heads = self._config.num_attention_heads
        groups = heads // (getattr(self._config, "num_key_value_heads", None) or heads)
        softcap = getattr(self._config, "attn_logit_softcapping", None) is not None
        return prepare_mask(self._cache, positions_1L, self._model.dtype, groups, window, softcap)

    def _branch_mask(self, window: int | None) -> Tensor:
        """What the branches' newest tokens may see, additive [B, 1, W, S]: the text up to the root, and their chain."""
        roots_BW1 = self._roots_BW.unsqueeze(2)
        rows, width = self._roots_BW.shape
        device = roots_BW1.device
        window = window or self._length + self._depth + 1
        slots_L = torch.arange(self._length, device=device)
        before_BWL = (slots_L < roots_BW1) & (slots_L > roots_BW1 + self._depth - window)
        recent_D = torch.arange(self._depth + 1, device=device) > self._depth - window
        own_WDW = torch.eye(width, dtype=torch.bool, device=device)[:, None, :] & recent_D[:, None]
        visible_BWS = torch.cat([before_BWL, own_WDW.reshape(1, width, -1).expand(rows, -1, -1)], dim=2)
        blocked_BWS = torch.zeros(visible_BWS.shape, dtype=self._model.dtype, device=device)
        return blocked_BWS.masked_fill_(~visible_BWS, -torch.inf).unsqueeze(1)


@dataclass(frozen=True)
class BranchStates:
    """The drafter's last hidden states around the drafted tokens of one response.

    Attributes:
        producing_TH: the states whose logits Y was drawn from: after the prompt and X_<i.
        consumed_TH: the states after reading Y_i behind X_<i.
        run_producing_MRH: the same for the tokens of the runs, behind X_<f, Y_f and the run before them.
        run_consumed_MRH: after reading them.
    """

    producing_TH: Tensor
    consumed_TH: Tensor
    run_producing_MRH: Tensor
    run_consumed_MRH: Tensor


def batch_branch_states(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]]
) -> list[BranchStates]:
    """States that produced, and states that have consumed, every drafted token of trace rows.

    Args:
        model: the drafter.
        rows: (prompt_ids, response_ids X [T], draft_ids Y [T], run_ids [M * R]) of every row; M counts the positions
            with Y != X; run_ids may be empty (R = 0).

    Returns:
        a `BranchStates` a row, in the model's dtype on its device.

    Raises:
        ValueError: a prompt is empty, or the lengths do not fit together.
    """
    rejected = [_rejected(*row) for row in rows]
    branches = Branches(model, [[*prompt, *response] for prompt, response, _, _ in rows])
    branches.root([[len(row[0]) + i for i in places] for row, places in zip(rows, rejected, strict=True)])
    run_lengths = [len(row[3]) // len(places) if places else 0 for row, places in zip(rows, rejected, strict=True)]
    chains = [
        [[row[2][i], *row[3][m * length : (m + 1) * length]] for m, i in enumerate(places)]
        for row, places, length in zip(rows, rejected, run_lengths, strict=True)
    ]
    states_DBWH = _read_chains(branches, chains, max(run_lengths) + 1)
    found = []
    for b, (row, places, length) in enumerate(zip(rows, rejected, run_lengths, strict=True)):
        start, size = len(row[0]), len(row[1])
        states_LH = branches.hidden_BLH[b]
        chain_MDH = states_DBWH[: length + 1, b, : len(places)].transpose(0, 1)
        consumed_TH = states_LH[start : start + size].clone()
        consumed_TH[torch.tensor(places, dtype=torch.long, device=consumed_TH.device)] = chain_MDH[:, 0]
        producing_TH = states_LH[start - 1 : start + size - 1]
        found.append(BranchStates(producing_TH, consumed_TH, chain_MDH[:, :-1], chain_MDH[:, 1:]))
    return found


def _rejected(
    prompt_ids: Sequence[int], response_ids: Sequence[int], draft_ids: Sequence[int], run_ids: Sequence[int]
) -> list[int]:
    places = [i for i, (x, y) in enumerate(zip(response_ids, draft_ids, strict=True)) if x != y]
    if not len(prompt_ids):
        raise ValueError("the prompt is empty: no state produced the first token")
    if len(run_ids) % len(places) if places else len(run_ids):
        raise ValueError(f"{len(run_ids)} run tokens do not divide among {len(places)} rejected positions")
    return places


def _read_chains(branches: Branches, chains: list[list[list[int]]], depth: int) -> Tensor:
    """States [D, B, W, H] after each token of the chains (tokens by row and branch; padded here with token 0)."""
    width = max(map(len, chains))
    if width == 0:
        hidden_BLH = branches.hidden_BLH
        return hidden_BLH.new_zeros(depth, len(chains), 0, hidden_BLH.shape[2])
    tokens_DBW = torch.zeros(depth, len(chains), width, dtype=torch.long)
    for b, row in enumerate(chains):
        for w, chain in enumerate(row):
            tokens_DBW[: len(chain), b, w] = torch.tensor(chain)
    tokens_DBW = tokens_DBW.to(branches.hidden_BLH.device)
    return torch.stack([branches.extend(tokens_BW) for tokens_BW in tokens_DBW])
