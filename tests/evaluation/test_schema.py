"""report.json round-trips, and a file that does not fit is refused with the place that does not."""

import dataclasses
import json

import pytest

from drafttrain.errors import UserError
from drafttrain.evaluation.schema import read_report, read_samples, to_json, to_json_line
from tests.evaluation import synthetic


@pytest.fixture(scope="module")
def made():
    return synthetic.report()


def test_a_report_survives_the_file(made, tmp_path):
    (tmp_path / "report.json").write_text(to_json(made[0]))
    assert read_report(tmp_path) == made[0]
    assert read_report(tmp_path / "report.json") == made[0]


def test_a_report_from_before_load_was_measured_is_read(made, tmp_path):
    data = json.loads(to_json(made[0]))
    del data["load"]
    (tmp_path / "report.json").write_text(json.dumps(data | {"schema_version": 1}))
    read = read_report(tmp_path)
    assert read.load == [] and read.methods == made[0].methods


def test_samples_survive_the_file(made, tmp_path):
    answers = next(iter(made[1].values()))
    (tmp_path / "a.jsonl").write_text("".join(to_json_line(sample) + "\n" for sample in answers))
    assert read_samples(tmp_path / "a.jsonl") == answers


@pytest.mark.parametrize("text", [(), ("a\u2028b\x85c",), ("\r\n", "\x0b")])
def test_answers_may_hold_any_line_separator(made, tmp_path, text):
    sample = next(iter(made[1].values()))[0]
    answers = [dataclasses.replace(sample, text=each) for each in text]
    (tmp_path / "a.jsonl").write_text("".join(to_json_line(each) + "\n" for each in answers), encoding="utf-8")
    assert read_samples(tmp_path / "a.jsonl") == answers


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda d: d["methods"][0].pop("kind"), "methods[0].kind is missing"),
        (lambda d: d["methods"][1]["overall"].update(tokens="many"), "methods[1].overall.tokens should be int"),
        (lambda d: d["methods"][1]["overall"].update(tokens=True), "methods[1].overall.tokens should be int"),
        (lambda d: d["verdict"].update(decision="maybe"), "verdict.decision is 'maybe'"),
        (lambda d: d.update(extra=1), "extra is unknown"),
        (lambda d: d.update(schema_version=99), "schema version 99"),
    ],
)
def test_what_does_not_fit_is_named(made, tmp_path, damage, told):
    data = json.loads(to_json(made[0]))
    damage(data)
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(UserError) as error:
        read_report(tmp_path)
    assert told in str(error.value)


def test_missing_truncated_and_foreign_files_are_refused_in_a_sentence(made, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text(to_json(made[0])[:500])
    with pytest.raises(UserError, match="not a whole JSON"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(UserError, match="schema version None"):
        read_report(tmp_path)
    (tmp_path / "s.jsonl").write_text('{"prompt_id": "x"}\n')
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_samples(tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").write_bytes(b'{"prompt_id": "\xff"}\n')
    with pytest.raises(UserError, match="is damaged"):
        read_samples(tmp_path / "s.jsonl")


def test_infinities_become_null(made):
    row = made[0].methods[1].lossless[0]
    row.z = float("inf")
    assert "Infinity" not in to_json(made[0])
    row.z = None
