"""Which answers count, and that figures are sums over them."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.evaluation import figures
from drafttrain.evaluation.cost import predict
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Costs
from tests.evaluation import synthetic

METHOD = "Model(drafter, length=4)"


def both(own_changes=None, base_changes=None):
    own = synthetic.samples(METHOD, "greedy", 4, **own_changes or {})
    base = synthetic.samples(AUTOREGRESSIVE, "greedy", 0, **base_changes or {})
    return own, base


def test_a_loop_on_either_side_leaves_the_answer_out():
    own, base = both({"looping": ("code-1",)}, {"looping": ("code-2", "recall-0")})
    row = figures.summarise(own, base, 50, 0)
    assert row.looping == 3 and row.prompts == 32 - 3
    assert row.tokens == sum(len(s.token_ids) for s in own if s.prompt_id not in ("code-1", "code-2", "recall-0"))


def test_only_revise_has_to_be_right():
    own, base = both({"wrong": ("revise-1", "code-1", "recall-3")})
    row = figures.summarise(own, base, 50, 0)
    assert row.wrong == 1 and row.prompts == 31


def by_hand(sample, seconds, **counts):
    return dataclasses.replace(sample, token_ids=list(range(counts["tokens"])), decode_seconds=seconds, counts=counts)


def test_figures_are_functions_of_summed_counts():
    """One answer of two rounds that draft three tokens and have three and one accepted; one that drafts in vain."""
    own, base = (answers[:2] for answers in both())
    at = {"drafted_at": [2, 2, 2], "reached_at": [2, 2, 1], "accepted_at": [2, 1, 1]}
    work = {"drafted": 6, "accepted": 4, "discarded": 2, "draft_forwards": {"drafter": 6}}
    own[0] = by_hand(own[0], 2.0, tokens=6, rounds=2, target_forwards=2, **work, **at)
    at = {"drafted_at": [1], "reached_at": [1], "accepted_at": [0]}
    work = {"drafted": 1, "accepted": 0, "discarded": 1, "draft_forwards": {"drafter": 1}}
    own[1] = by_hand(own[1], 1.0, tokens=1, rounds=1, target_forwards=1, **work, **at)
    base = [
        dataclasses.replace(each, token_ids=list(range(n)), decode_seconds=n)
        for each, n in zip(base, (6, 1), strict=True)
    ]
    row = figures.summarise(own, base, 50, 0)
    assert (row.tokens, row.rounds, row.drafted, row.accepted, row.discarded) == (7, 3, 7, 4, 3)
    assert row.tau == pytest.approx(7 / 3)
    assert row.acceptance_rate == pytest.approx(4 / 7)
    assert row.discard_rate == row.verification_rate == pytest.approx(3 / 7)
    assert row.acceptance_conditional == pytest.approx([2 / 3, 1 / 2, 1])
    assert row.acceptance_unconditional == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert row.speedup.value == pytest.approx(7 / 3)
    costs = Costs(1.0, {"drafter": 0.5}, [1.0, 1.0, 1.0, 2.0], 0.1)
    assert predict(row, costs) == pytest.approx(7 / (7 * 0.5 + (1 * 1.0 + 2 * 2.0) + 3 * 0.1))


def test_the_interval_holds_the_figure():
    row = figures.summarise(*both(), 50, 0)
    assert row.speedup.low < row.speedup.value < row.speedup.high


def test_all_answers_left_out_gives_no_figures_and_no_error():
    own, base = both({"looping": [f"{task}-{i}" for task in synthetic.TASKS for i in range(8)]})
    row = figures.summarise(own, base, 50, 0)
    assert row.prompts == 0 and row.speedup is None and row.looping == 32


def test_tasks_partition_the_whole():
    overall, tasks = figures.by_task(*both(), 50, 0)
    for name in ("tokens", "rounds", "drafted", "accepted", "prompts"):
        assert getattr(overall, name) == sum(getattr(row, name) for row in tasks.values())


def test_turns_of_a_conversation_are_resampled_together():
    own, base = both()
    for samples in (own, base):
        for turn, sample in enumerate(samples):
            sample.turn, sample.prompt_id, sample.task = turn, "one", "one"
    row = figures.summarise(own, base, 50, 0)
    assert row.prompts == 1
    assert row.speedup.low == pytest.approx(row.speedup.high)  # one conversation: nothing to resample


@given(st.lists(st.integers(0, 5), min_size=30, max_size=60))
def test_a_right_answer_is_never_a_loop(ids):
    assert not figures.loops(ids, right=True)


def test_loops_and_short_answers():
    assert figures.loops([1, 2, 3] * 20, right=None)
    assert figures.loops([1, 2, 3] * 20, right=False)
    assert not figures.loops([1, 2, 3] * 4, right=None)
    assert not figures.loops(list(range(60)), right=None)
