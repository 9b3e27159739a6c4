"""`drafttrain evaluate` at synthetic acceptance: speeds of shapes without trained weights, never taken for a report."""

import json

import pytest

from drafttrain.cli import main
from drafttrain.config import BlockConfig
from drafttrain.models.longspec_new import block_config
from tests.conftest import build_llama, build_tokenizer
from tests.programs.test_evaluate import refused

SMALL = {
    "max_new_tokens": 48,
    "repeats": 1,
    "top": 1,
    "max_length": 3,
    "bootstrap": 100,
    "prompts_per_task": 2,
    "batch_sizes": [1, 3],
    "dtype": "float32",
}
RATES = ("--evaluate.synthetic_acceptance", "[0.9, 0.5]")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Shapes of a target and a drafter without weights, and prompts."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, layers in (("target", 2), ("drafter", 1)):
        build_llama(layers=layers).config.save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    said = [f"Repeat the word apple {i} times, then change pear number {7 * i}" for i in range(6)]
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in said]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flags(files, run, *more):
    pair = ["--target.path", str(files / "target"), "--drafter.path", str(files / "drafter")]
    small = [word for name, value in SMALL.items() for word in (f"--evaluate.{name}", str(value))]
    random = ["--evaluate.random_weights", "true"]
    return [*pair, "--prompts.path", str(files / "prompts.jsonl"), "--run", str(run), *small, *random, *more]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed") / "run"
    main(["evaluate", *flags(files, folder, *RATES)])
    return folder


def test_the_speeds_of_every_batch_size_are_written(run):
    found = json.loads((run / "synthetic.json").read_text())
    assert found["synthetic_acceptance"] == [0.9, 0.5] and found["random_weights"]
    assert found["dtype"] == "float32" and found["pair"]["target_parameters"] > found["pair"]["drafter_parameters"]
    assert [(row["sampling"], row["batch_size"]) for row in found["rows"][::2]] == [
        ("temperature 1", 1),
        ("temperature 1", 3),
    ]
    for row in found["rows"]:
        assert 1 <= row["live_rows"] <= row["batch_size"] and row["tokens_per_second"] > 0
        if row["speedup"] is None:
            assert row["method"] == "Autoregressive()" and row["tau"] == 1
        else:
            assert row["speedup"]["low"] <= row["speedup"]["value"] <= row["speedup"]["high"]
            assert row["predicted_speedup"] > 0 and len(row["costs"]["v"]) == SMALL["max_length"] + 1
            assert row["tau"] == pytest.approx(row["expected_tau"], rel=0.4)
            assert row["acceptance"][0] == pytest.approx(0.9, abs=0.2)


def test_nothing_takes_them_for_real_ones(run, capsys):
    found = json.loads((run / "synthetic.json").read_text())
    assert all(("synthetic acceptance" in row["method"]) == (row["speedup"] is not None) for row in found["rows"])
    page = (run / "synthetic.md").read_text()
    assert "no text was the target's" in page and "no text was the target's" in found["warning"]
    assert not (run / "report.json").exists() and not (run / "samples").exists()
    assert not {"verdict", "lossless", "schema_version"} & set(found)
    assert "does not exist" in refused(capsys, "compare", str(run), str(run))
    path = str(run / "synthetic.json")
    assert "schema version None" in refused(capsys, "compare", path, path)


def test_trained_weights_and_given_methods_are_measured_too(files, tmp_path, capsys):
    trained = tmp_path / "trained"
    build_llama().save_pretrained(trained)
    build_tokenizer().save_pretrained(trained)
    methods = ("--evaluate.methods", '["Model(drafter, length=2)", "Model(drafter, stop=Confidence(0.9, max=3))"]')
    more = ["--target.path", str(trained), "--drafter.path", str(trained), "--evaluate.random_weights", "false"]
    more += ["--evaluate.batch_sizes", "[]", "--evaluate.max_new_tokens", "12", "--evaluate.prompts_per_task", "1"]
    greedy = ("--evaluate.samplings", '[{"temperature": 0}]')
    main(["evaluate", *flags(files, tmp_path / "run", *RATES, *more, *methods, *greedy)])
    found = json.loads((tmp_path / "run" / "synthetic.json").read_text())
    assert not found["random_weights"]
    expected = {row["method"].split(", synthetic")[0]: row["expected_tau"] for row in found["rows"]}
    assert expected == {
        "Autoregressive()": None,
        "Model(drafter, length=2)": pytest.approx(2.35),
        "Model(drafter, stop=Confidence(0.9, max=3))": None,
    }
    assert "Speed at synthetic acceptance" in capsys.readouterr().out


def test_the_plan_says_what_is_not_measured(files, tmp_path, capsys):
    main(["evaluate", *flags(files, tmp_path / "run", *RATES, "--plan")])
    text = capsys.readouterr().out
    assert "synthetic acceptance at 0.9, 0.5, random weights" in text and "batches of 1, 3" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("plan", [(), ("--plan",)])
@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "give rates to accept them at"),
        (("--evaluate.synthetic_acceptance", "[]"), "at least one rate"),
        (("--evaluate.synthetic_acceptance", "[0.5, 1.5]"), "between 0.0 and 1.0"),
        ((*RATES, "--evaluate.methods", '["Autoregressive()"]'), "needs a method that drafts"),
    ],
)
def test_mistakes_are_told_in_a_sentence(files, tmp_path, capsys, more, told, plan):
    assert told in refused(capsys, "evaluate", *flags(files, tmp_path / "run", *more, *plan))


@pytest.mark.parametrize("more", [RATES, ("--evaluate.random_weights", "true")])
def test_nothing_is_proven_of_it(files, tmp_path, capsys, more):
    pair = ("--target.path", str(files / "target"), "--drafter.path", str(files / "drafter"))
    assert "nothing can be proven" in refused(capsys, "lossless", *pair, *more, "--run", str(tmp_path / "proof"))
    assert not (tmp_path / "proof").exists()


def test_a_longspec_drafter_of_random_weights_is_measured_too(files, tmp_path):
    config = block_config(build_llama(layers=2), BlockConfig(window=16))
    shapes = tmp_path / "files"
    shapes.mkdir()
    (shapes / "target").symlink_to(files / "target")
    (shapes / "prompts.jsonl").symlink_to(files / "prompts.jsonl")
    config.save_pretrained(shapes / "drafter")
    build_tokenizer().save_pretrained(shapes / "drafter")
    one = (*RATES, "--evaluate.batch_sizes", "[1]")
    for methods in ((), ("--evaluate.methods", '["LongSpec(drafter, length=3)"]')):
        main(["evaluate", *flags(shapes, tmp_path / "run", *one, *methods)])
        found = json.loads((tmp_path / "run" / "synthetic.json").read_text())
        [own] = [row for row in found["rows"] if row["method"].startswith("LongSpec(drafter, length=")]
        assert own["tokens_per_second"] > 0 and own["tau"] > 1 and found["random_weights"]
