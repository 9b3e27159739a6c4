"""Prompts are tuned on and tested on apart, and a probe tests on nothing that its target was trained on."""

import pytest

from drafttrain.config import parse
from drafttrain.errors import UserError
from drafttrain.evaluation import inputs
from drafttrain.evaluation.inputs import inputs_of, split_probe
from drafttrain.run_folder import RunFolder


def records(*splits, kind="", task="code"):
    """Prompts of these splits."""
    return [
        {"prompt_id": f"{task}-{number}", "task": task, "split": split, "kind": kind, "reference": ""}
        for number, split in enumerate(splits)
    ]


def test_a_probe_of_the_reference_world_takes_held_out_prompts_only():
    made = records(*["train"] * 20, *["test"] * 6, kind="code.continue")
    tune, test = split_probe(made, per_task=8)
    assert len(tune) == 2 and len(test) == 4
    assert {record["split"] for record in (*tune, *test)} == {"test"}


def test_a_probe_of_somebodys_own_prompts_takes_all_of_them():
    tune, test = split_probe(records(*["train"] * 9), per_task=8)
    assert len(tune) == 3 and len(test) == 6
    assert not {record["prompt_id"] for record in tune} & {record["prompt_id"] for record in test}


@pytest.fixture
def parsed(tmp_path):
    return parse("", [], ["--run", str(tmp_path / "run")])


def given(monkeypatch, made):
    monkeypatch.setattr(inputs, "_make", lambda *_: made)


def test_a_quarter_of_the_test_prompts_tunes_where_there_are_no_others_and_that_is_known(parsed, monkeypatch):
    given(monkeypatch, records("train", "train") + records("train", "train", task="chat"))
    found = inputs_of(parsed, None, 512)
    assert not found.apart and found.tune == found.test[:1]
    given(monkeypatch, records(*["train"] * 3))
    assert inputs_of(parsed, None, 512).apart


def test_prompts_that_stand_in_the_run_are_those_of_the_recipe_until_they_are_answered(parsed, monkeypatch):
    """Until then another recipe may ask for others: whoever makes prompts decides whether these will do."""
    given(monkeypatch, records(*["train"] * 3))
    monkeypatch.setattr(inputs, "read_records", lambda *_: records("tune", "test", "test", task="answered"))
    run = RunFolder(parsed.run)
    run.prompts.mkdir(parents=True)
    assert {record["task"] for record in inputs_of(parsed, None, 512).test} == {"code"}
    run.responses.mkdir()
    assert {record["task"] for record in inputs_of(parsed, None, 512).test} == {"answered"}


def test_without_a_test_prompt_there_is_nothing_to_measure(parsed, monkeypatch):
    given(monkeypatch, records("train", "train", kind="code.continue"))
    with pytest.raises(UserError, match="no test prompts"):
        inputs_of(parsed, None, 512)
