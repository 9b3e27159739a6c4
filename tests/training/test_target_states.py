"""Stored states are the target's states, and training on them is training on the target."""

import pytest
import torch
from accelerate import Accelerator

from drafttrain.training.drafter_data import EMPTY, Collator, ResponseDataset
from drafttrain.training.sharding import FrozenTarget
from drafttrain.training.state_file import TOKENS_AT_ONCE, StateFile
from drafttrain.training.target_states import TargetStates, _groups
from tests.conftest import build_llama
from tests.training.test_drafter_trainer import assert_same, losses, make_trainer, rows, target, weights

__all__ = ["target"]


@pytest.fixture
def frozen():
    return FrozenTarget(build_llama().requires_grad_(False), Accelerator(cpu=True))


def test_stored_states_are_those_of_the_trained_tokens(frozen, tmp_path):
    data = ResponseDataset(rows(), 14)
    states = TargetStates(tmp_path / "states.bin", frozen, data, Collator(1), "key")
    batch = Collator(1)([data[4], EMPTY, data[2]])
    hidden = frozen.hidden(batch["input_ids"], batch["attention_mask"])
    trained = batch["weights"][:, 1:] > 0
    assert torch.allclose(states(batch["row"].tolist()), hidden[:, :-1][trained], atol=1e-5)
    assert states([-1]).shape == (0, 32)


def test_a_finished_file_is_used_and_another_is_made_again(frozen, tmp_path, monkeypatch):
    data, collator = ResponseDataset(rows(), 14), Collator(1)
    first = TargetStates(tmp_path / "states.bin", frozen, data, collator, "key")([0, 1, 2])
    fill, filled = StateFile.fill, []
    monkeypatch.setattr(StateFile, "fill", lambda self, *args: (filled.append(1), fill(self, *args)))
    assert torch.equal(TargetStates(tmp_path / "states.bin", frozen, data, collator, "key")([0, 1, 2]), first)
    assert not filled
    TargetStates(tmp_path / "states.bin", frozen, data, collator, "other")
    (tmp_path / "states.json").unlink()  # killed while it was filled
    TargetStates(tmp_path / "states.bin", frozen, data, collator, "other")
    assert len(filled) == 2


def test_training_on_stored_states_is_training_on_the_target(target, tmp_path):
    live, stored = make_trainer(tmp_path / "a", target), make_trainer(tmp_path / "b", target)
    data = stored.train_dataset.data
    stored.states = TargetStates(tmp_path / "states.bin", stored.target, data, stored.data_collator, "key")
    calls = stored.target.hidden
    stored.target.hidden = None
    live.train()
    stored.train()
    stored.target.hidden = calls
    assert losses(stored) == pytest.approx(losses(live), abs=1e-5)
    assert_same(weights(stored), weights(live), atol=1e-5)


def test_groups_hold_every_row_once_and_little_padding():
    lengths = torch.randint(1, 900, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = _groups(lengths)
    assert sorted(row for group in groups for row in group) == list(range(200))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[row] for row in group) <= TOKENS_AT_ONCE
