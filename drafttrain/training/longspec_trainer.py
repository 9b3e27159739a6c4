"""Distillation of a LongSpec drafter: the Trainer of drafters, with a target that is read and rows that are placed."""

# B batch, T time, N trained tokens

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.longspec import LongSpec
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.synthetic import SyntheticAcceptance
from drafttrain.errors import UserError
from drafttrain.models.longspec import LongSpecDrafter
from drafttrain.models.longspec_states import Reading, block_states
from drafttrain.training.distill_head import Lesson, teach_states
from drafttrain.training.drafter_data import IGNORED
from drafttrain.training.drafter_trainer import DrafterTrainer, shifted
from drafttrain.training.on_policy import OnPolicy
from drafttrain.training.positions import Placing
from drafttrain.training.readings import StoredReadings

HELD_OUT_STEP = -1
"""Held-out rows look behind by lags of their own, the same at every measurement."""


class LongSpecTrainer(DrafterTrainer):
    """The Trainer of LongSpec drafters.

    Args:
        placing: where rows stand, and their lags.
        packing: lay the rows of a batch end to end instead of padding them.
        args, kwargs: as of `DrafterTrainer`.

    Attributes:
        states: what is learnt of the target, when it is stored; else the target runs in every step.

    Raises:
        UserError: the drafter shall write itself and the target is split over processes, which write unlike texts.
    """

    def __init__(self, *args: Any, placing: Placing, packing: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.states: StoredReadings | None
        self.placing, self.packing = placing, packing
        self._block: LongSpecDrafter = self.replica.model  # its configuration
        if self.distillation.on_policy is not None and self.target.sharded:
            raise UserError(
                "training.on_policy_fraction: a LongSpec drafter writes beside its target, which is split over the "
                "processes here; use ZeRO-2 or leave it out."
            )

    def _attach(self, drafter: nn.Module) -> None:
        teach_block(drafter)

    def _writer(self, policy: OnPolicy) -> Decoder:
        """Rounds as when decoding, all of whose drafts are taken: so it meets what its own mistakes lead to."""
        drafter = LongSpec(self.replica.causal_lm, length=self._block.config.depth)
        engine = Engine(self.target.model, policy.vocabulary)
        seed, all_of_them = policy.key(self.state.global_step), SyntheticAcceptance([1.0])
        return Decoder(engine, drafter, policy.sampling, policy.eos_ids, seed, synthetic=all_of_them)

    def _placed(self, batch: dict[str, Tensor], step: int | None) -> dict[str, Tensor]:
        """The batch with positions and lags; tokens whose queries see nothing of the target lose their weight."""
        samples_B, lengths_B = batch["sample_id"], batch["attention_mask"].sum(1)
        width = batch["input_ids"].shape[1]
        lags_B = self.placing.lags(samples_B, HELD_OUT_STEP if step is None else step)
        if step is None:
            positions_BT = torch.arange(width, device=lags_B.device).expand(len(lags_B), -1)
        elif self.states is not None and "row" in batch:
            stored = self.states.positions(batch["row"].tolist())
            positions_BT = pad_sequence(stored, batch_first=True).to(lags_B.device)
        else:
            positions_BT = self.placing.positions(lengths_B, width, samples_B, step)
        weights_BT = batch["weights"].clone()
        weights_BT[:, 1:] = self.placing.taught(weights_BT[:, 1:], lags_B, positions_BT[:, :-1])
        batch = batch | {"weights": weights_BT, "positions": positions_BT, "lags": lags_B}
        return packed(batch) if self.packing else batch

    def _teach(
        self, model: nn.Module, inputs: Mapping[str, Tensor], states: StoredReadings | None = None
    ) -> dict[str, Tensor]:
        """Weighted sums of loss and expected acceptance over the trained tokens of a batch, maybe none."""
        weights_BT, labels_BT = shifted(inputs["weights"], 0.0), shifted(inputs["labels"], IGNORED)
        selected_BT = weights_BT > 0
        if states is None:
            reading = self._read(inputs)
            hidden_NH = reading.hidden_BTH[selected_BT]
        else:
            reading, hidden_NH = self._looked_up(inputs, states)
            hidden_NH = hidden_NH[selected_BT[labels_BT != IGNORED]]  # stored are those that see nothing, too
        with self.target.head(selected_BT.device) as head:
            lesson = Lesson(
                selected_BT=selected_BT,
                hidden_NH=hidden_NH,
                head=head,
                labels_N=labels_BT[selected_BT],
                weights_N=weights_BT[selected_BT],
                loss=self.distillation.loss,
                vocabulary=self.distillation.vocabulary,
                temperature=self.distillation.temperature,
                chunk_tokens=self.distillation.chunk_tokens,
            )
            return model(reading=reading, lags=inputs["lags"], lesson=lesson)

    def _read(self, inputs: Mapping[str, Tensor]) -> Reading:
        lengths = inputs["lengths"].tolist() if "lengths" in inputs else None
        mask_BT = inputs["attention_mask"] if lengths is None else None
        layer = self._block.config.kv_layer
        return self.target.reading(inputs["input_ids"], mask_BT, layer, inputs["positions"], lengths)

    def _looked_up(self, inputs: Mapping[str, Tensor], states: StoredReadings) -> tuple[Reading, Tensor]:
        rows, lengths = inputs["row"].tolist(), inputs["lengths"].tolist()
        with self.target.whole_embedding(), torch.no_grad():
            return states(rows, self.target.model, inputs["input_ids"], inputs["positions"], lengths)


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A padded batch as one row in which its documents lie end to end: all that is a token's, [1, tokens].

    No token predicts another document's, for the first token of a document has no weight. What is a row's stays a
    document's, [B], with their `lengths` beside it.
    """
    real_BT = batch["attention_mask"].bool()
    row = {name: value[real_BT].unsqueeze(0) for name, value in batch.items() if value.dim() == 2}
    return batch | row | {"lengths": real_BT.sum(1)}


def teach_block(block: LongSpecDrafter) -> LongSpecDrafter:
    """Teach a block to answer `block(reading=..., lags=..., lesson=...)` with sums; any other call goes its way."""
    plain_forward = block.forward

    def forward(
        self: LongSpecDrafter, *args, reading: Reading | None = None, lags: Tensor | None = None,
        lesson: Lesson | None = None,
    ):  # fmt: skip
        if lesson is None:
            return plain_forward(*args)
        states_BTH = block_states(self, reading, lags, plain_forward)
        loss, acceptance = teach_states(states_BTH[lesson.selected_BT], lesson)
        return {"loss": loss, "acceptance": acceptance}

    block.forward = types.MethodType(forward, block)
    return block
