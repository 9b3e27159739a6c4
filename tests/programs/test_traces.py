"""traces.py as people run it: every launcher, any folder, killed, repeated, planned, and with mistakes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep import responses, traces
from drafttrain.evaluation.trace_record import record_of
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.models.checkpoint import CheckpointInfo, save_checkpoint
from drafttrain.models.fingerprint import fingerprint
from drafttrain.records import read_manifest, read_records
from tests.conftest import build_llama, build_tokenizer
from tests.programs.test_responses import environment, launch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "data_prep" / "traces.py"
ROWS = 10


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a target and of a drafter that is a noisy copy of it."""
    folder = tmp_path_factory.mktemp("models")
    target, drafter = build_llama(hidden=16), build_llama(hidden=16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for name, model in (("target", target), ("drafter", drafter)):
        save_checkpoint(folder / name, model, build_tokenizer(), CheckpointInfo(name))
    return folder


@pytest.fixture(scope="module")
def answered(models, tmp_path_factory):
    """A run folder with responses."""
    folder = tmp_path_factory.mktemp("answered")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{at} apple " * (1 + at % 4)}) + "\n" for at in range(ROWS)))
    flags = ["--target.path", models / "target", "--prompts.source", "file", "--prompts.path", prompts]
    flags += ["--prompts.near_duplicate", "1.0", "--responses.max_new_tokens", "12", "--run", folder / "run"]
    responses.main([str(flag) for flag in flags])
    return folder / "run"


@pytest.fixture
def run(answered, tmp_path):
    """A run folder of the test's own with the same responses."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "responses").symlink_to(answered / "responses")
    return tmp_path / "run"


def settings(models, run):
    flags = ["--target.path", models / "target", "--drafter.path", models / "drafter", "--run-dir", run]
    flags += ["--traces.shard_rows", 3, "--traces.batch_size", 2, "--traces.run_length", 3, "--traces.top_k", 4]
    return [str(flag) for flag in flags]


def rows(run):
    return list(read_records(Path(run) / "traces", "traces"))


@pytest.fixture(scope="module")
def reference(models, answered, tmp_path_factory):
    """Rows of an uninterrupted run in this process."""
    run = tmp_path_factory.mktemp("reference")
    (run / "responses").symlink_to(answered / "responses")
    traces.main(settings(models, run))
    return rows(run)


def differing(found, expected):
    """What differs between rows, by number and column: ids exactly, floats beyond the rounding of another batch."""
    if len(found) != len(expected):
        return [f"{len(found)} rows, not {len(expected)}"]
    return [
        (number, name)
        for number, (row, other) in enumerate(zip(found, expected, strict=True))
        for name, value in row.items()
        if not _alike(value, other[name])
    ]


def _alike(value, other):
    if value and isinstance(value, list) and isinstance(value[0], float):
        return len(value) == len(other) and np.allclose(value, other, rtol=1e-7, atol=1e-4)
    return value == other


def refused(capsys, *arguments):
    """The sentence with which the program refuses, in this process."""
    with pytest.raises(SystemExit) as stop:
        traces.main([str(word) for word in arguments])
    assert stop.value.code == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("drafttrain: ")]
    assert len(told) == 1
    return told[0]


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves


def test_every_response_is_traced_in_order(models, run, capsys):
    traces.main(settings(models, run))
    answers = list(read_records(run / "responses", "responses"))
    made = rows(run)
    assert [row["response_ids"] for row in made] == [row["response_ids"] for row in answers]
    assert [row["prompt_id"] for row in made] == [row["prompt_id"] for row in answers]
    manifest = read_manifest(run / "traces", "traces")
    assert set(manifest["fingerprints"]) == {"target", "drafter"}
    assert manifest["scores"] == ["confidence", "entropy", "max_q"]
    record = record_of(made, manifest)
    assert record.size == sum(len(row["response_ids"]) for row in answers)
    assert f"traces: {ROWS} responses, {record.size} drafted tokens" in capsys.readouterr().out


def test_log_z_is_stored_at_the_temperature_that_is_traced(models, run):
    traces.main([*settings(models, run), "--traces.temperatures", "[0.25]"])
    manifest = read_manifest(run / "traces", "traces")
    assert manifest["temperatures"] == [0.25, manifest["sampling"]["temperature"]]
    assert all(len(row["log_z_q"]) == 2 * len(row["response_ids"]) for row in rows(run))


def test_a_second_run_changes_nothing_and_batches_do_not_matter(models, run, reference):
    traces.main([*settings(models, run), "--traces.batch_size", "5"])
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    traces.main(settings(models, run))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")} == before
    assert not differing(rows(run), reference)


def test_a_lost_or_damaged_shard_is_made_again_with_the_same_rows(models, run, reference):
    traces.main(settings(models, run))
    shards = sorted((run / "traces").glob("part-*.parquet"))
    shards[0].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:100])
    traces.main(settings(models, run))
    assert rows(run) == reference


def test_scores_of_a_head_are_stored_by_its_path(models, run, tmp_path):
    pair = {}
    for name in ("target", "drafter"):
        model = _load(models / name)
        pair[name] = fingerprint(model, build_tokenizer())
    head = AcceptanceHead(AcceptanceHeadConfig(16, depth=0, features=("step",), max_length=2, **pair))
    save_checkpoint(tmp_path / "head", head, None, CheckpointInfo("acceptance_head"))
    traces.main([*settings(models, run), "--traces.scores", json.dumps([str(tmp_path / "head")])])
    manifest = read_manifest(run / "traces", "traces")
    assert manifest["scores"][3:] == [f"{tmp_path / 'head'}@1", f"{tmp_path / 'head'}@2"]
    record = record_of(rows(run), manifest)
    assert record.scores[str(tmp_path / "head")].values_TC.shape == (record.size, 2)


def _load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Plan and mistakes


def test_a_plan_shows_an_example_and_estimates_and_writes_nothing(models, run, capsys):
    traces.main([*settings(models, run), "--plan"])
    told = capsys.readouterr().out
    assert "[[" in told and "<|assistant|>" in told
    assert f"traces: {ROWS} responses" in told
    assert "runs: 3 tokens beyond every rejection" in told
    assert "shards: 4 of 3 responses, 0 of them there already" in told
    assert "disk:" in told and "memory a process:" in told
    assert not (run / "traces").exists()


@pytest.mark.parametrize("plan", [["--plan"], []])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--drafter.path", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--target.path", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--traces.run_length", "-1"], "traces.run_length must be at least 0"),
        (["--traces.sampling.temperature", "0"], "drawn with temperature 1.0 and traces.sampling has temperature 0"),
    ],
)
def test_mistakes_are_told_by_the_plan_and_by_the_run(models, run, capsys, change, told, plan):
    assert told in refused(capsys, *settings(models, run), *change, *plan)


def test_missing_responses_are_refused(models, tmp_path, capsys):
    sentence = refused(capsys, *settings(models, tmp_path / "empty"))
    assert "responses does not exist; make it first with `data_prep/responses.py" in sentence


def test_a_drafter_of_another_tokenizer_is_refused(models, run, tmp_path, capsys):
    foreign = save_checkpoint(tmp_path / "foreign", build_llama(hidden=16), build_tokenizer(290), CheckpointInfo("x"))
    for plan in ([], ["--plan"]):
        assert "another tokenizer" in refused(capsys, *settings(models, run), "--drafter.path", foreign, *plan)


def test_another_target_than_the_one_that_answered_is_refused_until_accepted(models, run, tmp_path, capsys):
    other = save_checkpoint(tmp_path / "t", build_llama(hidden=16, seed=5), build_tokenizer(), CheckpointInfo("target"))
    flags = [*settings(models, run), "--target.path", str(other)]
    assert "weights differ" in refused(capsys, *flags)
    traces.main([*flags, "--accept-new-target"])
    assert len(rows(run)) == ROWS


def test_other_settings_in_the_same_folder_are_refused(models, run, capsys):
    traces.main(settings(models, run))
    assert "top_k was 4 and is now 5" in refused(capsys, *settings(models, run), "--traces.top_k", "5")


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [sys.executable, PROGRAM],
        [sys.executable, "-m", "data_prep.traces"],
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631", PROGRAM],
    ],
    ids=["python", "module", "torchrun"],
)
def test_any_launcher_from_any_folder_makes_the_same_rows(models, run, tmp_path, reference, launcher):
    launch(*launcher, *settings(models, run), cwd=tmp_path)
    assert not differing(rows(run), reference)


@pytest.mark.slow
def test_killed_midway_and_started_again_it_ends_with_the_same_rows(models, run, tmp_path, reference):
    command = [sys.executable, str(PROGRAM), *settings(models, run)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not list((run / "traces").glob("part-*.parquet")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (run / "traces").glob("part-*.parquet")}
    traces.main(settings(models, run))
    assert not differing(rows(run), reference)
    assert all(path.stat().st_mtime_ns == made for path, made in kept.items()), "finished shards are not made again"
