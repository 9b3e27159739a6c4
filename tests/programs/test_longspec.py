"""train_drafter.py with `kind: longspec`: trained, continued, killed, split over processes, refused in a sentence."""

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

from drafttrain.models.checkpoint import read_info
from drafttrain.models.loading import AutoDrafter
from drafttrain.train_drafter import main
from tests.programs.test_train_drafter import (
    LAUNCHERS,
    PROGRAM,
    ROOT,
    assert_close,
    curve,
    flags,
    launch,
    tool,
    weights,
)
from tests.training.drafting import make_run, save_responses, save_target, write_recipe

DRAFTER = {"kind": "longspec", "block": {"window": 8, "warm_start": 1, "depth": 3}}
TRAINING = {"positions": {"kind": "multi_gap"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, rows=25, drafter=DRAFTER, training=TRAINING)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    run = Path(shutil.copytree(made / "run", tmp_path_factory.mktemp("alone") / "run"))
    main(flags(made, run))
    return run


def test_the_run_leaves_a_longspec_drafter(alone):
    info, drafter = read_info(alone / "drafter"), AutoDrafter.from_pretrained(alone / "drafter")
    assert info.kind == "longspec" and info.target is not None and info.metrics["tau"] >= 1
    assert (drafter.config.window, drafter.config.kv_layer, drafter.config.depth) == (8, 1, 3)
    assert sum(weight.numel() for weight in drafter.parameters()) < 20_000  # neither embedding nor head
    assert len(curve(alone)) == 12 and not (alone / "drafter-training").exists()


def test_stages_follow_each_other_by_init_from(made, alone, run, tmp_path):
    training = {"positions": {"kind": "plain"}}
    recipe = write_recipe(
        tmp_path / "next.yaml", made / "target", DRAFTER | {"init_from": str(alone / "drafter")}, training
    )
    main(["--config", str(recipe), "--run", str(run), "--training.arguments.learning_rate", "0"])
    assert_close(weights(run), weights(alone), atol=0)


def test_a_block_that_copies_begins_further_on(tmp_path, capsys):
    target = save_target(tmp_path / "target", hidden=64)
    first = []
    for copying in (False, True):
        run = tmp_path / f"run-{copying}"
        save_responses(run / "responses", target, 25)
        drafter = {"kind": "longspec", "block": {"window": 8, "warm_start": 1, "depth": 3, "copying": copying}}
        main(["--config", str(write_recipe(tmp_path / "recipe.yaml", target, drafter, TRAINING)), "--run", str(run)])
        first.append(curve(run)[0])
        assert ("explain" in capsys.readouterr().out) == copying
    assert first[0] != first[1]


def test_the_plan_runs_nothing(made, run, capsys):
    main([*flags(made, run), "--plan"])
    out = capsys.readouterr().out
    assert "what would run" in out and "memory of one process" in out
    assert sorted(path.name for path in run.iterdir()) == ["responses"]


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--training.positions.served", "9000", "served is 9000, but the target has 512 positions"),
        ("--drafter.block.kv_layer", "5", "the target has layers 0 to 1"),
        ("--drafter.block.window", "0", "at least 1"),
        ("--drafter.block.copying", "true", "4 rotary pairs cannot tell distances apart"),
        ("--drafter.block.windw", "4", "did you mean --drafter.block.window"),
        ("--training.positions.kind", "anchored", "anchor_offset"),
    ],
)
@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
def test_mistakes_end_in_one_sentence(made, run, capsys, flag, value, sentence, plan):
    with pytest.raises(SystemExit) as stop:
        main([*flags(made, run), flag, value, *plan])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (run / "drafter").exists()


@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
def test_a_target_that_sees_a_window_only_is_refused(made, run, tmp_path, capsys, plan):
    settings = json.loads((made / "target" / "config.json").read_text())
    folder = Path(shutil.copytree(made / "target", tmp_path / "target"))
    changed = settings | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(changed))
    shutil.rmtree(run / "responses")
    save_responses(run / "responses", folder)
    with pytest.raises(SystemExit) as stop:
        main([*flags(made, run), "--target.path", str(folder), *plan])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "no layer of this mistral target is full attention" in told
    assert not (run / "drafter").exists()


def test_another_block_is_no_continuation(made, alone, run, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*flags(made, run), "--drafter.init_from", str(alone / "drafter"), "--drafter.block.window", "9"])
    assert stop.value.code == 2
    assert "has window 8 where the recipe makes it 9" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_curve_of_one(made, alone, run, tmp_path, launcher):
    launch(*LAUNCHERS[launcher], str(PROGRAM), *flags(made, run, per_device_train_batch_size=2), cwd=tmp_path)
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)
    assert_close(weights(run), weights(alone), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_gives_the_curve_of_one(made, alone, run, tmp_path, stage):
    pytest.importorskip("deepspeed")
    settings = json.loads((ROOT / "recipes" / "deepspeed" / f"zero{max(stage, 2)}.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    if stage == 3:  # so small a model would stay whole otherwise
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(settings))
    command = [tool("deepspeed"), "--num_accelerators", "2", "--master_port", str(29651 + stage)]
    more = flags(made, run, per_device_train_batch_size=2, deepspeed=path)
    launch(*command, str(PROGRAM), *more, cwd=tmp_path)
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)
    assert_close(weights(run), weights(alone), atol=1e-5)


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
    assert torch.isfinite(weights(run)["mlp.up_proj.weight"]).all()
