"""An acceptance head of a LongSpec drafter: traced, trained, stopping chains and trees, refused where it cannot be."""

from __future__ import annotations

import json

import pytest

from data_prep import responses, traces
from drafttrain import train_head
from drafttrain.cli import main
from drafttrain.evaluation.schema import read_report
from drafttrain.models.acceptance_head import load_config
from drafttrain.records import read_manifest, read_records
from tests.conftest import build_llama, build_tokenizer
from tests.programs.test_evaluate import flags
from tests.programs.test_evaluate_longspec import files  # noqa: F401

SAMPLED = ("--responses.sampling.temperature", "1.0", "--responses.max_new_tokens", "24")
SPLIT = ("--prompts.near_duplicate", "1.0", "--prompts.held_out", "0.34")
HEAD = ("--head.depth", "0", "--head.arguments.num_train_epochs", "3", "--head.arguments.per_device_train_batch_size")


def pair(files, run):  # noqa: F811
    return ["--target.path", str(files / "target"), "--drafter.path", str(files / "drafter"), "--run", str(run)]


@pytest.fixture(scope="module")
def traced(files, tmp_path_factory):  # noqa: F811
    run = tmp_path_factory.mktemp("traced") / "run"
    prompts = ["--prompts.path", str(files / "prompts.jsonl")]
    responses.main(["--target.path", str(files / "target"), "--run", str(run), *prompts, *SPLIT, *SAMPLED])
    traces.main([*pair(files, run), "--traces.shard_rows", "2", "--traces.top_k", "4"])
    return run


@pytest.fixture(scope="module")
def headed(files, traced):  # noqa: F811
    train_head.main([*pair(files, traced), *HEAD, "4"])
    return traced


def test_traces_are_told_step_by_step(files, traced, capsys):  # noqa: F811
    manifest, rows = (
        read_manifest(traced / "step_traces", "step_traces"),
        read_records(traced / "step_traces", "step_traces"),
    )
    answered = read_records(traced / "responses", "responses")
    assert manifest["steps"] == 5 and len(rows) == 5 * len(answered)
    assert rows["step"] == [1, 2, 3, 4, 5] * len(answered)
    traces.main([*pair(files, traced), "--traces.shard_rows", "2", "--traces.top_k", "4"])
    assert "accepted by step of the round, where it is reached: 1:" in capsys.readouterr().out
    traces.main([*pair(files, traced), "--traces.top_k", "4", "--plan"])
    assert "as drafted at step 1 to 5 of a round" in capsys.readouterr().out


def test_the_head_is_the_drafters_and_knows_its_steps(files, headed, capsys):  # noqa: F811
    config = load_config(headed / "head")
    assert config.max_length == 5 and config.drafter is not None and config.embeddings is not None
    metrics = json.loads((headed / "head" / "metrics.json").read_text())
    assert metrics["tokens"] > 20 and {"head", "logistic_q"} <= set(metrics["predictors"])
    train_head.main([*pair(files, headed), *HEAD, "4", "--plan"])
    assert "already trained" in capsys.readouterr().out


def test_it_stops_chains_and_trees_and_the_text_stays_the_targets(files, headed):  # noqa: F811
    methods = ["LongSpec(drafter, stop=AcceptanceHead(head, 0.6, max=5))"]
    methods += ["LongSpec(drafter, stop=AcceptanceHead(head, 0.6, max=3), tree=[2, 2, 2])"]
    main(["evaluate", *flags(files, headed), *SPLIT, "--evaluate.methods", json.dumps(methods)])
    report = read_report(headed)
    assert {row.method for row in report.methods} >= set(methods)
    assert all(check.passed for row in report.methods for check in row.lossless)
    small = ("--evaluate.answers", "800", "--evaluate.samplings", '[{"temperature": 1.0}]', "--method", methods[1])
    main(["lossless", *flags(files, headed), *SPLIT, *small])
    assert json.loads((headed / "lossless.json").read_text())["passed"]


def test_it_is_among_the_methods_that_are_run_by_default(files, headed):  # noqa: F811
    main(["evaluate", *flags(files, headed), *SPLIT])
    assert sum("AcceptanceHead(head" in row.method for row in read_report(headed).methods) == 3


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--head.state", "consumed"], "take head.state producing and head.data exact or expected"),
        (["--head.data", "rounds"], "take head.state producing and head.data exact or expected"),
    ],
)
def test_heads_that_cannot_be_are_refused(files, traced, capsys, more, sentence):  # noqa: F811
    with pytest.raises(SystemExit) as stop:
        train_head.main([*pair(files, traced), "--head.folder", "other", *more])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert not (traced / "other").exists()


def test_a_drafter_of_another_target_is_not_traced(files, traced, tmp_path, capsys):  # noqa: F811
    other = tmp_path / "other"
    build_llama(layers=1, seed=5).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    with pytest.raises(SystemExit) as stop:
        traces.main([*pair(files, traced), "--target.path", str(other), "--traces.top_k", "4"])
    assert stop.value.code == 2 and "was distilled for one target" in capsys.readouterr().err


def test_scores_are_for_replays_alone_and_traces_come_first(files, traced, tmp_path, capsys):  # noqa: F811
    for plan in ([], ["--plan"]):
        with pytest.raises(SystemExit) as stop:
            traces.main([*pair(files, traced), "--traces.scores", '["head"]', *plan])
        assert stop.value.code == 2 and "leave it out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        train_head.main(pair(files, tmp_path / "run"))
    assert stop.value.code == 2 and "traces does not exist; make it first" in capsys.readouterr().err
