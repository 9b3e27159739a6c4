"""Files are read row by row, and what is wrong with one is told with its place."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.reading import read_hub, read_rows
from drafttrain.errors import UserError

ROWS = [{"prompt": "one"}, {"prompt": "two\nlines"}, {"prompt": "\u00fc"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def values(path):
    return [row.value for row in read_rows(path)]


def write_every_format(folder):
    (folder / "a.jsonl").write_text(LINES + "\n", encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "c.json").write_text(json.dumps(ROWS))
    (folder / "d.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (folder / "e.json").write_text(LINES, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "f.parquet")
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_rows(tmp_path):
    for path in write_every_format(tmp_path):
        assert values(path) == ROWS, path.name


def test_a_folder_is_read_file_by_file(tmp_path):
    write_every_format(tmp_path)
    (tmp_path / "LICENSE").write_text("not a row")
    assert values(tmp_path) == 6 * ROWS


def test_text_is_one_prompt_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("first\r\n\nsecond")
    assert [(row.value, row.where.split(", ")[-1]) for row in read_rows(tmp_path / "prompts.txt")] == [
        ("first", "line 1"),
        ("second", "line 3"),
    ]


def test_a_single_object_is_one_row(tmp_path):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    (tmp_path / "chat.json").write_text(json.dumps(chat, indent=1))
    assert values(tmp_path / "chat.json") == [chat]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n', "line 2: not JSON"),
        ("a.json", b'{"a": \n', "not JSON"),
        ("a.json", b'"text"', "neither a list nor an object"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-9], "truncated"),
        ("a.jsonl.gz", b'{"a": 1}\n', "not gzip"),
        ("a.parquet", b"PAR1 and nothing more", "truncated or not Parquet"),
        ("a.csv", b"a,b\n", "no known kind"),
    ],
)
def test_a_bad_file_is_told_with_its_place(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        values(tmp_path / name)
    assert name in str(error.value)


def test_a_missing_file_and_an_empty_folder_are_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        values(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="no file of a known kind"):
        values(tmp_path)


def test_a_data_set_that_cannot_be_fetched_is_told():
    with pytest.raises(UserError, match="nobody/nothing") as error:
        list(read_hub("nobody/nothing", "train"))
    assert "\n" not in str(error.value)


def test_a_data_set_of_the_hub_is_read_by_split(tmp_path, monkeypatch):
    import datasets

    made = datasets.Dataset.from_list(ROWS)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *words, split: asked.append((*words, split)) or made)
    rows = list(read_hub("owner/set:easy", "test"))
    assert asked == [("owner/set", "easy", "test")]
    assert [row.value for row in rows] == ROWS and rows[1].where == "owner/set:easy, test row 2"


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("reset"),
        ValueError("Unknown split"),
        TimeoutError("too slow"),
        RuntimeError("Dataset scripts are no longer supported, but found set.py"),
    ],
)
def test_what_goes_wrong_with_the_hub_is_one_sentence(monkeypatch, error):
    import datasets

    def fail(*words, split):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=str(error)):
        list(read_hub("owner/set", "test"))
