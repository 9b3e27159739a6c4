"""The run's traces are used where they fit the decoding setting and the rules; otherwise there are others."""

import dataclasses
from types import SimpleNamespace

import pytest

from drafttrain.errors import UserError
from drafttrain.evaluation.tuning import stored_traces
from drafttrain.models.fingerprint import fingerprint
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import RunFolder
from tests.conftest import build_llama
from tests.training.synthetic_traces import make_manifest, make_records, write_traces


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    """A pair as far as traces ask for it."""
    made = [build_llama(len(tiny_tokenizer), layers=1, hidden=16, seed=seed) for seed in (0, 1)]
    parts = (SimpleNamespace(model=model, fingerprint=fingerprint(model, tiny_tokenizer)) for model in made)
    return SimpleNamespace(**dict(zip(("target", "drafter"), parts, strict=True)))


@pytest.fixture(scope="module")
def run(models, tiny_tokenizer, tmp_path_factory):
    """Greedy traces that follow the drafter for three tokens beyond a rejection."""
    run, pair = RunFolder(tmp_path_factory.mktemp("run")), (models.target.model, models.drafter.model)
    setting = {"temperature": 0.0, "run_length": 3}
    records = make_records(*pair, 2, tune=1, length=3, **setting)
    write_traces(run.traces, records, make_manifest(*pair, tiny_tokenizer, **setting))
    return run


def test_traces_of_the_tuning_split_are_used_for_their_own_setting(run, models):
    assert [row["split"] for row in stored_traces(run, models, Sampling(0.0), 4, False).rows] == ["tune"]
    assert stored_traces(run, models, Sampling(1.0), 4, False) is None


def test_traces_that_end_before_a_rule_would_are_not_used(run, models, capsys):
    assert stored_traces(run, models, Sampling(0.0), 5, False) is None
    assert "3 tokens beyond a rejection, 4 are needed (traces.run_length)" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["target", "drafter"])
def test_traces_of_another_model_are_refused_unless_its_weights_are_accepted(run, models, part):
    other = dataclasses.replace(getattr(models, part).fingerprint, weights="other")
    foreign = SimpleNamespace(**{**vars(models), part: SimpleNamespace(fingerprint=other)})
    with pytest.raises(UserError, match=f"{part}.weights"):
        stored_traces(run, foreign, Sampling(0.0), 4, False)
    assert stored_traces(run, foreign, Sampling(0.0), 4, True) is not None
