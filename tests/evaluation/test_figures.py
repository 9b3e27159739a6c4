"""Which answers count, and that figures are sums over them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.evaluation import figures
from drafttrain.evaluation.schema import AUTOREGRESSIVE
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


def test_identities_of_the_counts():
    row = figures.summarise(*both(), 50, 0)
    assert row.tau == pytest.approx(row.tokens / row.rounds)
    assert row.verification_rate == pytest.approx(1 / row.tau)
    assert row.drafted == row.accepted + row.discarded == sum(row.drafted_at)
    assert row.accepted == sum(row.accepted_at)
    assert row.acceptance_unconditional[2] == pytest.approx(
        row.acceptance_conditional[0] * row.acceptance_conditional[1] * row.acceptance_conditional[2]
    )
    assert row.speedup.low < row.speedup.value < row.speedup.high
    assert row.speedup.value == pytest.approx(row.tokens_per_second / (row.baseline_tokens / row.baseline_seconds))


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
