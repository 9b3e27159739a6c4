"""Max-Gram: the longest match, then a bigram table."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.decoding.draft import Committed
from drafttrain.decoding.drafters import Setting
from drafttrain.decoding.exclusions import Exclusions
from drafttrain.decoding.max_gram import MaxGram
from drafttrain.decoding.suffixes import Suffixes
from drafttrain.models.bigrams import BigramTable
from drafttrain.ops.sampling import Sampling
from drafttrain.testing import check_drafter

TEXTS = st.lists(st.integers(0, 3), max_size=25)
TABLE = BigramTable([1, 2, 3, -1, 5, 4], "a tokenizer", 5)


def longest_match(text):
    """By trying every length and place."""
    for length in range(len(text) - 1, 0, -1):
        for end in range(length, len(text)):
            if text[end - length : end] == text[len(text) - length :]:
                return end, length
    return 0, 0


def proposed(drafter, text, budget=100, eos=(), exclusions=None):
    committed = Committed([list(text)], [0], exclusions=None if exclusions is None else [exclusions])
    drafter.start(committed, Setting(Sampling(0.0), frozenset(eos), 100, 1000))
    draft = drafter.propose(committed, None, [budget], None)
    return draft.rows()[0], draft.origins[0]


@given(TEXTS, TEXTS)
def test_the_longest_match_is_found_behind_any_prefix(text, more):
    suffixes = Suffixes()
    suffixes.extend(text)
    assert suffixes.match(more) == longest_match(text + more)
    suffixes.extend(more)
    suffixes.shorten(len(text))
    assert suffixes.text == text and suffixes.match(more) == longest_match(text + more)


@given(TEXTS, st.integers(1, 6))
def test_copies_are_what_follows_the_match_and_then_the_match_behind_those(text, length):
    if not text:
        return
    expected = []
    for _ in range(2):
        whole = text + expected
        end, matched = longest_match(whole)
        expected += whole[end : end + length - len(expected)] if matched else []
    assert proposed(MaxGram(length=length), text)[0] == expected


def test_the_longest_and_of_those_the_earliest_is_copied():
    text = [9, 1, 2, 3, 7, 1, 2, 4, 7, 1, 2, 5, 0, 7, 1, 2]
    assert proposed(MaxGram(length=2), text) == ([4, 7], [7, 8])


def test_where_nothing_matches_the_table_is_followed():
    assert proposed(MaxGram(length=4), [7, 8, 0]) == ([], [])
    assert proposed(MaxGram(TABLE, length=4), [7, 8, 0]) == ([1, 2, 3], [None] * 3), "3 has no successor"
    assert proposed(MaxGram(TABLE, length=4), [7, 8, 4])[0] == [5, 4, 5, 4]
    assert proposed(MaxGram(TABLE, length=4), [7, 8, 50])[0] == []
    assert proposed(MaxGram(TABLE, length=4, least=2), [1, 2, 7, 1]) == ([2, 3], [None] * 2), "one token is too little"
    assert proposed(MaxGram(TABLE, length=4, least=1), [1, 2, 7, 1])[0] == [2, 7, 1, 2]


def test_labels_tell_copied_tokens_from_those_of_the_table():
    committed = Committed([[6, 0, 6], [7, 8, 0]], [0, 1])
    drafter = MaxGram(TABLE, length=2)
    drafter.start(committed, Setting(Sampling(0.0), frozenset(), 100, 100))
    draft = drafter.propose(committed, None, [2, 2], None)
    assert draft.source == [["max-gram"] * 2, ["bigrams"] * 2]


def test_exclusions_and_ends_hold_for_copies_and_for_the_table():
    text = [5, 6, 7, 8, 9, 5, 6]
    assert proposed(MaxGram(length=4), text, exclusions=Exclusions(spans=[(3, 4)]))[0] == [7]
    assert proposed(MaxGram(length=4), text, exclusions=Exclusions(patterns=[[8, 9]]))[0] == [7]
    assert proposed(MaxGram(TABLE, length=4), [7, 0], exclusions=Exclusions(patterns=[[1, 2]]))[0] == []
    assert proposed(MaxGram(length=4), text, eos=[8])[0] == [7, 8]
    assert proposed(MaxGram(length=4), text, budget=1)[0] == [7]


@given(TEXTS)
def test_origins_hold_the_tokens_that_were_copied(text):
    if text:
        tokens, origins = proposed(MaxGram(TABLE, length=6), text)
        whole = text + tokens
        assert all(origin is None or whole[origin] == token for token, origin in zip(tokens, origins, strict=True))
        table = [place for place, origin in enumerate(origins) if origin is None]
        assert all(b == a + 1 for a, b in pairwise(table))


@pytest.mark.parametrize("table", [None, BigramTable([3, 0, 1, 5, -1, 2], "a tokenizer", 5)])
def test_it_keeps_to_the_interface_and_to_the_targets_text(table):
    checked = check_drafter(lambda engine: MaxGram(table, length=4))
    assert 0 < checked.accepted < checked.drafted
    assert checked.controls == 2
