"""Records: killed anywhere and started again, a data set has exactly the rows it would have had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.config import REPOSITORY
from drafttrain.errors import UserError
from drafttrain.records import MANIFEST, SCHEMAS, ShardedWriter, differences, iter_records, read_manifest, read_records

MANIFEST_OF_TEST = {
    "kind": "responses",
    "seed": 7,
    "sampling": {"temperature": 1.0, "top_k": 0},
    "fingerprints": {"target": {"tokenizer": "aa", "architecture": "bb", "weights": "cc"}},
}


def row(source, turn=0):
    return {
        "prompt_id": f"p{source}",
        "split": "train",
        "task": "code",
        "source": "test",
        "turn": turn,
        "prompt_ids": list(range(source)),
        "response_ids": [source, turn],
        "finish_reason": "eos",
        "text": "\u00e9" * source,
    }


def rows_of(writer, shard):
    """Some source rows give two records, some none."""
    return [row(source, turn) for source in writer.source_range(shard) for turn in range(source % 3)]


def write_all(folder, total=10, shard_rows=3, world=1, manifest=MANIFEST_OF_TEST):
    for rank in range(world):
        writer = ShardedWriter(folder, manifest, total, shard_rows)
        for shard in writer.pending(rank, world):
            writer.write(shard, rows_of(writer, shard))
    writer.finish()
    return writer


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


EXPECTED = [row(source, turn) for source in range(10) for turn in range(source % 3)]


def test_rows_come_back_in_source_order(tmp_path):
    write_all(tmp_path / "r")
    assert list(iter_records(tmp_path / "r", "responses")) == EXPECTED
    dataset = read_records(tmp_path / "r", "responses")
    assert dataset.to_list() == EXPECTED
    manifest = read_manifest(tmp_path / "r", "responses")
    assert manifest["rows"] == len(EXPECTED) and manifest["source_rows"] == 10 and manifest["seed"] == 7
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 3, 3, 0]


def test_columns_can_be_chosen(tmp_path):
    write_all(tmp_path / "r")
    dataset = read_records(tmp_path / "r", "responses", columns=["turn", "response_ids"])
    assert dataset.column_names == ["turn", "response_ids"]
    assert dataset["turn"][:] == [entry["turn"] for entry in EXPECTED]


def test_a_data_set_without_rows_reads_as_one(tmp_path):
    write_all(tmp_path / "r", total=0)
    assert len(read_records(tmp_path / "r", "responses")) == 0
    assert list(iter_records(tmp_path / "r", "responses")) == []


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_files_do_not_depend_on_the_number_of_processes(tmp_path, world):
    write_all(tmp_path / "one")
    write_all(tmp_path / "many", world=world)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@given(total=st.integers(0, 40), shard_rows=st.integers(1, 9), world=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_shards_cover_every_source_row_once(tmp_path_factory, total, shard_rows, world):
    writer = ShardedWriter(tmp_path_factory.mktemp("r"), MANIFEST_OF_TEST, total, shard_rows)
    shards = [shard for rank in range(world) for shard in writer.pending(rank, world)]
    assert sorted(source for shard in shards for source in writer.source_range(shard)) == list(range(total))


# Crashes


def crash_at(monkeypatch, name, call):
    """Make the call number `call` of os.<name> die as a killed process would: nothing after it runs, tmp stays."""
    real, count = getattr(os, name), [0]

    def dying(*arguments, **keywords):
        count[0] += 1
        if count[0] == call:
            monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
            raise SystemExit("killed")
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, name, dying)


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("call", range(1, 7))
@pytest.mark.parametrize("world", [1, 3])
def test_killed_between_temporary_file_and_rename_then_rerun_gives_the_same_rows(tmp_path, where, call, world):
    write_all(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, where, call)
        try:
            write_all(tmp_path / "killed")
        except SystemExit:
            left = list((tmp_path / "killed").glob("part-*"))
            assert all(pq.read_metadata(path) for path in left), "a half-written file has a final name"
    write_all(tmp_path / "killed", world=world)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_records as t
writer = t.ShardedWriter({folder!r}, t.MANIFEST_OF_TEST, 10, 3)
writer.write(0, t.rows_of(writer, 0))
real = os.replace
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = die
writer.write(1, t.rows_of(writer, 1))
"""


@pytest.mark.slow
def test_a_really_killed_process_leaves_nothing_under_a_final_name(tmp_path):
    code = KILLED.format(root=str(REPOSITORY), tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    names = sorted(contents(tmp_path / "killed"))
    assert [name for name in names if not name.startswith(".")] == [MANIFEST, "part-00000.parquet"]
    assert len(names) == 3, "the temporary file of the killed process should be there"
    with pytest.raises(UserError, match="unfinished"):
        read_records(tmp_path / "killed", "responses")
    write_all(tmp_path / "killed")
    write_all(tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    writer = ShardedWriter(tmp_path, MANIFEST_OF_TEST, 10, 3)
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        writer.write(0, rows_of(writer, 0))
    assert contents(tmp_path) == before


def test_what_is_done_is_not_done_again(tmp_path):
    writer = write_all(tmp_path)
    assert writer.pending() == []
    again = ShardedWriter(tmp_path, MANIFEST_OF_TEST, 10, 3)
    assert again.pending() == [] and again.pending(1, 2) == []


def test_a_rerun_repairs_damaged_and_missing_shards(tmp_path):
    write_all(tmp_path / "r")
    whole = contents(tmp_path / "r")
    path = tmp_path / "r" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    (tmp_path / "r" / "part-00002.parquet").unlink()
    assert ShardedWriter(tmp_path / "r", MANIFEST_OF_TEST, 10, 3).pending() == [1, 2]
    write_all(tmp_path / "r")
    assert contents(tmp_path / "r") == whole


def test_other_shard_sizes_go_on_with_the_recorded_one(tmp_path):
    write_all(tmp_path / "r")
    whole = contents(tmp_path / "r")
    assert ShardedWriter(tmp_path / "r", MANIFEST_OF_TEST, 10, 5).pending() == []
    write_all(tmp_path / "r", shard_rows=5)
    assert contents(tmp_path / "r") == whole


def test_finishing_too_early_names_the_missing_shard(tmp_path):
    writer = ShardedWriter(tmp_path, MANIFEST_OF_TEST, 10, 3)
    writer.write(0, rows_of(writer, 0))
    with pytest.raises(UserError, match=r"part-00001\.parquet is missing"):
        writer.finish()
    with pytest.raises(UserError, match="unfinished"):
        read_manifest(tmp_path, "responses")


# Mismatches


def refusal(function, *arguments, **keywords):
    with pytest.raises(UserError) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_going_on_with_other_settings_names_what_differs(tmp_path):
    write_all(tmp_path)
    other = {**MANIFEST_OF_TEST, "sampling": {"temperature": 0.5, "top_k": 0}, "seed": 8}
    told = refusal(ShardedWriter, tmp_path, other, 10, 3)
    assert "seed was 7 and is now 8" in told and "sampling.temperature was 1.0 and is now 0.5" in told
    assert "top_k" not in told
    assert "source_rows was 10 and is now 11" in refusal(ShardedWriter, tmp_path, MANIFEST_OF_TEST, 11, 3)


def test_going_on_with_another_target_is_refused(tmp_path):
    ShardedWriter(tmp_path, MANIFEST_OF_TEST, 10, 3)
    other = json.loads(json.dumps(MANIFEST_OF_TEST))
    other["fingerprints"]["target"]["weights"] = "dd"
    assert "fingerprints.target.weights was cc and is now dd" in refusal(ShardedWriter, tmp_path, other, 10, 3)


def test_a_reader_checks_only_what_it_asks_about(tmp_path):
    write_all(tmp_path)
    read_records(tmp_path, "responses", expect={"sampling": {"top_k": 0}})
    told = refusal(read_records, tmp_path, "responses", expect={"sampling": {"top_k": 5}})
    assert "sampling.top_k was 0 and is now 5" in told and "seed" not in told
    assert "drafter was not set" in refusal(read_records, tmp_path, "responses", expect={"drafter": "x"})


def test_other_weights_pass_only_when_accepted_and_another_tokenizer_never(tmp_path):
    write_all(tmp_path)

    def expect(**parts):
        return {"fingerprints": {"target": {**MANIFEST_OF_TEST["fingerprints"]["target"], **parts}}}

    read_records(tmp_path, "responses", expect=expect())
    told = refusal(read_records, tmp_path, "responses", expect=expect(weights="dd"))
    assert "weights was cc and is now dd" in told and "--accept-new-target" in told
    read_records(tmp_path, "responses", expect=expect(weights="dd"), accept_new_weights=True)
    told = refusal(read_records, tmp_path, "responses", expect=expect(tokenizer="x"), accept_new_weights=True)
    assert "tokenizer was aa and is now x" in told and "--accept-new-target" not in told


def test_another_kind_and_another_schema_version_are_refused(tmp_path):
    write_all(tmp_path)
    assert "holds responses, not traces" in refusal(read_records, tmp_path, "traces")
    path = tmp_path / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    assert "schema version 99" in refusal(read_records, tmp_path, "responses")
    assert "schema_version was 99" in refusal(ShardedWriter, tmp_path, MANIFEST_OF_TEST, 10, 3)


# Damage


def test_a_missing_data_set_is_named(tmp_path):
    assert "holds no records" in refusal(read_records, tmp_path / "nowhere", "responses")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\x00", '{"kind": "responses", "schema_version": 1, "complete": true}']
)
def test_a_damaged_manifest_is_named(tmp_path, text):
    write_all(tmp_path)
    (tmp_path / MANIFEST).write_text(text)
    assert f"{MANIFEST} is damaged" in refusal(read_records, tmp_path, "responses")


@pytest.mark.parametrize("shard_rows", [0, "3", None])
def test_nothing_goes_on_with_an_impossible_shard_size(tmp_path, shard_rows):
    recorded = {**write_all(tmp_path).manifest, "shard_rows": shard_rows}
    (tmp_path / MANIFEST).write_text(json.dumps(recorded))
    assert f"{MANIFEST} is damaged" in refusal(write_all, tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    write_all(tmp_path)
    (tmp_path / "part-00002.parquet").unlink()
    assert "part-00002.parquet is missing" in refusal(read_records, tmp_path, "responses")


def test_truncation_anywhere_is_named(tmp_path):
    write_all(tmp_path)
    path = tmp_path / "part-00001.parquet"
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert "part-00001.parquet is damaged" in refusal(read_records, tmp_path, "responses")


def test_one_changed_byte_in_the_data_is_noticed(tmp_path):
    write_all(tmp_path)
    path = tmp_path / "part-00001.parquet"
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    silent = []
    for position in range(4, footer, 11):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            if read_records(tmp_path, "responses").to_list() != EXPECTED:
                silent.append(position)
        except UserError:
            pass
    assert not silent, "changed rows were read without an error"


def test_a_foreign_file_under_a_shards_name_is_refused(tmp_path):
    write_all(tmp_path)
    path = tmp_path / "part-00001.parquet"
    pq.write_table(pa.table({"x": [1, 2, 3]}), path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["shards"][1].update(rows=3, bytes=path.stat().st_size)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert "does not have the columns" in refusal(read_records, tmp_path, "responses")


def test_a_record_with_wrong_fields_is_a_bug_not_a_silent_null(tmp_path):
    writer = ShardedWriter(tmp_path, MANIFEST_OF_TEST, 10, 3)
    incomplete = row(1)
    del incomplete["text"]
    with pytest.raises(ValueError, match="text"):
        writer.write(0, [incomplete])
    with pytest.raises(ValueError, match="more"):
        writer.write(0, [{**row(1), "more": 1}])


@given(st.dictionaries(st.sampled_from("abc"), st.integers() | st.dictionaries(st.sampled_from("de"), st.integers())))
def test_nothing_differs_from_itself(settings_):
    assert differences(settings_, settings_) == []


def test_every_kind_has_ids_a_split_and_a_task():
    for schema in SCHEMAS.values():
        assert {"prompt_id", "split", "task", "source", "prompt_ids"} <= set(schema.names)
