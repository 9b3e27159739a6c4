"""Exactness of the loop, in float64: whatever drafts and whenever it stops, the text is the target's."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.decoding.counts import Counts
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Conversation, Decoder, surviving_order
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, EntropyBound, FixedLength
from drafttrain.errors import UserError
from drafttrain.ops.random import Draws
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama
from tests.decoding.support import WatchedDrafter, greedy_reference, pair

GREEDY = Sampling(0.0)
PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 3, 4], [1, 2, 3], [20, 4]]


class FirstEntry:
    """A head that reads one entry of the state: enough to stop rows at different places."""

    features = ("log_q", "step")

    def __init__(self, state: str) -> None:
        self.state = state

    def score(self, hidden_BH, q_B, entropy_B, step_B):
        assert entropy_B is None
        return torch.sigmoid(2 + hidden_BH[:, 0] + q_B.log() / step_B)


def rules():
    return {
        "fixed": FixedLength(4),
        "one": FixedLength(1),
        "confidence": Confidence(0.7, max_length=6),
        "confidence-per-token": Confidence(0.5, per_token=True, max_length=6),
        "confidence-min": Confidence(0.3, min_length=3, max_length=6),
        "entropy": EntropyBound(1.2, max_length=6),
        "producing": AcceptanceHeadRule(FirstEntry("producing"), 0.6, max_length=6),
        "consumed": AcceptanceHeadRule(FirstEntry("consumed"), 0.6, 2, 6),
    }


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.fixture(scope="module")
def engines(models):
    target, drafter = models
    return Engine(target), Engine(drafter)


@pytest.fixture(scope="module")
def reference(models):
    return [greedy_reference(models[0], prompt, 24) for prompt in PROMPTS]


def texts(completions):
    return [completion.token_ids for completion in completions]


def test_autoregressive_decoding_is_the_models_own_argmax(engines, reference):
    assert texts(Decoder(engines[0], None, GREEDY).generate(PROMPTS, 24)) == reference


@pytest.mark.parametrize("name", rules())
@pytest.mark.parametrize("check_every", [1, 3])
def test_greedy_speculation_is_greedy_decoding(engines, reference, name, check_every):
    drafter = ModelDrafter(engines[1], stop=rules()[name], check_every=check_every)
    completions = Decoder(engines[0], drafter, GREEDY).generate(PROMPTS, 24)
    assert texts(completions) == reference
    total = sum(completion.counts for completion in completions)
    assert total.accepted > 0
    assert total.discarded > 0


@pytest.mark.parametrize("name", rules())
def test_a_row_costs_and_gives_the_same_alone_and_in_a_batch(engines, name):
    """Counts too: stopping by mask is stopping."""
    batch = Decoder(engines[0], ModelDrafter(engines[1], stop=rules()[name]), GREEDY).generate(PROMPTS, 24)
    for prompt, together in zip(PROMPTS, batch, strict=True):
        [alone] = Decoder(engines[0], ModelDrafter(engines[1], stop=rules()[name]), GREEDY).generate([prompt], 24)
        assert (together.token_ids, together.sources) == (alone.token_ids, alone.sources)
        for seconds in ("prefill_seconds", "decode_seconds"):
            setattr(alone.counts, seconds, getattr(together.counts, seconds))
        assert together.counts == alone.counts


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_target_that_drafts_for_itself_emits_length_plus_one_a_round(engines, length):
    rounds = 4
    [completion] = Decoder(engines[0], ModelDrafter(engines[0], length), GREEDY).generate(
        [[1, 5]], rounds * (length + 1)
    )
    counts = completion.counts
    assert counts.tau == length + 1
    assert counts.rounds == rounds
    assert counts.discarded == 0
    assert completion.sources == (["drafter"] * length + ["target"]) * rounds


def test_self_drafting_accepts_every_sampled_token(engines):
    sampling = Sampling(0.8, top_p=0.9)
    drafter = ModelDrafter(engines[0], 3)
    completions = Decoder(engines[0], drafter, sampling).generate(PROMPTS, 20)
    assert sum(completion.counts for completion in completions).tau == 4


def test_the_drafters_state_is_exact_after_every_round(engines):
    """Its cache ++ pending tokens = committed, row by row, while rows stop, finish and leave."""
    for rule in (FixedLength(4), Confidence(0.7, max_length=6)):
        drafter = WatchedDrafter(engines[1], stop=rule)
        Decoder(engines[0], drafter, GREEDY).generate(PROMPTS, [9, 24, 3, 16, 1])
        assert drafter.rounds > 5


def test_a_full_acceptance_costs_no_forward_of_its_own(engines, monkeypatch):
    widths = []
    own = Engine.forward

    def forward(self, cache, tokens, counts=None, keep="all"):
        if keep == "last":
            widths.append(tokens.shape[1])
        return own(self, cache, tokens, counts, keep)

    monkeypatch.setattr(Engine, "forward", forward)
    [completion] = Decoder(engines[0], ModelDrafter(engines[0], 3), GREEDY).generate([[1, 5]], 12)
    assert widths == [1, 1, 1] + [2, 1, 1] * 2
    assert completion.counts.draft_forwards == {"drafter": 9}


def test_the_seconds_of_a_round_are_all_of_it(engines):
    class Slow(ModelDrafter):
        def commit(self, agreed):
            time.sleep(0.02)
            super().commit(agreed)

    [completion] = Decoder(engines[0], Slow(engines[1], 3), GREEDY).generate([[1, 5]], 6)
    assert completion.counts.decode_seconds >= 0.02 * completion.counts.rounds


# ---- ends ----


def test_an_end_token_inside_a_block_ends_the_row(engines, models, reference):
    eos = {reference[0][6], reference[3][3]}
    expected = [greedy_reference(models[0], prompt, 24, eos) for prompt in PROMPTS]
    assert any(len(text) < 24 for text in expected)
    for drafter in (None, ModelDrafter(engines[0], 5), ModelDrafter(engines[1], 4)):
        completions = Decoder(engines[0], drafter, GREEDY, eos).generate(PROMPTS, 24)
        assert texts(completions) == expected
        for completion in completions:
            ended = completion.token_ids[-1] in eos
            assert completion.finish_reason == ("eos" if ended else "length")
            counts = completion.counts
            assert len(completion.sources) == counts.tokens == len(completion.token_ids)
            assert counts.drafted == counts.accepted + counts.discarded


def test_an_end_token_that_was_drafted_gets_no_bonus(engines, reference):
    eos = {reference[0][2]}
    assert eos.isdisjoint(reference[0][:2])
    [completion] = Decoder(engines[0], ModelDrafter(engines[0], 5), GREEDY, eos).generate([PROMPTS[0]], 24)
    assert completion.sources == ["drafter"] * 3
    assert (completion.counts.accepted, completion.counts.discarded) == (3, 2)


def test_an_end_token_stops_an_adaptive_draft_whatever_the_minimum(engines, reference):
    eos = {reference[0][2]}
    rule = Confidence(1.0, min_length=5, max_length=8)
    [completion] = Decoder(engines[0], ModelDrafter(engines[0], stop=rule), GREEDY, eos).generate([PROMPTS[0]], 24)
    assert (completion.counts.drafted, completion.counts.discarded) == (3, 0)


def test_a_row_of_a_batch_drafts_nothing_behind_its_end(engines, reference):
    eos = {reference[0][2]}
    drafter = ModelDrafter(engines[0], stop=Confidence(1.0, max_length=9))
    rows = Decoder(engines[0], drafter, GREEDY, eos).generate([PROMPTS[0], PROMPTS[0]], 24)
    assert [row.counts.drafted for row in rows] == [3, 3]


def test_an_end_token_in_the_prompt_ends_nothing(engines, reference):
    eos = {PROMPTS[0][0]}
    [completion] = Decoder(engines[0], None, GREEDY, eos).generate([PROMPTS[0]], 2)
    assert completion.token_ids == reference[0][:2]


def test_limits_end_rows_inside_a_block(engines, reference):
    limits = [1, 2, 7, 24, 5]
    completions = Decoder(engines[0], ModelDrafter(engines[0], 4), GREEDY).generate(PROMPTS, limits)
    assert texts(completions) == [text[:limit] for text, limit in zip(reference, limits, strict=True)]
    # No token is drafted that the limit would throw away.
    assert all(completion.counts.discarded == 0 for completion in completions)


# ---- sampling ----


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3)]
)
@pytest.mark.parametrize("drafts", [False, True])
def test_sampled_text_does_not_depend_on_the_batch(engines, sampling, drafts):
    def decoder():
        return Decoder(engines[0], ModelDrafter(engines[1], 3) if drafts else None, sampling, seed=5)

    ids = [31, 7, 12, 5, 90]
    together = texts(decoder().generate(PROMPTS, [20, 3, 11, 20, 6], ids))
    alone = [
        decoder().generate([prompt], limit, [sample_id])[0].token_ids
        for prompt, limit, sample_id in zip(PROMPTS, [20, 3, 11, 20, 6], ids, strict=True)
    ]
    assert together == alone
    assert together != texts(decoder().generate(PROMPTS, [20, 3, 11, 20, 6], [0, 1, 2, 3, 4]))


def test_other_seeds_give_other_text(engines):
    one, two = (Decoder(engines[0], None, Sampling(), seed=seed).generate([[1, 2]], 30) for seed in (0, 1))
    assert texts(one) != texts(two)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("name", ["fixed", "confidence"])
def test_a_vanishing_temperature_is_greedy_everywhere_at_once(engines, monkeypatch, name, penalty):
    """Target, drafter and verification switch together: nothing is drawn, no q is declared, the text is the argmax."""

    def drawn(*_):
        raise AssertionError("a draw in greedy decoding")

    drafts = []
    own = ModelDrafter.propose
    monkeypatch.setattr(ModelDrafter, "propose", lambda self, *given: drafts.append(own(self, *given)) or drafts[-1])
    monkeypatch.setattr(Draws, "at", drawn)
    plain = Decoder(engines[0], None, Sampling(0.0, repetition_penalty=penalty)).generate(PROMPTS, 16)
    for temperature in (1e-5, 1e-9):
        sampling = Sampling(temperature, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=penalty)
        for drafter in (None, ModelDrafter(engines[1], stop=rules()[name])):
            assert texts(Decoder(engines[0], drafter, sampling).generate(PROMPTS, 16)) == texts(plain)
    assert drafts and all(draft.probs_BKV is None for draft in drafts)


def test_a_penalty_sees_the_drafted_prefix(models, engines):
    """Greedy with a penalty that forbids repeats within the block: identical to decoding one token at a time."""
    sampling = Sampling(0.0, repetition_penalty=4.0)
    plain = Decoder(engines[0], None, GREEDY).generate(PROMPTS, 20)
    expected = Decoder(engines[0], None, sampling).generate(PROMPTS, 20)
    assert texts(plain) != texts(expected)
    for drafter in (ModelDrafter(engines[0], 5), ModelDrafter(engines[1], 4)):
        assert texts(Decoder(engines[0], drafter, sampling).generate(PROMPTS, 20)) == texts(expected)
    with torch.no_grad():
        text = [*PROMPTS[0], *expected[0].token_ids]
        for place in range(len(PROMPTS[0]), len(text)):
            logits = models[0](torch.tensor([text[:place]])).logits[0, -1]
            seen = torch.tensor(sorted(set(text[:place])))
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 4, logits[seen] * 4)
            assert logits.argmax().item() == text[place]


# ---- vocabularies, conversations, refusals ----


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.9), Sampling(0.9, repetition_penalty=1.2)])
def test_vocabularies_of_unequal_size(models, engines, sampling):
    target, drafter = models
    narrow = Engine(target, vocabulary=15)
    expected = Decoder(narrow, None, sampling).generate(PROMPTS[:1] + PROMPTS[3:4], 16)
    assert all(token < 15 for text in texts(expected) for token in text)
    wider = Decoder(narrow, ModelDrafter(Engine(drafter), 3), sampling).generate(PROMPTS, 16)
    assert all(token < 15 for text in texts(wider) for token in text)
    smaller = Decoder(Engine(target), ModelDrafter(Engine(drafter, vocabulary=15), 3), sampling).generate(PROMPTS, 16)
    if sampling.greedy:
        assert texts(wider)[0] == texts(expected)[0]
        assert texts(smaller) == texts(Decoder(engines[0], None, GREEDY).generate(PROMPTS, 16))
    assert len(smaller[0].token_ids) == 16


def test_a_later_turn_reads_only_what_is_new(engines, monkeypatch):
    read = []
    own = Engine.read

    def watched(self, cache, rows):
        read.append(len(rows[0]))
        own(self, cache, rows)

    decoder = Decoder(engines[0], ModelDrafter(engines[1], 3), GREEDY)
    chat = Conversation(decoder)
    first = chat.reply([1, 5, 3], 8)
    second_prompt = [1, 5, 3, *first.token_ids, 9, 2, 14]
    monkeypatch.setattr(Engine, "read", watched)
    second = chat.reply(second_prompt, 8)
    assert read[0] <= 4  # the drafter's, who may not have read the last draft
    assert read[1] <= 3
    fresh = Decoder(engines[0], ModelDrafter(engines[1], 3), GREEDY).generate([second_prompt], 8)
    assert second.token_ids == fresh[0].token_ids
    assert second.counts.accepted == fresh[0].counts.accepted
    third = chat.reply([1, 5, 8, 8], 8)  # an edited history shares two tokens only
    assert third.token_ids == Decoder(engines[0], None, GREEDY).generate([[1, 5, 8, 8]], 8)[0].token_ids


def test_a_conversation_survives_other_uses_of_its_decoder(engines):
    decoder = Decoder(engines[0], ModelDrafter(engines[1], 3), GREEDY)
    chat = Conversation(decoder)
    first = chat.reply([1, 5, 3], 8)
    decoder.generate(PROMPTS, 5)
    prompt = [1, 5, 3, *first.token_ids, 9]
    assert chat.reply(prompt, 8).token_ids == Decoder(engines[0], None, GREEDY).generate([prompt], 8)[0].token_ids


def test_a_conversation_survives_other_uses_of_its_drafter(engines):
    drafter = ModelDrafter(engines[1], 3)
    chat = Conversation(Decoder(engines[0], drafter, GREEDY))
    first = chat.reply([1, 5, 3], 8)
    Decoder(engines[0], drafter, GREEDY).generate([[4, 4, 4, 4]], 5)
    prompt = [1, 5, 3, *first.token_ids, 9]
    again = Decoder(engines[0], ModelDrafter(engines[1], 3), GREEDY).generate([prompt], 8)[0]
    reply = chat.reply(prompt, 8)
    assert reply.token_ids == again.token_ids
    assert reply.counts.accepted == again.counts.accepted


def test_a_conversation_survives_a_turn_that_its_drafter_refuses(engines):
    small = Engine(build_llama(24, layers=1, hidden=16, max_position_embeddings=32).double())
    chat = Conversation(Decoder(engines[0], ModelDrafter(small, 2), GREEDY))
    first = chat.reply([1, 5, 3], 8)
    with pytest.raises(UserError, match="exceeds the 32 positions"):
        chat.reply([2] * 30, 8)
    prompt = [1, 5, 3, *first.token_ids, 9]
    assert chat.reply(prompt, 8).token_ids == Decoder(engines[0], None, GREEDY).generate([prompt], 8)[0].token_ids


def test_bad_input_is_refused_before_work_starts(engines):
    decoder = Decoder(engines[0], None, GREEDY)
    assert decoder.generate([], 4) == []
    with pytest.raises(UserError, match="prompt 1 is empty"):
        decoder.generate([[1], []], 4)
    with pytest.raises(UserError, match="max_new_tokens is 0"):
        decoder.generate([[1]], 0)
    with pytest.raises(UserError, match="exceeds the 512 positions"):
        decoder.generate([[1] * 500], 13)


def test_a_drafter_with_fewer_positions_is_refused_by_name(engines):
    small = Engine(build_llama(24, layers=1, hidden=16, max_position_embeddings=16).double())
    decoder = Decoder(engines[0], ModelDrafter(small, 2, name="small"), GREEDY)
    with pytest.raises(UserError, match="17 tokens exceeds the 16 positions of small"):
        decoder.generate([[1] * 10], 7)


@pytest.mark.parametrize("way", ["dtype", "device"])
def test_a_drafter_unlike_its_target_is_refused_before_anything_is_read(engines, monkeypatch, way):
    other = build_llama(24, layers=1, hidden=16)
    small = Engine(other if way == "dtype" else other.double().to("meta"))
    told = {"dtype": "small in torch.float32 on cpu", "device": "small in torch.float64 on meta"}[way]
    decoder = Decoder(engines[0], ModelDrafter(small, 2, name="small"), GREEDY)
    monkeypatch.setattr(Engine, "forward", None)
    with pytest.raises(UserError, match=f"the target computes in torch.float64 on cpu, {told}; load both"):
        decoder.generate(PROMPTS, 7)


def test_whatever_a_drafter_refuses_is_refused_before_the_target_reads(engines, monkeypatch):
    small = Engine(build_llama(24, layers=1, hidden=16, max_position_embeddings=16).double())
    monkeypatch.setattr(Engine, "forward", None)
    with pytest.raises(UserError, match="exceeds the 16 positions"):
        Decoder(engines[0], ModelDrafter(small, 2), GREEDY).generate([[1] * 10], 7)


# ---- invariants ----


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.lists(st.integers(0, 23), min_size=1, max_size=9), min_size=1, max_size=4),
    st.lists(st.integers(1, 14), min_size=4, max_size=4),
    st.integers(1, 6),
    st.sets(st.integers(0, 23), max_size=3),
)
def test_any_batch_decodes_like_autoregressive_decoding(engines, prompts, limits, length, eos):
    limits = limits[: len(prompts)]
    plain = Decoder(engines[0], None, GREEDY, eos).generate(prompts, limits)
    drafted = Decoder(engines[0], ModelDrafter(engines[1], length), GREEDY, eos).generate(prompts, limits)
    assert texts(plain) == texts(drafted)
    for completion, limit in zip(drafted, limits, strict=True):
        counts = completion.counts
        bonuses = completion.sources.count("target")
        assert counts.tokens == counts.accepted + bonuses <= limit
        assert counts.rounds - 1 <= bonuses <= counts.rounds
        assert counts.drafted == sum(counts.drafted_at) == counts.draft_forwards.get("drafter", 0)
        assert counts.accepted == sum(counts.accepted_at)
        assert sorted(counts.accepted_at, reverse=True) == counts.accepted_at


@given(st.lists(st.booleans(), max_size=9))
def test_surviving_rows_keep_their_place_or_move_forward(alive):
    order = surviving_order(alive)
    assert sorted(order) == [row for row, lives in enumerate(alive) if lives]
    assert all(row >= place for place, row in enumerate(order))


def test_counts_add_up():
    a, b = Counts(), Counts()
    a.add_round(3, 2, 2, {"drafter": 2}, 0.5)
    b.add_round(1, 4, 0, {"drafter": 4, "other": 1}, 0.25)
    total = sum([a, b])
    assert total == a + b == b + a
    assert (total.tokens, total.rounds, total.drafted, total.accepted, total.discarded) == (4, 2, 6, 2, 4)
    assert total.draft_forwards == {"drafter": 6, "other": 1}
    assert total.drafted_at == [2, 2, 1, 1]
    assert total.accepted_at == [1, 1, 0, 0]
    assert total.decode_seconds == 0.75
    assert total.tau == 2
    assert total.acceptance_rate == pytest.approx(1 / 3)
    assert a.tokens == 3


def test_caches_are_freed_at_once_without_waiting_for_garbage_collection(engines):
    target, drafter = engines
    decoder = Decoder(target, ModelDrafter(drafter, length=3))
    gc.collect()
    gc.disable()
    try:
        decoder.generate([[1, 5, 3]], 8)
        caches = [weakref.ref(decoder._cache), weakref.ref(decoder.drafter.cache)]
        decoder.generate([[1, 5, 3]], 8)
        assert [cache() for cache in caches] == [None, None]
    finally:
        gc.enable()
