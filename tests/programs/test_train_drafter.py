"""train_drafter.py as people run it: every launcher, any folder, interrupted, repeated, and with mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from drafttrain.models.checkpoint import CheckpointInfo, read_info, save_checkpoint
from drafttrain.train_drafter import main
from tests.conftest import build_llama, build_tokenizer
from tests.training.drafting import make_run, save_responses, write_recipe

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "drafttrain" / "train_drafter.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Target, recipe and a run with 21 responses to train on: the last batch of four has one, so a second process has
    nothing to train in it."""
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, rows=25)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def flags(made, run, **arguments):
    words = ["--config", str(made / "recipe.yaml"), "--run-dir", str(run)]  # torchrun takes --run for one of its own
    for name, value in arguments.items():
        words += [f"--training.arguments.{name}", str(value)]
    return words


def launch(*command, cwd, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(ROOT) if "-m" in command else ""
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


def tool(name):
    return str(Path(sys.executable).with_name(name))


def weights(run):
    return load_file(run / "drafter" / "model.safetensors")


def curve(run):
    return [entry["loss"] for entry in json.loads((run / "training_log.json").read_text()) if "loss" in entry]


def assert_close(one, two, atol):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=atol), name


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    """The run of a single process that all launchers must reproduce."""
    run = Path(shutil.copytree(made / "run", tmp_path_factory.mktemp("alone") / "run"))
    main(flags(made, run))
    return run


# ---- one process ----


def test_the_chain_leaves_a_plain_drafter_with_its_history(made, alone):
    drafter = AutoModelForCausalLM.from_pretrained(alone / "drafter")
    assert drafter.config.num_hidden_layers == 1 and drafter.config.use_cache
    info = read_info(alone / "drafter")
    assert info.kind == "drafter" and info.target is not None and info.metrics["tau"] >= 1
    points = json.loads((alone / "tau_history.json").read_text())
    assert [point["fraction"] for point in points] == [0, 0.5, 1]
    assert yaml.safe_load((alone / "recipe.yaml").read_text())["drafter"]["layers"] == [0]
    assert not (alone / "drafter-training").exists()
    assert len(curve(alone)) == 12


def test_run_again_it_does_nothing_and_with_other_settings_it_trains_again(made, alone, tmp_path, capsys):
    run = Path(shutil.copytree(alone, tmp_path / "again"))
    before = weights(run)
    main(flags(made, run))
    assert "already trained" in capsys.readouterr().out
    main(flags(made, run, learning_rate=1e-4))
    assert not torch.equal(weights(run)["lm_head.weight"], before["lm_head.weight"])


def test_a_drafter_can_be_continued(made, alone, tmp_path):
    run = Path(shutil.copytree(made / "run", tmp_path / "more"))
    main([*flags(made, run, max_steps=1, learning_rate=0), "--drafter.init_from", str(alone / "drafter")])
    assert_close(weights(run), weights(alone), atol=0)


def test_other_weights_under_the_same_path_are_another_start(made, tmp_path, capsys):
    run, start = Path(shutil.copytree(made / "run", tmp_path / "run")), tmp_path / "start"
    tokenizer = build_tokenizer()
    for seed in (1, 2, 2):
        model = build_llama(len(tokenizer), layers=1, seed=seed)
        save_checkpoint(start, model, tokenizer, CheckpointInfo("drafter"))
        main([*flags(made, run, max_steps=1, learning_rate=0), "--drafter.init_from", str(start)])
        assert torch.equal(weights(run)["lm_head.weight"], model.lm_head.weight)
    assert capsys.readouterr().out.count("already trained") == 1


@pytest.mark.parametrize(
    "drafter",
    [
        {"kind": "new", "config": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}},
        {"kind": "cut", "layers": [1], "lora": {"r": 2, "alpha": 4}},
    ],
)
def test_other_kinds_of_drafters(made, run, tmp_path, drafter):
    recipe = write_recipe(tmp_path / "other.yaml", made / "target", drafter)
    main(["--config", str(recipe), "--run", str(run), "--training.arguments.max_steps", "2"])
    assert AutoModelForCausalLM.from_pretrained(run / "drafter").config.num_hidden_layers == 1


def test_on_policy_and_a_mix_of_losses(made, run, tmp_path):
    training = {"losses": {"forward_kl": 0.5, "total_variation": 1.0}, "on_policy_fraction": 0.5, "on_policy_tokens": 4}
    recipe = write_recipe(tmp_path / "mix.yaml", made / "target", training=training)
    main(["--config", str(recipe), "--run", str(run)])
    assert len(curve(run)) == 12


def test_without_held_out_responses_the_last_weights_are_kept(made, tmp_path, capsys):
    run = tmp_path / "run"
    save_responses(run / "responses", made / "target", rows=5)
    main(flags(made, run))
    assert "no responses of the split tune" in capsys.readouterr().out and (run / "drafter").exists()


# ---- plan ----


def test_the_plan_shows_what_is_trained_and_runs_nothing(made, run, capsys):
    main([*flags(made, run), "--plan"])
    out = capsys.readouterr().out
    assert "21 responses" in out and "[[" in out and "12 steps of 4 responses" in out
    assert "memory of one process" in out and "disk:" in out and "time:" in out
    assert sorted(path.name for path in run.iterdir()) == ["responses"]


def test_the_plan_counts_what_decoding_takes(made, run, capsys):
    def memory(*more):
        main([*flags(made, run), *more, "--plan"])
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        return {name: line.split()[0] for line in lines for name in ("copy of", "keys and values") if name in line}

    assert memory("--training.tau_evaluations", "0") == {"copy of": "0.0", "keys and values": "0.0"}
    assert memory()["copy of"] != "0.0"


def test_the_plan_of_a_deepspeed_run_needs_no_launcher(made, run, capsys):
    main([*flags(made, run, deepspeed="recipes/deepspeed/zero3.json"), "--plan"])
    assert "what would run" in capsys.readouterr().out


# ---- mistakes ----


def refused(*argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence.startswith("drafttrain: ")
    return sentence


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--training.losses", '{"kl": 1}', "known are forward_kl"),
        ("--training.temperature", "0", "at least 0.01"),
        ("--training.max_length", "100000", "the models' context, 512"),
        ("--training.max_length", "2", "has a token to train"),
        ("--training.on_policy_fraction", "1.5", "on_policy_fraction"),
        ("--training.tau_length", "0", "at least 1"),
        ("--training.arguments.learning_rat", "1", "did you mean learning_rate"),
        ("--training.arguments.deepspeed", "nowhere.json", "does not exist"),
        ("--drafter.layers", "[7]", "layers 0 to 1"),
        ("--drafter.init_from", "/nowhere", "does not exist"),
    ],
)
@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
def test_mistakes_end_in_one_sentence_before_anything_runs(made, run, capsys, flag, value, sentence, plan):
    assert sentence in refused(*flags(made, run), flag, value, *plan, capsys=capsys)
    assert not (run / "drafter").exists()


def test_another_tokenizer_is_refused(made, run, tmp_path, capsys):
    other = Path(shutil.copytree(made / "target", tmp_path / "other"))
    build_tokenizer(280).save_pretrained(other)
    settings = ["--drafter.kind", "pretrained", "--drafter.path", str(other)]
    assert "another tokenizer than the target" in refused(*flags(made, run), *settings, capsys=capsys)
    assert "another tokenizer than the target" in refused(*flags(made, run), *settings, "--plan", capsys=capsys)


def test_missing_and_damaged_responses_are_told(made, run, tmp_path, capsys):
    assert "data_prep/responses.py" in refused(*flags(made, tmp_path / "empty"), capsys=capsys)
    shard = next((run / "responses").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100])
    assert "damaged or truncated" in refused(*flags(made, run), capsys=capsys)


def test_a_diverging_run_ends_in_a_sentence(made, run, capsys):
    sentence = refused(*flags(made, run, learning_rate="1e30", max_grad_norm=0, warmup_steps=0), capsys=capsys)
    assert "learning_rate" in sentence and not (run / "drafter").exists()


# ---- launchers ----

LAUNCHERS = {
    "torchrun": [tool("torchrun"), "--nproc_per_node", "2", "--master_port", "29641"],
    "accelerate": [tool("accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "29642"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_curve_of_one(made, alone, run, tmp_path, launcher):
    launch(*LAUNCHERS[launcher], str(PROGRAM), *flags(made, run, per_device_train_batch_size=2), cwd=tmp_path)
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)
    assert_close(weights(run), weights(alone), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_curve_of_one(made, alone, run, tmp_path, stage):
    pytest.importorskip("deepspeed")
    settings = json.loads((ROOT / "recipes" / "deepspeed" / f"zero{stage}.json").read_text())
    if stage == 3:  # so small a model would stay whole otherwise
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(settings))
    command = [tool("deepspeed"), "--num_accelerators", "2", "--master_port", str(29643 + stage)]
    more = flags(made, run, per_device_train_batch_size=2, deepspeed=path)
    launch(*command, str(PROGRAM), *more, cwd=tmp_path)
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)
    assert_close(weights(run), weights(alone), atol=1e-5)


@pytest.mark.slow
def test_deepspeed_trains_in_mixed_precision_without_an_accelerator(made, alone, run, tmp_path):
    pytest.importorskip("deepspeed")
    command = [tool("deepspeed"), "--num_accelerators", "2", "--master_port", "29648", str(PROGRAM)]
    settings = {"per_device_train_batch_size": 2, "bf16": "true", "deepspeed": "recipes/deepspeed/zero2.json"}
    launch(*command, *flags(made, run, **settings), cwd=tmp_path)
    assert curve(run) == pytest.approx(curve(alone), rel=0.02)


@pytest.mark.slow
def test_fsdp_gives_the_curve_of_one(made, alone, run, tmp_path):
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    command = [tool("torchrun"), "--nproc_per_node", "2", "--master_port", "29647"]
    done = launch(*command, str(script), *flags(made, run, per_device_train_batch_size=2), cwd=tmp_path)
    assert "sharded: FSDPLlamaDecoderLayer FSDPLlamaDecoderLayer" in done.stdout
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)
    assert_close(weights(run), weights(alone), atol=1e-5)


@pytest.mark.slow
def test_as_a_module_from_another_folder(made, alone, run, tmp_path):
    launch(sys.executable, "-m", "drafttrain.train_drafter", *flags(made, run), cwd=tmp_path)
    assert_close(weights(run), weights(alone), atol=0)


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_weights(made, run, tmp_path):
    straight = Path(shutil.copytree(run, tmp_path / "straight"))
    more = {"num_train_epochs": 20, "save_steps": 1, "save_total_limit": 3}
    command = [sys.executable, str(PROGRAM), *flags(made, run, **more)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path)
    work, deadline = run / "drafter-training", time.time() + 600
    while not list(work.glob("checkpoint-*5/complete")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "drafter").exists() and list(work.glob("checkpoint-*/complete"))
    launch(*command, cwd=tmp_path)
    launch(sys.executable, str(PROGRAM), *flags(made, straight, **more), cwd=tmp_path)
    assert_close(weights(run), weights(straight), atol=0)
    points = [json.loads((folder / "tau_history.json").read_text()) for folder in (run, straight)]
    assert [[point["step"], point["tau"]] for point in points[0]] == [[p["step"], p["tau"]] for p in points[1]]
