"""Distillation on `transformers.Trainer`: what it trains on, what it logs, what it measures.

The loss of a step is a sum over all trained tokens of all processes and accumulation steps, divided by their summed
weights. So the batch size of a device, the number of processes and the length of responses change nothing but rounding,
and a rank may have fewer tokens than the others, or none.
"""

# B batch, T time, N trained tokens

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.distributed import barrier, is_main
from drafttrain.errors import UserError
from drafttrain.models.drafters import inner, merged
from drafttrain.training.distill_head import Lesson, attach
from drafttrain.training.drafter_data import EMPTY, Collator, Epochs
from drafttrain.training.held_out import HISTORY, HeldOut, TauHistory
from drafttrain.training.losses import Loss
from drafttrain.training.on_policy import OnPolicy
from drafttrain.training.sharding import FrozenTarget, Replica, cast_parameters
from drafttrain.training.target_states import TargetStates

COMPLETE = "complete"
"""File that a checkpoint gets last, when every process has written its part."""

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_total_limit": 2,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": False,
}
"""Training arguments that a recipe need not give."""

FIXED: dict[str, Any] = {
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "label_names": ["labels"],
    "eval_strategy": "no",
    "dataloader_num_workers": 0,
}
"""Held-out responses are measured at shares of the data (`training.tau_evaluations`), not by the Trainer's own rule."""


@dataclass(frozen=True)
class Distillation:
    """How the target teaches.

    Attributes:
        loss: of a token, see `losses.mixed`.
        temperature: divides both models' logits.
        chunk_tokens: tokens whose logits exist at one time.
        vocabulary: leading token ids that stand for text.
        evaluations: how often held-out responses are measured, at equal shares of the data; 0 never.
        on_policy: None for never.
    """

    loss: Loss
    temperature: float
    chunk_tokens: int
    vocabulary: int
    evaluations: int = 10
    on_policy: OnPolicy | None = None


class DrafterTrainer(Trainer):
    """The Trainer of drafters.

    Args:
        drafter: trained in place; a causal LM or a peft model around one.
        target: frozen, whole, not yet sharded.
        args: see `DEFAULTS` and `FIXED`.
        distillation: how the target teaches.
        train: the responses.
        collator: makes batches of them.
        run: folder that gets `tau_history.json`.
        held_out: measured while training; None never.
        resumed: optimizer steps already done.

    Attributes:
        states: the target's states, when they are stored; else the target runs in every step.
    """

    def __init__(
        self,
        drafter: nn.Module,
        target: PreTrainedModel,
        args: TrainingArguments,
        distillation: Distillation,
        train: Epochs,
        collator: Collator,
        run: Path,
        held_out: HeldOut | None = None,
        resumed: int = 0,
        **kwargs: Any,
    ) -> None:
        decodes = held_out is not None or distillation.on_policy is not None
        replica = Replica(drafter, target.dtype, args.device if decodes else torch.device("cpu"))
        self._attach(drafter)
        super().__init__(model=drafter, args=args, train_dataset=train, data_collator=collator, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, over all accumulation steps
        self.replica, self.target = replica, FrozenTarget(target, self.accelerator)
        self.distillation, self.held_out = distillation, held_out
        self.states: TargetStates | None = None
        self.history = TauHistory(run / HISTORY, resumed)
        self._sums = torch.zeros(2, dtype=torch.float64)  # expected acceptance and weights since the last log
        if held_out is not None and distillation.evaluations:
            self.add_callback(_AtShares(distillation.evaluations))

    def _get_train_sampler(self, train_dataset: Epochs | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # the data set shuffles itself

    # ---- loss ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one optimizer step, written by the drafter where the step is on-policy."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        policy = self.distillation.on_policy
        if policy is not None and policy.at(self.state.global_step):
            self.replica.refresh(self._unwrapped())
            batches = [policy.continued(batch, self._writer(policy), self.state.global_step) for batch in batches]
        batches = [self._placed(batch, self.state.global_step) for batch in batches]
        return batches, self._total_weight(batches)

    def _attach(self, drafter: nn.Module) -> None:
        """Teach the model to answer a lesson."""
        attach(inner(drafter))

    def _writer(self, policy: OnPolicy) -> Decoder:
        """What writes on-policy text: the drafter as it stands."""
        engine = Engine(self.replica.causal_lm, policy.vocabulary)
        return Decoder(engine, None, policy.sampling, policy.eos_ids, policy.key(self.state.global_step))

    def _placed(self, batch: dict[str, Tensor], step: int | None) -> dict[str, Tensor]:
        """A batch with all that is drawn for it: in training by the step, None for held-out rows. Here nothing is."""
        return batch

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> None:
        return None  # counted in `get_batch_samples`, when the batches are final

    def _total_weight(self, batches: list[dict[str, Tensor]]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            total += batch["weights"][:, 1:].sum().cpu()
        return self._over_processes(total)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This process's share of the loss of one accumulation step.

        Raises:
            UserError: it is not a number; nothing was updated with it.
        """
        sums = self._teach(model, inputs, self.states if "row" in inputs else None)
        if not math.isfinite(sums["loss"].item()):
            raise UserError(
                f"the loss is {sums['loss'].item()} at step {self.state.global_step}; lower "
                "training.arguments.learning_rate or train in bf16 instead of fp16. Checkpoints before it are kept."
            )
        self._sums += torch.stack([sums["acceptance"].detach(), inputs["weights"][:, 1:].sum()]).double().cpu()
        # Gradients are averaged over processes, but the denominator is global already.
        return sums["loss"] * (self.accelerator.num_processes / num_items_in_batch.clamp_min(1.0).item())

    def _teach(
        self, model: nn.Module, inputs: Mapping[str, Tensor], states: TargetStates | None = None
    ) -> dict[str, Tensor]:
        """Weighted sums of loss and expected acceptance over the trained tokens of a batch, maybe none."""
        ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
        weights_BT, labels_BT = shifted(inputs["weights"], 0.0), shifted(inputs["labels"], -100)
        selected_BT = weights_BT > 0
        if states is None:
            hidden_NH = self.target.hidden(ids_BT, mask_BT)[selected_BT]
        else:
            hidden_NH = states(inputs["row"].tolist()).to(ids_BT.device)
        with self.target.head(ids_BT.device) as head:
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
            return model(input_ids=ids_BT, attention_mask=mask_BT, lesson=lesson)

    # ---- what is told ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the expected acceptance, sum of min(p, q), to every logged training loss."""
        if "loss" in logs:
            acceptance, weight = self._over_processes(self._sums).tolist()
            self._sums.zero_()
            logs["expected_acceptance"] = acceptance / max(weight, 1.0)
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Real tau, loss and expected acceptance on held-out responses, logged and kept in the history."""
        started = time.perf_counter()
        point = self._place()
        counts = self.held_out.decode(self.target, self.replica.refresh(self._unwrapped()))
        point |= {"tau": counts.tau, "acceptance_rate": counts.acceptance_rate, **self._score_held_out()}
        point["seconds"] = round(time.perf_counter() - started, 3)
        self.history.add(point, write=is_main())
        names = ("tau", "acceptance_rate", "loss", "expected_acceptance")
        metrics = {f"{metric_key_prefix}_{name}": point[name] for name in names}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _place(self) -> dict[str, float]:
        """Where in the training we are."""
        data: Epochs = self.train_dataset
        return {
            "step": self.state.global_step,
            "fraction": self.state.global_step / max(1, self.state.max_steps),
            "tokens": round((self.state.epoch or 0.0) * data.data.tokens),
        }

    @torch.no_grad()
    def _score_held_out(self) -> dict[str, float]:
        self.model_wrapped.eval()
        totals = torch.zeros(3, dtype=torch.float64)
        for rows in self.held_out.shares(self.args.per_device_eval_batch_size):
            # A rank without rows makes the same forward passes, on an empty one.
            batch = self._prepare_inputs(self._placed(self.data_collator(rows or [EMPTY]), None))
            sums = self._teach(self.model_wrapped, batch)
            totals += torch.stack([sums["loss"], sums["acceptance"], batch["weights"][:, 1:].sum()]).double().cpu()
        loss, acceptance, weight = self._over_processes(totals).tolist()
        return {"loss": loss / max(weight, 1.0), "expected_acceptance": acceptance / max(weight, 1.0)}

    def _over_processes(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        return self.accelerator.gather(sums.to(self.args.device).unsqueeze(0)).sum(0).cpu()

    # ---- results ----

    def trained(self) -> PreTrainedModel:
        """The drafter as it will be served: plain, whole, on every rank; all ranks call it."""
        served = self.replica.causal_lm.dtype
        # LoRA updates are merged before rounding to the served dtype, not after.
        exact = torch.promote_types(self.replica.trained_in, torch.float32)
        whole = Replica(self.replica.model, exact, torch.device("cpu")).refresh(self._unwrapped())
        return cast_parameters(merged(whole.model), served)

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Older checkpoints go when the new one is marked complete, so that there is one to resume from at any time."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(model, trial)
        self.args.save_total_limit = limit
        barrier()
        if is_main():
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / COMPLETE).touch()
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint)


class _AtShares(TrainerCallback):
    """Evaluates and saves when another share of the data has been trained on."""

    def __init__(self, times: int) -> None:
        self.times = times

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Steps ceil(i * all / times), the last one among them."""
        marks = {math.ceil(index * state.max_steps / self.times) for index in range(1, self.times + 1)}
        if state.global_step in marks:
            control.should_evaluate = control.should_save = True
        return control


def is_complete(checkpoint: Path) -> bool:
    """Whether every process finished writing a checkpoint."""
    return (checkpoint / COMPLETE).is_file()


def shifted(values_BT: Tensor, fill: float) -> Tensor:
    """What belongs to the next token, at the position that predicts it."""
    last_B1 = torch.full_like(values_BT[:, :1], fill)
    return torch.cat([values_BT[:, 1:], last_B1], 1)
