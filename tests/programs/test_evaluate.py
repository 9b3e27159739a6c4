"""`drafttrain evaluate`, `compare` and `lossless` as people run them, on tiny models with real tokenizers."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

from drafttrain.cli import main
from drafttrain.decoding import loop
from drafttrain.evaluation.methods import kind_of
from drafttrain.evaluation.schema import AUTOREGRESSIVE, read_report, read_samples
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.models.checkpoint import CheckpointInfo, save_checkpoint
from drafttrain.models.loading import load_drafter
from tests.conftest import VOCABULARY, build_llama, build_tokenizer

SMALL = {
    "max_new_tokens": 16,
    "repeats": 1,
    "top": 1,
    "max_length": 4,
    "thresholds": [0.3, 0.6],
    "bootstrap": 100,
    "prompts_per_task": 3,
    "batch_sizes": [],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A target, a drafter that often agrees with it, and prompts."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer, target = build_tokenizer(), build_llama(layers=1, seed=0)
    drafter = copy.deepcopy(target)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for name, model in (("target", target), ("drafter", drafter)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    said = [f"Repeat the word apple {i} times, then change pear number {7 * i}" for i in range(6)]
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in said]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flags(files, run, *more):
    pair = ["--target.path", str(files / "target"), "--drafter.path", str(files / "drafter")]
    small = [word for name, value in SMALL.items() for word in (f"--evaluate.{name}", str(value))]
    return [*pair, "--prompts.path", str(files / "prompts.jsonl"), "--run", str(run), *small, *more]


BOTH = ("--evaluate.samplings", '[{"temperature": 0}, {"temperature": 1}]')


@pytest.fixture(scope="module")
def probe(files, tmp_path_factory):
    """The run folder of a probe, with an acceptance head in it."""
    run = tmp_path_factory.mktemp("probe") / "run"
    add_head(files, run)
    main(["evaluate", *flags(files, run, *BOTH, "--evaluate.batch_sizes", "[3, 1]")])
    return run


def add_head(files, run):
    """An acceptance head for the pair, not a good one."""
    target, drafter = (load_drafter(str(files / name)) for name in ("target", "drafter"))
    config = AcceptanceHeadConfig(32, depth=1, target=target.fingerprint, drafter=drafter.fingerprint)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = AcceptanceHead(config)
    save_checkpoint(run / "head", head, None, CheckpointInfo("acceptance_head", target=target.fingerprint))


def test_the_report_holds_every_kind_under_every_setting(probe):
    report = read_report(probe)
    for setting in ("greedy", "temperature 1"):
        kinds = [row.kind for row in report.methods if row.sampling == setting]
        assert kinds == ["autoregressive", "fixed", "head", "confidence"]
        swept = [point.kind for point in report.sweep if point.sampling == setting]
        counted = [swept.count(kind) for kind in ("fixed", "confidence", "head", "oracle", "known")]
        assert counted == [4, 14, 9, 1, 0 if setting == "greedy" else 1]
    assert report.workload.prompts == {"chat": 3, "all": 3}
    assert all(row.costs and row.predicted_speedup and row.replayed_speedup for row in report.of("greedy"))
    assert all(row.kv_bytes and row.breakdown for row in report.methods)
    assert all((row.peak_memory is not None) == torch.cuda.is_available() for row in report.methods)
    assert {"speedup", "length", "pareto", "breakdown"} <= set(report.plots)
    assert all((probe / path).is_file() for path in report.plots.values())
    assert report.environment.cores and report.environment.versions["torch"]


def test_larger_batches_are_measured_and_reported(probe):
    report = read_report(probe)
    assert [load.sampling for load in report.load] == ["greedy", "temperature 1"]
    for load in report.load:
        assert (load.requests, load.repeated, load.prompts) == (16, 13, 3)
        assert [batch.batch_size for batch in load.batches] == [1, 3]
        for batch in load.batches:
            base, *drafting = batch.points
            assert kind_of(drafting[0].method) == "fixed" and len(drafting) == 2
            assert base.method == AUTOREGRESSIVE and base.speedup is None
            assert all(1 <= point.live_rows <= batch.batch_size for point in batch.points)
            assert all(0 < point.latency_median <= point.latency_95 for point in batch.points)
            for point in drafting:
                assert point.speedup.value == pytest.approx(point.tokens_per_second / base.tokens_per_second)
            assert batch.v[0] == 1 and batch.v == sorted(batch.v) and len(batch.v) == SMALL["max_length"] + 1
        assert [found.method for found in load.break_even] == [point.method for point in load.batches[0].points[1:]]
    assert (probe / report.plots["load"]).is_file()
    for name in ("report.md", "report.html"):
        text = (probe / name).read_text()
        assert "Under load" in text and "13 of them again" in text


def test_output_is_checked_and_exact(probe):
    report = read_report(probe)
    assert report.verdict.decision != "not exact"
    for row in report.of("greedy"):
        assert [check.tier for check in row.lossless] == ["float64", "low precision"] or [
            check.tier for check in row.lossless
        ] == ["float64", "float32"]
        assert row.lossless[0].passed and row.lossless[0].identical == row.lossless[0].answers
    assert all(row.lossless[-1].tier == "sampled" for row in report.of("temperature 1"))


def test_counts_agree_between_report_and_samples(probe):
    report = read_report(probe)
    for row in report.methods:
        samples = read_samples(probe / row.samples)
        assert len(samples) == 3
        counted = [sample for sample in samples if not sample.looping]
        if row.overall.looping == 0:
            assert row.overall.tokens == sum(len(sample.token_ids) for sample in counted)
        for sample in samples:
            assert len(sample.sources) == len(sample.token_ids) == sample.counts["tokens"]
            assert sample.sources.count("target") == len(sample.sources) - sample.counts["accepted"]
    assert report.baseline("greedy").overall.prompts > 0 and report.baseline("greedy").overall.tau == 1


def test_the_last_lines_are_the_verdict_and_the_report(files, tmp_path, capsys):
    method = '["Model(drafter, length=2)"]'
    main(["evaluate", *flags(files, tmp_path / "run", "--evaluate.methods", method)])
    lines = capsys.readouterr().out.strip().splitlines()
    report = read_report(tmp_path / "run")
    assert lines[-1] == f"Report: {tmp_path / 'run' / 'report.html'}"
    assert report.verdict.headline in lines[-8:]
    assert [row.method for row in report.methods] == [AUTOREGRESSIVE, "Model(drafter, length=2)"]
    assert report.workload.tuned_by == "the recipe (evaluate.methods)"


def test_traces_are_made_as_far_as_a_given_method_drafts(files, tmp_path):
    method = f"Model(drafter, stop=Confidence(1.0, max={2 * SMALL['max_length']}))"
    greedy = ("--evaluate.samplings", '[{"temperature": 0}]', "--evaluate.methods", json.dumps([method]))
    main(["evaluate", *flags(files, tmp_path / "run", *greedy)])
    [point] = [point for point in read_report(tmp_path / "run").sweep if point.method == method]
    assert point.measured and point.unobserved == 0


def test_a_run_is_compared_with_itself(probe, capsys):
    main(["compare", str(probe), str(probe)])
    assert "No difference shown" in capsys.readouterr().out


def test_batches_are_measured_too(files, tmp_path):
    method = ("--evaluate.methods", '["Model(drafter, length=3)"]', "--evaluate.batch_size", "2")
    main(["evaluate", *flags(files, tmp_path / "run", *method)])
    report = read_report(tmp_path / "run")
    assert report.workload.batch_size == 2
    assert report.of("temperature 1")[0].overall.prompts == 3


def test_a_target_whose_weights_are_partly_on_disk_is_measured_and_no_proof_promised(files, tmp_path, capsys):
    places = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = json.dumps({place: "disk" if "layers" in place else "cpu" for place in places})
    argv = [*flags(files, tmp_path / "run", *BOTH[:1], '[{"temperature": 0}]'), "--target.device_map", device_map]
    main(["evaluate", *argv, "--evaluate.methods", '["Model(drafter, length=2)"]'])
    [_, row] = read_report(tmp_path / "run").methods
    assert row.lossless[0].tier == "not checked" and "partly offloaded" in row.lossless[0].reason
    assert row.lossless[1].passed
    assert "partly offloaded" in refused(capsys, "lossless", *argv, "--method", "Model(drafter, length=2)")


def accept_everything(monkeypatch):
    """Greedy verification that lets every drafted token through."""
    monkeypatch.setattr(loop, "accepted_greedily", lambda drafted, choice: len(drafted))


def test_wrong_output_fails_the_command_after_the_report_is_written(files, tmp_path, monkeypatch, capsys):
    accept_everything(monkeypatch)
    greedy = ("--evaluate.samplings", '[{"temperature": 0}]', "--evaluate.methods", '["Model(drafter, length=3)"]')
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *flags(files, tmp_path / "run", *greedy)])
    assert stop.value.code == 1
    assert read_report(tmp_path / "run").verdict.decision == "not exact"
    assert "do not deploy" in capsys.readouterr().out


def test_the_plan_runs_nothing_and_writes_nothing(files, tmp_path, capsys):
    main(["evaluate", *flags(files, tmp_path / "run", "--plan")])
    text = capsys.readouterr().out
    assert "what would run" in text and "<|user|>" in text and "[[the answer" in text
    assert "load: not studied" in text
    main(["evaluate", *flags(files, tmp_path / "run", "--plan", "--evaluate.batch_sizes", "[4, 1, 32]")])
    assert "3 methods x 32 requests x 1 repeats in batches of 1, 4, 32; at most 4,608 tokens" in capsys.readouterr().out
    members = ("--evaluate.members", json.dumps({"small": str(files / "drafter")}))
    main(["evaluate", *flags(files, tmp_path / "run", "--plan", *members, "--evaluate.methods", '["Model(small)"]')])
    assert "what would run" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    return error.splitlines()[-1]


@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_mistakes_are_told_in_a_sentence(files, tmp_path, capsys, plan):
    method = ("--evaluate.methods", '["Model(drafter, lenght=5)"]')
    assert "lenght" in refused(capsys, "evaluate", *flags(files, tmp_path / "a", *method, *plan))
    method = ("--evaluate.methods", '["Model(drafter, stop=AcceptanceHead(head, 0.5))"]')
    assert "head" in refused(capsys, "evaluate", *flags(files, tmp_path / "b", *method, *plan))
    method = ("--evaluate.methods", '["Model(drafter, length=300)"]')
    assert "300 tokens a round" in refused(capsys, "evaluate", *flags(files, tmp_path / "e", *method, *plan))
    nothing = ("--target.path", str(files / "target"), "--run", str(tmp_path / "c"), *plan)
    assert "there is no drafter" in refused(capsys, "evaluate", *nothing)
    prompts = ("--prompts.path", str(tmp_path / "none.jsonl"), *plan)
    assert "none.jsonl" in refused(capsys, "evaluate", *flags(files, tmp_path / "d"), *prompts)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("thresholds", "[0.5, 1.5]", "between 0.0 and 1.0"),
        ("tolerance", "-1", "at least 0.0"),
        ("batch_sizes", "[4, 0]", "at least 1"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_runs(files, tmp_path, capsys, name, value, told):
    argv = flags(files, tmp_path / "run", f"--evaluate.{name}", value)
    assert f"evaluate.{name} must be {told}" in refused(capsys, "evaluate", *argv)
    assert not (tmp_path / "run").exists()


def test_a_drafter_of_another_vocabulary_is_refused(files, tmp_path, capsys):
    other = tmp_path / "other"
    build_llama(280, layers=1).save_pretrained(other)
    build_tokenizer(280).save_pretrained(other)
    argv = [*flags(files, tmp_path / "run"), "--drafter.path", str(other)]
    assert "another tokenizer" in refused(capsys, "evaluate", *argv)


RECURRENT = {
    "mamba": lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=2),
    "llama4_text": lambda: hf.Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_local_experts=1, intermediate_size=16
    ),
}


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("verb", ["evaluate", "lossless"])
@pytest.mark.parametrize("part", ["target", "drafter"])
def test_a_model_that_cannot_be_rolled_back_is_refused_in_a_sentence(files, tmp_path, capsys, family, verb, part):
    folder = tmp_path / family
    hf.AutoModelForCausalLM.from_config(RECURRENT[family]()).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    argv = [verb, *flags(files, tmp_path / "run"), f"--{part}.path", str(folder)]
    for more in ("--plan",), ():
        told = refused(capsys, *argv, *more)
        assert told.startswith(f"drafttrain: {family} ") and "cannot be rolled back" in told


def test_a_damaged_report_is_no_report(probe, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(probe, folder)
    (folder / "report.json").write_text("{")
    assert "not a whole JSON file" in refused(capsys, "compare", str(probe), str(folder))


def test_lossless_writes_its_proof(files, tmp_path, capsys):
    pair = ("--target.path", str(files / "target"), "--drafter.path", str(files / "drafter"))
    sampling = ("--evaluate.samplings", '[{"temperature": 0.5}]')
    main(["lossless", *pair, *sampling, "--method", "Model(drafter, length=3)", "--run", str(tmp_path / "proof")])
    text = capsys.readouterr().out
    assert "Model(drafter, length=3): lossless" in text and "is at most 1e-06" in text
    proof = json.loads((tmp_path / "proof" / "lossless.json").read_text())
    assert proof["passed"] and proof["false_alarms"]["tests"] == len(proof["workload"]["cases"]) == 2
    assert proof["false_alarms"]["level"] == pytest.approx(1e-6 / 2)
    findings = proof["proofs"][0]["findings"]
    low = {each["test"]: each["figures"] for each in findings if "bfloat16" in each["test"] or "t32" in each["test"]}
    assert len(low) == 2 and all({"match_rate", "divergences"} <= set(figures) for figures in low.values())
    controls = [each["result"] for each in findings if "control" in each["test"]]
    assert len(controls) == 8 and set(controls) == {"caught"}


def test_a_proof_needs_no_more_than_a_pair_and_a_method(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pair = ("--target.path", str(files / "target"), "--drafter.path", str(files / "drafter"))
    main(["lossless", *pair, "--method", "Model(drafter, length=3)", "--plan"])
    text = capsys.readouterr().out
    assert str(Path("runs/lossless/lossless.json")) in text and "prompts answered greedily: 8" in text
    prompts = ("--prompts.path", str(files / "prompts.jsonl"))
    main(["lossless", *pair, *prompts, "--method", "Model(drafter, length=3)", "--plan"])
    assert "prompts answered greedily: 6" in capsys.readouterr().out


def test_a_method_that_is_not_lossless_fails_the_command(files, tmp_path, monkeypatch, capsys):
    accept_everything(monkeypatch)
    pair = ("--target.path", str(files / "target"), "--drafter.path", str(files / "drafter"))
    small = ("--answers", "100", "--evaluate.samplings", '[{"temperature": 1}]', "--evaluate.max_new_tokens", "8")
    with pytest.raises(SystemExit) as stop:
        main(["lossless", *pair, *small, "--run", str(tmp_path / "run")])
    assert stop.value.code == 1
    assert "NOT LOSSLESS" in capsys.readouterr().out
    assert not json.loads((tmp_path / "run" / "lossless.json").read_text())["passed"]


def test_the_plan_of_a_proof_runs_nothing_and_fails_on_what_would_fail(files, tmp_path, capsys):
    pair = ("--target.path", str(files / "target"), "--drafter.path", str(files / "drafter"))
    planned = ("lossless", *pair, "--run", str(tmp_path / "proof"), "--plan", "--method")
    main([*planned, "Model(drafter, length=3)"])
    text = capsys.readouterr().out
    assert "greedy in float64" in text and "400 answers by chi-square" in text and "time: about" in text
    assert "prompts answered greedily: 8" in text
    assert "stranger" in refused(capsys, *planned, "Model(stranger, length=3)")
    assert not (tmp_path / "proof").exists()


# ---- methods from outside ----

THEIRS = """
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.stopping import Confidence

class Mine(ModelDrafter):
    def __init__(self, drafter, k=3):
        super().__init__(drafter, k, name="mine")

class Rule(Confidence):
    pass
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """The current folder has a module of the person's own."""
    (tmp_path / "their_drafter.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("their_drafter", None)


OUTSIDE = (
    "their_drafter.Mine(drafter, k=2)",
    "Model(drafter, stop=their_drafter.Rule(0.5))",
    "examples.my_drafter.MyDrafter(n=1)",
    "Model(drafter, length=2)",
)


def test_methods_from_outside_are_measured_like_others(files, theirs, tmp_path, capsys):
    methods = ("--evaluate.methods", json.dumps([*OUTSIDE[1:], "their_drafter.Mine( drafter,2 )"]))
    refusal = refused(capsys, "evaluate", *flags(files, tmp_path / "no", *methods))
    assert "their_drafter.Rule in the method" in refusal and "--allow-code" in refusal
    assert "their_drafter" not in sys.modules
    main(["evaluate", *flags(files, tmp_path / "run", *BOTH, *methods, "--allow-code")])
    report = read_report(tmp_path / "run")
    for setting in ("greedy", "temperature 1"):
        rows = {row.method: row for row in report.methods if row.sampling == setting}
        assert set(rows) == {AUTOREGRESSIVE, *OUTSIDE}
        assert [rows[method].kind for method in OUTSIDE] == ["other", "other", "other", "fixed"]
        assert all(check.passed for row in rows.values() for check in row.lossless)
        members = [list(rows[method].costs.c) for method in OUTSIDE]
        assert members == [["mine"], ["drafter"], [], ["drafter"]]
        assert all(rows[method].predicted_speedup and rows[method].breakdown for method in OUTSIDE)
        assert [rows[method].replayed_speedup is None for method in OUTSIDE] == [True, True, True, False]
    assert {"speedup", "length", "breakdown"} <= set(report.plots)
    page = (tmp_path / "run" / "report.md").read_text()
    assert all(method in page for method in OUTSIDE)
    main(["compare", str(tmp_path / "run"), str(tmp_path / "run")])


def test_the_plan_checks_methods_from_outside(files, theirs, tmp_path, capsys):
    planned = [*flags(files, tmp_path / "run"), "--plan", "--evaluate.methods"]
    assert "--allow-code" in refused(capsys, "evaluate", *planned, json.dumps(OUTSIDE))
    main(["evaluate", *planned, json.dumps(OUTSIDE), "--allow-code"])
    wrong = '["their_drafter.Mine(drafter, length=2)"]'
    assert "no parameter length" in refused(capsys, "evaluate", *planned, wrong, "--allow-code")


@pytest.mark.slow
def test_methods_from_outside_are_proven_like_others(files, theirs, tmp_path):
    pair = ("--target.path", str(files / "target"), "--drafter.path", str(files / "drafter"))
    words = ["lossless", *pair, "--evaluate.samplings", '[{"temperature": 1}]', "--run", str(tmp_path / "proof")]
    main([*words, "--allow-code", "--method", OUTSIDE[0], "--answers", "2000", "--evaluate.max_new_tokens", "8"])
    proof = json.loads((tmp_path / "proof" / "lossless.json").read_text())
    assert proof["passed"] and [each["method"] for each in proof["proofs"]] == [OUTSIDE[0]]


@pytest.mark.slow
def test_the_command_is_installed_under_its_name(files, tmp_path):
    command = [sys.executable, "-m", "drafttrain.cli", "evaluate", *flags(files, tmp_path / "run", "--plan")]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(root), "PATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "what would run" in done.stdout


def test_the_fastest_tree_is_found_and_measured(files, tmp_path, capsys):
    """And with it a given one, whose target forwards are counted by their tokens."""
    given = "Model(drafter, tree=[3, 2])"
    more = ["--evaluate.trees", "true", "--evaluate.methods", f'["{given}"]']
    main(["evaluate", *flags(files, tmp_path / "run", *more)])
    report = read_report(tmp_path / "run")
    row = next(row for row in report.methods if row.method == given)
    assert row.kind == "other" and row.predicted_speedup and row.lossless
    assert (
        sum(row.overall.trees_of) and max(range(len(row.overall.trees_of)), key=row.overall.trees_of.__getitem__) == 5
    )
    assert len(row.costs.v) >= 6
    told = capsys.readouterr()
    assert "tree predicted to be fastest" in told.out + told.err
