"""Prompts are tuned on and tested on apart, and a probe tests on nothing that its target was trained on."""

import json

import pytest

from data_prep.prompts import ensure_prompts
from drafttrain.config import parse
from drafttrain.errors import UserError
from drafttrain.evaluation import inputs
from drafttrain.evaluation.inputs import inputs_of, split_probe
from drafttrain.run_folder import RunFolder
from tests.conftest import build_tokenizer


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
    monkeypatch.setattr(inputs, "_made", lambda *_: made)


def test_a_quarter_of_the_test_prompts_tunes_where_there_are_no_others_and_that_is_known(parsed, monkeypatch):
    given(monkeypatch, records("train", "train") + records("train", "train", task="chat"))
    found = inputs_of(parsed, None, 512)
    assert not found.apart and found.tune == found.test[:1]
    given(monkeypatch, records(*["train"] * 3))
    assert inputs_of(parsed, None, 512).apart


@pytest.fixture
def answered(tmp_path, tiny_tokenizer):
    """Evaluates a run whose prompts, of this file, have been answered; takes flags, and another tokenizer."""
    asked = [json.dumps({"messages": [{"role": "user", "content": f"Count to {n}"}]}) for n in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(asked))
    (tmp_path / "others.jsonl").write_text("\n".join(asked[1:]))
    run = RunFolder(tmp_path / "run")
    own = parse("", [], ["--run", str(run.path), "--prompts.path", str(tmp_path / "prompts.jsonl")])
    ensure_prompts(own.recipe.prompts, tiny_tokenizer, 512, run)
    run.responses.mkdir()

    def found(*flags, tokenizer=tiny_tokenizer):
        return inputs_of(parse("", [], ["--run", str(run.path), *flags]), tokenizer, 256)

    return found


def test_answered_prompts_are_read_with_their_own_recipe_and_with_one_that_names_none(answered, tmp_path):
    found = answered()
    assert found.test and found == answered("--prompts.path", str(tmp_path / "prompts.jsonl"))


def test_other_prompts_than_those_answered_are_refused(answered, tmp_path):
    with pytest.raises(UserError, match="file"):
        answered("--prompts.path", str(tmp_path / "others.jsonl"))
    with pytest.raises(UserError, match="limit"):
        answered("--prompts.path", str(tmp_path / "prompts.jsonl"), "--prompts.limit", "3")


def test_prompts_of_another_tokenizer_are_refused(answered):
    with pytest.raises(UserError, match="tokenizer"):
        answered(tokenizer=build_tokenizer(280))


def test_without_a_test_prompt_there_is_nothing_to_measure(parsed, monkeypatch):
    given(monkeypatch, records("train", "train", kind="code.continue"))
    with pytest.raises(UserError, match="no test prompts"):
        inputs_of(parsed, None, 512)
