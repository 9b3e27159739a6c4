"""Near-duplicates: the threshold means exact Jaccard, and nothing alike survives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.dedup import Seen, jaccard, shingles

WORDS = [f"w{number}" for number in range(400)]


def passage(seed: int, words: int = 60) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def edited(text: str, edits: int, seed: int = 0) -> str:
    words = text.split()
    for at in np.random.default_rng(seed).choice(len(words), edits, replace=False):
        words[at] = "changed"
    return " ".join(words)


def near_duplicates(texts: list[str], threshold: float) -> list[int | None]:
    """For every text, the index of the earlier text that it repeats, or None."""
    seen = Seen(threshold)
    return [seen.add(text) for text in texts]


def test_jaccard_of_shingles_is_that_of_sets_of_word_runs():
    one, other = passage(1), edited(passage(1), 2)

    def runs(text):
        words = text.split()
        return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}

    expected = len(runs(one) & runs(other)) / len(runs(one) | runs(other))
    assert jaccard(shingles(one), shingles(other)) == pytest.approx(expected)


def test_case_and_white_space_do_not_make_a_new_text():
    assert near_duplicates(["The cat  sat.\n", "the CAT sat ."], 1.0) == [None, 0]


def test_a_changed_digit_in_a_short_question_is_another_question():
    assert near_duplicates(["What is 12 plus 13?", "What is 12 plus 14?"], 0.8) == [None, None]


def test_the_first_of_two_alike_stays():
    text = passage(3, 200)
    assert near_duplicates([passage(4, 200), text, passage(5, 200), edited(text, 2)], 0.8) == [None, None, None, 1]


def test_texts_without_spaces_are_compared_by_character():
    line = "\u4eca\u65e5\u306f\u5929\u6c17\u304c\u3044\u3044\u3067\u3059\u306d\u6563\u6b69\u306b\u884c\u304d"
    assert near_duplicates([line * 2, line * 2 + "\u306d"], 0.8) == [None, 0]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.8, 0.9]))
def test_banding_agrees_with_comparing_every_pair(seed, threshold):
    draw = np.random.default_rng(seed)
    texts = [passage(int(draw.integers(8))) for _ in range(6)]
    texts += [edited(text, int(draw.integers(1, 4)), seed) for text in texts]
    sets = [shingles(text) for text in texts]
    expected, kept = [], []
    for at, mine in enumerate(sets):
        twin = next((other for other in kept if jaccard(mine, sets[other]) >= threshold), None)
        expected.append(twin)
        kept += [at] if twin is None else []
    assert near_duplicates(texts, threshold) == expected


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_threshold_that_is_no_similarity_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        Seen(threshold)
