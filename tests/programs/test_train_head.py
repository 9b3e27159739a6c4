"""train_head.py as people run it: every launcher, any folder, interrupted, repeated, and with mistakes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import AcceptanceHead, load_config
from drafttrain.models.checkpoint import CheckpointInfo, read_info, save_checkpoint
from tests.conftest import build_llama, build_tokenizer
from tests.training.synthetic_traces import make_manifest, make_records, write_traces

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "drafttrain" / "train_head.py"
STEPS = 8  # two epochs of four
ARGUMENTS = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "disable_tqdm": True}


@pytest.fixture(scope="module")
def pair():
    tokenizer = build_tokenizer()
    target, drafter = build_llama(seed=0, hidden=16), build_llama(layers=1, hidden=16, seed=0)
    drafter.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    drafter.lm_head.load_state_dict(target.lm_head.state_dict())
    return target, drafter, tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory, pair):
    """A run folder with drafter and traces, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    target, drafter, tokenizer = pair
    save_checkpoint(folder / "drafter", drafter, tokenizer, CheckpointInfo("drafter"))
    records = make_records(target, drafter, count=14, tune=3, length=5, run_length=2)
    write_traces(folder / "traces", records, make_manifest(target, drafter, tokenizer, run_length=2))
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


def flags(run, **head):
    words = ["--run-dir", str(run), "--head.depth", "1"]  # torchrun takes --run for one of its own
    for name, value in {"arguments": ARGUMENTS, **head}.items():
        words += [f"--head.{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
    return words


def train(run, **head):
    from drafttrain.training.head_program import train_head

    train_head(parsed(run, **head))


def parsed(run, *more, **head):
    from drafttrain.config import parse

    return parse("", ("drafter", "traces", "head"), [*flags(run, **head), *more])


def launch(*command, cwd, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    environment |= {"PYTHONPATH": str(ROOT) if "-m" in command else ""}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def weights(run):
    return load_file(run / "head" / "model.safetensors")


def assert_close(left, right, atol=0.0):
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0)


@pytest.mark.parametrize(
    "head",
    [
        {"state": "producing", "data": "exact"},
        {"state": "producing", "data": "expected"},
        {"state": "consumed", "data": "mixed", "tied": "true", "features": []},
        {"state": "consumed", "data": "rounds", "features": ["log_q", "step"]},
    ],
)
def test_a_head_is_trained_judged_and_saved(run, head):
    train(run, **head)
    settings = load_config(run / "head")
    assert (settings.state, settings.data) == (head["state"], head["data"])
    metrics = json.loads((run / "head" / "metrics.json").read_text())
    assert set(metrics["predictors"]) >= {"head", "head_raw", "raw_q", "isotonic_q", "logistic_q_entropy"}
    assert metrics["tokens"] == 5 + 14 % 5 + 5 + 15 % 5 + 5 + 16 % 5
    assert [entry["step"] for entry in metrics["curve"] if "eval_kl" in entry] == [STEPS // 2, STEPS]
    info = read_info(run / "head")
    assert info.kind == "acceptance_head"
    assert info.extra["drafter"] == settings.drafter.to_dict()
    assert not (run / "head-training").exists()


def test_the_head_stands_beside_its_drafter_only(run, pair):
    from drafttrain.models.fingerprint import fingerprint

    train(run)
    target, drafter, tokenizer = pair
    identity = {"target": fingerprint(target, tokenizer), "drafter": fingerprint(drafter, tokenizer)}
    AcceptanceHead.load(run / "head", **identity)
    other = build_llama(layers=1, hidden=16, seed=9)
    with pytest.raises(UserError, match="drafter"):
        AcceptanceHead.load(run / "head", drafter=fingerprint(other, tokenizer))


def test_a_finished_head_is_kept_and_other_settings_train_anew(run, capsys):
    train(run)
    before = (run / "head" / "model.safetensors").stat().st_mtime_ns
    (run / "head-training").mkdir()  # killed between saving and tidying up
    train(run)
    assert "already trained" in capsys.readouterr().out and not (run / "head-training").exists()
    assert (run / "head" / "model.safetensors").stat().st_mtime_ns == before
    train(run, w_rej=1)
    assert load_config(run / "head").w_rej == 1


def test_a_head_can_be_continued(run, tmp_path):
    train(run)
    first = weights(run)
    shutil.copytree(run / "head", tmp_path / "first")
    still = {**ARGUMENTS, "learning_rate": 0.0}
    train(run, init_from=tmp_path / "first", arguments=still)
    assert_close(weights(run), first)
    other = {name: value + (name == "output.bias") for name, value in first.items()}
    save_file(other, tmp_path / "first" / "model.safetensors")
    train(run, init_from=tmp_path / "first", arguments=still)  # the same path holds another start
    assert_close(weights(run), other)
    with pytest.raises(UserError, match="depth"):
        train(run, init_from=tmp_path / "first", arguments=still, depth=2)


def test_the_drafter_of_the_recipe_serves_where_the_run_has_none(run, made):
    shutil.rmtree(run / "drafter")
    with pytest.raises(UserError, match="train_drafter"):
        train(run)
    from drafttrain.training.head_program import train_head

    train_head(parsed(run, "--drafter.path", str(made / "drafter")))
    assert (run / "head" / "config.json").exists()


def test_without_tune_responses_the_head_is_trained_unjudged(run, pair, capsys):
    target, drafter, tokenizer = pair
    shutil.rmtree(run / "traces")
    records = make_records(target, drafter, count=4, tune=0, length=4)
    write_traces(run / "traces", records, make_manifest(target, drafter, tokenizer))
    train(run)
    assert "neither evaluated" in capsys.readouterr().out
    assert "predictors" not in json.loads((run / "head" / "metrics.json").read_text())


def another_drafter(run, tokenizer):
    save_checkpoint(run / "drafter", build_llama(layers=1, hidden=16, seed=9), tokenizer, CheckpointInfo("drafter"))


def truncate(run):
    shard = next((run / "traces").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spoil", "head", "told"),
    [
        (lambda run, _: shutil.rmtree(run / "traces"), {}, r"data_prep/traces\.py"),
        (another_drafter, {}, "weights"),
        (lambda run, _: truncate(run), {}, "damaged"),
        (None, {"depth": 7}, r"head\.depth"),
        (None, {"data": "mixed"}, "consumed"),
        (None, {"arguments": {"learning_rat": 1}}, "learning_rate"),
        (None, {"arguments": {"seed": 3}}, "seed"),
        (None, {"init_from": "nowhere"}, "nowhere"),
        (None, {"arguments": {**ARGUMENTS, "learning_rate": 1e30, "max_grad_norm": 0}}, "learning_rate"),
    ],
)
def test_mistakes_are_told_in_one_sentence(run, pair, spoil, head, told):
    if spoil is not None:
        spoil(run, pair[2])
    with pytest.raises(UserError, match=told) as error:
        train(run, **head)
    assert "\n" not in str(error.value)
    assert not (run / "head").exists()


def test_the_plan_shows_an_example_and_touches_nothing(run, capsys):
    from drafttrain.training.head_plan import plan

    before = sorted(run.rglob("*"))
    plan(parsed(run, data="rounds"))
    shown = capsys.readouterr().out
    assert re.search(r"\[\[.+?\]\]->", shown)  # a rejected drafted token and what the target said
    for words in ("train: 14 responses", "tune: 3 responses", "8 steps of 4 responses", "parameters", "disk"):
        assert words in shown
    assert sorted(run.rglob("*")) == before
    with pytest.raises(UserError, match="data_prep"):
        plan(parsed(run / "nothing"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "module", "accelerate"])
def test_it_runs_from_another_folder(run, tmp_path, how):
    train(run)
    expected = weights(run)
    shutil.rmtree(run / "head")
    program = {
        "file": [str(PROGRAM)],
        "module": ["-m", "drafttrain.train_head"],
        "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "1", str(PROGRAM)],
    }
    launch(sys.executable, *program[how], *flags(run), cwd=tmp_path)
    assert_close(weights(run), expected)


@pytest.mark.slow
def test_a_mistake_ends_with_code_two_and_one_line(run, tmp_path):
    done = launch(sys.executable, str(PROGRAM), *flags(run, depth=9), cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("drafttrain: head.depth is 9")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("data", ["exact", "mixed"])
def test_two_processes_train_the_head_of_one(run, tmp_path, data):
    """Fourteen responses in batches of 4 per process: the last global batch leaves the second process two."""
    head = {"state": "consumed", "data": data}
    two = Path(shutil.copytree(run, tmp_path / "two"))
    halves = {**ARGUMENTS, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    train(run, **head, arguments={**halves, "per_device_train_batch_size": 8})
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    launch(sys.executable, *launcher, str(PROGRAM), *flags(two, **head, arguments=halves), cwd=tmp_path)
    assert_close(weights(two), weights(run), atol=2e-5)
    curves = [json.loads((folder / "head" / "metrics.json").read_text()) for folder in (run, two)]
    one, other = ([entry["eval_kl"] for entry in curve["curve"] if "eval_kl" in entry] for curve in curves)
    assert one == pytest.approx(other, abs=1e-5)
    assert curves[0]["predictors"]["raw_q"] == curves[1]["predictors"]["raw_q"]


@pytest.mark.slow
def test_a_process_without_any_token_takes_part(run, tmp_path, pair):
    target, drafter, tokenizer = pair
    shutil.rmtree(run / "traces")
    records = make_records(target, drafter, count=3, tune=1, length=4)  # the second of them is empty
    write_traces(run / "traces", records, make_manifest(target, drafter, tokenizer))
    two = Path(shutil.copytree(run, tmp_path / "two"))
    train(run, arguments={**ARGUMENTS, "per_device_train_batch_size": 8})
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29612"]
    launch(sys.executable, *launcher, str(PROGRAM), *flags(two), cwd=tmp_path)
    assert_close(weights(two), weights(run), atol=2e-5)


@pytest.mark.slow
def test_deepspeed_trains_the_same_head(run, tmp_path):
    pytest.importorskip("deepspeed")
    zero = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True, "gradient_clipping": "auto"}
    zero |= dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu"), "auto")
    zero |= {"gradient_accumulation_steps": "auto"}
    settings = tmp_path / "zero2.json"
    settings.write_text(json.dumps(zero))
    plain = {**ARGUMENTS, "optim": "adamw_torch"}
    two = Path(shutil.copytree(run, tmp_path / "two"))
    train(run, arguments={**plain, "per_device_train_batch_size": 8})
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", "29613"]
    launch(*command, str(PROGRAM), *flags(two, arguments={**plain, "deepspeed": str(settings)}), cwd=tmp_path)
    assert_close(weights(two), weights(run), atol=1e-6)


def saved_steps(work):
    return [int(path.name.rsplit("-", 1)[1]) for path in work.glob("checkpoint-*")]


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_weights(run, tmp_path):
    straight = Path(shutil.copytree(run, tmp_path / "straight"))
    arguments = {**ARGUMENTS, "num_train_epochs": 60, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    arguments |= {"load_best_model_at_end": False, "save_total_limit": 3}
    command = [sys.executable, str(PROGRAM), *flags(run, arguments=arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    work = run / "head-training"
    deadline = time.time() + 300
    while not any(step >= 5 for step in saved_steps(work)) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "head").exists()
    assert 5 <= max(saved_steps(work)) < 240
    launch(*command, cwd=tmp_path)
    launch(sys.executable, str(PROGRAM), *flags(straight, arguments=arguments), cwd=tmp_path)
    assert_close(weights(run), weights(straight))
