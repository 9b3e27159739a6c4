"""data_prep/readings.py, and train_drafter.py that reads what it made: planned, made, killed, used, refused."""

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

from data_prep.readings import main as read
from drafttrain.train_drafter import main as train
from tests.programs.test_longspec import DRAFTER, TRAINING
from tests.programs.test_train_drafter import LAUNCHERS, ROOT, assert_close, curve, flags, launch, tool, weights
from tests.training.drafting import make_run

PROGRAM = ROOT / "data_prep" / "readings.py"
STORED = ["--training.readings", "stored"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    make_run(folder, rows=25, drafter=DRAFTER, training=TRAINING)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def test_training_reads_what_was_made_and_plans_tell_its_bytes(made, run, capsys):
    plain = flags(made, run)
    read([*plain, "--plan"])
    planned = int(capsys.readouterr().out.split("\nreadings: ")[1].split(" bytes")[0].replace(",", ""))
    assert not (run / "readings").exists()
    read(plain)
    files = sorted((run / "readings").glob("part-*"))
    found = sum(file.stat().st_size for file in files)
    assert planned <= found < planned + 1000 * len(files)
    capsys.readouterr()
    train([*plain, *STORED, "--plan"])
    assert f"readings of the target: {found:,} bytes in {len(files)} shards" in capsys.readouterr().out
    train([*plain, *STORED, "--training.arguments.learning_rate", "1e-2", "--training.arguments.num_train_epochs", "8"])
    assert len(curve(run)) == 48 and sum(curve(run)[-3:]) < sum(curve(run)[:3])


def memory_of_target(out: str) -> str:
    return next(line.split()[0] for line in out.splitlines() if line.endswith("  target"))


def test_the_plan_knows_that_the_layers_go(made, read_once, capsys, monkeypatch):
    monkeypatch.setattr("drafttrain.training.drafter_plan._gigabytes", lambda number: f"{number:.0f}")
    found = []
    for more in ([], STORED, ["--training.tau_evaluations", "0", *STORED]):
        train([*flags(made, read_once), *more, "--plan"])
        out = capsys.readouterr().out
        assert "for the target's states" not in out  # those are of other drafters
        found.append(memory_of_target(out))
    settings = json.loads((made / "target" / "config.json").read_text())
    ends = settings["vocab_size"] * settings["hidden_size"] * (1 if settings["tie_word_embeddings"] else 2)
    assert found[0] == found[1] and int(found[1]) > 4 * ends == int(found[2])


def test_without_measuring_no_layer_of_the_target_is_needed(made, run, capsys):
    plain = [*flags(made, run), "--training.tau_evaluations", "0"]
    read(plain)
    train([*plain, *STORED])
    assert len(curve(run)) == 12
    before = weights(run)
    shutil.rmtree(run / "drafter")
    train([*plain, *STORED])
    assert_close(weights(run), before, atol=0)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--training.positions.kind", "plain"], "positions.kind was multi_gap and is now plain"),
        (["--drafter.block.kv_layer", "0"], "layer was 1 and is now 0"),
        (["--target.dtype", "bfloat16"], "dtype was float32 and is now bfloat16"),
        (["--training.packing", "false"], "leave training.packing on"),
        (["--drafter.kind", "cut", "--drafter.layers", "[0]"], "readings stored is for drafter.kind longspec"),
    ],
)
@pytest.mark.parametrize("plan", [[], ["--plan"]], ids=["run", "plan"])
def test_mistakes_end_in_one_sentence(made, read_once, capsys, more, sentence, plan):
    with pytest.raises(SystemExit) as stop:
        train([*flags(made, read_once), *STORED, *more, *plan])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and sentence in told
    assert not (read_once / "drafter").exists()


@pytest.fixture(scope="module")
def read_once(made, tmp_path_factory):
    run = Path(shutil.copytree(made / "run", tmp_path_factory.mktemp("read") / "run"))
    read(flags(made, run))
    return run


def test_there_must_be_some_and_of_a_longspec_drafter(made, run, capsys):
    for argv in ([*STORED], [*STORED, "--plan"]):
        with pytest.raises(SystemExit) as stop:
            train([*flags(made, run), *argv])
        assert stop.value.code == 2 and "make it first with `data_prep/readings.py" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        read([*flags(made, run), "--drafter.kind", "cut"])
    assert stop.value.code == 2 and "readings are for longspec drafters" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        read([*flags(made, run), "--training.positions.served", "9000"])
    assert stop.value.code == 2 and "the target has 512 positions" in capsys.readouterr().err
    assert not (run / "readings").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_make_and_read_the_same(made, read_once, run, tmp_path, launcher):
    launch(*LAUNCHERS[launcher], str(PROGRAM), *flags(made, run), cwd=tmp_path)
    for file in (read_once / "readings").glob("part-*"):
        assert (run / "readings" / file.name).read_bytes() == file.read_bytes()
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    train([*flags(made, alone), *STORED])
    program = str(ROOT / "drafttrain" / "train_drafter.py")
    more = flags(made, run, per_device_train_batch_size=2)
    launch(*LAUNCHERS[launcher], program, *more, *STORED, cwd=tmp_path)
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)
    assert_close(weights(run), weights(alone), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("measured", [0, 2])
def test_zero3_reads_them_too(made, read_once, run, tmp_path, measured):
    """Split embeddings and heads; with layers that decode, and without any."""
    pytest.importorskip("deepspeed")
    settings = json.loads((ROOT / "recipes" / "deepspeed" / "zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(settings))
    alone = Path(shutil.copytree(read_once, tmp_path / "alone"))
    more = ["--training.tau_evaluations", str(measured), *STORED]
    train([*flags(made, alone), *more])
    shutil.copytree(read_once / "readings", run / "readings")
    command = [tool("deepspeed"), "--num_accelerators", "2", "--master_port", "29681"]
    own = flags(made, run, per_device_train_batch_size=2, deepspeed=path)
    launch(*command, str(ROOT / "drafttrain" / "train_drafter.py"), *own, *more, cwd=tmp_path)
    assert curve(run) == pytest.approx(curve(alone), abs=1e-5)
    assert_close(weights(run), weights(alone), atol=1e-5)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_files(made, read_once, run, tmp_path):
    """Shards of one row each, so that there is something to be killed between."""
    source = (
        "import data_prep.readings, drafttrain.training.readings as r; r.SHARD_BYTES = 1; data_prep.readings.main()"
    )
    command = [sys.executable, "-c", source, *flags(made, run)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    folder, deadline = run / "readings", time.time() + 300
    while len(list(folder.glob("part-*"))) < 4 and process.poll() is None and time.time() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(list(folder.glob("part-*"))) < 21
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    alone = Path(shutil.copytree(made / "run", tmp_path / "alone"))
    subprocess.run([*command[:-1], str(alone)], check=True, env=environment, stdout=subprocess.DEVNULL)
    files = sorted((alone / "readings").glob("*"))
    assert len(files) == 22 and [file.read_bytes() for file in files] == [
        (folder / file.name).read_bytes() for file in files
    ]
