"""Distillation of a LongSpec drafter: what a step computes, that it learns, and that a resumed run is the same run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from drafttrain.config import DrafterConfig, PositionsConfig
from drafttrain.models.drafters import build_drafter
from drafttrain.models.fingerprint import fingerprint
from drafttrain.models.loading import Loaded
from drafttrain.models.longspec_states import block_states, read_target
from drafttrain.ops.sampling import Sampling
from drafttrain.training.arguments import training_arguments
from drafttrain.training.drafter_data import EMPTY, Collator, Epochs, ResponseDataset
from drafttrain.training.drafter_trainer import DEFAULTS, FIXED, Distillation
from drafttrain.training.held_out import HeldOut
from drafttrain.training.longspec_trainer import LongSpecTrainer, packed
from drafttrain.training.losses import mixed
from drafttrain.training.on_policy import OnPolicy
from drafttrain.training.positions import Placing
from tests.conftest import build_llama

VOCABULARY = 300


def rows(count=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count, 2), generator=generator).tolist()
    ids = [torch.randint(6, VOCABULARY, (prompt + answer,), generator=generator).tolist() for prompt, answer in lengths]
    return [
        {"prompt_ids": one[:prompt], "response_ids": one[prompt:]}
        for one, (prompt, _) in zip(ids, lengths, strict=True)
    ]


@pytest.fixture
def target(tiny_tokenizer):
    model = build_llama(len(tiny_tokenizer), layers=2, eos_token_id=5).requires_grad_(False)
    return Loaded(model, tiny_tokenizer, fingerprint(model, tiny_tokenizer), "memory")


def recipe(**block) -> DrafterConfig:
    drafter = DrafterConfig(kind="longspec")
    drafter.block = replace(drafter.block, **{"window": 4, "warm_start": 1, "depth": 3} | block)
    return drafter


def make_trainer(folder, target, kind="multi_gap", on_policy=None, held_out=0, packing=True, **arguments):
    drafter = build_drafter(recipe(), target)
    placing = Placing.of(PositionsConfig(kind=kind, served=256, settling=1), 512, drafter.config.depth, seed=3)
    settings = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    settings |= {"num_train_epochs": 2, "save_strategy": "no"} | arguments
    args = training_arguments(settings, folder / "work", "training", DEFAULTS, **FIXED, seed=0)
    data = ResponseDataset(rows(), 20)
    tune = ResponseDataset(rows(seed=9), 20)
    measured = HeldOut.of(tune, held_out, 3, VOCABULARY, {5}, 512) if held_out else None
    distillation = Distillation(mixed({"forward_kl": 1.0}), 1.0, 8, VOCABULARY, 2 if held_out else 0, on_policy)
    epochs = Epochs(data, 0, args.train_batch_size * args.gradient_accumulation_steps)
    more = {"placing": placing, "packing": packing}
    return LongSpecTrainer(drafter, target.model, args, distillation, epochs, Collator(1), folder, measured, **more)


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer._unwrapped().named_parameters()}


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_is_the_loss_of_each_row_read_alone(target, tmp_path, packing):
    """Every row by itself, without padding, its queries masked one by one: loss and gradient are the same."""
    trainer = make_trainer(tmp_path, target, packing=False)
    data = trainer.train_dataset.data
    batch = trainer._placed(Collator(1)([data[index] for index in range(4)]), step=5)
    sums = trainer._teach(trainer.model, packed(batch) if packing else batch)
    sums["loss"].backward()
    gradient = trainer.model.cross_attn.q_proj.weight.grad.clone()
    block, model = build_drafter(recipe(), target), target.model
    total = torch.zeros(())
    for place in range(4):
        length, lag = int(batch["attention_mask"][place].sum()), int(batch["lags"][place])
        ids, at = batch["input_ids"][place : place + 1, :length], batch["positions"][place : place + 1, :length]
        reading = read_target(model, ids, torch.ones_like(ids), 1, at)
        states = block_states(block, reading, torch.tensor([lag]))[0, :-1]
        log_p = model.lm_head(reading.hidden_BTH[0, :-1]).log_softmax(-1)
        divergence = F.kl_div(model.lm_head(states).log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)
        trained = torch.arange(length - 1)
        astray = [time for time in range(1, length) if at[0, time] > at[0, time - 1] + 1]  # settling is 1
        counted = (trained >= lag) & (trained >= int(batch["prompt_length"][place]) - 1)
        counted[[time for time in astray if time < length - 1]] = False
        total = total + divergence[counted].sum()
    total.backward()
    torch.testing.assert_close(sums["loss"], total, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradient, block.cross_attn.q_proj.weight.grad, atol=1e-3, rtol=1e-3)


def test_packing_changes_no_loss_and_no_gradient(target, tmp_path):
    """In float32, to rounding; and it is the documents that are kept apart: one document of all rows is another."""
    trainer = make_trainer(tmp_path, target, packing=False)
    batch = trainer._placed(Collator(1)([*(trainer.train_dataset.data[at] for at in range(6)), EMPTY]), step=2)
    assert batch["attention_mask"].min() == 0  # there was something to save

    def taught(inputs):
        trainer.model.zero_grad()
        sums = trainer._teach(trainer.model, inputs)
        sums["loss"].backward()
        assert inputs["weights"][:, 1:].sum() == batch["weights"][:, 1:].sum()
        return sums | {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}

    padded, together = taught(batch), taught(packed(batch))
    for name, value in padded.items():
        scale = float(value.detach().abs().max())
        torch.testing.assert_close(together[name], value, atol=1e-5 * scale, rtol=0, msg=name)
    mixed_up = packed(batch)
    mixed_up |= {"lengths": mixed_up["lengths"].sum().view(1), "lags": mixed_up["lags"][:1]}
    assert (taught(mixed_up)["loss"] - padded["loss"]).abs().item() > 1e-2


def test_a_packed_row_has_no_padding(target, tmp_path):
    trainer = make_trainer(tmp_path, target)
    rows = [trainer.train_dataset.data[at] for at in range(5)]
    batch = trainer._placed(Collator(1)(rows), step=0)
    assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in rows))
    assert batch["input_ids"][0].tolist() == [token for row in rows for token in row["input_ids"]]
    assert batch["attention_mask"].all() and batch["lengths"].tolist() == [len(row["input_ids"]) for row in rows]


def test_it_learns_and_the_target_does_not(target, tmp_path):
    before = target.fingerprint.weights
    trainer = make_trainer(tmp_path, target, num_train_epochs=20, held_out=3, logging_steps=1)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert fingerprint(target.model, target.tokenizer).weights == before
    assert trainer.history.points[-1]["tau"] >= 1
    assert type(trainer.trained()).__name__ == "LongSpecDrafter"


@pytest.mark.parametrize("on_policy", [None, OnPolicy(0.5, 6, Sampling(), VOCABULARY, {5}, 20, 1, seed=3)])
def test_a_resumed_run_is_the_same_run(target, tmp_path, on_policy):
    arguments = {"save_strategy": "steps", "save_steps": 1, "on_policy": on_policy}
    straight = make_trainer(tmp_path / "a", target, **arguments)
    straight.train()
    again = make_trainer(tmp_path / "b", target, **arguments)
    folder = sorted((tmp_path / "a" / "work").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[1]
    again.train(resume_from_checkpoint=str(folder))
    for name, weight in weights(straight).items():
        assert torch.equal(weights(again)[name], weight)


def test_accumulation_and_batch_size_change_nothing(target, tmp_path):
    together = make_trainer(tmp_path / "a", target)
    together.train()
    apart = make_trainer(tmp_path / "b", target, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    apart.train()
    for name, weight in weights(together).items():
        torch.testing.assert_close(weights(apart)[name], weight, atol=2e-3, rtol=2e-2)


def test_a_rank_without_rows_computes_nothing_and_does_not_fail(target, tmp_path):
    trainer = make_trainer(tmp_path, target)
    sums = trainer._teach(trainer.model, trainer._placed(Collator(1)([EMPTY]), step=0))
    assert sums["loss"].item() == 0
    sums["loss"].backward()


def test_what_it_writes_itself_is_what_rounds_would_draft(target, tmp_path):
    policy = OnPolicy(1.0, 6, Sampling(), VOCABULARY, {5}, 20, 1, seed=3)
    trainer = make_trainer(tmp_path, target, on_policy=policy)
    batch = Collator(1)([trainer.train_dataset.data[index] for index in range(3)])
    made = policy.continued(batch, trainer._writer(policy), step=0)
    assert (made["weights"].sum(1) >= 1).all() and (made["labels"] == -100).all()
