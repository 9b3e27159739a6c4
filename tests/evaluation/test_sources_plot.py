"""Who wrote the tokens, turn by turn, and the sweep of gamma: plots and tables of methods that copy."""

from __future__ import annotations

import dataclasses

import pytest
from matplotlib import pyplot

from drafttrain.evaluation import figures, plots, tables
from drafttrain.evaluation.schema import mixed
from drafttrain.evaluation.sources_plot import gamma, sources, turns, without_gamma
from tests.evaluation import synthetic
from tests.evaluation.test_report import shown_ticks

METHODS = [f"FirstOf(Copy(gamma={n}, source='longest'), Model(drafter, length=3))" for n in (2, 3, 4)] + [
    "Model(drafter, length=4)",
    "Then((Reviewed(drafter, inner=MaxGram()), 4), (MaxGram(), 10))",
]


@pytest.fixture
def made():
    """A report of methods that copy, of conversations of two turns."""
    found, answers = synthetic.report(samplings=("greedy",))
    base = answers["greedy", "Autoregressive()"]
    for number, (row, method) in enumerate(zip(found.methods[1:], METHODS, strict=True)):
        own = answers["greedy", row.method]
        both = [[dataclasses.replace(each, turn=turn) for each in group for turn in (0, 1)] for group in (own, base)]
        row.turns = figures.by_turn(*both, resamples=200, seed=0)
        row.method = method
        if method == "Model(drafter, length=4)":
            continue
        for place, each in enumerate((row.overall, *row.tasks.values(), *row.turns.values())):
            copied = int(each.tokens * (0.1 + 0.15 * (place + number) / 4))
            each.drafted_by = {"copy": 2 * copied, "drafter": 30}
            each.accepted_by = {"copy": copied, "drafter": each.tokens // 4}
            each.rounds_by, each.tokens_by = {"copy": 4, "drafter": 10}, {"copy": 30, "drafter": 20}
    found.methods[0].turns = figures.by_turn(both[1], both[1], resamples=200, seed=0)
    return found


@pytest.mark.parametrize("draw", [sources, turns, gamma])
def test_it_is_drawn_with_nothing_covered(made, draw):
    with pyplot.rc_context(plots.STYLE):
        figure = draw(made)
        figure.canvas.draw()
        boxes = [
            label.get_window_extent()
            for axis in figure.axes
            for label in [*shown_ticks(axis), axis._left_title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
            if label.get_visible() and label.get_text()
        ]
        width, height = figure.get_size_inches() * figure.dpi
        assert all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes)
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.9, 0.9).overlaps(b)]
        pyplot.close(figure)


def test_a_report_without_copies_and_turns_has_none_of_them():
    plain, _ = synthetic.report(samplings=("greedy",))
    assert [draw(plain) for draw in (sources, turns, gamma)] == [None] * 3
    assert not any(mixed(row) for row in plain.methods)


def test_the_bars_of_a_method_come_to_all_its_tokens(made):
    axis = sources(made).axes[0]
    ends = {}
    for bar in axis.patches:
        ends[bar.get_y()] = max(ends.get(bar.get_y(), 0), bar.get_x() + bar.get_width())
    assert len(ends) == 4 * len(made.methods[1].tasks)
    assert all(end == pytest.approx(1) for end in ends.values())


def test_methods_that_differ_in_gamma_alone_are_one_curve(made):
    axis, *others = gamma(made).axes
    assert not others
    assert [list(line.get_xdata()) for line in axis.get_lines()[:1]] == [[2, 3, 4]]


@pytest.mark.parametrize(
    ("method", "found"),
    [
        ("Copy()", ("Copy(gamma=n)", 3)),
        ("Copy(gamma=5)", ("Copy(gamma=n)", 5)),
        ("Copy(length=4)", ("Copy(gamma=n, length=4)", 3)),
        ("Copy(gamma=2, length=4)", ("Copy(gamma=n, length=4)", 2)),
        ("FirstOf(Copy(gamma=2), Model(drafter, length=3))", ("FirstOf(Copy(gamma=n), Model(drafter, length=3))", 2)),
        ("Then((Copy(), 2), (Copy(gamma=4), 3))", None),
        ("Model(drafter, length=3)", None),
    ],
)
def test_gamma_is_read_off_a_method(method, found):
    assert without_gamma(method) == found


def test_tables_tell_turns_apart(made):
    columns, cells = tables.task_cells(made, "greedy")
    tasks = list(made.methods[0].tasks)
    assert [line[0] for line in cells] == [*tasks, *(f"{task}, turn {n}" for task in sorted(tasks) for n in (1, 2))]
    assert all(len(line) == len(columns) for line in cells)
    told = [line[1] for line in tables.source_cells(made, "greedy") if "MaxGram" in line[0]]
    assert told == [line[0] for line in cells]


def test_tasks_of_one_turn_have_no_rows_of_turns():
    answers = synthetic.samples("Model(drafter, length=3)", "greedy", 3)
    assert figures.by_turn(answers, answers, 200, 0) == {}
    later = [dataclasses.replace(each, turn=1) for each in answers if each.task == "code"]
    found = figures.by_turn([*answers, *later], [*answers, *later], 200, 0)
    assert list(found) == ["code, turn 1", "code, turn 2"]
    assert found["code, turn 1"].tokens == sum(len(each.token_ids) for each in answers if each.task == "code")


def test_standardized_walltime_improvement_charges_forwards_alone():
    found = figures.Figures(prompts=1, looping=0, wrong=0, tokens=90, target_forwards=20)
    found.draft_forwards = {"drafter": 50, "small": 100}
    shares, costs = {"drafter": 0.4, "small": 0.05}, {"drafter": 0.2}
    assert figures.swi(found, shares, costs) == {"parameters": 90 / (20 + 20 + 5)}
    assert figures.swi(found, {}, costs | {"small": 0.1}) == {"measured": 90 / (20 + 10 + 10)}
    assert figures.swi(dataclasses.replace(found, tokens=0), shares, costs) == {}
