"""The search for the fastest method: what is tried, how forwards are priced, what is written."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
import yaml

from drafttrain import cli
from drafttrain.config import TargetConfig
from drafttrain.decoding.counts import Completion, Counts
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build, parse_method
from drafttrain.evaluation import tune as tuning
from drafttrain.evaluation.candidates import combinations, copies, singles
from drafttrain.evaluation.forward_costs import WIDTHS, ForwardCosts, at, fitted, forward_seconds
from drafttrain.evaluation.guesses import Answer
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.schema import AUTOREGRESSIVE
from drafttrain.evaluation.sketch import Sketch
from drafttrain.evaluation.tune import DRAWS, Prompt, Tried, Tuner, measure, simplicity
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.models.bigrams import learn
from drafttrain.models.checkpoint import CheckpointInfo, save_checkpoint
from drafttrain.models.loading import load_drafter, load_target
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama, build_tokenizer
from tests.decoding.support import pair


def test_whatever_is_tried_can_be_built():
    target, small = pair()
    engines = {"drafter": Engine(small), "small": Engine(target), "bigrams": learn([[1, 2]], 24, "t")}
    engines["head"] = AcceptanceHead(AcceptanceHeadConfig(engines["drafter"].config.hidden_size))
    bottoms, tops = copies(True), [*singles("drafter", ["head"]), *singles("small")]
    tried = [*bottoms, *tops, *combinations(["drafter", "small"], tops[:2], bottoms[:2])]
    assert len(tried) == len(set(tried)) > 100
    for method in tried:
        assert build(method, engines).max_length >= 1
        assert str(parse_method(str(parse_method(method)))) == str(parse_method(method))
    assert any(method.startswith("Then((Reviewed(drafter, inner=Then((Reviewed(small,") for method in tried)


def test_costs_between_timed_widths_lie_on_lines():
    assert at({1: 1.0, 5: 2.0}, 3) == 1.5
    assert at({1: 1.0, 5: 2.0}, 9) == 3.0


def test_forwards_are_timed_in_every_width():
    target, small = pair()
    found = forward_seconds({"": Engine(target), "small": Engine(small)}, 20, repeats=3)
    assert set(found) == {"", "small"}
    assert all(tuple(own) == WIDTHS for own in found.values())
    assert all((np.diff(list(own.values())) >= 0).all() and own[1] > 0 for own in found.values())


def sketch(rounds, reads, host, judged=0):
    return Sketch(10, Counter(rounds), {"drafter": Counter(reads)} if reads else {}, judged, host)


def test_what_is_beside_the_forwards_is_found_from_real_runs():
    """Runs of 1.3 times the forwards, 0.2 a round, 0.05 a draft forward, 0.1 a judged token, 4 times their own."""
    costs = ForwardCosts({1: 0.9, 9: 1.7}, {"drafter": {1: 0.2, 9: 0.3}}, 0.0, 1.0)
    did = [sketch({3: 4}, {1: 12}, 0.1), sketch({9: 2}, {}, 0.2), sketch({5: 3, 1: 1}, {2: 3, 1: 9}, 0.4)]
    did += [sketch({2: 8}, {1: 8}, 0.05), sketch({4: 2, 1: 3}, {3: 2}, 0.9), sketch({4: 2}, {1: 6}, 0.1, 6)]
    did += [sketch({3: 3, 5: 1}, {1: 9, 2: 1}, 0.1, 8)]

    def beside(each):
        drafts = sum(reads.total() for reads in each.reads.values())
        return 0.2 * each.rounds.total() + 0.05 * drafts + 0.1 * each.judged + 4 * each.host_seconds

    runs = [(each, 1.3 * costs.forwards(each) + beside(each)) for each in did]
    found = fitted(costs, runs)
    assert found.round == pytest.approx(0.2)
    assert found.host == pytest.approx(4)
    assert found.judge == pytest.approx(0.1)
    assert found.target[1] == pytest.approx(1.3 * 0.9)
    assert found.models["drafter"][1] == pytest.approx(1.3 * 0.2 + 0.05)
    for each, steps in runs:
        assert found.predicted(each) == pytest.approx(10 / steps)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of a target and of a drafter that is nearly the same."""
    path = tmp_path_factory.mktemp("tune")
    target, drafter = build_llama(hidden=16), build_llama(hidden=16)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    for name, model in (("target", target), ("drafter", drafter)):
        save_checkpoint(path / name, model, build_tokenizer(), CheckpointInfo(name))
    rows = [{"prompt": f"{at} apple pear apple pear {at * at}"} for at in range(8)]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(folder, *more):
    named = {"target.path": folder / "target", "drafter.path": folder / "drafter", "prompts.source": "file"}
    named |= {"prompts.path": folder / "prompts.jsonl", "prompts.near_duplicate": 1.0, "evaluate.max_new_tokens": 14}
    named |= {"evaluate.dtype": "float32", "evaluate.repeats": 1, "responses.sampling.temperature": 1.0}
    return ["tune", *(str(part) for name, value in named.items() for part in (f"--{name}", value)), *more]


def test_the_verb_writes_what_it_found_and_a_recipe_that_is_accepted(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("drafttrain.evaluation.tune.copies", lambda bigrams: copies(bigrams)[:3])
    monkeypatch.setattr("drafttrain.evaluation.tune.singles", lambda *given: singles(*given)[:2])
    monkeypatch.setattr("drafttrain.evaluation.tune.combinations", lambda *given: combinations(*given)[::9])
    cli.main(flags(folder, "--run", str(tmp_path / "run"), "--evaluate.trees", "true"))
    found = json.loads((tmp_path / "run" / "tune.json").read_text())
    assert found["fastest"]["measured"] == max(each["measured"] or 0 for each in found["tried"])
    assert found["chosen"]["behind"]["low"] <= 1
    recipe = yaml.safe_load((tmp_path / "run" / "tuned.yaml").read_text())
    assert recipe["evaluate"]["methods"] == [found["chosen"]["method"]]
    assert "predicted" in (tmp_path / "run" / "tune.md").read_text()
    assert f"Fastest: {found['fastest']['method']}" in capsys.readouterr().out
    cli.main(["tune", "--config", str(tmp_path / "run" / "tuned.yaml"), "--run", str(tmp_path / "other"), "--plan"])
    assert not (tmp_path / "other" / "tune.json").exists()


def ran(first: int, *seconds: float) -> list[Completion]:
    """Repeats of an answer of five tokens, the first of them given."""
    return [Completion([first] * 5, "eos", [], Counts(tokens=5, decode_seconds=each)) for each in seconds]


def test_where_answers_are_drawn_those_that_may_stand_in_a_figure_are_timed(monkeypatch):
    """The fastest repeat of each, by the token, times the recorded tokens; all of them where none is usable."""
    monkeypatch.setattr(tuning, "usable", lambda task, reference, ids, tokenizer: ids[0] == 1)
    question = Question("p", "code", 0, (3,), 9, None, 0)
    drawn = [tuning._redrawn(question, draw) for draw in range(3)]
    assert len({each.sample_id for each in drawn}) == 3
    tuner = Tuner.__new__(Tuner)
    tuner.models = type("Models", (), {"tokenizer": None})()
    tuner.prompts = [Prompt(drawn, drawn[0], [0, 1])]
    tuner.answers = [Answer("code", (3,), (1,) * 4, 9), Answer("code", (3,), (1,) * 6, 9)]
    runs = {drawn[0]: ran(1, 2.0, 1.0), drawn[1]: ran(2, 50.0), drawn[2]: ran(1, 3.0)}
    assert tuner._scaled(runs) == [pytest.approx((1.0 + 3.0) / 10 * 10)]
    assert tuner._scaled({each: ran(2, 2.0) for each in drawn}) == [pytest.approx(6.0 / 15 * 10)]


def test_several_answers_are_recorded_only_where_they_are_drawn(folder, monkeypatch):
    monkeypatch.setattr(tuning, "usable", lambda *given: True)
    target = load_target(TargetConfig(path=str(folder / "target"), dtype="float32"))
    models = Models(target, load_drafter(str(folder / "drafter"), "float32"), {}, frozenset(), "float32")
    question = Question("p", "code", 0, (1, 5, 3), 4, None, 7)
    for temperature, answers in ((0.0, 1), (1.0, DRAWS)):
        tuner = Tuner.__new__(Tuner)
        tuner.models, tuner.sampling, tuner.seed = models, Sampling(temperature), 0
        tuner.target, tuner.engines = models.engines()[0], {"drafter": models.engines()[1]}
        prompts, recorded = tuner._answered([question])
        assert [len(prompt.drawn) for prompt in prompts] == [answers]
        assert list(prompts[0].answers) == list(range(answers)) and len(recorded) == answers
    assert len({each.tokens for each in recorded}) > 1


def test_methods_are_told_apart_where_prompts_agree_about_them():
    """Ten prompts, a method that is 2 % slower on each, and one that is now slower, now faster, 2 % in all."""
    base = [1.0] * 10
    runs = {AUTOREGRESSIVE: [3.0] * 10, "fast": base, "slow": [1.02] * 10, "now and then": [0.72, 1.32] * 5}
    tried = [Tried(method, 3.0) for method in ("slow", "now and then", "fast")]
    measure(tried, runs, ["code"] * 5 + ["revise"] * 5)
    slow, varying, fast = tried
    assert (fast.measured, fast.measured_by_task) == (3.0, {"code": 3.0, "revise": 3.0})
    assert fast.ties and varying.ties and not slow.ties
    assert varying.behind.value == pytest.approx(1.02)
    assert slow.error == pytest.approx(0.02)


def test_simple_is_what_has_few_members_then_few_weights_then_few_settings():
    engines = {"drafter": Engine(build_llama(hidden=16)), "small": Engine(build_llama(hidden=8))}
    ordered = ["Copy()", "Copy(gamma=2)", "Model(small, length=4)", "Model(drafter, length=4)"]
    ordered += ["Model(drafter, stop=Confidence(0.5, max=9))", "FirstOf(Copy(), Model(small, length=4))"]
    ordered += ["Then((Reviewed(small, inner=MaxGram(length=6)), 2), (Copy(), 8))", "Reviewed(drafter, inner=Copy())"]
    ordered += [
        "Model(drafter, stop=AcceptanceHead(head, 0.5))",
        "Reviewed(drafter, inner=Reviewed(small, inner=Copy()))",
    ]
    assert sorted(set(ordered), key=lambda method: simplicity(method, engines)) == ordered


def test_a_drafter_that_no_recorded_answer_can_say_is_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("drafttrain.evaluation.pair.Models.reads_target", True)
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags(folder, "--run", str(tmp_path)))
    assert stopped.value.code == 2
    assert "is a LongSpec drafter" in capsys.readouterr().err


def test_drafts_that_are_made_up_cannot_be_tuned(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags(folder, "--run", str(tmp_path), "--evaluate.synthetic_acceptance", "[0.8]"))
    assert stopped.value.code == 2
    assert "tune needs real drafts" in capsys.readouterr().err
