"""Reading a prompt layer by layer: each layer's keys are scored and dropped as soon as it has attended.

So one layer at most is alive in full. The prompt is read in one forward together with the lookahead, which is causal:
the prompt's own states are those of any prefill, and the logits behind it are the dense target's.
"""

# B batch, N query heads, M key heads, T tokens read, S tokens of a prompt, L tokens of the lookahead, D head size

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from drafttrain.context.budgets import keep_top
from drafttrain.context.scorers import Scorer
from drafttrain.context.scoring import Looked
from drafttrain.decoding.engine import Engine
from drafttrain.ops.attention import SEE_ALL, attending_by, folded_attention, stand_in, windows_by_layer
from drafttrain.ops.cache import WrittenLayer
from drafttrain.ops.ragged import RaggedCache
from drafttrain.ops.upload import upload

BLOCK = 256
"""Query rows at once where a mask is needed, so that no mask of a prompt's square is ever made."""


@dataclass(frozen=True)
class Reading:
    """One row's prompt as the target is to read it.

    Attributes:
        tokens: of the prompt, or of what is left of it.
        positions: of each.
        ahead: the lookahead, read behind it.
        counts: tokens that each layer keeps of it.
        protected_S: bool, which tokens are kept in any case.
        sample_id: of the row.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    ahead: Sequence[int]
    counts: Sequence[int]
    protected_S: Tensor
    sample_id: int = 0

    @property
    def following(self) -> int:
        """Position of the token behind the prompt."""
        return self.positions[-1] + 1


class Prefill(Cache):
    """Reads rows into a ragged cache.

    Args:
        engine: of the target.
        readings: one a row.
        lengths: tokens of each row's text, whether read or not.
        scorer: says what is kept where not all is; it may be None then.
        room: tokens that will be read behind the prompts, lookaheads included.

    Attributes:
        scoring_seconds: spent on scores so far.
    """

    def __init__(
        self,
        engine: Engine,
        readings: Sequence[Reading],
        lengths: Sequence[int],
        scorer: Scorer | None,
        room: int,
    ) -> None:
        self.engine, self.scorer = engine, scorer
        self.readings = list(readings)
        self.windows = windows_by_layer(engine.config)
        self.scoring_seconds = 0.0
        heads = engine.config.num_attention_heads // engine.groups
        kept = [[[reading.counts[layer]] * heads for reading in readings] for layer in range(engine.layers)]
        following = [reading.following for reading in readings]
        self.cache = RaggedCache(kept, lengths, following, self.windows, engine.device, room)
        self._layer = 0
        super().__init__(layers=[WrittenLayer(self, index) for index in range(engine.layers)])

    def write(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is held here but the layer's number."""
        self._layer = layer
        return key_states, value_states

    def run(self) -> list[Tensor]:
        """Read all rows, one after the other: long prompts fill a machine alone, and a row is what it is by itself.

        Returns:
            of each row the logits behind its prompt and behind each token of its lookahead, [1 + L, V].
        """
        found = []
        engine = self.engine
        for row, reading in enumerate(self.readings):
            tokens_1T = upload([[*reading.tokens, *reading.ahead]], engine.device)
            following = reading.following + torch.arange(len(reading.ahead))
            positions_T = torch.cat([torch.tensor(reading.positions), following]).to(engine.device)
            hidden_1TH = self._body(tokens_1T, positions_T, self._attend(row, positions_T))
            logits = engine.logits(hidden_1TH[:, len(reading.tokens) - 1 :])
            found.append(logits[0].to(engine.device))
        return found

    def _body(self, tokens_1T: Tensor, positions_T: Tensor, attend: Callable) -> Tensor:
        engine = self.engine
        if engine.model.training:
            engine.model.eval()
        with attending_by(engine.config, attend):
            return engine.body(
                input_ids=tokens_1T,
                attention_mask=engine.masks(lambda window: stand_in(SEE_ALL, engine.device)),
                position_ids=positions_T.unsqueeze(0),
                past_key_values=self,
                use_cache=True,
            ).last_hidden_state

    def _attend(self, row: int, positions_T: Tensor) -> Callable:
        """The attention of this row's prefill: ours, and the layer's keys are chosen."""
        last = self.engine.layers - 1

        def attend(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
            layer = self._layer
            window = self.windows[layer]
            positions = positions_T.to(query.device)
            self._drop(row, layer, query[0], key[0], value[0], positions, (window, scaling, softcap))
            first = len(self.readings[row].tokens) - 1 if layer == last else 0  # nothing else of its output is read
            return prompt_attention(module, query, key, value, positions, window, scaling, softcap, first), None

        return attend

    def _drop(
        self, row: int, layer: int, query: Tensor, key: Tensor, value: Tensor, positions_T: Tensor, how: tuple
    ) -> None:
        """Put what a layer keeps into the ragged cache."""
        reading = self.readings[row]
        text, count = len(reading.tokens), reading.counts[layer]
        chosen_MS = torch.arange(text, device=key.device).expand(len(key), text)
        if count < text:
            started = time.perf_counter()
            scores = self._scores(layer, reading, query, key, positions_T, how)
            chosen_MS = keep_top(scores, count, reading.protected_S)
            self.scoring_seconds += time.perf_counter() - started
        self.cache.fill(layer, row, key, value, list(chosen_MS), positions_T[:text])

    def _scores(
        self, layer: int, reading: Reading, query: Tensor, key: Tensor, positions_T: Tensor, how: tuple
    ) -> Tensor:
        text, scorer = len(reading.tokens), self.scorer
        first = max(0, text - max(1, scorer.window))
        end = len(positions_T) if scorer.ahead else text
        looked = Looked(query[:, first:end], key[:, :end], positions_T[first:end], positions_T[:end], *how)
        return scorer.score(layer, looked, text, reading.sample_id)


def prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions_T: Tensor,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    since: int = 0,
) -> Tensor:
    """Causal attention of a whole prompt [1, N, T, D]: [1, T, N, D], zero before ``since``.

    Windows, capped scores and a part of the rows go by blocks of rows.
    """
    length = query.shape[2]
    binds = window is not None and bool(positions_T[-1] - positions_T[0] >= window)
    if not binds and softcap is None and since == 0:
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2)
    parts = [value.new_zeros(1, since, query.shape[1], value.shape[3])]
    groups = query.shape[1] // key.shape[1]
    for start in range(since, length, BLOCK):
        end = min(length, start + BLOCK)
        rows, first = positions_T[start:end].unsqueeze(1), 0
        if binds:
            first = int(torch.searchsorted(positions_T, positions_T[start] - window, right=True))
        keys = positions_T[first:end]
        hidden = keys > rows
        if window is not None:
            hidden |= keys <= rows - window
        mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)
        tiled = mask.repeat(groups, 1)[None, None]
        out, _ = folded_attention(
            module, query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], tiled, scaling, softcap
        )
        parts.append(out)
    return torch.cat(parts, 1)
