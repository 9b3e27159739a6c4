"""Distillation in one process: what a step computes, what is measured, and that a resumed run is the same run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drafttrain.config import DrafterConfig, LoraConfig, TrainingConfig
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.errors import UserError
from drafttrain.models.drafters import build_drafter
from drafttrain.models.fingerprint import fingerprint
from drafttrain.models.loading import Loaded
from drafttrain.ops.sampling import Sampling
from drafttrain.training.arguments import training_arguments
from drafttrain.training.distill_head import attach
from drafttrain.training.drafter_data import EMPTY, Collator, Epochs, ResponseDataset
from drafttrain.training.drafter_program import _held_out
from drafttrain.training.drafter_trainer import DEFAULTS, FIXED, Distillation, DrafterTrainer, is_complete
from drafttrain.training.held_out import HISTORY, HeldOut, TauHistory
from drafttrain.training.losses import expected_acceptance, forward_kl, mixed
from drafttrain.training.on_policy import OnPolicy
from drafttrain.training.sharding import Replica
from drafttrain.training.work_folder import last_checkpoint
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


def make_trainer(
    folder,
    target,
    drafter=None,
    on_policy=None,
    held_out=0,
    evaluations=0,
    resumed=0,
    loss=None,
    data=None,
    **arguments,
):
    settings = {"learning_rate": 3e-3, "logging_steps": 1, "disable_tqdm": True, "num_train_epochs": 2}
    settings |= {"per_device_train_batch_size": 4, "save_strategy": "no", "optim": "adamw_torch", **arguments}
    args = training_arguments(settings, folder / "work", "training", DEFAULTS, **FIXED, seed=0)
    data = ResponseDataset(rows(), 20)
    held = ResponseDataset(rows(5, seed=9), 20)
    return DrafterTrainer(
        drafter or build_drafter(DrafterConfig(kind="cut", layers=[0]), target),
        target.model,
        args,
        Distillation(mixed({"forward_kl": 1.0}), 1.0, 8, VOCABULARY, evaluations, on_policy),
        Epochs(data, 0, args.train_batch_size * args.gradient_accumulation_steps),
        Collator(1),
        folder,
        HeldOut.of(held, held_out, 3, VOCABULARY, {5}, 40) if held_out else None,
        resumed,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.trained().named_parameters()}


def assert_same(one, two, atol=1e-6):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=atol), name


def test_a_logged_step_is_the_mean_over_its_trained_tokens(target, tmp_path):
    trainer = make_trainer(tmp_path, target, num_train_epochs=1)
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[0]), target)
    first = [trainer.train_dataset[place] for place in range(4)]
    kl = accepted = count = 0.0
    with torch.no_grad():
        for row in first:
            ids = torch.tensor([row["input_ids"]])
            places = range(max(row["prompt_length"], 1), ids.shape[1])
            log_p, log_q = (model(ids).logits[0].log_softmax(-1) for model in (target.model, drafter))
            for place in places:
                pair = log_p[None, place - 1], log_q[None, place - 1]
                kl += forward_kl(*pair).item()
                accepted += expected_acceptance(*pair).item()
                count += 1
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(kl / count, rel=1e-4)
    assert logged["expected_acceptance"] == pytest.approx(accepted / count, rel=1e-4)


def test_batch_size_changes_nothing_but_rounding(target, tmp_path):
    whole = make_trainer(tmp_path / "a", target)
    parts = make_trainer(tmp_path / "b", target, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    assert losses(whole) == pytest.approx(losses(parts), abs=1e-4)
    assert_same(weights(whole), weights(parts), atol=1e-4)


def test_training_raises_expected_acceptance(target, tmp_path):
    trainer = make_trainer(tmp_path, target, num_train_epochs=12)
    trainer.train()
    logged = [entry["expected_acceptance"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(logged[-3:]) / 3 > sum(logged[:3]) / 3 + 0.02


def test_an_interrupted_run_ends_with_the_same_weights(target, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 3}
    straight = make_trainer(tmp_path / "a", target, held_out=3, evaluations=3, **arguments)
    straight.train()

    cut = make_trainer(tmp_path / "b", target, held_out=3, evaluations=3, **arguments)
    step = cut.training_step

    def dies(*args):
        if cut.state.global_step == 5:
            raise KeyboardInterrupt
        return step(*args)

    cut.training_step = dies
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    unfinished = tmp_path / "b" / "work" / "checkpoint-5"
    unfinished.mkdir()  # a save that was cut off has no mark and is no checkpoint
    found = last_checkpoint(tmp_path / "b" / "work", is_complete)
    assert found.name == "checkpoint-4"
    again = make_trainer(tmp_path / "b", target, held_out=3, evaluations=3, resumed=4, **arguments)
    again.train(resume_from_checkpoint=str(found))
    assert_same(weights(again), weights(straight), atol=0)
    points = [json.loads((tmp_path / run / HISTORY).read_text()) for run in "ab"]
    for one, two in zip(*points, strict=True):
        assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_an_older_checkpoint_goes_only_when_the_new_one_is_complete(target, tmp_path, monkeypatch):
    from drafttrain.training import drafter_trainer

    rotate, seen = drafter_trainer.rotate_checkpoints, []

    def watched(folder, *rest):
        seen.append(last_checkpoint(Path(folder), is_complete).name)
        rotate(folder, *rest)

    monkeypatch.setattr(drafter_trainer, "rotate_checkpoints", watched)
    trainer = make_trainer(tmp_path, target, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert seen == [f"checkpoint-{step}" for step in range(1, 7)]
    assert sorted(path.name for path in (tmp_path / "work").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_tau_is_measured_at_equal_shares_of_the_data(target, tmp_path):
    trainer = make_trainer(tmp_path, target, held_out=4, evaluations=3, num_train_epochs=3)
    trainer.train()
    points = json.loads((tmp_path / HISTORY).read_text())
    assert [point["step"] for point in points] == [3, 6, 9] and points[-1]["fraction"] == 1.0
    assert points[-1]["tokens"] == 3 * trainer.train_dataset.data.tokens
    assert all(1 <= point["tau"] <= 4 for point in points)


def test_held_out_prompts_are_decoded_in_batches_of_the_evaluation():
    inputs = SimpleNamespace(tune=ResponseDataset(rows(5, seed=9), 20), vocabulary=VOCABULARY, ends={5}, context=40)
    assert _held_out(TrainingConfig(), inputs, 2).batch == 2


@pytest.mark.parametrize("asked", [3, 5, 8])
def test_no_held_out_prompt_is_decoded_twice(asked):
    data = ResponseDataset(rows(5, seed=9), 20)
    held_out = HeldOut.of(data, asked, 3, VOCABULARY, {5}, 40)
    assert len({tuple(prompt) for prompt in held_out.prompts}) == len(held_out.prompts) == min(asked, len(data))


def test_a_drafter_equal_to_the_target_is_always_accepted(target, tmp_path):
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[0, 1]), target)
    trainer = make_trainer(tmp_path, target, drafter, held_out=4)
    metrics = trainer.evaluate()
    assert metrics["eval_acceptance_rate"] == 1.0 and metrics["eval_tau"] > 2
    assert metrics["eval_loss"] == pytest.approx(0, abs=1e-5)
    assert metrics["eval_expected_acceptance"] == pytest.approx(1, abs=1e-5)


def test_an_empty_batch_has_a_loss_of_zero_and_gradients(target, tmp_path):
    trainer = make_trainer(tmp_path, target)
    batch = Collator(1)([EMPTY, EMPTY])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0.0))
    loss.backward()
    assert loss == 0 and all(weight.grad is not None for weight in trainer.model.parameters())


def test_a_loss_that_is_no_number_ends_in_a_sentence(target, tmp_path):
    trainer = make_trainer(tmp_path, target)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(UserError, match="the loss is nan at step 0"):
        trainer.train()


def test_lora_trains_its_updates_and_is_served_merged(target, tmp_path):
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[0], lora=LoraConfig(r=2, alpha=4)), target)
    trainer = make_trainer(tmp_path, target, drafter, held_out=2, evaluations=1, num_train_epochs=6, learning_rate=0.03)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    served, before = weights(trainer), target.model.state_dict()
    assert torch.equal(served["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(served["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    ids = torch.tensor([[7, 8, 9, 10]])
    assert torch.allclose(trainer.trained()(ids).logits, trainer.model(input_ids=ids).logits, atol=1e-4)


def test_the_target_is_no_part_of_the_drafter(target, tmp_path):
    before = target.fingerprint.weights
    trainer = make_trainer(tmp_path, target)
    trainer.train()
    assert fingerprint(target.model, target.tokenizer).weights == before
    assert not any(weight.requires_grad for weight in target.model.parameters())
    own = {id(weight) for weight in trainer.model.parameters()}
    assert not own & {id(weight) for weight in target.model.parameters()}


def test_the_history_forgets_what_a_resumed_run_does_again(tmp_path):
    history = TauHistory(tmp_path / HISTORY)
    for step in (0, 2, 4):
        history.add({"step": step, "tau": 1.0}, write=True)
    assert [point["step"] for point in TauHistory(tmp_path / HISTORY, resumed=2).points] == [0, 2]
    assert TauHistory(tmp_path / HISTORY).points == []


# ---- on-policy ----

POLICY = OnPolicy(0.5, 6, Sampling(), VOCABULARY, {5}, 20, 1, seed=3)


def written(batch, replica, step):
    """The batch as the drafter writes it on."""
    engine = Engine(replica.causal_lm, POLICY.vocabulary)
    writer = Decoder(engine, None, POLICY.sampling, POLICY.eos_ids, POLICY.key(step))
    return POLICY.continued(batch, writer, step)


def batch_of(data):
    return Collator(1)([data[index] for index in range(len(data))])


def test_about_the_asked_share_of_steps_is_on_policy():
    chosen = [replace(POLICY, fraction=0.3).at(step) for step in range(2000)]
    assert 0.26 < sum(chosen) / 2000 < 0.34
    assert not replace(POLICY, fraction=0.0).at(1) and replace(POLICY, fraction=1.0).at(1)


def test_only_what_the_drafter_wrote_is_trained(target):
    replica = Replica(target.model, torch.float32, torch.device("cpu"))
    batch = batch_of(ResponseDataset(rows(), 20))
    prefixes, made = POLICY.prefixes(batch, step=4), written(batch, replica, step=4)
    for place, prefix in enumerate(prefixes):
        assert made["input_ids"][place, : len(prefix)].tolist() == prefix
        assert batch["input_ids"][place, : len(prefix)].tolist() == prefix
        trained = made["weights"][place].nonzero().flatten().tolist()
        assert trained == list(range(len(prefix), len(prefix) + len(trained))) and 1 <= len(trained) <= 6
        tokens = made["input_ids"][place, trained].tolist()
        assert len(tokens) == 6 or tokens[-1] == 5
    assert (made["labels"] == -100).all()


def test_what_is_written_depends_on_the_sample_and_step_alone(target):
    replica = Replica(target.model, torch.float32, torch.device("cpu"))
    data = ResponseDataset(rows(), 20)
    together = written(batch_of(data), replica, step=2)
    alone = written(Collator(1)([data[3]]), replica, step=2)
    length = int(alone["attention_mask"].sum())
    assert together["input_ids"][3, :length].tolist() == alone["input_ids"][0, :length].tolist()
    later = written(Collator(1)([data[3]]), replica, step=3)
    assert later["input_ids"].tolist() != alone["input_ids"].tolist()


def test_empty_rows_stay_empty_on_policy(target):
    replica = Replica(target.model, torch.float32, torch.device("cpu"))
    assert not written(Collator(1)([EMPTY]), replica, step=1)["weights"].any()


def test_on_policy_training_runs_and_resumes_exactly(target, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    straight = make_trainer(tmp_path / "a", target, on_policy=POLICY, **arguments)
    straight.train()
    again = make_trainer(tmp_path / "b", target, on_policy=POLICY, **arguments)
    folder = sorted((tmp_path / "a" / "work").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    again.train(resume_from_checkpoint=str(folder))
    assert_same(weights(again), weights(straight), atol=0)


def test_a_replica_follows_the_trained_weights(target):
    drafter = build_drafter(DrafterConfig(kind="cut", layers=[1]), target)
    replica = Replica(drafter, torch.bfloat16, torch.device("cpu"))
    attach(drafter)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.mul_(1.5)
    replica.refresh(drafter)
    for (_, copy), (_, weight) in zip(replica.model.named_parameters(), drafter.named_parameters(), strict=True):
        assert copy.dtype == torch.bfloat16 and torch.equal(copy, weight.to(torch.bfloat16))


def test_a_replica_keeps_its_rotary_frequencies_exact(target):
    replica = Replica(target.model, torch.bfloat16, torch.device("cpu"))
    frequencies = replica.causal_lm.model.rotary_emb.inv_freq
    assert torch.equal(frequencies, target.model.model.rotary_emb.inv_freq) and frequencies.dtype == torch.float32
