"""The programs accept the command lines of the benchmarks, and the benchmarks find their figures in a report."""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import pytest

from benchmarks import adaptive_length, speculation
from data_prep import responses, traces
from drafttrain import train_drafter, train_head
from drafttrain.config import parse
from drafttrain.evaluation.statistics import Interval
from drafttrain.evaluation.sweep import settings
from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from tests.evaluation import synthetic

SECTIONS = {
    "data_prep/responses.py": responses.SECTIONS,
    "data_prep/traces.py": traces.SECTIONS,
    "drafttrain/train_drafter.py": train_drafter.SECTIONS,
    "drafttrain/train_head.py": train_head.SECTIONS,
    "evaluate": ("target", "drafter", "prompts", "traces", "head", "evaluate"),
}


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adaptive_length.py", "--run", str(tmp_path), "--seeds", "2"])
    return adaptive_length._options()


def accepted(command):
    """Program and recipe of a command, as the program reads it."""
    program, *flags = command
    if program == "-m":
        module, program, *flags = flags
        assert module == "drafttrain.cli"
    return program, parse("", SECTIONS[program], flags)


@pytest.mark.parametrize("name", adaptive_length.TEMPERATURES)
def test_every_command_of_the_chain_is_accepted(options, name):
    read = [accepted(command) for command in adaptive_length.chain(name, options)]
    heads = ["drafttrain/train_head.py"] * 3
    assert [program for program, _ in read] == ["data_prep/responses.py", "data_prep/traces.py", *heads, "evaluate"]
    temperature = adaptive_length.TEMPERATURES[name]
    assert {parsed.run for _, parsed in read} == {options.run / name}
    assert {parsed.recipe.responses.sampling.temperature for _, parsed in read} == {temperature}
    assert [each.temperature for each in read[-1][1].recipe.evaluate.samplings] == [temperature]
    assert read[-1][1].recipe.evaluate.batch_sizes == []


def test_the_drafter_is_distilled_on_other_prompts_than_heads_learn_from(options):
    made = [accepted(command) for command in adaptive_length.distil(options)]
    used = [
        accepted(command)[1]
        for name in adaptive_length.TEMPERATURES
        for command in adaptive_length.chain(name, options)
    ]
    assert [program for program, _ in made] == ["data_prep/responses.py", "drafttrain/train_drafter.py"]
    assert {parsed.recipe.prompts.seed for _, parsed in made}.isdisjoint(parsed.recipe.prompts.seed for parsed in used)
    assert {Path(parsed.recipe.drafter.path) for parsed in used} == {made[-1][1].run / "drafter"}


def test_greedy_answers_are_to_tasks_that_end(options):
    answered = [adaptive_length.chain(name, options)[0] for name in ("sampled", "greedy")]
    sampled, greedy = (accepted(command)[1].recipe.prompts.mixture for command in answered)
    assert sampled == options.mixture
    assert greedy == {task: count for task, count in sampled.items() if task != "code"} != sampled


def test_quick_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["adaptive_length.py", "--run", str(tmp_path), "--quick"])
    options = adaptive_length._options()
    read = [accepted(command)[1].recipe for command in adaptive_length.chain("sampled", options)]
    assert len(read) == 5
    assert sum(read[0].prompts.mixture.values()) == 24
    assert {recipe.head.arguments["num_train_epochs"] for recipe in read if recipe.head.arguments} == {1}


def test_traces_reach_as_far_as_the_published_head_drafts(options):
    read = [accepted(command) for command in adaptive_length.chain("greedy", options)]
    [published] = [parsed.recipe.head for _, parsed in read if parsed.recipe.head.folder == adaptive_length.PUBLISHED]
    assert {p.recipe.traces.run_length for name, p in read if "head" not in name} == {19} == {published.max_length - 1}


def test_a_recipe_is_found_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "pair.yaml").write_text("target: {path: model}\n")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adaptive_length.py", "--config", "pair.yaml"])
    options = adaptive_length._options()
    assert (options.config, options.target) == (tmp_path / "pair.yaml", str(tmp_path / "model"))


def test_heads_differ_in_seed_and_folder_and_the_published_one_keeps_its_own_form(options):
    read = [
        parsed.recipe
        for program, parsed in map(accepted, adaptive_length.chain("greedy", options))
        if "head" in program
    ]
    assert [(recipe.head.folder, recipe.head.tied) for recipe in read] == [
        ("head_0", False),
        ("head_1", False),
        (adaptive_length.PUBLISHED, True),
    ]
    assert [recipe.seed for recipe in read[:2]] == [0, 1]
    ours, published = read[0], read[2]
    assert published.target.path == ours.target.path and published.drafter.path == ours.drafter.path
    assert published.head.arguments["num_train_epochs"] == ours.head.arguments["num_train_epochs"]
    assert (published.head.w_rej, published.head.mixing) == (6.0, 0.15)
    own = published.head
    config = AcceptanceHeadConfig(8, min_length=own.min_length, max_length=own.max_length, threshold=own.threshold)
    swept = settings(ours.evaluate, {adaptive_length.PUBLISHED: config})
    assert adaptive_length.AS_IS in [each.method for each in swept]


@pytest.mark.parametrize("task", speculation.TASKS)
def test_the_evaluations_of_speculation_are_accepted(task, tmp_path):
    options = argparse.Namespace(target="t", drafter="d", run=tmp_path, prompts=16, length=160, tokens=160, repeats=3)
    temperature = speculation.TASKS[task]
    parsed = parse("", SECTIONS["evaluate"], speculation.flags(task, temperature, options))
    assert parsed.recipe.prompts.mixture == {task: 16 * speculation.TRIED}
    assert parsed.recipe.responses.sampling.temperature == temperature and parsed.run == tmp_path / task
    assert parsed.recipe.evaluate.batch_sizes == []


@pytest.fixture(scope="module")
def report():
    """One decoding setting, with a head of ours and the published one in place of the synthetic report's heads."""
    made, _ = synthetic.report(samplings=("greedy",))
    old = [point for point in made.sweep if point.kind == "head"]
    row = next(row for row in made.methods if row.kind == "head")
    made.sweep = [point for point in made.sweep if point.kind != "head"]
    made.methods = [each for each in made.methods if each.kind != "head"]
    for name, gain in (("head_0", 1.1), ("published", 1.05)):
        points = [dataclasses.replace(p, method=p.method.replace("(head,", f"({name},")) for p in old]
        best = max(points, key=lambda point: point.predicted_speedup)
        made.sweep += points
        versus = {"fixed": Interval(gain, gain - 0.02, gain + 0.02), "confidence": Interval(1.02, 1.0, 1.04)}
        changes = {"method": best.method, "replayed_speedup": best.predicted_speedup, "versus": versus}
        made.methods.append(dataclasses.replace(row, **changes))
    made.sweep.append(dataclasses.replace(old[0], method=adaptive_length.AS_IS, predicted_speedup=0.9))
    return made


def test_the_figures_of_adaptive_length_are_those_of_the_report(report):
    figures, rows = adaptive_length.figures_of(report)
    assert all(math.isfinite(end) for each in figures.values() for end in (each.value, each.low, each.high))
    assert figures["gain_over_best_fixed"] == Interval(1.1, 1.1 - 0.02, 1.1 + 0.02)
    assert figures["gain_over_confidence"] == Interval(1.02, 1.0, 1.04)
    assert figures["speedup_oracle"].value == max(p.predicted_speedup for p in report.sweep if p.kind == "oracle")
    best = max((row.overall.speedup for row in report.of("greedy", "fixed")), key=lambda speedup: speedup.value)
    assert figures["speedup_best_fixed"] == best
    assert figures["oracle_gap_closed"].value > figures["published_gap_closed"].value
    assert figures["speedup_published_as_is"].value == 0.9
    assert [row["head"] for row in rows] == ["head_0", "published"]


def test_the_figures_of_speculation_are_of_the_setting_that_replay_chose(report):
    chosen = max((row for row in report.methods if row.replayed_speedup), key=lambda row: row.replayed_speedup)
    figures = speculation.figures_of(report, "revise")
    assert figures["speedup_revise"] == chosen.overall.speedup.value
    assert figures["speedup_revise_low"] <= figures["speedup_revise"] <= figures["speedup_revise_high"]
    assert figures["revise_answers"] == chosen.overall.prompts


def test_the_figures_are_drawn(report, tmp_path):
    figures, _ = adaptive_length.figures_of(report)
    ends = {"": "value", "_low": "low", "_high": "high"}
    flat = {f"{name}_greedy{end}": getattr(own, part) for name, own in figures.items() for end, part in ends.items()}
    adaptive_length.draw(flat, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
