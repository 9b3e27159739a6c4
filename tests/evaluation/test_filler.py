"""The same questions at several lengths: nothing but the text before them differs."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.errors import UserError
from drafttrain.evaluation.contexts import paired_lines
from drafttrain.evaluation.filler import behind_filler
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.schema import ContextBucket
from drafttrain.evaluation.statistics import Interval


def question(name="a", ids=(1, 5, 6, 7), turn=0, sample=3):
    return Question(name, "task", turn, tuple(ids), 16, "right", sample)


OTHERS = [[1, 20, 21, 22], [1, 30, 31]]


@given(st.lists(st.integers(8, 60), min_size=1, max_size=3, unique=True), st.integers(0, 1000))
def test_lengths_are_as_asked_and_the_question_stands_at_the_end(lengths, sample):
    found = behind_filler([question(sample=sample), question("b", (1, 9))], lengths, OTHERS, 100)
    assert [len(each.ids) for each in found] == sorted(lengths) * 2
    for each, other in itertools.pairwise(found):
        assert each.ids[0] == 1 and each.context == len(each.ids) and each.limit == min(16, 100 - len(each.ids))
        if each.prompt_id[0] == other.prompt_id[0]:  # the longer one's text ends as the shorter one's
            assert other.ids[-len(each.ids) + 1 :] == each.ids[1:]
    assert found[0].ids[-3:] == (5, 6, 7) and found[-1].ids[-1:] == (9,)
    assert set(found[0].ids[1:-3]) <= {20, 21, 22, 30, 31}
    assert len({each.prompt_id for each in found}) == len(found) and found[0].reference == "right"


def test_later_turns_and_longer_prompts_are_left_out():
    found = behind_filler([question(), question("b", range(40)), question("c", turn=1)], [8, 32], OTHERS, 64)
    assert [each.prompt_id for each in found] == ["a@8", "a@32"]


@pytest.mark.parametrize(
    ("questions", "lengths", "others", "told"),
    [
        ([question()], [8, 64], OTHERS, "has 64, but the pair's context is 64"),
        ([question("b", range(40))], [8], OTHERS, "no prompt has at most 8 tokens"),
        ([question()], [8], [], "needs other prompts"),
    ],
)
def test_what_cannot_be_is_refused(questions, lengths, others, told):
    with pytest.raises(UserError, match=told):
        behind_filler(questions, lengths, others, 64)


def test_the_longest_prompts_are_told():
    def bucket(context, ratio, kept=5):
        return ContextBucket("M", "greedy", context, 3, 9, 2.0, 1.0, 0.1, kept, ratio)

    [line] = paired_lines([bucket(8, Interval(1, 1, 1)), bucket(64, Interval(0.97, 0.9, 1.02)), bucket(64, None)])
    assert "With 64 tokens before the answer in place of 8, `M` writes 0.970 [0.900, 1.020] times" in line
    assert paired_lines([bucket(8, None), bucket(64, None)]) == []
