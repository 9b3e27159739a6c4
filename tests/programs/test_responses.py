"""responses.py as people run it: every launcher, any folder, killed, repeated, planned, and with mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import responses
from drafttrain.models.checkpoint import CheckpointInfo, save_checkpoint
from drafttrain.records import read_manifest, read_records
from tests.conftest import build_llama, build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "data_prep" / "responses.py"
PROMPTS = 10
SHARD_ROWS = 4


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "model"
    return save_checkpoint(folder, build_llama(hidden=16), build_tokenizer(), CheckpointInfo("target"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "questions.jsonl"
    rows = [{"question_id": at, "turns": [f"{at} apple " * (1 + at % 5), f"pear {at}"]} for at in range(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def flags(target, prompts):
    return settings(target, prompts)


def settings(target, prompts, max_new_tokens=6):
    return [
        *("--target.path", str(target), "--prompts.source", "file", "--prompts.path", str(prompts)),
        *("--prompts.near_duplicate", "1.0", "--responses.max_new_tokens", str(max_new_tokens)),
        *("--responses.batch_size", "3", "--responses.shard_rows", str(SHARD_ROWS)),
    ]


def rows(run, kind="responses"):
    return list(read_records(Path(run) / kind, kind))


def refused(capsys, *arguments):
    """The sentence with which the program refuses, in this process."""
    with pytest.raises(SystemExit) as stop:
        responses.main([str(word) for word in arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    told = [line for line in lines if line.startswith("drafttrain: ")]
    assert len(told) == 1, lines
    return told[0]


def environment():
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return os.environ | quiet | {"ACCELERATE_USE_CPU": "true"}


def launch(*command, cwd):
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment() | ({"PYTHONPATH": str(ROOT)} if "-m" in command[:2] else {}),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def reference(target, prompts, tmp_path_factory):
    """Rows of an uninterrupted run in this process."""
    run = tmp_path_factory.mktemp("reference") / "run"
    responses.main([*settings(target, prompts), "--run", str(run)])
    return rows(run)


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves


def test_every_turn_of_every_prompt_is_answered(flags, tmp_path, capsys):
    responses.main([*flags, "--run", str(tmp_path / "run")])
    made, asked = rows(tmp_path / "run"), rows(tmp_path / "run", "prompts")
    assert [(row["prompt_id"], row["turn"]) for row in made] == [(p["prompt_id"], t) for p in asked for t in (0, 1)]
    manifest = read_manifest(tmp_path / "run" / "responses", "responses")
    assert set(manifest["fingerprints"]["target"]) == {"tokenizer", "architecture", "weights"}
    assert (manifest["sampling"]["temperature"], manifest["seed"]) == (1.0, 0)
    assert "responses: 20 (" in capsys.readouterr().out


def test_a_second_run_changes_nothing(flags, tmp_path):
    run = tmp_path / "run"
    responses.main([*flags, "--run", str(run)])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    responses.main([*flags, "--run", str(run), "--responses.batch_size", "7"])
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before


def test_a_lost_or_damaged_shard_is_made_again_with_the_same_rows(flags, tmp_path, reference):
    run = tmp_path / "run"
    responses.main([*flags, "--run", str(run)])
    shards = sorted((run / "responses").glob("part-*.parquet"))
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:100])
    responses.main([*flags, "--run", str(run)])
    assert rows(run) == reference


def test_the_seed_decides_sampled_answers(flags, tmp_path, reference):
    responses.main([*flags, "--run", str(tmp_path / "run"), "--seed", "1", "--prompts.seed", "0"])
    other = rows(tmp_path / "run")
    assert [row["prompt_id"] for row in other] == [row["prompt_id"] for row in reference]
    assert [row["response_ids"] for row in other] != [row["response_ids"] for row in reference]


def test_logged_answers_are_kept_without_decoding(target, tmp_path):
    log = tmp_path / "log.jsonl"
    talk = [{"role": "user", "content": "apple?"}, {"role": "assistant", "content": "pear."}]
    log.write_text(json.dumps({"messages": talk, "id": "one"}) + "\n")
    flags = [*settings(target, log), "--responses.source", "logged", "--run", str(tmp_path / "run")]
    responses.main(flags)
    [row] = rows(tmp_path / "run")
    assert (row["prompt_id"], row["text"], row["finish_reason"]) == ("one", "pear.", "eos")


def test_a_run_that_ends_without_an_answer_says_so(target, tmp_path, capsys, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"q": "apple?", "a": "pear."}) + "\n")
    monkeypatch.setattr("data_prep.answering.logged", lambda *_: iter(()))
    fields = ["--prompts.fields", '{"prompt": "q", "answer": "a"}', "--responses.source", "logged"]
    assert "no prompt got an answer" in refused(capsys, *settings(target, log), *fields, "--run", tmp_path / "run")


def test_the_reference_world_needs_no_file(target, tmp_path):
    mixture = json.dumps({"code": 3, "revise": 3})
    world = ["--prompts.mixture", mixture, "--prompts.length", "200", "--responses.max_new_tokens", "4"]
    responses.main(["--target.path", str(target), *world, "--run", str(tmp_path / "run")])
    assert {row["task"] for row in rows(tmp_path / "run")} == {"code", "revise"}


# ---------------------------------------------------------------------------------------------------------------------
# Plan


def test_a_plan_shows_an_example_and_estimates_and_writes_nothing(flags, tmp_path, capsys):
    responses.main([*flags, "--run", str(tmp_path / "run"), "--plan"])
    told = capsys.readouterr().out
    assert "<|assistant|>[[the target's answer, at most 6 tokens]]" in told
    assert "20 answers by" in told and "shards: 3 of 4 prompts, 0 of them there already" in told
    assert "max_new_tokens: 6" in told and "disk:" in told
    assert not (tmp_path / "run").exists()


def test_a_plan_of_logged_answers_marks_the_recorded_one(target, tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"q": "apple?", "a": "pear."}) + "\n")
    fields = ["--prompts.fields", '{"prompt": "q", "answer": "a"}', "--responses.source", "logged"]
    responses.main([*settings(target, log), *fields, "--run", str(tmp_path / "run"), "--plan"])
    assert "<|assistant|>[[pear.<|end|>]]" in capsys.readouterr().out


def test_a_plan_of_answers_that_cannot_be_used_is_told(target, tmp_path, capsys, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({"q": "apple?", "a": "pear."}) + "\n")
    monkeypatch.setattr("data_prep.responses_plan.logged", lambda *_: iter(()))
    fields = ["--prompts.fields", '{"prompt": "q", "answer": "a"}', "--responses.source", "logged"]
    told = refused(capsys, *settings(target, log), *fields, "--run", tmp_path / "run", "--plan")
    assert "no recorded answer can be used" in told


@pytest.mark.parametrize("plan", [["--plan"], []])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--prompts.path", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--responses.batch_size", "0"], "responses.batch_size"),
        (["--responses.sampling.top_p", "0"], "sampling.top_p"),
        (["--prompts.preset", "mt_bnch"], "mt_bench"),
        (["--responses.source", "logged"], "no prompt has a recorded answer"),
        (["--target.path", "nowhere/at/all"], "nowhere/at/all does not exist"),
    ],
)
def test_mistakes_are_told_by_the_plan_and_by_the_run(flags, tmp_path, capsys, change, told, plan):
    assert told in refused(capsys, *flags, *change, "--run", tmp_path / "run", *plan)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "fine"', "line 2: not JSON"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"question": "x"}', "line 2: field text is missing"),
        (json.dumps({"prompt": "apple " * 600}), "line 2: the prompt has"),
    ],
)
def test_a_bad_prompt_is_told_with_file_and_line_and_leaves_nothing(target, tmp_path, capsys, line, told):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    sentence = refused(capsys, *settings(target, path), "--run", tmp_path / "run")
    assert "bad.jsonl" in sentence and told in sentence
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_other_settings_in_the_same_folder_are_refused(flags, tmp_path, capsys):
    responses.main([*flags, "--run", str(tmp_path / "run")])
    sentence = refused(capsys, *flags, "--responses.sampling.temperature", "0.5", "--run", tmp_path / "run")
    assert "sampling.temperature was 1.0 and is now 0.5" in sentence


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, PROGRAM],
        [sys.executable, "-m", "data_prep.responses"],
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", PROGRAM],
    ],
    ids=["python", "module", "accelerate"],
)
def test_any_launcher_from_any_folder_makes_the_same_rows(flags, tmp_path, reference, launcher):
    launch(*launcher, *flags, "--run", tmp_path / "run", cwd=tmp_path)
    assert rows(tmp_path / "run") == reference


@pytest.mark.slow
def test_killed_midway_and_started_again_it_ends_with_the_same_rows(flags, tmp_path, reference):
    run = tmp_path / "run"
    command = [sys.executable, str(PROGRAM), *flags, "--run", str(run)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    try:
        _wait_for_shards(run, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (run / "responses").glob("part-*.parquet")}
    assert kept, "nothing was finished before the kill"
    responses.main([*flags, "--run", str(run)])
    assert rows(run) == reference
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items()), "finished shards are not made again"


def _wait_for_shards(run, process):
    """Wait until one shard is there; the kill may also find the run finished, which must be fine too."""
    deadline = time.monotonic() + 200
    while not list((run / "responses").glob("part-*.parquet")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
