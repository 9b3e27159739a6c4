"""Stored readings: what is learnt from them is what is learnt from the target itself, and of no other target."""

from __future__ import annotations

import pytest
import torch

from drafttrain.config import PositionsConfig
from drafttrain.errors import UserError
from drafttrain.training.drafter_data import EMPTY, Collator, ResponseDataset
from drafttrain.training.positions import Placing
from drafttrain.training.readings import STEP, ReadingWriter, StoredReadings, bytes_needed, check_readings, manifest_of
from drafttrain.training.sharding import drop_layers
from tests.training.test_longspec_trainer import make_trainer, rows, target  # noqa: F401

LAYER = 1
PLACING = Placing.of(PositionsConfig(kind="multi_gap", served=256), 512, 3, seed=3)


def manifest(target, data, layer=LAYER, dtype=torch.float32, placing=PLACING, responses="r"):  # noqa: F811
    prints = target.fingerprint.to_dict()
    return manifest_of(prints, layer, dtype, placing, {"kind": responses}, data)


def make(folder, target, data, shards=None, per=3):  # noqa: F811
    row_bytes = 2**28 / per  # so many rows a shard
    writer = ReadingWriter(folder, manifest(target, data), data, row_bytes)
    chosen = writer.pending() if shards is None else shards
    assert len(list(writer.fill(target.model, PLACING, chosen))) == sum(len(writer.source_range(at)) for at in chosen)
    return writer


@pytest.fixture
def stored(target, tmp_path):  # noqa: F811
    data = ResponseDataset(rows(), 20)
    make(tmp_path / "readings", target, data).finish()
    return StoredReadings(tmp_path / "readings", manifest(target, data), data)


@pytest.mark.parametrize("empty", [[], [EMPTY]], ids=["", "with a row that fills"])
def test_loss_and_gradient_are_those_of_the_target_itself(target, stored, tmp_path, empty):  # noqa: F811
    trainer = make_trainer(tmp_path, target)
    batch = Collator(1)([*empty, *(trainer.train_dataset.data[at] for at in (7, 0, 3, 4))])

    def taught(states):
        trainer.states = states
        trainer.model.zero_grad()
        placed = trainer._placed(batch, STEP)
        sums = trainer._teach(trainer.model, placed, states)
        sums["loss"].backward()
        found = sums | {name: weight.grad.clone() for name, weight in trainer.model.named_parameters()}
        return placed, found

    (placed, live), (again, read) = taught(None), taught(stored)
    assert torch.equal(placed["positions"], again["positions"]) and placed["positions"].max() > 20
    assert torch.equal(placed["lags"], again["lags"]) and live["loss"] > 0
    for name, value in live.items():
        torch.testing.assert_close(read[name], value, atol=1e-5 * float(value.detach().abs().max()), rtol=0, msg=name)
    wrong = placed | {"row": batch["row"].flip(0)}  # other rows' keys and states are not those
    assert (trainer._teach(trainer.model, wrong, stored)["loss"] - live["loss"]).abs().item() > 1e-2


def test_positions_stay_and_lags_are_drawn_anew(target, stored, tmp_path):  # noqa: F811
    trainer = make_trainer(tmp_path, target)
    trainer.states = stored
    batch = Collator(1)([trainer.train_dataset.data[at] for at in range(8)])
    placed = [trainer._placed(batch, step) for step in (STEP, 5, 6)]
    assert all(torch.equal(one["positions"], placed[0]["positions"]) for one in placed)
    assert any(not torch.equal(one["lags"], placed[0]["lags"]) for one in placed)


def test_a_whole_training_without_layers_is_finite_and_learns(target, stored, tmp_path):  # noqa: F811
    trainer = make_trainer(tmp_path, target, num_train_epochs=20, logging_steps=1)
    drop_layers(target.model)
    assert len(target.model.model.layers) == 0
    trainer.states = stored
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_killed_and_started_again_it_makes_the_same_files(target, stored, tmp_path):  # noqa: F811
    data = ResponseDataset(rows(), 20)
    whole = tmp_path / "readings"
    folder = tmp_path / "again"
    writer = make(folder, target, data, shards=[0, 2])
    assert writer.pending() == [1, 3]
    path = writer.path(2)
    path.write_bytes(path.read_bytes()[:-5])  # cut short
    (folder / ".part-00001.safetensors.9.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="unfinished"):
        check_readings(folder, {})
    writer = make(folder, target, data)
    writer.finish()
    assert not list(folder.glob(".*.tmp"))
    for file in whole.glob("part-*"):
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_they_are_as_large_as_was_said(target, stored, tmp_path):  # noqa: F811
    data = ResponseDataset(rows(), 20)
    files = list((tmp_path / "readings").glob("part-*"))
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    found = sum(file.stat().st_size for file in files)
    assert found - headers == bytes_needed(target.model.config, 4, data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layer": 0}, "layer was 1 and is now 0"),
        ({"dtype": torch.bfloat16}, "dtype was float32 and is now bfloat16"),
        ({"placing": Placing.of(PositionsConfig(kind="plain"), 512, 3, seed=3)}, "positions.kind was multi_gap"),
        ({"responses": "others"}, "responses was"),
    ],
)
def test_those_of_something_else_are_refused(target, stored, tmp_path, change, told):  # noqa: F811
    data = ResponseDataset(rows(), 20)
    with pytest.raises(UserError, match=told):
        StoredReadings(tmp_path / "readings", manifest(target, data, **change), data)
    with pytest.raises(UserError, match="max_length was 20 and is now 19"):
        StoredReadings(tmp_path / "readings", manifest(target, ResponseDataset(rows(), 19)), data)


def test_those_of_another_target_or_damaged_are_refused(target, stored, tmp_path):  # noqa: F811
    data, folder = ResponseDataset(rows(), 20), tmp_path / "readings"
    asked = manifest(target, data)
    asked["target"]["weights"] = "0123"
    with pytest.raises(UserError, match=r"target\.weights was .* and is now 0123"):
        StoredReadings(folder, asked, data)
    del asked["target"]["weights"]  # a plan does not know them
    check_readings(folder, asked)
    part = folder / "part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"part-00001\.safetensors is damaged or truncated"):
        StoredReadings(folder, manifest(target, data), data)
