"""The verdict says what the numbers say: gain, no gain, not proven, not exact, and which term is to blame."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.evaluation import figures
from drafttrain.evaluation.cost import halved, predict
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Costs, Exactness
from drafttrain.evaluation.statistics import Interval
from drafttrain.evaluation.verdict import decide, rising, verdict_lines
from tests.evaluation import synthetic

METHOD = "Model(drafter, length=4)"


def rows(interval, **changes):
    base = synthetic.samples(AUTOREGRESSIVE, "greedy", 0)
    own = synthetic.samples(METHOD, "greedy", 4)
    made = [
        synthetic.result(AUTOREGRESSIVE, "autoregressive", "greedy", base, base),
        synthetic.result(METHOD, "fixed", "greedy", own, base),
    ]
    made[1].overall.speedup = interval
    for name, value in changes.items():
        setattr(made[1], name, value)
    return made


@pytest.mark.parametrize(
    ("interval", "decision"),
    [
        (Interval(1.6, 1.4, 1.8), "deploy"),
        (Interval(1.3, 0.9, 1.7), "not proven"),
        (Interval(1.01, 1.0, 1.02), "no gain"),
        (Interval(0.7, 0.6, 0.8), "no gain"),
    ],
)
def test_the_lower_bound_decides(interval, decision):
    verdict = decide(rows(interval), [], [], least=1.05)
    assert verdict.decision == decision
    assert ("do not deploy" in verdict.headline) == (decision != "deploy")
    assert f"{interval.value:.2f}" in verdict.headline and METHOD in verdict.headline


def test_few_prompts_prove_nothing_however_narrow_the_interval():
    made = rows(Interval(1.6, 1.6, 1.6))
    made[1].overall.prompts = 2
    verdict = decide(made, [], [], 1.05)
    assert verdict.decision == "not proven" and "so few prompts" in verdict.headline


def test_wrong_output_outweighs_any_speed():
    failed = Exactness("float64", False, 4, 3, reason="code-1 differs at token 9")
    verdict = decide(rows(Interval(3.0, 2.9, 3.1), lossless=[failed]), [], [], 1.05)
    assert verdict.decision == "not exact"
    assert "do not deploy" in verdict.headline and "code-1 differs at token 9" in verdict.headline


def test_nothing_left_to_measure_is_not_a_gain():
    verdict = decide(rows(None), [], [], 1.05)
    assert verdict.decision == "not proven" and "do not deploy" in verdict.headline


def counted(**changes):
    figure = figures.summarise(
        synthetic.samples(METHOD, "greedy", 4), synthetic.samples(AUTOREGRESSIVE, "greedy", 0), 50, 0
    )
    return dataclasses.replace(figure, **changes)


@pytest.mark.parametrize(
    ("costs", "limit"),
    [
        (Costs(1.0, {"drafter": 0.01}, [1.0] * 13, 0.0), "tau"),
        (Costs(1.0, {"drafter": 0.9}, [1.0] * 13, 0.0), "c"),
        (Costs(1.0, {"drafter": 0.01}, [1.0, 1.5, 2.5, 3.5, 4.5, 5.5], 0.0), "v"),
        (Costs(1.0, {"drafter": 0.01}, [1.0] * 13, 4.0), "o"),
    ],
)
def test_the_term_that_costs_most_is_named(costs, limit):
    gains = halved(counted(), costs)
    assert max(gains, key=gains.get) == limit
    made = rows(Interval(1.6, 1.4, 1.8), costs=costs)
    verdict = decide(made, [], [], 1.05)
    assert verdict.settings[0].limit == limit
    assert any(f" {limit}, " in line for line in verdict.details)


@given(st.floats(0.001, 2), st.floats(0, 1), st.floats(0, 5), st.lists(st.floats(0, 0.5), min_size=12, max_size=12))
def test_halving_a_cost_never_slows(c, v, o, steps):
    widths = [1.0]
    for step in steps:
        widths.append(widths[-1] + v * step)
    costs = Costs(1.0, {"drafter": c}, widths, o)
    figure = FIGURES
    now = predict(figure, costs)
    assert all(gain >= now * (1 - 1e-9) for gain in halved(figure, costs).values())


FIGURES = counted()


def test_the_prediction_is_the_formula():
    figure = FIGURES
    costs = Costs(1.0, {"drafter": 0.2}, [1.0, 1.1, 1.2, 1.3, 1.4], 0.3)
    spent = figure.draft_forwards["drafter"] * 0.2 + figure.rounds * (1.4 + 0.3)  # every round drafts exactly 4
    assert predict(figure, costs) == pytest.approx(figure.tokens / spent)


def test_what_an_adaptive_rule_adds_is_said_with_its_interval():
    report, _ = synthetic.report(samplings=("greedy",))
    assert any("acceptance head earns its place" in line for line in report.verdict.details)
    for row in report.methods:
        if row.versus:
            row.versus["fixed"] = Interval(0.9, 0.85, 0.95)
    assert any("costs more than it saves" in line for line in decide(report.methods, [], [], 1.05).details)
    for row in report.methods:
        if row.versus:
            row.versus["fixed"] = Interval(1.02, 0.95, 1.1)
    assert any("adds nothing" in line for line in decide(report.methods, [], [], 1.05).details)


def test_the_adaptive_rule_that_replay_chose_is_judged_not_the_luckiest():
    report, _ = synthetic.report(samplings=("greedy",))
    heads = [row for row in report.methods if row.kind == "head"]
    for row in report.methods:
        row.replayed_speedup = 1.5
    heads[0].replayed_speedup, heads[0].versus = 1.6, {"fixed": Interval(1.04, 1.02, 1.06)}
    heads[1].versus = {"fixed": Interval(1.3, 1.2, 1.4), "confidence": Interval(1.2, 1.1, 1.3)}
    heads[0].versus["confidence"] = Interval(1.01, 0.97, 1.05)
    [line] = [line for line in decide(report.methods, [], [], 1.05).details if "earns its place" in line]
    assert "+4 % [+2, +6] over the best fixed" in line and "+1 % [-3, +5] against the best confidence" in line


def test_a_method_from_outside_is_named_and_takes_over_where_its_interval_lies_above():
    report, _ = synthetic.report(samplings=("greedy",))
    own = report.methods[-1]
    own.method, own.kind, own.replayed_speedup = "their.code.Mine(k=3)", "other", None
    chosen = max((row for row in report.of("greedy") if row is not own), key=lambda row: row.replayed_speedup)
    value = chosen.overall.speedup.value
    own.overall.speedup = Interval(2.5, value - 0.1, 2.6)
    verdict = decide(report.methods, [], [], 1.05)
    assert chosen.method in verdict.headline
    line = f"Replay cannot judge `their.code.Mine(k=3)`: measured, it is 2.50 [{value - 0.1:.2f}, 2.60] times as fast."
    assert line in verdict.details
    own.overall.speedup = Interval(2.5, value + 0.1, 2.6)
    verdict = decide(report.methods, [], [], 1.05)
    assert "their.code.Mine(k=3)" in verdict.headline and not any("Replay cannot" in each for each in verdict.details)


def test_the_verdict_is_on_the_method_that_replay_chose_or_without_replay_on_the_fastest():
    report, _ = synthetic.report(samplings=("greedy",))
    chosen, lucky = report.of("greedy")[:2]
    for row in report.methods:
        row.replayed_speedup = 1.5
    chosen.replayed_speedup, chosen.overall.speedup = 1.6, Interval(1.2, 1.0, 1.4)
    lucky.overall.speedup = Interval(9.0, 8.9, 9.1)
    [verdict] = decide(report.methods, [], [], 1.05).settings
    assert (verdict.method, verdict.decision) == (chosen.method, "not proven")
    for row in report.methods:
        row.replayed_speedup = None
    [verdict] = decide(report.methods, [], [], 1.05).settings
    assert (verdict.method, verdict.decision) == (lucky.method, "deploy")


def test_the_way_to_perfect_stopping_is_told_by_replay():
    report, _ = synthetic.report(samplings=("greedy",))
    [line] = [line for line in report.verdict.details if "perfect stopping" in line]
    best = {
        kind: max(p.predicted_speedup for p in report.sweep if p.kind == kind) for kind in ("fixed", "oracle", "head")
    }
    share = (best["head"] - best["fixed"]) / (best["oracle"] - best["fixed"])
    assert f"{100 * share:.0f} % of the way" in line


def test_a_head_is_held_against_confidence_too():
    report, _ = synthetic.report(samplings=("greedy",))
    for row in report.methods:
        if row.kind == "head":
            row.versus["confidence"] = Interval(1.01, 0.97, 1.05)
    details = decide(report.methods, [], [], 1.05).details
    assert any("+1 % [-3, +5] against the best confidence threshold" in line for line in details)


def test_every_setting_is_judged_and_the_first_one_leads():
    report, _ = synthetic.report()
    assert [setting.sampling for setting in report.verdict.settings] == ["greedy", "temperature 1"]
    assert "greedy" in report.verdict.headline
    assert any(line.startswith("Temperature 1: ") for line in report.verdict.details)


def test_more_data_is_advised_while_tau_rises():
    rising_history = [{"tau": 1.5 + 0.1 * i} for i in range(8)]
    flat = [{"tau": 2.0 + 0.001 * i} for i in range(8)]
    assert rising(rising_history) and not rising(flat) and not rising([])
    lines = verdict_lines(decide(rows(Interval(1.6, 1.4, 1.8)), [], rising_history, 1.05))
    assert any("train on more data" in line for line in lines)


def test_where_speculation_stops_paying_is_said_of_the_method_of_the_verdict():
    load = synthetic.load("greedy", {METHOD: (1.5, 1.25, 0.75), "Model(drafter, length=9)": (1.1, 0.9, 0.5)})
    lines = decide(rows(Interval(1.6, 1.4, 1.8)), [], [], 1.05, [synthetic.load("temperature 1"), load]).details
    [line] = [line for line in lines if line.startswith("Under load")]
    assert METHOD in line and "stops paying at a batch of 16 (0.75" in line
    load.prompts = 4
    assert not any("Under load" in line for line in decide(rows(Interval(1.6, 1.4, 1.8)), [], [], 1.05, [load]).details)
