"""Whether states are stored, and that a run that goes on reads what it stored."""

import shutil
from types import SimpleNamespace

from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from drafttrain.training.head_data import HeadDataset, Layout
from drafttrain.training.head_program import _states
from drafttrain.training.head_states import DrafterStates, StateStore
from tests.conftest import build_llama
from tests.training.synthetic_traces import make_records


def test_stored_states_are_read_again_however_full_the_disk_has_become(tmp_path, monkeypatch):
    model = build_llama(64, hidden=16)
    records = make_records(model, model, count=2, tune=0)
    data = HeadDataset(records, Layout(greedy=False), AcceptanceHeadConfig(16), seed=0)
    inputs = SimpleNamespace(drafter=SimpleNamespace(model=model), work=tmp_path, key="key")
    assert isinstance(_states("train", data, inputs), StateStore)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert isinstance(_states("train", data, inputs), StateStore)
    assert isinstance(_states("tune", data, inputs), DrafterStates)
