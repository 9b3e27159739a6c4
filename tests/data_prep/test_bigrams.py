"""bigrams.py as people run it, and the table in a method."""

from __future__ import annotations

import json

import pytest

from data_prep import bigrams, responses
from drafttrain.decoding.expression import build
from drafttrain.models.bigrams import BigramTable
from drafttrain.models.checkpoint import CheckpointInfo, save_checkpoint
from drafttrain.models.fingerprint import tokenizer_hash
from drafttrain.records import read_records
from drafttrain.run_folder import RunFolder
from tests.conftest import build_llama, build_tokenizer


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A target's folder and a run folder with its responses."""
    folder = tmp_path_factory.mktemp("bigrams")
    save_checkpoint(folder / "target", build_llama(hidden=16), build_tokenizer(), CheckpointInfo("target"))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{at} apple"}) + "\n" for at in range(6)))
    flags = ["--target.path", folder / "target", "--prompts.source", "file", "--prompts.path", folder / "prompts.jsonl"]
    flags += ["--prompts.near_duplicate", "1.0", "--responses.max_new_tokens", "12", "--run", folder / "run"]
    responses.main([str(flag) for flag in flags])
    return folder


def test_the_table_is_learned_from_the_training_answers(answered, capsys):
    run = RunFolder(answered / "run")
    flags = ["--target.path", str(answered / "target"), "--run", str(run.path)]
    bigrams.main([*flags, "--plan"])
    assert not run.bigrams.exists()
    bigrams.main(flags)
    table = BigramTable.load(run.bigrams, tokenizer_hash(build_tokenizer()))
    rows = [row for row in read_records(run.responses, "responses") if row["split"] == "train"]
    assert table.pairs == sum(len(row["prompt_ids"]) + len(row["response_ids"]) - 1 for row in rows) > 0
    assert str(run.bigrams) in capsys.readouterr().out
    assert build("MaxGram(bigrams)", {"bigrams": table}).successors == table.successors


def test_without_answers_it_says_what_makes_them(answered, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        bigrams.main(["--target.path", str(answered / "target"), "--run", str(tmp_path)])
    assert stopped.value.code == 2
    assert "data_prep/responses.py" in capsys.readouterr().err
