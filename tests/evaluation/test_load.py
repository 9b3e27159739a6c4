"""Where speculation stops paying is read off intervals, where its speed-up crosses 1 off the line through them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.evaluation.load import break_even, told
from drafttrain.evaluation.statistics import Interval
from tests.evaluation import synthetic

METHOD = "Model(drafter, length=4)"


def at(**speedups):
    """Speed-ups by batch size (`b4` is 4), each with an interval of 0.1 to both sides."""
    return {int(size[1:]): Interval(value, value - 0.1, value + 0.1) for size, value in speedups.items()}


@pytest.mark.parametrize(
    ("speedups", "size", "crossing"),
    [
        (at(b1=1.5, b4=1.4, b16=1.2), None, None),
        (at(b1=1.5, b4=1.25, b16=0.75), 16, 8.0),
        (at(b1=1.5, b4=1.05, b16=0.55), 4, 4 * 4**0.1),
        (at(b1=1.5, b4=1.4, b16=1.05), 16, None),
        (at(b1=0.9, b4=0.8), 1, None),
        (at(b1=1.05, b4=1.25, b16=0.75), 16, 8.0),
        (at(b1=1.5, b4=0.9, b16=1.2), None, None),
        (at(b8=1.3), None, None),
        (at(b16=0.75, b1=1.5, b4=1.25), 16, 8.0),
    ],
)
def test_the_size_from_which_on_no_interval_is_above_one_and_the_line_through_one(speedups, size, crossing):
    found = break_even(METHOD, speedups)
    assert (found.method, found.batch_size) == (METHOD, size)
    assert found.crossing == (pytest.approx(crossing) if isinstance(crossing, float) else crossing)


@given(st.lists(st.floats(0.3, 3), min_size=1, max_size=6))
def test_a_crossing_lies_between_sizes_on_either_side_of_one(values):
    speedups = {2**i: Interval(value, value, value) for i, value in enumerate(values)}
    found = break_even(METHOD, speedups)
    assert (found.batch_size is None) == (values[-1] > 1)
    assert (found.crossing is None) == (values[-1] > 1 or max(values) <= 1)
    if found.crossing is not None:
        assert all(speedups[size].value <= 1 for size in speedups if size > found.crossing * (1 + 1e-9))
        assert speedups[max(size for size in speedups if size < found.batch_size)].value > 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1.5, 1.4, 1.3), "pays at every batch size measured (1, 4, 16; 1.30 [1.25, 1.35] times as fast at 16)"),
        ((1.5, 1.25, 0.75), "stops paying at a batch of 16 (0.75 [0.70, 0.80] times as fast); between the sizes"),
        ((1.0, 0.9, 0.8), "is not shown to pay at any batch size measured (1.00 [0.95, 1.05] times as fast at 1)."),
    ],
)
def test_the_answer_is_told_with_its_interval(values, words):
    load = synthetic.load("greedy", {METHOD: values})
    assert f"`{METHOD}` {words}" in told(load, load.break_even[0])
    assert ("a batch of about 8.0." in told(load, load.break_even[0])) == (values[2] == 0.75)
