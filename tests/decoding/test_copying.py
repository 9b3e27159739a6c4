"""The copy drafter: what it proposes, from where, and what it must not touch."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.decoding.copy_index import SOURCES, CopyIndex
from drafttrain.decoding.copying import Copy
from drafttrain.decoding.draft import Committed
from drafttrain.decoding.drafters import Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.exclusions import Excluded, Exclusions
from drafttrain.decoding.expression import build
from drafttrain.decoding.loop import Conversation, Decoder
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from drafttrain.testing import check_drafter
from tests.decoding.support import pair

GREEDY = Sampling(0.0)
VARIANTS = {
    "published": {"gamma": 2, "length": 4},
    "latest": {"gamma": 1, "source": "latest", "follow": True},
    "all": {"gamma": 2, "length": 2, "longest": 8, "source": "longest", "follow": True, "backoff": 1, "cooldown": 1},
}
TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def proposed(copy, text, budget=100, eos=(), vocabulary=100, exclusions=None):
    """Tokens and origins behind a text."""
    committed = Committed([list(text)], [0], exclusions=None if exclusions is None else [exclusions])
    copy.start(committed, Setting(GREEDY, frozenset(eos), vocabulary, 1000))
    draft = copy.propose(committed, None, [budget], None)
    return draft.rows()[0], draft.origins[0]


@pytest.fixture(scope="module")
def target():
    return Engine(pair()[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_keeps_to_the_interface_and_to_the_targets_text(name):
    checked = check_drafter(lambda engine: Copy(**VARIANTS[name]))
    assert 0 < checked.accepted < checked.drafted
    assert checked.controls == 2


# ---- what is proposed ----


def test_what_followed_the_same_ending_is_proposed():
    assert proposed(Copy(gamma=2, length=3), [1, 2, 3, 4, 5, 6, 1, 2]) == ([3, 4, 5], [2, 3, 4])
    assert proposed(Copy(gamma=3), [1, 2, 3, 4, 5, 6, 1, 2]) == ([], [])
    assert proposed(Copy(gamma=2), [1, 2, 3, 1, 2]) == ([3, 1, 2], [2, 3, 4])


def test_the_policies_choose_among_several_places():
    text = [9, 1, 2, 3, 0, 1, 2, 4, 0, 7, 1, 2, 5, 0, 9, 1, 2]
    assert proposed(Copy(gamma=2, length=1), text) == ([3], [3])
    assert proposed(Copy(gamma=2, length=1, source="latest"), text) == ([5], [12])
    assert proposed(Copy(gamma=2, length=1, source="longest"), text) == ([3], [3])
    assert proposed(Copy(gamma=2, length=1, source="longest"), [*text[:-3], 1, 2]) == ([4], [7])  # 0, 1, 2


def test_a_source_that_was_right_is_followed_over_one_token_that_differs():
    old = [1, 2, 3, 4, 5, 6, 7, 8]
    changed = [*old, 1, 2, 3, 4, 0]
    assert proposed(Copy(gamma=2, length=3, follow=True), changed) == ([6, 7, 8], [5, 6, 7])
    assert proposed(Copy(gamma=2, length=3), changed) == ([], [])
    assert proposed(Copy(gamma=2, length=3, follow=True), [*changed, 0]) == ([], []), "not over two"


def test_a_followed_source_is_not_left_for_an_earlier_one():
    text = [1, 2, 9, 9, 9, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    more = [*text, 4]
    assert proposed(Copy(gamma=3, length=1, follow=True), more) == ([5], [10])
    twice = [5, 1, 2, 7, 6, 1, 2, 8, 6, 1, 2]  # the latest [6, 1, 2] and what follows it
    assert proposed(Copy(gamma=2, length=1, source="latest", follow=True), twice)[0] == [8]


def test_a_block_grows_with_what_matches():
    passage = list(range(1, 31))
    copy = Copy(gamma=2, length=2, longest=8)
    for count, expected in ((2, 2), (4, 4), (7, 7), (15, 8)):
        assert len(proposed(copy, [*passage, 0, *passage[:count]])[0]) == expected


def test_after_misses_longer_matches_are_asked_for():
    missed = [20, 21, 22, 23, 24, 25, 9, 1, 2, 3, 7, 1, 2, 4, 8, 1, 2, 5]  # one miss: the second time it was not tried
    copy, patient = (Copy(gamma=2, length=1, source="latest", backoff=backoff) for backoff in (0, 1))
    for more, expected in (([20, 21], 22), ([20, 21, 22], 23)):
        assert proposed(copy, [*missed, *more])[0] == [expected]
        assert proposed(patient, [*missed, *more])[0] == [expected] * (len(more) == 3)
    right = [*missed, 20, 21, 22, 23, 24, 1, 2]
    assert proposed(patient, right)[0] == [5], "a copy that would have been right makes good the misses"


def test_after_misses_it_waits_and_a_right_guess_ends_the_wait():
    missed = [20, 21, 22, 23, 9, 1, 2, 3, 7, 1, 2, 4]
    copy, patient = (Copy(gamma=2, length=1, cooldown=cooldown) for cooldown in (0, 4))
    for more, expected in (([20, 21], 22), ([6, 20, 21], 22), ([20, 21, 22], 23), ([6, 6, 20, 21], 22)):
        assert proposed(copy, [*missed, *more])[0] == [expected]
        assert proposed(patient, [*missed, *more])[0] == [expected] * (22 in more or len(more) == 4)


def test_nothing_is_proposed_that_cannot_be_of_use():
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    assert proposed(Copy(gamma=2), text, budget=2)[0] == [3, 4]
    assert proposed(Copy(gamma=2), text, budget=0)[0] == []
    assert proposed(Copy(gamma=2), text, eos=[4])[0] == [3, 4]
    assert proposed(Copy(gamma=2), text, vocabulary=5)[0] == [3, 4]


# ---- the index ----


@given(TEXTS, st.integers(1, 4), st.sampled_from(SOURCES[:2]))
def test_the_index_finds_what_a_search_finds(text, gamma, source):
    index = CopyIndex(gamma, source, False, 0, 0)
    index.extend(text)
    ends = [end for end in range(gamma, len(text)) if text[end - gamma : end] == text[len(text) - gamma :]]
    assert index.guess.source == (0 if not ends else ends[0] if source == "earliest" else ends[-1])


@given(
    TEXTS,
    TEXTS,
    TEXTS,
    st.integers(1, 3),
    st.sampled_from(SOURCES),
    st.booleans(),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_a_shortened_index_is_as_if_it_had_read_no_more(text, more, other, gamma, source, follow, backoff, cooldown):
    index, fresh = (CopyIndex(gamma, source, follow, backoff, cooldown) for _ in range(2))
    index.extend(text)
    index.extend(more)
    index.shorten(len(text))
    fresh.extend(text)
    for each in (index, fresh):
        each.extend(other)
    assert vars(index) == vars(fresh)


def test_of_a_chat_the_index_is_kept(target, monkeypatch):
    read = []
    own = CopyIndex.extend
    monkeypatch.setattr(CopyIndex, "extend", lambda self, tokens: read.append(len(tokens)) or own(self, tokens))
    chat = Conversation(Decoder(target, Copy(gamma=2, source="latest"), GREEDY))
    prompt = [1, 5, 3, 7, 1, 5, 9, 2, 1, 5] * 8
    first = chat.reply(prompt, 8)
    read.clear()
    again = [*prompt, *first.token_ids, 4, 1, 5]
    second = chat.reply(again, 8)
    assert read[0] <= 8 + 3, "its last round and the new turn"
    assert second.token_ids == Decoder(target, None, GREEDY).generate([again], 8)[0].token_ids


# ---- exclusions ----


def test_an_excluded_span_is_not_copied():
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    copy = Copy(gamma=2, length=5)
    assert proposed(copy, text, exclusions=Exclusions(spans=[(4, 5)]))[0] == [3, 4]
    assert proposed(copy, text, exclusions=Exclusions(spans=[(2, 3)]))[0] == []
    assert proposed(copy, text, exclusions=Exclusions(spans=[(0, 2)]))[0] == [3, 4, 5, 6, 1], "it may be matched"


def test_an_excluded_pattern_is_not_copied_nor_completed():
    text = [1, 2, 3, 4, 5, 6, 7, 1, 2]
    copy = Copy(gamma=2, length=5)
    assert proposed(copy, text, exclusions=Exclusions(patterns=[[4, 5]]))[0] == [3]
    assert proposed(copy, text, exclusions=Exclusions(patterns=[[5, 4]]))[0] == [3, 4, 5, 6, 7]
    across = [8, 2, 3, 4, 5, 9, 7, 1, 2]  # [7, 1, 2, 3] stands nowhere, a copy would complete it
    assert proposed(Copy(gamma=1, length=5), across, exclusions=Exclusions(patterns=[[1, 2, 3]]))[0] == []


@settings(deadline=None, max_examples=60)
@given(TEXTS, st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=2), st.data())
def test_no_draft_comes_from_what_is_excluded(text, patterns, data):
    start = data.draw(st.integers(0, len(text) - 1))
    span = (start, data.draw(st.integers(start + 1, len(text))))
    exclusions = Exclusions([span], patterns)
    closed = set(range(*span))
    for size, pattern in ((len(pattern), pattern) for pattern in patterns):
        closed |= {at + k for at in range(len(text) - size + 1) if text[at : at + size] == pattern for k in range(size)}
    tokens, origins = proposed(Copy(gamma=1, length=6), text, exclusions=exclusions)
    assert not closed & set(origins)
    whole, found = text + tokens, Excluded(exclusions)
    assert all(place < len(text) for place in found._occurrences(whole, len(text)))


def test_exclusions_restrict_drafting_alone(target):
    prompt = [1, 5, 3, 7, 1, 5, 9, 2, 1, 5]
    plain = Decoder(target, None, GREEDY).generate([prompt], 40)[0]
    copied = Decoder(target, Copy(gamma=1), GREEDY).generate([prompt], 40)[0]
    everything = Exclusions(spans=[(0, len(prompt))], patterns=[[token] for token in range(24)])
    [excluded] = Decoder(target, Copy(gamma=1), GREEDY).generate([prompt], 40, exclusions=[everything])
    assert plain.token_ids == copied.token_ids == excluded.token_ids
    assert copied.counts.drafted and not excluded.counts.drafted


def test_exclusions_are_given_anew_with_every_turn_of_a_chat(target):
    prompt = [1, 5, 3, 7, 1, 5, 9, 2, 1, 5] * 2
    chat = Conversation(Decoder(target, Copy(gamma=1), GREEDY))
    first = chat.reply(prompt, 8, Exclusions(patterns=[[token] for token in range(24)]))
    assert not first.counts.drafted
    again = [*prompt, *first.token_ids, 1, 5]
    assert chat.reply(again, 8, Exclusions(spans=[(0, 3)])).counts.drafted


def test_exclusions_belong_to_their_rows(target):
    prompts = [[1, 5, 3, 7, 1, 5], [2, 4, 2], [1, 5, 3, 7, 1, 5]]
    closed = [Exclusions(), Exclusions(), Exclusions(patterns=[[token] for token in range(24)])]
    decoder = Decoder(target, Copy(gamma=1), GREEDY)
    free = decoder.generate(prompts, [30, 2, 30], [0, 1, 2])
    rows = decoder.generate(prompts, [30, 2, 30], [0, 1, 2], exclusions=closed)
    assert rows[0].counts.accepted == free[0].counts.accepted > 0
    assert rows[2].counts.drafted == 0
    assert [row.token_ids for row in rows] == [row.token_ids for row in free]


@pytest.mark.parametrize("span", [(-1, 2), (2, 2), (3, 11)])
def test_a_span_outside_its_prompt_is_refused(target, span):
    with pytest.raises(UserError, match=f"span {span[0]} to {span[1]} does not lie in prompt 1, which has 10 tokens"):
        Decoder(target, Copy(), GREEDY).generate([[1], [1] * 10], 4, exclusions=[Exclusions(), Exclusions([span])])
    with pytest.raises(UserError, match="empty excluded pattern"):
        Decoder(target, Copy(), GREEDY).generate([[1]], 4, exclusions=[Exclusions(patterns=[[]])])


# ---- origins ----


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.4)])
def test_every_copied_token_is_the_one_at_its_origin(target, sampling):
    rng = random.Random(1)
    prompts = [[rng.randrange(24) for _ in range(size)] for size in (30, 12, 80)]
    copied = 0
    decoder = Decoder(target, Copy(gamma=1, follow=True, source="latest"), sampling)
    for prompt, row in zip(prompts, decoder.generate(prompts, [80, 9, 25]), strict=True):
        text = prompt + row.token_ids
        for place, (token, source, origin) in enumerate(zip(row.token_ids, row.sources, row.origins, strict=True)):
            assert (source == "copy") == (origin is not None)
            if origin is not None:
                assert text[origin] == token and origin < len(prompt) + place
                copied += 1
    assert copied > 4


def test_copied_tokens_are_accepted_with_the_targets_own_probability(target):
    """At T = 1 the mean acceptance of tokens that were judged is the mean of p(x) over them."""
    prompt = [1, 5, 3, 7, 1, 5, 3, 7, 1]
    with torch.inference_mode():
        p = target.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[5].item()
    rows = Decoder(target, Copy(gamma=2, length=1), Sampling()).generate([prompt] * 4000, 2)
    share = sum(row.sources[0] == "copy" for row in rows) / 4000
    assert rows[0].counts.drafted == 1
    assert abs(share - p) < 5 * (p * (1 - p) / 4000) ** 0.5
    assert 0.005 < p < 0.995


# ---- bad input ----


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("Copy(gamma=0)", "Copy's gamma is 0, but it must be a whole number of at least 1"),
        ("Copy(length=0)", "Copy's length is 0"),
        ("Copy(backoff=-1)", "Copy's backoff is -1, but it must be a whole number of at least 0"),
        ("Copy(longest=4)", "cannot grow from length=10 to longest=4"),
        ("Copy(source='newest')", "must be one of earliest, latest, longest"),
    ],
)
def test_impossible_settings_are_refused(expression, said):
    with pytest.raises(UserError, match=said):
        build(expression, {})
