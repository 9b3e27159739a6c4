"""Training of the acceptance head on `transformers.Trainer`, and its judgement on held-out responses.

The model that the Trainer sees is the head alone. The loss is the weighted cross-entropy of SpecDec++ (section 3.3),

    L = sum_i n_i [ -w_acc P_i log P'_i - w_rej (1 - P_i) log(1 - P'_i) ] / sum_i n_i [ w_acc P_i + w_rej (1 - P_i) ],

n_i what an example counts (head_data.py), both sums over the whole global batch: all processes and accumulation steps.
So the number of processes changes nothing but rounding, and ranks may have unequal numbers of tokens, or none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from drafttrain.distributed import rank, world_size
from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.training import calibration
from drafttrain.training.head_data import HeadDataset, collate
from drafttrain.training.head_states import Wanted
from drafttrain.training.sharding import gathered

# N drafted tokens, H hidden


class States(Protocol):
    """Looks up or computes the states of examples: `DrafterStates` or `StateStore`."""

    def __call__(self, wanted: Sequence[Wanted]) -> Tensor:
        """States [N, H] of the examples of some responses."""
        ...

    def embed(self, tokens_N: Tensor) -> Tensor:
        """The drafter's input embeddings of tokens, [N, E]; only heads with the feature `token` ask."""
        ...


DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-3,
    "num_train_epochs": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.01,
    "logging_steps": 20,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "kl",
    "greater_is_better": False,
    "report_to": "none",
    "dataloader_pin_memory": False,
}
"""Training arguments that a recipe need not give; `kl` is the calibrated binary KL on held-out responses."""

FIXED: dict[str, Any] = {
    # each of these would change what a batch is, or hide that the loss is no number
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "dataloader_num_workers": 0,
    "ddp_broadcast_buffers": False,  # the table of the feature `token` is filled in only when training is over
    "label_names": ["labels"],
}


def head_logits(model: nn.Module, states: States, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """The head's logits [N] for a collated batch."""
    hidden_NH = states(batch["wanted"]).to(device)
    log_q_N, entropy_N, step_N = (batch[name].to(device) for name in ("log_q", "entropy", "step"))
    embedding_NE = states.embed(batch["drafted"]).to(device) if reads_tokens(model) else None
    return model(hidden_NH, log_q_N.exp(), entropy_N, step_N, embedding_NE)


def reads_tokens(model: nn.Module) -> bool:
    """Whether a head, wrapped or not, has the feature `token`."""
    return any(name.endswith("token_input.weight") for name, _ in model.named_parameters())


def weighted_loss(logit_N: Tensor, label_N: Tensor, weight_N: Tensor, w_acc: float, w_rej: float) -> Tensor:
    """Summed weighted cross-entropy of soft labels, in float32; the numerator of the loss above."""
    logit_N = logit_N.float()
    accepted_N, rejected_N = w_acc * label_N * F.softplus(-logit_N), w_rej * (1 - label_N) * F.softplus(logit_N)
    return (weight_N * (accepted_N + rejected_N)).sum()


def weight_sum(label_N: Tensor, weight_N: Tensor, w_acc: float, w_rej: float) -> Tensor:
    """Summed weights of soft labels, float64; the denominator."""
    label_N = label_N.double()
    return (weight_N * (w_acc * label_N + w_rej * (1 - label_N))).sum()


class HeldOut:
    """Responses that no head was trained on, and what can be said of a head on them.

    They are always scored on exact states, those of decoding, whatever the head was trained on.

    Args:
        dataset: not shuffled; its config has data "exact".
        states: of its examples.
        baselines: fitted on the training responses; None leaves them out of the report.
    """

    def __init__(self, dataset: HeadDataset, states: States, baselines: calibration.Baselines | None = None) -> None:
        self.dataset, self.states, self.baselines = dataset, states, baselines

    def predict(self, model: nn.Module, batch: int = 32) -> dict[str, np.ndarray]:
        """Scores of every drafted token; all processes call it and share the work.

        Returns:
            predicted (P' as trained), log_q, entropy, label: [N] float64, in the order of the responses.
        """
        device = next(model.parameters()).device
        starts = range(0, len(self.dataset), batch)
        parts: list[tuple[int, dict[str, np.ndarray]]] = []
        # All processes make the same number of forward passes, some on nothing: a sharded head gathers weights in each.
        for first in range(0, len(starts), world_size()):
            mine = first + rank()
            rows = range(starts[mine], min(starts[mine] + batch, len(self.dataset))) if mine < len(starts) else ()
            items = collate([self.dataset[row] for row in rows])
            with torch.no_grad():
                logit_N = head_logits(model, self.states, items, device)
            columns = {"predicted": torch.sigmoid(logit_N.float())}
            columns |= {"log_q": items["log_q"], "entropy": items["entropy"], "label": items["labels"]}
            parts.append((mine, {name: value.double().cpu().numpy() for name, value in columns.items()}))
        ordered = sorted(_from_all_processes(parts), key=lambda part: part[0])
        return {name: np.concatenate([part[name] for _, part in ordered]) for name in ordered[0][1]}

    def scores(self, model: nn.Module, w_acc: float, w_rej: float) -> dict[str, float]:
        """The figures that are logged while training, of the calibrated prediction."""
        found = self.predict(model)
        calibrated = calibration.invert_loss_weight(found["predicted"], w_acc, w_rej)
        full = calibration.report(calibrated, found["label"])
        return {name: float(full[name]) for name in ("kl", "auroc", "brier", "ece")}

    def report(self, model: nn.Module, w_acc: float, w_rej: float) -> dict[str, Any]:
        """Everything: the head raw and after inverting the loss weight, beside the baselines that read q only."""
        found = self.predict(model)
        label = found["label"]
        predictions = {
            "head": calibration.invert_loss_weight(found["predicted"], w_acc, w_rej),
            "head_raw": found["predicted"],
        }
        if self.baselines is not None:
            predictions |= self.baselines(found["log_q"], found["entropy"])
        return {
            "responses": len(self.dataset.records),
            "tokens": len(label),
            "accepted": float(label.mean()),
            "predictors": {name: calibration.report(values, label) for name, values in predictions.items()},
        }


class HeadTrainer(Trainer):
    """The Trainer of acceptance heads.

    Args:
        head: trained in place.
        args: see `DEFAULTS` and `FIXED`.
        train: shuffled; its global_batch is that of args over all processes.
        states: of the training examples.
        held_out: evaluated when args say so; None for never.
    """

    def __init__(
        self,
        head: AcceptanceHead,
        args: TrainingArguments,
        train: HeadDataset,
        states: States,
        held_out: HeldOut | None = None,
        **kwargs: Any,
    ) -> None:
        # The Trainer wants an evaluation set where it evaluates; ours is scored by `evaluate` below.
        eval_dataset = held_out.dataset if held_out is not None else None
        kwargs |= {"train_dataset": train, "eval_dataset": eval_dataset, "data_collator": collate}
        super().__init__(model=head, args=args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is normalised here, over all accumulation steps
        self._states, self._held_out = states, held_out
        self._weights = (head.config.w_acc, head.config.w_rej)

    def _get_train_sampler(self, train_dataset: HeadDataset | None = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)  # the data set shuffles itself

    def _get_num_items_in_batch(self, batch_samples: Sequence[Mapping[str, Any]], device: torch.device) -> Tensor:
        """The loss's denominator: weights of all accumulation steps of all processes."""
        total = torch.zeros((), dtype=torch.float64)
        for batch in batch_samples:
            total = total + weight_sum(batch["labels"], batch["weights"], *self._weights).cpu()
        return self.accelerator.gather(total.to(device)).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """This process's share of the loss of one accumulation step.

        Raises:
            UserError: it is not a number; nothing was updated yet.
        """
        logit_N = head_logits(model, self._states, inputs, self.args.device)
        summed = weighted_loss(logit_N, inputs["labels"], inputs["weights"], *self._weights)
        # Gradients are averaged over processes, but the denominator is global already.
        loss = summed / num_items_in_batch.clamp_min(1e-9).to(summed.dtype) * self.accelerator.num_processes
        if not math.isfinite(loss.item()):
            raise UserError(
                f"the loss of the acceptance head is {loss.item()} at step {self.state.global_step}; lower "
                "head.arguments.learning_rate, or train the drafter again if its states are not finite."
            )
        return loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Calibrated scores on the held-out responses, logged as eval_kl, eval_auroc, eval_brier, eval_ece."""
        self.model_wrapped.eval()
        scores = self._held_out.scores(self.model_wrapped, *self._weights)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out_report(self) -> dict[str, Any]:
        """`HeldOut.report` of the head as it is now, empty without held-out responses; all processes call it."""
        if self._held_out is None:
            return {}
        self.model_wrapped.eval()
        return self._held_out.report(self.model_wrapped, *self._weights)

    def trained_head(self) -> AcceptanceHead:
        """A float32 copy of the head on the CPU, gathered where it was sharded; all processes call it."""
        head = AcceptanceHead(self.model.config)
        head.load_state_dict({name: value.float() for name, value in self._whole_weights().items()})
        return head.eval()

    def _whole_weights(self) -> dict[str, Tensor]:
        if self.is_fsdp_enabled:
            return self.accelerator.get_state_dict(self.model_wrapped)
        with gathered(list(self.model.parameters())):
            return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}


def _from_all_processes(parts: list[Any]) -> list[Any]:
    if world_size() == 1:
        return parts
    gathered: list[list[Any]] = [[] for _ in range(world_size())]
    torch.distributed.all_gather_object(gathered, parts)
    return [part for process in gathered for part in process]
