"""`drafttrain evaluate` and `lossless` on a target and a LongSpec drafter, as people run them."""

import json

import pytest

from drafttrain.cli import main
from drafttrain.config import BlockConfig
from drafttrain.evaluation.schema import read_report
from drafttrain.models.checkpoint import CheckpointInfo, save_checkpoint
from drafttrain.models.fingerprint import fingerprint
from drafttrain.models.longspec_new import new_block
from tests.conftest import build_llama, build_tokenizer
from tests.programs.test_evaluate import flags, refused


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    tokenizer, target = build_tokenizer(), build_llama(layers=1, seed=0)
    target.save_pretrained(folder / "target")
    tokenizer.save_pretrained(folder / "target")
    block = new_block(target, BlockConfig(window=16, warm_start=0), target.dtype, 0)
    info = CheckpointInfo("longspec", target=fingerprint(target, tokenizer))
    save_checkpoint(folder / "drafter", block, tokenizer, info)
    said = [f"Repeat the word apple {i} times, then change pear number {7 * i} " * (1 + i % 3) for i in range(6)]
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in said]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_report_has_its_methods_and_output_is_exact(files, tmp_path):
    both = ("--evaluate.samplings", '[{"temperature": 0}, {"temperature": 1}]')
    main(["evaluate", *flags(files, tmp_path / "run", *both)])
    report = read_report(tmp_path / "run")
    greedy = report.of("greedy")
    assert [row.method for row in greedy if row.kind == "fixed"] == [
        "LongSpec(drafter, length=2)",
        "LongSpec(drafter, length=4)",
    ]
    assert all(check.passed for row in report.methods for check in row.lossless)
    assert all(row.costs and row.predicted_speedup for row in greedy if row.kind == "fixed")
    assert report.verdict.decision != "not exact"


def test_longer_prompts_are_told_apart(files, tmp_path, monkeypatch):
    from drafttrain.evaluation import contexts

    monkeypatch.setattr(contexts, "SHORTEST", 64)
    main(["evaluate", *flags(files, tmp_path / "run"), "--evaluate.methods", '["LongSpec(drafter, length=2)"]'])
    report = read_report(tmp_path / "run")
    drafted = [bucket for bucket in report.contexts if bucket.method == "LongSpec(drafter, length=2)"]
    assert len(drafted) >= 2 and [bucket.context for bucket in drafted] == sorted({b.context for b in drafted})
    assert len({bucket.drafter_kv_bytes for bucket in drafted}) == 1, "it grows with the prompt"
    assert all(bucket.tau >= 1 and bucket.prefill_seconds > 0 for bucket in report.contexts)
    assert (tmp_path / "run" / report.plots["contexts"]).is_file()


def test_the_same_questions_are_asked_at_several_lengths(files, tmp_path, capsys):
    method = ("--evaluate.methods", '["LongSpec(drafter, length=2)"]')
    main(["evaluate", *flags(files, tmp_path / "run"), *method, "--evaluate.contexts", "[256, 400]"])
    report = read_report(tmp_path / "run")
    drafted = [bucket for bucket in report.contexts if bucket.method == "LongSpec(drafter, length=2)"]
    assert [bucket.context for bucket in drafted] == [256, 400] and len({bucket.prompts for bucket in drafted}) == 1
    ratios = [bucket.tau_ratio for bucket in drafted]
    assert ratios[0].value == 1 and ratios[1].value == pytest.approx(drafted[1].tau / drafted[0].tau)
    assert all(check.passed for row in report.methods for check in row.lossless)
    assert any("With 400 tokens before the answer in place of 256" in note for note in report.notes)
    for plan in ((), ("--plan",)):
        run = flags(files, tmp_path / "other", "--evaluate.contexts", "[9000]", *plan)
        assert "evaluate.contexts has 9000, but the pair's context is" in refused(capsys, "evaluate", *run)


def test_it_is_proven_lossless_and_the_controls_fail(files, tmp_path):
    small = ("--evaluate.answers", "800", "--evaluate.samplings", '[{"temperature": 1.0}]')
    main(["lossless", *flags(files, tmp_path / "run", *small)])
    proven = json.loads((tmp_path / "run" / "lossless.json").read_text())
    assert "LongSpec(drafter, length=5)" in json.dumps(proven)


def test_a_drafter_of_another_target_is_refused(files, tmp_path, capsys):
    other = tmp_path / "other"
    build_llama(layers=1, seed=5).save_pretrained(other)
    build_tokenizer().save_pretrained(other)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *flags(files, tmp_path / "run"), "--target.path", str(other)])
    assert stop.value.code == 2 and "was distilled for one target" in capsys.readouterr().err


def test_the_plan_runs_nothing(files, tmp_path, capsys):
    main(["evaluate", *flags(files, tmp_path / "run"), "--plan"])
    assert "what would run" in capsys.readouterr().out


def test_its_trees_are_measured_and_proven(files, tmp_path, capsys):
    tree = "LongSpec(drafter, tree=[3, 2])"
    main(["evaluate", *flags(files, tmp_path / "run", "--evaluate.trees", "true", "--evaluate.methods", f'["{tree}"]')])
    report = read_report(tmp_path / "run")
    row = next(row for row in report.methods if row.method == tree)
    assert row.costs and row.predicted_speedup and sum(row.overall.trees_of)
    assert all(check.passed for check in row.lossless)
    assert "tree predicted to be fastest" in "".join(capsys.readouterr())
    small = ("--evaluate.answers", "800", "--evaluate.samplings", '[{"temperature": 1.0}]', "--method", tree)
    main(["lossless", *flags(files, tmp_path / "proof", *small)])
    assert json.loads((tmp_path / "proof" / "lossless.json").read_text())["passed"]


def test_it_cannot_look_ahead_of_its_target(files, tmp_path, capsys):
    pair = ["--target.path", str(files / "target"), "--drafter.path", str(files / "drafter")]
    for more in ((), ("--plan",)):
        run = ("--run", str(tmp_path / "run"), "--context.lengths", "[400]")
        assert "a LongSpec drafter reads its target's keys" in refused(capsys, "evaluate", *pair, *run, *more)


def test_it_cannot_be_exported(files, tmp_path, capsys):
    pair = ["--target.path", str(files / "target"), "--drafter.path", str(files / "drafter")]
    with pytest.raises(SystemExit) as stop:
        main(["export", *pair, "--run", str(tmp_path / "run")])
    assert stop.value.code == 2 and "of the kind longspec, which no other engine loads" in capsys.readouterr().err
