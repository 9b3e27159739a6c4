"""Drafters of drafters: what they propose, exactness whatever is combined, every member in step."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drafttrain.decoding import expression
from drafttrain.decoding.combined import FirstOf, Then
from drafttrain.decoding.copying import Copy
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import ModelDrafter, Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build, parse_method
from drafttrain.decoding.joining import join
from drafttrain.decoding.loop import Conversation, Decoder
from drafttrain.decoding.max_gram import MaxGram
from drafttrain.decoding.reviewed import Reviewed
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.errors import UserError
from drafttrain.evaluation.reference import tree
from drafttrain.evaluation.statistics import chi_square
from drafttrain.models.bigrams import learn
from drafttrain.ops.random import Draws
from drafttrain.ops.sampling import Sampling
from drafttrain.testing import check_drafter
from tests.decoding.support import FALSE_ALARM, InStep, Successors, pair

GREEDY = Sampling(0.0)
PROMPTS = [[1, 5, 3, 1, 5], [2], [7, 8, 9, 10, 11, 3, 4, 7, 8], [1, 2, 3, 1], [20, 4, 20, 4]]
LIMITS = [20, 3, 24, 11, 1]
PUBLISHED = (
    "Then((Reviewed(base, inner=Then((Reviewed(small, inner=MaxGram()), 1), (MaxGram(), 10))), 5), "
    "(Reviewed(small, inner=MaxGram()), 14), (MaxGram(), 10))"
)


class Head:
    """An acceptance head that reads one entry of the state."""

    state, features = "producing", ("log_q",)

    def score(self, hidden_BH, q_B, entropy_B, step_B):
        return torch.sigmoid(2 + hidden_BH[:, 0] + q_B.log())


@pytest.fixture(scope="module")
def members():
    """A target, and what expressions name."""
    target, small = pair()
    _, base = pair(noise=0.1)
    table = learn([[1, 5, 3, 1, 5, 3, 4], [7, 8, 2, 0, 4, 9]], 24, "a tokenizer")
    return {
        "target": Engine(target),
        "small": Engine(small),
        "base": Engine(base),
        "head": Head(),
        "bigrams": table,
    }


@pytest.fixture(scope="module")
def plain(members):
    return [row.token_ids for row in Decoder(members["target"], None, GREEDY).generate(PROMPTS, LIMITS)]


def proposal(drafter, texts, budget=64, prefix=None, eos=(), vocabulary=60):
    committed = Committed([list(text) for text in texts], list(range(len(texts))))
    drafter.start(committed, Setting(GREEDY, frozenset(eos), vocabulary, 1000))
    draws = Draws(0, committed.sample_ids, committed.lengths, torch.device("cpu"))
    return drafter.propose(committed, prefix, [budget] * len(texts), draws)


# ---- what is proposed ----


def test_the_first_that_proposes_is_taken_row_by_row():
    rising = Successors(lambda token: token + 1, 60, "rising")
    draft = proposal(FirstOf(Copy(gamma=2, length=3), rising), [[1, 2, 3, 4, 1, 2], [7, 8, 9], [5, 6, 5, 6]])
    assert draft.rows() == [[3, 4, 1], [10], [5, 6]]
    assert [draft.label(row, 0) for row in range(3)] == ["copy", "rising", "copy"]
    assert [draft.origin(row, 0) for row in range(3)] == [2, None, 2]


def test_then_asks_each_until_there_are_enough_and_may_overshoot():
    rising, falling = (Successors(lambda token, by=by: (token + by) % 60, 60, f"by {by}") for by in (1, -1))
    text = [[10, 11, 12, 13, 14, 30]]
    assert proposal(Then((rising, 2), (falling, 3)), text).rows() == [[31, 32, 31, 30, 29]]
    copied = [[10, 11, 12, 13, 14, 30, 11]]
    assert proposal(Then((Copy(gamma=1, length=3), 1), (rising, 4)), copied).rows() == [[12, 13, 14, 15, 16]]
    assert proposal(Then((Copy(gamma=2), 5), (rising, 2)), text).rows() == [[31, 32, 33, 34, 35, 36, 37]]
    assert proposal(Then((rising, 9)), text, budget=4).rows() == [[31, 32, 33, 34]]
    assert proposal(Then((rising, 9)), text, eos=[33]).rows() == [[31, 32, 33]], "not behind an end"


def test_a_review_keeps_what_the_model_would_write_and_adds_its_own():
    rising = Successors(lambda token: token + 1, 60, "rising")
    text = [[1, 2, 3, 4, 9, 0, 1, 2]]
    draft = proposal(Reviewed(rising, Copy(gamma=2, length=5)), text)
    assert draft.rows() == [[3, 4, 5]]
    assert draft.source == [["copy", "copy", "rising"]] and draft.origins == [[2, 3, None]]
    assert draft.forwards == {"rising": 1}
    assert proposal(Reviewed(rising, Copy(gamma=2, length=5)), text, budget=2).rows() == [[3, 4]]
    assert proposal(Reviewed(rising, Copy(gamma=2, length=5)), text, budget=1).rows() == [[3]]
    assert proposal(Reviewed(rising, Copy(gamma=3)), text).rows() == [[3]], "nothing to review"


def test_a_lenient_review_keeps_what_is_likely_enough():
    class Undecided(Successors):
        def score(self, committed, prefix, draft):
            logits = super().score(committed, prefix, draft)
            logits[..., 9] = 8.5  # nearly as likely as the rule, everywhere: 0.37 of the mass
            return logits

    model = Undecided(lambda token: token + 1, 60, "undecided")
    text = [[1, 2, 3, 4, 9, 9, 1, 2]]
    for lenience, expected in ((1, [3, 4, 5]), (2, [3, 4, 5]), (3, [3, 4, 9, 9, 10])):
        assert proposal(Reviewed(model, Copy(gamma=2, length=4), lenience), text).rows() == [expected]


def test_the_published_cascade_drafts_what_it_drafts_by_hand():
    """K = [[5, 14, 10], [0, 1, 10], [0, 0, 10]], token by token.

    base: x -> x + 1, but 9 -> 20. small: x -> x + 1, but 11 -> 7 and 30 -> 5. The text ends in [5, 6], as it began.
    """
    base = Successors(lambda token: {9: 20}.get(token, token + 1), 60, "base")
    small = Successors(lambda token: {11: 7, 30: 5}.get(token, token + 1), 60, "small")
    inner = Then((Reviewed(small, MaxGram()), 1), (MaxGram(), 10))
    cascade = Then((Reviewed(base, inner), 5), (Reviewed(small, MaxGram()), 14), (MaxGram(), 10))
    text = [5, 6, 7, 8, 9, 10, 11, 40, 5, 6]
    # Max-Gram 7 8 9 10 11 40 5 6 and, matched again, 7 8; small keeps five and adds 7; Max-Gram adds ten behind that
    # 7; base keeps 7 8 9 and adds 20. That is fewer than 5: behind 20 Max-Gram knows nothing, small gives 21, base
    # keeps it and adds 22.
    first = [7, 8, 9, 20, 21, 22]
    # small alone up to 30, then 5; behind it Max-Gram 6 7 8 9 10 11 40 5 6 7, of which small keeps six and adds 7.
    second = [*range(23, 31), 5, 6, 7, 8, 9, 10, 11, 7]
    # Those are 22, three more than 5 + 14, fewer than 29: Max-Gram copies behind the first 7, over the end of the text.
    third = [8, 9, 10, 11, 40, 5, 6, 7, 8, 9]
    draft = proposal(cascade, [text])
    assert draft.rows() == [first + second + third]
    assert draft.forwards == {"small": 2 + 10, "base": 2}
    assert proposal(inner, [text]).rows() == [[7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 40, 5, 6, 7, 8, 9]]


def test_the_published_expression_is_that_cascade(members):
    method = parse_method(PUBLISHED)
    assert parse_method(str(method)) == method
    assert method.members == {"base", "small"}
    cascade = build(method, members)
    assert (type(cascade), cascade.counts) == (Then, [5, 14, 10])
    first, second, third = (member.drafter for member in cascade.members)
    assert isinstance(first, Reviewed) and first.model.drafter.name == "base" and first.lenience == 1
    assert first.inner.drafter.counts == [1, 10]
    assert isinstance(second, Reviewed) and second.model.drafter.name == "small"
    assert isinstance(third, MaxGram)


# ---- joined drafts ----


def _drafts(rows, width):
    """A draft of given lengths a row, sampled or not."""
    return st.builds(
        lambda lengths, seed, kind: _draft(lengths, seed, kind),
        st.lists(st.integers(0, width), min_size=rows, max_size=rows),
        st.integers(0, 99),
        st.sampled_from(["deterministic", "sampled", "mixed"]),
    )


def _draft(lengths, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    tokens = torch.randint(0, 5, shape, generator=generator)
    probs = None if kind == "deterministic" else torch.rand(*shape, 4 + seed % 2, generator=generator)
    sampled = torch.rand(shape, generator=generator) < 0.5 if kind == "mixed" else None
    ragged = None if min(lengths) == max(lengths) else torch.tensor(lengths)
    origins = [[seed + k for k in range(length)] for length in lengths] if kind == "deterministic" else None
    return Draft(tokens, ragged, probs, sampled, kind, {kind: 1}, origins)


def _told(draft, row):
    """All that is known of each token of a row."""
    found = []
    for place, token in enumerate(draft.rows()[row]):
        drawn = draft.probs_BKV is not None and (draft.sampled_BK is None or bool(draft.sampled_BK[row, place]))
        q = tuple(draft.probs_BKV[row, place].tolist()) if drawn else None
        q = q if q is None else (*q, 0.0)[:5]
        found.append((token, draft.label(row, place), draft.origin(row, place), q))
    return found


@given(_drafts(3, 4), _drafts(3, 3))
def test_joined_drafts_keep_all_that_is_known_of_each_token(first, second):
    joined = join(first, second)
    for row in range(3):
        assert _told(joined, row) == _told(first, row) + _told(second, row)
    assert sum(joined.forwards.values()) == 2


# ---- exactness ----

LEAVES = st.sampled_from(
    [
        "Model(small, length=1)",
        "Model(small, length=3)",
        "Model(base, length=2)",
        "Model(small, stop=Confidence(0.6, max=4))",
        "Model(small, stop=AcceptanceHead(head, 0.5, max=4))",
        "Copy(gamma=1, length=3)",
        "Copy(gamma=2, length=2, longest=6, source='latest', follow=True, cooldown=1)",
        "MaxGram(length=4)",
        "MaxGram(bigrams, length=3, least=2)",
    ]
)


def _one_more(inner):
    parts = st.lists(inner, min_size=1, max_size=3)
    counts = st.integers(1, 5)
    return st.one_of(
        parts.map(lambda each: f"FirstOf({', '.join(each)})"),
        st.lists(st.tuples(inner, counts), min_size=1, max_size=3).map(
            lambda each: f"Then({', '.join(f'({part}, {count})' for part, count in each)})"
        ),
        st.builds("Reviewed({}, inner={}, lenience={})".format, st.sampled_from(["small", "base"]), inner, LENIENCES),
    )


LENIENCES = st.sampled_from([1, 1, 2, 5])
DEPTH_1 = st.one_of(LEAVES, _one_more(LEAVES))
DEPTH_2 = st.one_of(DEPTH_1, _one_more(DEPTH_1))
EXPRESSIONS = _one_more(DEPTH_2)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(EXPRESSIONS, st.sets(st.integers(0, 23), max_size=2))
def test_any_expression_is_greedy_decoding(members, plain, text, eos):
    decoder = Decoder(members["target"], build(text, members), GREEDY, eos)
    for row, expected in zip(decoder.generate(PROMPTS, LIMITS), plain, strict=True):
        end = next((place + 1 for place, token in enumerate(expected) if token in eos), len(expected))
        assert row.token_ids == expected[:end]
        assert row.counts.drafted == row.counts.accepted + row.counts.discarded


@settings(
    deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(EXPRESSIONS, st.sampled_from([GREEDY, Sampling(0.9, top_p=0.95, repetition_penalty=1.2)]))
def test_every_member_is_in_step(members, monkeypatch, text, sampling):
    """Looked at before and after every proposal; see `InStep`."""
    monkeypatch.setattr(expression, "ModelDrafter", InStep)
    rows = Decoder(members["target"], build(text, members), sampling).generate(PROMPTS, LIMITS)
    assert [len(row.token_ids) for row in rows] == LIMITS


@pytest.mark.parametrize("name", ["nested", "lenient"])
def test_whether_members_are_in_step_is_looked_at(members, monkeypatch, name):
    monkeypatch.setattr(expression, "ModelDrafter", InStep)
    before = InStep.checks
    Decoder(members["target"], build(CHOSEN[name], members), GREEDY).generate(PROMPTS, LIMITS)
    assert InStep.checks > before + 10


def p_values(members, drafter, sampling, answers=1500, depth=3):
    """Of sampled text under the target and under a hotter one."""
    prompt, model = PROMPTS[0], members["target"].model
    rows = Decoder(members["target"], drafter, sampling, seed=2).generate([prompt] * answers, depth + 3)
    found = []
    for temperature in (1.0, 1.6):
        other = dataclasses.replace(sampling, temperature=temperature * sampling.temperature)
        exact = tree(model, prompt, other, frozenset(), 24, depth, 24)
        found.append(chi_square(exact.count([row.token_ids for row in rows]), exact.leaves).p_value)
    return found


@pytest.mark.slow
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(EXPRESSIONS, st.sampled_from([Sampling(), Sampling(0.8, top_k=6)]))
def test_any_expression_samples_from_the_target(members, text, sampling):
    right, wrong = p_values(members, build(text, members), sampling)
    assert right > FALSE_ALARM
    assert wrong < FALSE_ALARM, "the test would not see a wrong distribution"


CHOSEN = {
    "copying": "FirstOf(Copy(gamma=1, length=4), Model(small, length=2))",
    "nested": "Reviewed(base, inner=Then((Reviewed(small, inner=Model(small, length=3)), 2), (Copy(gamma=1), 3)))",
    "lenient": "Then((Reviewed(base, inner=Model(small, length=3), lenience=3), 2), (Model(small, length=2), 2))",
}


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_expressions_sample_from_the_target(members, name):
    right, wrong = p_values(members, build(CHOSEN[name], members), Sampling(), 1200, 2)
    assert right > FALSE_ALARM > wrong


def test_a_lenient_review_that_declared_a_distribution_would_be_seen(members):
    """The negative control of the rule that lenient tokens go up as deterministic."""

    class Declaring(Reviewed):
        def _emitted(self, draft, tokens_BK, probs_BKV, kept, lengths):
            q = torch.full((*tokens_BK.shape, 24), 1 / 24, dtype=torch.float64)
            return super()._emitted(draft, tokens_BK, q, kept, lengths)

    model, inner = ModelDrafter(members["base"], 1), ModelDrafter(members["small"], 3)
    right, _ = p_values(members, Declaring(model, inner, 3), Sampling(), 1200, 2)
    assert right < FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize(
    ("declared", "make"),
    [
        (True, lambda engine: FirstOf(Copy(2, 4), ModelDrafter(engine, 2))),
        (True, lambda engine: Then((ModelDrafter(engine, 2), 2), (Copy(1, 3), 3))),
        (
            True,
            lambda engine: Reviewed(ModelDrafter(engine, 1), Reviewed(ModelDrafter(engine, 1, name="s"), Copy(1, 3))),
        ),
        (False, lambda engine: Reviewed(ModelDrafter(engine, 1), ModelDrafter(engine, 3, name="s"), 3.0)),
    ],
)
def test_combinations_keep_to_the_interface(declared, make):
    """A q is declared by all but the one that reviews with lenience, whose tokens go up as deterministic."""
    checked = check_drafter(make)
    assert 0 < checked.accepted < checked.drafted
    assert checked.controls == (4 if declared else 2)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_a_tree_may_be_drafted_where_nothing_was_copied(members, sampling):
    drafter = FirstOf(Copy(gamma=2, length=4), TreeDrafter(members["small"], [2, 2, 1]))
    for prompt in PROMPTS:
        [row] = Decoder(members["target"], drafter, sampling).generate([prompt], 24)
        assert {"copy", "drafter"} & set(row.sources)
        if sampling.greedy:
            assert row.token_ids == Decoder(members["target"], None, GREEDY).generate([prompt], 24)[0].token_ids
    for other in (Then((Copy(gamma=1), 2), (TreeDrafter(members["small"], [2, 2]), 2)), drafter):
        with pytest.raises(UserError, match="a tree cannot be drafted beside or behind other tokens"):
            Decoder(members["target"], other, GREEDY).generate([PROMPTS[0], [9, 2, 11]], 24)


def test_of_a_chat_every_member_reads_only_what_is_new(members, monkeypatch):
    read = []
    own = Engine.read
    monkeypatch.setattr(Engine, "read", lambda self, cache, rows: read.append(len(rows[0])) or own(self, cache, rows))
    chat = Conversation(Decoder(members["target"], build(CHOSEN["nested"], members), GREEDY))
    prompt = PROMPTS[2] * 4
    first = chat.reply(prompt, 8)
    read.clear()
    again = [*prompt, *first.token_ids, 4, 1, 5]
    second = chat.reply(again, 8)
    assert max(read) <= 8 + 3
    assert second.token_ids == Decoder(members["target"], None, GREEDY).generate([again], 8)[0].token_ids


def test_what_else_the_loop_gives_reaches_every_member():
    told = []

    class Told(Successors):
        def propose(self, committed, prefix, budget, random, target_view=None, layers=()):
            told.append((target_view, layers))
            return super().propose(committed, prefix, budget, random)

    inner = Told(lambda token: token + 1, 60, "a")
    drafter = FirstOf(Then((Reviewed(inner, inner), 1), (inner, 2)))
    committed = Committed([[1, 2]], [0])
    drafter.start(committed, Setting(GREEDY, frozenset(), 60, 100))
    drafter.propose(committed, None, [9], Draws(0, [0], [2], torch.device("cpu")), "view", layers=[3])
    assert told == [("view", [3])] * 2


# ---- bad input ----


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("FirstOf()", "FirstOf.. can propose nothing"),
        ("Then()", "Then.. can propose nothing"),
        ("Then(Copy(), 3)", "Then takes pairs"),
        ("Then((Copy(), 0))", "Then's tokens is 0"),
        ("FirstOf(Copy(), small)", "FirstOf takes drafters, as in .*, but small is none"),
        ("FirstOf(Confidence(0.5))", "but Confidence is none"),
        ("FirstOf(Autoregressive())", "proposes nothing"),
        ("Reviewed(head, inner=Copy())", "head in the method is not a model"),
        ("Reviewed(small, inner=Copy(), lenience=0.5)", "lenience is 0.5, but it must be at least 1"),
        ("MaxGram(small)", "small in the method is not a bigram table"),
        ("MaxGram(least=0)", "MaxGram's least is 0"),
        ("FirstOf(Copy(gama=3))", "did you mean gamma"),
    ],
)
def test_what_cannot_be_built_is_refused(members, text, said):
    with pytest.raises(UserError, match=said):
        build(text, members)


def test_counts_say_who_proposed_what(members):
    decoder = Decoder(
        members["target"], build("FirstOf(Copy(gamma=2, length=3), Model(small, length=2))", members), GREEDY
    )
    for row in decoder.generate(PROMPTS, LIMITS):
        counts = row.counts
        assert sum(counts.drafted_by.values()) == counts.drafted
        assert {who: row.sources.count(who) for who in set(row.sources) - {"target"}} == {
            who: count for who, count in counts.accepted_by.items() if count
        }
        assert sum(counts.rounds_by.values()) == counts.rounds and sum(counts.tokens_by.values()) == counts.tokens
    assert {"copy", "small"} <= set(sum(row.counts for row in decoder.generate(PROMPTS, LIMITS)).drafted_by)
