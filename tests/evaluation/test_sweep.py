"""The sweep asks for every setting once, judges it in the test split's mixture, and picks the best of each family."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.config import EvaluateConfig
from drafttrain.decoding.counts import Counts
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import parse_method
from drafttrain.errors import UserError
from drafttrain.evaluation.command import foreign_heads
from drafttrain.evaluation.methods import ORACLE, check_length, family_of, head_of, kind_of, longest_of, parameter_of
from drafttrain.evaluation.names import sampling_name
from drafttrain.evaluation.runner import Round, Timings
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Costs, SweepPoint
from drafttrain.evaluation.sweep import Setting, pick, settings, sweep, weighted
from drafttrain.evaluation.trace_record import Record
from drafttrain.evaluation.trace_scores import Scores
from drafttrain.evaluation.tuning import by_family, counts, task_weights
from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from drafttrain.ops.sampling import Sampling
from drafttrain.recipe import SamplingConfig
from tests.conftest import build_llama

HEAD = "Model(drafter, stop=AcceptanceHead(head, 0.7, min=2))"


def test_every_length_and_threshold_is_swept_once_in_canonical_form():
    heads = {"head": AcceptanceHeadConfig(8, threshold=0.35), "published": AcceptanceHeadConfig(8, min_length=2)}
    swept = settings(EvaluateConfig(max_length=3, thresholds=[0.5, 0.2]), heads)
    methods = [each.method for each in swept]
    assert methods[:3] == [f"Model(drafter, length={k})" for k in (1, 2, 3)]
    assert "Model(drafter, stop=AcceptanceHead(head, 0.35, max=3))" in methods  # its own threshold
    assert "Model(drafter, stop=AcceptanceHead(head, 0.35, max=20))" in methods  # its own setting
    assert "Model(drafter, stop=AcceptanceHead(published, 0.5, min=2, max=3))" in methods
    assert "Model(drafter, stop=Confidence(0.2, per_token=True, max=3))" in methods
    assert len(set(methods)) == len(methods) == 3 + 2 * (2 + 5) + (3 + 5 + 1) + (3 + 5 + 1)
    assert all(str(parse_method(method)) == method for method in methods)
    assert all((each.kind, each.parameter) == (kind_of(each.method), parameter_of(each.method)) for each in swept)


@pytest.mark.parametrize(
    ("method", "kind", "parameter", "family"),
    [
        ("Model(drafter, length=5)", "fixed", 5, "fixed"),
        ("Model(drafter, length=9, stop=Confidence(0.4))", "confidence", 0.4, "confidence"),
        ("Model(drafter, stop=Entropy(1.5))", "entropy", 1.5, "entropy"),
        (HEAD, "head", 0.7, "head head"),
        (AUTOREGRESSIVE, "autoregressive", None, "autoregressive"),
        ("their.code.Mine(drafter, 3, length=4)", "other", None, "other their.code.Mine"),
        ("their.code.Mine(drafter, stop=AcceptanceHead(head, 0.7))", "other", None, "other their.code.Mine"),
        ("Model(drafter, stop=their.Rule(0.5, head))", "other", None, "other their.Rule"),
    ],
)
def test_methods_are_told_apart_by_their_expressions(method, kind, parameter, family):
    assert (kind_of(method), parameter_of(method), family_of(method)) == (kind, parameter, family)
    assert head_of(method) == ("head" if kind == "head" else None)
    assert head_of(ORACLE) is None


def point(method, speedup):
    return SweepPoint(method, kind_of(method), "greedy", parameter_of(method), 2.0, 0.1, 0.5, speedup)


def test_the_fastest_of_each_family_are_picked_in_order_of_their_parameter():
    speeds = {1: 1.2, 2: 1.5, 3: 1.6, 4: 1.4}
    points = [point(f"Model(drafter, length={k})", speedup) for k, speedup in speeds.items()]
    points += [point(f"Model(drafter, stop=AcceptanceHead({name}, 0.5))", 1.0) for name in ("other", "head")]
    points.append(SweepPoint("perfect stopping", "oracle", "greedy", None, 3.0, 0.0, 0.3, 9.0))
    assert pick(points, 2) == [
        "Model(drafter, length=2)",
        "Model(drafter, length=3)",
        "Model(drafter, stop=AcceptanceHead(head, 0.5))",
        "Model(drafter, stop=AcceptanceHead(other, 0.5))",
    ]


@given(st.integers(1, 50), st.integers(1, 50), st.floats(0.1, 10))
def test_weights_scale_counts_and_leave_rates_of_one_task_alone(tokens, rounds, weight):
    row = Counts(tokens, rounds, rounds, {"drafter": tokens}, tokens, 1, tokens - 1, [rounds])
    total = weighted({"a": row}, {"a": weight})
    assert total.tokens / total.rounds == pytest.approx(tokens / rounds)
    assert total.drafted_at == [pytest.approx(weight * rounds)]


def test_tasks_weigh_as_in_the_test_split():
    assert task_weights("aaaab", "aabbbb") == {"a": 0.5, "b": 4.0}
    assert task_weights("aab", "aa") == {"a": 1.0, "b": 0.0}  # not asked in the test split
    assert task_weights("aa", "bb") == {}


class Words:
    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@pytest.mark.parametrize(
    ("task", "ids", "reference", "counted"),
    [
        ("code", [1, 2, 3] * 20, None, False),
        ("recall", [1, 2, 3] * 20, " ".join(["1 2 3"] * 20), True),
        ("revise", [4, 5], "4 5", True),
        ("revise", [4, 5], "4 6", False),
        ("recall", [4, 5], "4 6", True),
        ("code", [], None, False),
    ],
)
def test_tuning_answers_count_as_test_answers_do(task, ids, reference, counted):
    row = {"prompt_id": "p", "turn": 0, "task": task, "response_ids": ids}
    references = {} if reference is None else {("p", 0): reference}
    assert counts(row, references, Words()) is counted


def test_each_family_has_costs_of_all_its_runs_and_all_share_the_targets():
    def timings(width, draft, loop, steps):
        made = Timings([Round(0.0, draft, 1.0, 1.0 + draft + loop, width, steps) for _ in range(20)])
        made.counts.draft_forwards = {"drafter": 20 * steps} if steps else {}
        return made

    tuned = {
        AUTOREGRESSIVE: timings(1, 0.0, 0.0, 0),
        "Model(drafter, length=2)": timings(3, 0.4, 0.1, 2),
        "Model(drafter, stop=Confidence(0.4))": timings(3, 0.6, 0.1, 2),
    }
    tested = {AUTOREGRESSIVE: timings(1, 0.0, 0.0, 0), HEAD: timings(3, 0.8, 0.2, 2)}
    found = by_family([tuned, tested], 4)
    assert {family: round(costs.c["drafter"], 6) for family, costs in found.items()} == {
        "fixed": 0.2,
        "confidence": 0.3,
        "head head": 0.4,
    }
    assert found["head head"].o == found["fixed"].o == pytest.approx(0.1)
    assert all(costs.v == pytest.approx([1.0] * 4) for costs in found.values())


@pytest.mark.parametrize(
    ("settings_given", "name"),
    [
        ({"temperature": 0}, "greedy"),
        ({"temperature": 0.8, "top_p": 0.9}, "temperature 0.8, top-p 0.9"),
        ({"temperature": 1, "top_k": 50, "min_p": 0.1}, "temperature 1, top-k 50, min-p 0.1"),
        ({"temperature": 0, "repetition_penalty": 1.2}, "greedy, repetition penalty 1.2"),
    ],
)
def test_settings_are_named_for_people(settings_given, name):
    assert sampling_name(SamplingConfig(**settings_given)) == name


def swept(run_length, weights, *methods):
    """Points of these methods, replayed over thirty tokens of task "a" that a third of the drafted ones are not."""
    accepted = np.arange(30) % 3 != 2
    scores = Scores(np.full((30, 1), 0.9), np.full((10, run_length, 1), 0.9))
    nowhere, runs = np.zeros(30, dtype=bool), np.zeros((10, run_length), dtype=bool)
    record = Record.make([30], accepted, nowhere, runs, [False], None, ["a"], {"confidence": scores})
    models = SimpleNamespace(members=lambda: {"drafter": Engine(build_llama(24, layers=1, hidden=16))})
    costs = {"fixed": Costs(1.0, {"drafter": 0.1}, [1.0] * 13, 0.0)}
    asked = [Setting(method, kind_of(method), parameter_of(method)) for method in methods]
    return sweep(record, asked, models, costs, weights, "greedy")


def test_a_sweep_predicts_from_what_replay_counts():
    """Two tokens are accepted, then one is not, ten times over; a draft step costs a tenth of a target forward."""
    two, oracle = swept(6, {}, "Model(drafter, length=2)")
    for point in (two, oracle):
        assert (point.tau, point.discard_rate, point.verification_rate) == (3.0, 0.0, pytest.approx(1 / 3))
        assert point.predicted_speedup == pytest.approx(30 / (20 * 0.1 + 10))
    four, _ = swept(6, {}, "Model(drafter, length=4)")
    assert four.tau == 3.0
    assert four.discard_rate == pytest.approx(
        2 * 10 / 30, abs=2 / 30
    )  # less where the answer's end limits the last draft
    assert four.predicted_speedup == pytest.approx(30 / (40 * 0.1 + 10), abs=0.05)


def test_a_sweep_says_how_far_rules_drafted_on_beyond_the_traces():
    method = "Model(drafter, stop=Confidence(0.9, max=6))"
    short, long = swept(0, {}, method)[0], swept(6, {}, method)[0]
    assert short.unobserved > 0.5 and long.unobserved == 0
    assert short.tau == long.tau and short.discard_rate < long.discard_rate


def test_weights_that_leave_no_answer_do_not_count():
    fixed = "Model(drafter, length=3)"
    assert swept(0, {"a": 0.0, "b": 2.0}, fixed) == swept(0, {}, fixed)


def test_a_method_is_replayed_no_longer_than_its_drafter_drafts():
    cut, whole = "Model(drafter, length=2, stop=Confidence(0.9, max=6))", "Model(drafter, stop=Confidence(0.9, max=2))"
    first, second, _ = swept(6, {}, cut, whole)
    assert (first.tau, first.discard_rate) == (second.tau, second.discard_rate)


def test_a_heads_own_setting_is_swept_once():
    swept = settings(EvaluateConfig(thresholds=[0.7]), {"head": AcceptanceHeadConfig(8, max_length=12, threshold=0.7)})
    assert [each.method for each in swept].count("Model(drafter, stop=AcceptanceHead(head, 0.7))") == 1
    published = AcceptanceHeadConfig(8, min_length=2, max_length=20, threshold=0.7)
    swept = settings(EvaluateConfig(thresholds=[0.5]), {"published": published})
    assert "Model(drafter, stop=AcceptanceHead(published, 0.7, min=2, max=20))" in [each.method for each in swept]


@pytest.mark.parametrize(
    ("method", "longest"),
    [
        ("Model(drafter, length=5)", 5),
        (HEAD, 12),
        ("Model(drafter, length=9, stop=Confidence(0.4))", 9),
        ("Model(drafter, stop=Entropy(1.5, max=20))", 20),
        (AUTOREGRESSIVE, 0),
        ("their.code.Mine(drafter, length=300)", 0),
        ("Model(drafter, stop=their.Rule(0.5, max=300))", 0),
        ("Model(drafter, length=7, stop=their.Rule(0.5))", 7),
    ],
)
def test_the_longest_draft_is_read_off_a_method(method, longest):
    assert longest_of(method) == longest


@pytest.mark.parametrize(
    ("method", "fine"),
    [
        ("Model(drafter, length=300)", False),
        ("Model(drafter, stop=Confidence(0.4, max=300))", False),
        ("Model(drafter, length=8, stop=Confidence(0.4, max=300))", True),
        ("Model(drafter, length=300, stop=Confidence(0.4))", True),
        ("Model(drafter, length=250)", True),
        (AUTOREGRESSIVE, True),
    ],
)
def test_drafts_longer_than_replay_counts_are_refused(method, fine):
    if fine:
        check_length(method)
        return
    with pytest.raises(UserError, match="300 tokens a round"):
        check_length(method)


def test_a_head_trained_for_another_setting_is_named():
    heads = {
        "head": AcceptanceHeadConfig(8, sampling={"temperature": 1.0, "top_k": 0}),
        "greedy_head": AcceptanceHeadConfig(8, sampling={"temperature": 0.0}),
        "untrained": AcceptanceHeadConfig(8),
    }
    [note] = foreign_heads(heads, "greedy", Sampling(0.0))
    assert "`head` was trained for temperature 1:" in note and "greedy" in note


def test_models_do_not_share_their_costs():
    chains = [
        "Model(drafter, length=3)",
        "Model(drafter, length=5)",
        "Model(small, length=3)",
        "LongSpec(small, length=3)",
    ]
    assert [family_of(method) for method in chains] == ["fixed", "fixed", "fixed small", "fixed small"]
    assert family_of("Model(drafter, stop=AcceptanceHead(head, 0.5))").endswith(" head")
