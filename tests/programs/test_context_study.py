"""`drafttrain evaluate` on long prompts: real runs, whole and cut down, and a report that says approximate."""

from __future__ import annotations

import json
import re

import pytest

from drafttrain.cli import main
from drafttrain.context.cost import CompressionCost, Seconds
from drafttrain.evaluation.context_methods import METHODS
from drafttrain.evaluation.context_study import Study
from tests.conftest import build_llama, build_tokenizer
from tests.programs.test_evaluate import refused

LOW = ("--context.budgets", "[0.1]", "--context.methods", '["kv_dropping"]')
KINDS = ["recall/single/noise", "recall/multi_key/prose"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    for name, layers in (("target", 2), ("drafter", 1)):
        build_llama(layers=layers, max_position_embeddings=2048).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    hay = "The sky is wide. " * 60
    lines = [{"input": f"{hay} The key is {n}. {hay} Which key?", "outputs": [str(n)]} for n in (7, 8)]
    (folder / "ruler.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def flags(files, run, *more):
    pair = ["--target.path", str(files / "target"), "--drafter.path", str(files / "drafter"), "--run", str(run)]
    small = {"prompts": 1, "max_new_tokens": 5, "lookahead": 3, "budgets": "[0.3, 1.0]", "kinds": json.dumps(KINDS)}
    small["lookaheads"] = "[1, 3]"
    settings = [word for name, value in small.items() for word in (f"--context.{name}", str(value))]
    return [*pair, "--evaluate.dtype", "float32", *settings, *more]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    methods = json.dumps(list(METHODS))
    decoding = ["--context.decoding", "Model(drafter, length=2)"]
    main(["evaluate", *flags(files, folder, "--context.lengths", "[700]", "--context.methods", methods, *decoding)])
    return folder


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run / "context.json").read_text())


def test_every_method_is_run_at_every_budget_beside_the_dense_target(report):
    rows = {(row["method"], row["budget"]): row for row in report["rows"]}
    assert set(rows) == {("dense", 1.0), *((name, budget) for name in METHODS for budget in (0.3, 1.0))}
    for row in rows.values():
        assert row["prompts"] == 2 and set(row["tasks"]) == set(KINDS) and row["first_token"] > 0
    dropped = rows["kv_dropping", 0.3]
    assert dropped["draft_prefill"] > 0 and dropped["scoring"] > 0 and 0 < dropped["recall"] < 1
    assert rows["prompt_compression", 0.3]["recall"] is None
    for name in ("snapkv", "streaming", "random"):  # they look at no lookahead, so none is drafted for them
        assert rows[name, 0.3]["draft_prefill"] == rows[name, 0.3]["free_tokens"] == 0


def test_a_budget_of_everything_is_the_dense_answer_and_a_small_one_is_small(report):
    rows = {(row["method"], row["budget"]): row for row in report["rows"]}
    dense = rows["dense", 1.0]
    for name in METHODS:
        whole = rows[name, 1.0]
        assert whole["same"] == 1.0 and whole["score"] == dense["score"]
        assert whole["recall"] in (None, 1.0) and (whole["kl"] or 0) < 1e-6
        assert rows[name, 0.3]["kv_bytes"] < 0.45 * dense["kv_bytes"]


def test_the_report_says_approximate_and_shows_what_was_kept(run, report):
    page, text = (run / "context.html").read_text(), (run / "context.md").read_text()
    assert "Approximate" in report["warning"] and report["warning"] in text
    assert "may differ" in page and "class='kept'" in page and "class='dropped'" in page
    assert set(report["break_even"]) == {"0.3", "1"}
    plots = {"accuracy", "recall", "mass", "kl", "speed", "memory", "first_token", "break_even", "lookahead"}
    assert plots == set(report["plots"])
    for path in report["plots"].values():
        assert (run / path).read_bytes().startswith(b"\x89PNG")


def test_kv_dropping_is_swept_by_its_lookahead(run, report):
    rows = {row["method"]: row for row in report["lookaheads"]}
    assert list(rows) == ["1", "3", "3, confidence 0.5", "3, settled 0.1"]
    one, three, confident, settled = rows.values()
    assert one["drafted"] == 1 and three["drafted"] == 3 and {row["budget"] for row in rows.values()} == {0.3}
    assert confident["drafted"] < 3 and settled["drafted"] <= 3  # random weights are never confident
    for row in rows.values():
        assert 0 <= row["free_tokens"] <= row["drafted"] and row["overhead"] > 0 and 0 < row["recall"] < 1
    own = next(row for row in report["rows"] if (row["method"], row["budget"]) == ("kv_dropping", 0.3))
    assert all(own[name] == three[name] for name in ("drafted", "score", "same", "recall", "kl"))
    assert "Lookahead of KV dropping at 30%" in (run / "context.md").read_text()


def test_short_prompts_are_read_whole_where_compression_does_not_pay(files, tmp_path, monkeypatch):
    costs = CompressionCost(Seconds(0, 1.0, 0.0), Seconds(500, 0.0, 0.0))
    monkeypatch.setattr("drafttrain.evaluation.context_study.compression_cost", lambda *_: costs)
    lengths = ("--context.lengths", "[400, 1200]", "--context.methods", '["prompt_compression", "both"]')
    main(["evaluate", *flags(files, tmp_path / "run", *lengths, "--context.bypass", "true")])
    report = json.loads((tmp_path / "run" / "context.json").read_text())
    assert report["break_even"] == {"0.3": 715, "1": None} and report["bypass"]
    short, long = ([row for row in report["rows"] if row["length"] == length] for length in (400, 1200))
    single = [row for row in short if row["method"] == "prompt_compression"]
    assert all(row["draft_prefill"] == 0 and row["same"] == 1 for row in single)
    assert any(row["method"] == "prompt_compression" and row["draft_prefill"] > 0 for row in long)


def test_every_document_keeps_its_minimum(files, tmp_path):
    """Each line is one; the drafter is random, so it would leave some out."""
    text = "".join(f"{number}: the sky is wide and the sea is deep here.\n" for number in range(30))
    (tmp_path / "ruler.jsonl").write_text(json.dumps({"input": f"{text}\nWhich key?", "outputs": ["7"]}) + "\n")
    for least in (0, 3):
        own = {"path": str(tmp_path / "ruler.jsonl"), "methods": '["chunks"]', "min_per_document": str(least)}
        more = [word for name, value in own.items() for word in (f"--context.{name}", value)]
        main(["evaluate", *flags(files, tmp_path / "run", *more, "--context.budgets", "[0.4]")])
        [example] = json.loads((tmp_path / "run" / "context.json").read_text())["examples"]
        dropped = "".join(re.findall(r"<span[^>]*>([^<]*)</span>", example["html"]))
        whole = [number for number in range(30) if f"{number}: the sky is wide and the sea is deep here." in dropped]
        assert bool(whole) == (least == 0)


def test_a_file_of_prompts_is_run(files, tmp_path):
    more = ("--context.path", str(files / "ruler.jsonl"), "--context.prompts", "2", "--context.methods", '["snapkv"]')
    main(["evaluate", *flags(files, tmp_path / "run", *more)])
    rows = json.loads((tmp_path / "run" / "context.json").read_text())["rows"]
    assert {row["prompts"] for row in rows} == {2} and {row["length"] for row in rows} == {rows[0]["length"]}


def test_a_prompt_shorter_than_the_window_is_read_whole(files, tmp_path):
    (tmp_path / "short.jsonl").write_text(json.dumps({"input": "The key is 7. Which?", "outputs": ["7"]}) + "\n")
    more = ("--context.path", str(tmp_path / "short.jsonl"), "--context.methods", json.dumps(list(METHODS)))
    main(["evaluate", *flags(files, tmp_path / "run", *more)])
    rows = json.loads((tmp_path / "run" / "context.json").read_text())["rows"]
    assert all(row["same"] == 1.0 and row["draft_prefill"] == 0 for row in rows)


def test_the_question_is_read_by_every_method(files, tmp_path):
    """It stands before a tail that is longer than any window."""
    hay = "The sky is wide. " * 60
    record = {"input": f"{hay}\nWhere is the zebra?", "outputs": ["here"], "answer_prefix": " so" * 90}
    (tmp_path / "ruler.jsonl").write_text(json.dumps(record) + "\n")
    more = ("--context.path", str(tmp_path / "ruler.jsonl"), "--context.methods", '["window", "both"]')
    main(["evaluate", *flags(files, tmp_path / "run", *more)])
    for example in json.loads((tmp_path / "run" / "context.json").read_text())["examples"]:
        marked = "".join(re.findall(r"<mark[^>]*>([^<]*)</mark>", example["html"]))
        assert "Where is the zebra?" in marked


def test_budgets_are_looked_at_before_anything_is_run(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Study, "rows", None)
    error = refused(capsys, "evaluate", *flags(files, tmp_path / "run", "--context.lengths", "[1500, 256]", *LOW))
    assert "kv_dropping at 0.1 of prompt recall/single/noise/256/" in error and "context.budgets" in error


def test_a_plan_runs_nothing_and_says_what_would_run(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("drafttrain.evaluation.context_study.load_models", None)
    main(["evaluate", *flags(files, tmp_path / "run", "--context.lengths", "[700, 1500]", "--plan")])
    told = capsys.readouterr().out
    assert "2 prompts of about 700 tokens" in told and "recall/multi_key/prose 1" in told
    assert "30% = 210, 100% = 700 tokens, at most " in told and "30% = 450, 100% = 1500" in told
    assert "kv_dropping: keys by LookaheadAttention(window=32" in told and "1; 3; 3, confidence 0.5; 3, settled" in told
    assert "13 runs of 4 prompts" in told and re.search(r"time: about \d+ min on cpu", told)
    assert "lookahead: at most 3 tokens" in told and "budgets:\n  - 0.3" in told
    assert not (tmp_path / "run").exists()
    error = refused(capsys, "evaluate", *flags(files, tmp_path / "run", "--context.path", "none.jsonl", "--plan"))
    assert "none.jsonl does not exist" in error


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--context.methods", '["snap"]'], "context.methods has snap"),
        (["--context.budgets", "[0.01]"], "a budget of . tokens .* is less than"),
        (["--context.budgets", "[-0.5]"], "context.budgets"),
        (["--context.budgets", "[1.5]"], "context.budgets"),
        (["--context.budgets", "[]"], "context.budgets is empty"),
        (["--context.kinds", '["recall/none"]'], "there is no task kind recall/none"),
        (["--context.lengths", "[4096]"], "exceeds the pair's context of 2048"),
        (["--context.path", "none.jsonl"], "does not exist"),
        (["--context.documents", "("], "context.documents is no regular expression"),
        (["--context.methods", '["chunks"]', "--context.min_per_document", "90"], "or the 90 of each document"),
        (["--context.lookaheads", "[0]"], "context.lookaheads"),
        (["--context.decoding", "Model(none, length=2)"], "names none"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence_by_run_and_plan(files, tmp_path, capsys, more, sentence):
    for plan in ([], ["--plan"]):
        own = flags(files, tmp_path / "run", "--context.lengths", "[700]", *more, *plan)
        assert re.search(sentence, refused(capsys, "evaluate", *own))
    assert not (tmp_path / "run" / "context.json").exists()
