"""Traces of a LongSpec drafter: one row a step of the round.

What a block drafts at a place depends on the step: at the k-th token of a round the target's last k tokens are not
there to be read. So every response is traced once a step, as if each of its tokens had been drafted at that step, and
`reached` tells where that can happen: where the tokens before, at the steps before, were accepted. That is the event
that an acceptance head's label is conditioned on. Coupling and columns are those of `tracing`; nothing replays these.
"""

# B rows, T response tokens, N response tokens of the batch, H hidden

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafttrain.decoding.engine import Engine
from drafttrain.evaluation.tracing import COPIED, Tracer, TraceSettings, _Batch, _split
from drafttrain.models.longspec import LongSpecDrafter
from drafttrain.models.longspec_states import block_states, read_target
from drafttrain.records import SCHEMAS

KIND = "step_traces"

_NUMBERS = set(SCHEMAS[KIND].names) - {*COPIED, "step", "reached"}


@dataclass(frozen=True)
class _Beside:
    """A block as a tracer sees a drafter: its states go through the target's head."""

    target: Engine
    block: LongSpecDrafter

    @property
    def vocabulary(self) -> int:
        return self.target.vocabulary

    @property
    def max_positions(self) -> int:
        return self.block.config.max_position_embeddings

    def logits(self, hidden_NH: Tensor) -> Tensor:
        return self.target.logits(hidden_NH)


class StepTracer(Tracer):
    """Makes trace rows of responses, of each as many as the drafter was trained to draft steps.

    Args:
        target: cut to the tokens that it can emit.
        block: the drafter, in the target's dtype and on its device.
        settings: of the traces; what lies beyond rejections is not followed.
    """

    def __init__(self, target: Engine, block: LongSpecDrafter, settings: TraceSettings) -> None:
        super().__init__(target, _Beside(target, block), settings)

    @torch.inference_mode()
    def trace(self, responses: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """Rows (records.SCHEMAS["step_traces"]) of a batch of response rows: for each its steps, from 1.

        Raises:
            UserError: as `Tracer.trace`.
        """
        for response in responses:
            self._check(response)
        batch, block = _Batch(responses), self.drafter.block
        lengths = [len(sequence) for sequence in batch.sequences]
        device = self.target.device
        ids_1T = torch.tensor([[token for sequence in batch.sequences for token in sequence]], device=device)
        positions_1T = torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)
        layer = block.config.kv_layer
        reading = read_target(self.target.model, ids_1T, None, layer, positions_1T, lengths=lengths)
        first_N = torch.tensor([part.start for part in reading.documents])[batch.row_N]
        prompt_N = torch.tensor([len(prompt) for prompt in batch.prompts])[batch.row_N]
        before_N = (first_N + prompt_N + batch.place_N - 1).to(device)
        hidden_p_NH = reading.hidden_BTH[0, before_N]
        rows: list[list[dict[str, Any]]] = [[] for _ in responses]
        reached_N = torch.ones(len(batch.row_N), dtype=torch.bool)
        for step in range(1, block.config.depth + 1):
            lags_B = torch.full((len(lengths),), step, device=device)
            hidden_q_NH = block_states(block, reading, lags_B)[0, before_N]
            columns = self._columns(batch, hidden_p_NH, hidden_q_NH)
            drafts = _split({name: value for name, value in columns.items() if name in _NUMBERS}, batch.lengths)
            reached = reached_N.split(batch.lengths)
            for place, (response, draft) in enumerate(zip(responses, drafts, strict=True)):
                taken = {name: response[name] for name in COPIED}
                draft = {name: value.ravel() for name, value in draft.items()}
                rows[place].append({**taken, **draft, "step": step, "reached": reached[place].numpy()})
            accepted_N = columns["draft_ids"] == batch.response_N
            reached_N = (reached_N & accepted_N).roll(1) & (batch.place_N > 0)
        return rows
