"""Training the acceptance head: its loss, its equality over batch splits, its resumption, its judgement."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.training import calibration
from drafttrain.training.head_data import HeadDataset, Layout
from drafttrain.training.head_trainer import (
    FIXED,
    HeadTrainer,
    HeldOut,
    weight_sum,
    weighted_loss,
)
from drafttrain.training.work_folder import last_checkpoint

HIDDEN = 6


def make_records(count=11, seed=0):
    """Records without models: drafted tokens that are accepted or not, and what q said of them."""
    generator = torch.Generator().manual_seed(seed)
    records = []
    for number in range(count):
        size = [0, 3, 17, 5, 8, 1, 12, 6, 9, 2, 4][number % 11]
        x = torch.randint(0, 9, (size,), generator=generator)
        y = torch.where(torch.rand(size, generator=generator) < 0.6, x, x + 1)
        log_q = torch.rand(size, generator=generator).clamp_min(0.01).log()
        label = torch.rand(size, generator=generator).clamp_min(0.01)
        lists = {"response_ids": x, "draft_ids": y, "log_q": log_q, "log_p": log_q + label.log()}
        lists |= {"entropy": torch.rand(size, generator=generator)}
        record = {name: values.tolist() for name, values in lists.items()}
        records.append(record | {"prompt_id": f"p{number}", "turn": 0, "prompt_ids": [1]})
    return records


LAYOUT = Layout(greedy=False)


def states(wanted):
    """States that betray the label, as a function of the token alone, whoever asks."""
    rows = [torch.zeros(0, HIDDEN)]
    for row, trace, examples in wanted:
        position = examples.index_N.float()
        columns = [trace.label_T[examples.index_N], position.sin(), (position + row).cos()]
        rows.append(torch.stack([*columns, *[position * 0] * (HIDDEN - len(columns))], dim=1))
    return torch.cat(rows)


def make_trainer(folder, *, batch=4, accumulation=1, records=None, states=states, held_out=False, seed=0, **arguments):
    config = AcceptanceHeadConfig(HIDDEN, depth=1, features=("log_q", "entropy", "step"), w_rej=3.0)
    records = make_records() if records is None else records
    settings = {"learning_rate": 0.02, "num_train_epochs": 3, "report_to": "none", "save_strategy": "no"}
    settings |= {"logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "seed": seed}
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **(settings | arguments | FIXED),
    )
    torch.manual_seed(seed)
    head = AcceptanceHead(config)
    train = HeadDataset(records, LAYOUT, config, seed, batch * accumulation)
    tune = HeadDataset(make_records(seed=1), LAYOUT, config, seed, shuffle=False)
    return HeadTrainer(head, args, train, states, HeldOut(tune, states) if held_out else None)


def weights_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def test_the_loss_is_the_published_formula():
    logit, label, weight = torch.tensor([0.3, -1.2, 2.0]), torch.tensor([0.0, 0.4, 1.0]), torch.tensor([1.0, 0.5, 1.0])
    p = torch.sigmoid(logit)
    expected = -(weight * (2 * label * p.log() + 6 * (1 - label) * (1 - p).log())).sum()
    assert torch.allclose(weighted_loss(logit, label, weight, 2.0, 6.0), expected)
    assert float(weight_sum(label, weight, 2.0, 6.0)) == pytest.approx(6 + 0.5 * (2 * 0.4 + 6 * 0.6) + 2)


def test_extreme_logits_have_finite_losses():
    loss = weighted_loss(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 1.0]), torch.ones(2), 1.0, 6.0)
    assert math.isfinite(float(loss))


def test_its_minimiser_is_the_distorted_probability():
    logit = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([logit], max_iter=50)
    label = torch.tensor([0.9])

    def closure():
        optimizer.zero_grad()
        loss = weighted_loss(logit, label, torch.ones(1), 1.0, 6.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    distorted = float(calibration.invert_loss_weight(0.9, 6, 1))
    assert float(torch.sigmoid(logit.detach())) == pytest.approx(distorted, abs=1e-3)


def test_accumulation_steps_change_nothing(tmp_path):
    whole, parts = make_trainer(tmp_path / "a", batch=4), make_trainer(tmp_path / "b", batch=1, accumulation=4)
    whole.train()
    parts.train()
    assert torch.allclose(weights_of(whole), weights_of(parts), atol=1e-5)
    curves = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, parts)]
    assert curves[0] == pytest.approx(curves[1], abs=2e-4)


def test_the_logged_loss_is_the_mean_over_weights(tmp_path):
    trainer = make_trainer(tmp_path, batch=11, learning_rate=0.0, num_train_epochs=1)
    torch.nn.init.normal_(trainer.model.feature_output.weight)  # silent at first
    trainer.train()
    items = [trainer.train_dataset[i] for i in range(11)]
    label = torch.cat([examples.label_N for _, _, examples in items])
    examples = [e for _, _, e in items]
    log_q, entropy, step = (
        torch.cat([getattr(e, name) for e in examples]) for name in ("log_q_N", "entropy_N", "step_N")
    )
    logit = trainer.model(states(items), log_q.exp(), entropy, step)
    weight = torch.ones(len(label))
    expected = weighted_loss(logit, label, weight, 1.0, 3.0) / weight_sum(label, weight, 1.0, 3.0)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected.item(), abs=1e-3)


def test_a_batch_larger_than_the_data_trains(tmp_path):
    trainer = make_trainer(tmp_path, batch=32)
    before = weights_of(trainer).clone()
    trainer.train()
    assert trainer.state.global_step == 3
    assert not torch.equal(weights_of(trainer), before)


def test_training_goes_on_exactly_after_an_interruption(tmp_path):
    straight = make_trainer(tmp_path / "straight")
    straight.train()
    schedule = {"save_strategy": "steps", "save_steps": 2}
    first = make_trainer(tmp_path / "killed", **schedule)
    first.train()
    steps = sorted(int(path.name.rsplit("-", 1)[1]) for path in (tmp_path / "killed").glob("checkpoint-*"))
    assert steps[0] == 2  # in the middle of an epoch of three steps
    for later in steps[2:]:
        (tmp_path / "killed" / f"checkpoint-{later}" / "trainer_state.json").write_text('{"trunca')
    found = last_checkpoint(tmp_path / "killed")
    assert found.name == "checkpoint-4"
    resumed = make_trainer(tmp_path / "killed", seed=0, **schedule)
    torch.nn.init.zeros_(resumed.model.output.weight)  # must come from the checkpoint
    resumed.train(resume_from_checkpoint=str(found))
    assert resumed.state.global_step == straight.state.global_step
    assert torch.equal(weights_of(resumed), weights_of(straight))


def test_no_checkpoint_is_found_where_there_is_none(tmp_path):
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-3").mkdir()
    assert last_checkpoint(tmp_path) is None


def test_a_loss_that_is_no_number_is_told_before_anything_is_updated(tmp_path):
    def broken(wanted):
        return states(wanted) * float("nan")

    trainer = make_trainer(tmp_path, states=broken)
    before = weights_of(trainer).clone()
    with pytest.raises(UserError, match=r"step 0; lower head\.arguments\.learning_rate"):
        trainer.train()
    assert torch.equal(weights_of(trainer), before)


def test_only_the_head_is_trained_and_saved(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="epoch", num_train_epochs=1)
    trainer.train()
    from safetensors import safe_open

    with safe_open(f"{last_checkpoint(tmp_path)}/model.safetensors", "pt") as file:
        assert set(file.keys()) == set(trainer.model.state_dict())
    assert {name.split(".")[0] for name, _ in trainer.model.named_parameters()} <= {
        *("blocks", "output", "feature_input", "feature_output")
    }


def test_evaluation_chooses_the_best_epoch(tmp_path):
    strategy = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    best = {"metric_for_best_model": "kl", "greater_is_better": False}
    trainer = make_trainer(tmp_path, held_out=True, learning_rate=0.3, **strategy, **best)
    trainer.train()
    kls = [entry["eval_kl"] for entry in trainer.state.log_history if "eval_kl" in entry]
    assert len(kls) == 3
    assert trainer.evaluate()["eval_kl"] == pytest.approx(min(kls), abs=1e-6)


def test_held_out_scores_keep_the_order_of_the_responses(tmp_path):
    trainer = make_trainer(tmp_path, held_out=True)
    held_out = trainer._held_out
    small, large = held_out.predict(trainer.model, batch=2), held_out.predict(trainer.model, batch=100)
    for name, values in large.items():
        np.testing.assert_allclose(small[name], values, atol=1e-6)
    labels = torch.cat([LAYOUT.trace(record).label_T for record in make_records(seed=1)])
    np.testing.assert_allclose(large["label"], labels.double().numpy())


def test_a_head_that_sees_the_label_beats_q_alone_and_is_calibrated_after_inversion(tmp_path):
    trainer = make_trainer(tmp_path, records=make_records(66), batch=8, num_train_epochs=15, learning_rate=0.03)
    trainer.train()
    train = trainer.train_dataset
    tune = HeadDataset(make_records(44, seed=1), LAYOUT, train.config, 0, shuffle=False)
    traces = [train.trace(row) for row in range(len(train.records))]
    columns = [torch.cat([getattr(t, name) for t in traces]).numpy() for name in ("log_q_T", "entropy_T", "label_T")]
    report = HeldOut(tune, states, calibration.Baselines(*columns)).report(trainer.model, 1.0, 3.0)
    scores = report["predictors"]
    assert set(scores) == {"head", "head_raw", "raw_q", "logistic_q", "isotonic_q", "logistic_q_entropy"}
    assert scores["head"]["kl"] < 0.3 * scores["logistic_q"]["kl"]
    assert scores["head"]["auroc"] == pytest.approx(scores["head_raw"]["auroc"])  # a monotone map keeps the order
    assert scores["head"]["ece"] < 0.5 * scores["head_raw"]["ece"]
    assert report["tokens"] == sum(row["count"] for row in scores["head"]["reliability"])


def test_the_trained_head_is_a_copy(tmp_path):
    trainer = make_trainer(tmp_path)
    head = trainer.trained_head()
    assert head.config == trainer.model.config
    with torch.no_grad():
        trainer.model.output.bias += 1
    assert not torch.equal(head.output.bias, trainer.model.output.bias)
