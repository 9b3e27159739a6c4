"""The run folder: fixed names, a record of what ran, honest about what cannot be written."""

import json
import os

import pytest

from drafttrain.config import parse
from drafttrain.errors import UserError
from drafttrain.run_folder import RunFolder, require_space, write_atomically


def test_looking_at_a_run_makes_nothing(tmp_path):
    run = RunFolder(tmp_path / "new")
    names = ["prompts", "responses", "drafter", "traces", "head", "plots", "samples"]
    assert [getattr(run, name).name for name in names] == names
    assert run.report == run.path
    assert not run.path.exists()


def test_the_recipe_and_every_command_are_kept(tmp_path):
    parsed = parse("", [], ["--run", str(tmp_path / "a" / "b"), "--head.depth", "1"])
    run = RunFolder(parsed.run)
    run.record(parsed, "train_head", ["train_head.py", "--run", "a b"])
    run.record(parsed, "evaluate", ["drafttrain", "evaluate"])
    again = parse("", [], ["--config", str(run.recipe)])
    assert again.recipe == parsed.recipe
    commands = [json.loads(line) for line in run.commands.read_text().splitlines()]
    assert [entry["program"] for entry in commands] == ["train_head", "evaluate"]
    assert commands[0]["command"] == "train_head.py --run 'a b'"


def test_only_the_first_process_writes_the_record(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parsed = parse("", [], ["--run", str(tmp_path / "run")])
    RunFolder(parsed.run).record(parsed, "x", [])
    assert not parsed.run.exists()


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the run folder .*--run"):
        RunFolder(tmp_path / "file").create()
    with pytest.raises(UserError, match="cannot write"):
        RunFolder(tmp_path / "file" / "below").create()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_an_unwritable_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"):
        RunFolder(tmp_path).create()


def test_a_missing_input_names_the_program_that_makes_it(tmp_path):
    run = RunFolder(tmp_path)
    with pytest.raises(UserError, match=r"traces does not exist.*data_prep/traces\.py --run"):
        run.require(run.traces, "data_prep/traces.py")
    assert run.require(tmp_path, "anything") == tmp_path


def test_too_little_disk_is_told_before_anything_starts(tmp_path):
    require_space(tmp_path / "not" / "yet", 1, "the traces")
    with pytest.raises(UserError, match=r"the traces need about .* GiB"):
        require_space(tmp_path / "not" / "yet", 2**60, "the traces")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
