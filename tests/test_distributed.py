"""Ranks and progress, with and without a launcher."""

import os
import socket
import subprocess
import sys

import pytest

from drafttrain import distributed
from drafttrain.config import REPOSITORY


def test_alone_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.process_group():
        assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
        assert distributed.is_main()
        distributed.barrier()


def test_a_launchers_environment_is_believed_before_the_group_exists(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (3, 4, False)


def test_progress_yields_everything_and_tells_it_on_the_first_process_only(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "LINE_SECONDS", 0.0)
    assert list(distributed.progress(iter(range(3)), 3, "counting")) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[0].startswith("counting 1/3") and lines[-1].startswith("counting 3/3")
    monkeypatch.setenv("RANK", "1")
    assert list(distributed.progress([1], 1, "counting")) == [1]
    assert capsys.readouterr().err == ""


def test_progress_has_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(distributed.progress("abc", 3, "x")) == ["a", "b", "c"]


def test_messages_are_said_once(monkeypatch, capsys):
    distributed.say("hello")
    monkeypatch.setenv("RANK", "1")
    distributed.say("hello")
    assert capsys.readouterr().out == "hello\n"


TWO = """
import sys
from pathlib import Path
from drafttrain import distributed as d
from drafttrain.records import ShardedWriter
with d.process_group():
    assert d.world_size() == 2
    manifest = {"kind": "responses"}
    writer = ShardedWriter(sys.argv[1], manifest, 4, 1)
    row = dict.fromkeys(["prompt_id", "split", "task", "source", "finish_reason", "text"], "")
    row |= {"prompt_ids": [], "response_ids": []}
    for shard in writer.pending(d.rank(), d.world_size()):
        assert shard % 2 == d.rank()
        writer.write(shard, [{**row, "turn": shard}])
    writer.finish()
    from drafttrain.records import iter_records
    assert [row["turn"] for row in iter_records(sys.argv[1], "responses")] == [0, 1, 2, 3]
"""


@pytest.mark.slow
def test_two_processes_write_one_data_set(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path / "r")],
            cwd=REPOSITORY,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
