"""The run's traces are used where they fit the decoding setting and the rules; otherwise there are others."""

import dataclasses
from types import SimpleNamespace

import pytest

from drafttrain.evaluation import tuning
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.ops.sampling import Sampling

MODELS = SimpleNamespace(
    target=SimpleNamespace(fingerprint=Fingerprint("t", "a", "w")),
    drafter=SimpleNamespace(fingerprint=Fingerprint("t", "b", "x")),
)


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Traces that follow the drafter for three tokens beyond a rejection."""
    manifest = {"sampling": dataclasses.asdict(Sampling(0.0)), "run_length": 3}
    rows = [{"split": "train", "n": 1}, {"split": "tune", "n": 2}]
    monkeypatch.setattr(tuning, "read_manifest", lambda *_: manifest)
    monkeypatch.setattr(tuning, "read_records", lambda *_, **__: rows)
    run = SimpleNamespace(traces=tmp_path)
    return lambda sampling, longest: tuning.stored_traces(run, MODELS, sampling, longest, False)


def test_traces_of_the_tuning_split_are_used_for_their_own_setting(stored):
    assert [row["n"] for row in stored(Sampling(0.0), 4).rows] == [2]
    assert stored(Sampling(1.0), 4) is None


def test_traces_that_end_before_a_rule_would_are_not_used(stored, capsys):
    assert stored(Sampling(0.0), 5) is None
    assert "3 tokens beyond a rejection, 4 are needed (traces.run_length)" in capsys.readouterr().out
