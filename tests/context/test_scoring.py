"""Scores against an independent float64 reference that makes every weight at once, and never in chunks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.context import scoring
from drafttrain.context.budgets import Budget, Protected, chat_spans, keep_top
from drafttrain.context.scorers import LastWindow, LookaheadAttention, Oracle, Random, Recency
from drafttrain.context.scoring import Looked, attention_mass, pooled
from drafttrain.errors import UserError
from tests.conftest import build_tokenizer


def made(heads: int, key_heads: int, rows: int, text: int, seed: int = 0, **more: object) -> Looked:
    """Queries of the last tokens of a text, and keys of all of it, in float64."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(n, t, 8, generator=generator).double() for n, t in ((heads, rows), (key_heads, text)))
    return Looked(query, key, torch.arange(text - rows, text), torch.arange(text), **more)


def weights(looked: Looked) -> torch.Tensor:
    """softmax(q k / sqrt d) written out, head by head and row by row: [N, R, S]."""
    heads, rows, size = looked.query.shape
    groups = heads // len(looked.key)
    out = torch.zeros(heads, rows, looked.key.shape[1], dtype=torch.float64)
    for head in range(heads):
        for row in range(rows):
            exponents = []
            for slot in range(looked.key.shape[1]):
                product = float(looked.query[head, row] @ looked.key[head // groups, slot])
                product *= size**-0.5 if looked.scaling is None else looked.scaling
                if looked.softcap:
                    product = looked.softcap * math.tanh(product / looked.softcap)
                distance = int(looked.rows[row] - looked.positions[slot])
                seen = distance >= 0 and (looked.window is None or distance < looked.window)
                exponents.append(torch.tensor(product, dtype=torch.float64).exp().item() if seen else 0.0)
            out[head, row] = torch.tensor(exponents, dtype=torch.float64) / sum(exponents)
    return out


CASES = [{}, {"window": 6}, {"softcap": 1.5, "scaling": 0.7}, {"window": 9, "softcap": 2.0}]


@pytest.mark.parametrize("more", CASES)
@pytest.mark.parametrize("fitting", [0, 3, 10, 1000])
def test_mass_by_parts_is_mass_at_once(more, fitting, monkeypatch):
    """A row, some rows, or the heads of one key head at a time, or all of them."""
    monkeypatch.setattr(scoring, "SCORES", fitting * 23)
    looked = made(4, 2, 5, 23, **more)
    assert len(list(looked.shares())) == {0: 20, 3: 8, 10: 2, 1000: 1}[fitting]
    full = weights(looked)
    grouped = full.reshape(2, 2, 5, -1)
    assert (attention_mass(looked, "max") - grouped.amax((1, 2))).abs().max() < 1e-12
    assert (attention_mass(looked, "mean") - grouped.mean((1, 2))).abs().max() < 1e-12
    assert (attention_mass(looked, "mean", per_head=True) - full.mean(1)).abs().max() < 1e-12
    row = torch.linspace(0, 1, 5).double()
    assert (attention_mass(looked, "max", row) - (grouped * row[:, None]).amax((1, 2))).abs().max() < 1e-6


@pytest.mark.parametrize("how", ["max", "mean"])
@settings(deadline=None, max_examples=30)
@given(width=st.integers(1, 9), values=st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_pooling_is_a_centred_window(how, width, values):
    found = pooled(torch.tensor(values, dtype=torch.float64), width, how)
    for at, value in enumerate(found.tolist()):
        around = [values[i] if 0 <= i < len(values) else 0.0 for i in range(at - (width - 1) // 2, at + width // 2 + 1)]
        assert value == pytest.approx(max(around) if how == "max" else sum(around) / width, abs=1e-12)


def snapkv(looked: Looked, window: int, pool: int, text: int, keep: int) -> list[list[int]]:
    """SnapKV by hand: mean attention of the window, max-pooled over what lies before it, best ones and the window."""
    kept = []
    for mass in weights(looked).reshape(len(looked.key), -1, looked.query.shape[1], looked.key.shape[1]):
        before = mass.mean((0, 1))[: text - window].tolist()
        smooth = [max(before[max(0, at - pool // 2) : at + pool // 2 + 1]) for at in range(len(before))]
        best = sorted(range(len(smooth)), key=lambda at: -smooth[at])[: keep - window]
        kept.append(sorted([*best, *range(text - window, text)]))
    return kept


@pytest.mark.parametrize("pool", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_snapkv_keeps_what_an_independent_reference_keeps(pool, seed):
    looked = made(4, 2, 6, 40, seed)
    scores = LastWindow(6, pool=pool).score(0, looked, 40, 0)
    found = keep_top(scores, 15, Protected(0, 6).mask(40)).tolist()
    expected = snapkv(looked, 6, pool, 40, 15)
    if pool == 1:
        assert found == expected
    for mine, theirs in zip(found, expected, strict=True):  # a smoothed peak is a tie, broken either way
        assert len(mine) == 15 and len(set(mine) & set(theirs)) >= 13


def test_streaming_keeps_sinks_and_the_last_tokens():
    looked = made(4, 2, 1, 40)
    scores = Recency().score(0, looked, 40, 0)
    assert keep_top(scores, 10, Protected(4, 0).mask(40)).tolist() == [[0, 1, 2, 3, 34, 35, 36, 37, 38, 39]] * 2


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_the_lookahead_scorer_looks_from_window_and_lookahead(reduction):
    looked = made(4, 2, 9, 43)  # a window of 6 and 3 tokens ahead of a text of 40
    rows = weights(looked).reshape(2, -1, 43)[:, :, :34]
    expected = rows.amax(1) if reduction == "max" else rows.mean(1)
    scores = LookaheadAttention(6, reduction, pool=1).score(0, looked, 40, 0)
    assert scores.shape == (2, 40) and (scores[:, :34] - expected).abs().max() < 1e-12
    assert not scores[:, 34:].any()


def test_the_oracle_takes_the_mean_of_all_its_rows():
    looked = made(4, 2, 4, 43)
    expected = weights(looked).reshape(2, -1, 43).mean(1)[:, :40]
    assert (Oracle().score(0, looked, 40, 0) - expected).abs().max() < 1e-12


def test_random_tokens_depend_on_sample_layer_and_seed_alone():
    looked = made(4, 2, 1, 30)
    first = Random().score(3, looked, 30, 7)
    assert torch.equal(first, Random().score(3, made(4, 2, 1, 30, seed=5), 30, 7))
    assert not torch.equal(first[0], first[1])
    others = [Random(1).score(3, looked, 30, 7), Random().score(2, looked, 30, 7), Random().score(3, looked, 30, 8)]
    assert all(not torch.equal(first, other) for other in others)


# ---- budgets ----


@settings(deadline=None)
@given(
    st.integers(50, 2000),
    st.integers(1, 40),
    st.floats(0.05, 1.0),
    st.sampled_from(["uniform", "pyramid"]),
    st.floats(1, 50),
)
def test_a_budget_is_spent_and_falls(length, layers, share, shape, steepness):
    protected = 2
    counts = Budget(share, shape, steepness).by_layer(length, layers, protected)
    assert len(counts) == layers and all(protected <= count <= length for count in counts)
    assert counts == sorted(counts, reverse=True)
    if max(counts) < length:  # else the first layers hold less than they were given
        assert abs(sum(counts) / layers - Budget(share).tokens(length)) <= 1


def test_a_pyramid_is_that_of_the_paper():
    """PyramidKV: min = (C - W) / beta, max = 2 (C - W) - min, linear, W added."""
    counts = Budget(128, "pyramid", 20).by_layer(1000, 8, 28)
    assert (counts[0], counts[-1]) == (28 + 195, 28 + 5)
    assert len({a - b for a, b in itertools.pairwise(counts)} - {27, 28}) == 0


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Budget(-0.1), "a budget of -0.1 of the prompt is impossible"),
        (lambda: Budget(1.5), "a budget of 1.5 of the prompt is impossible"),
        (lambda: Budget(0), "a budget of 0 tokens is impossible"),
        (lambda: Budget(8, "cone"), "uniform or pyramid, not cone"),
        (lambda: Budget(8, "pyramid", 0.5), "steepness is 0.5"),
        (lambda: Budget(8).by_layer(100, 2, 36), "a budget of 8 tokens for a prompt of 100 is less than the 36"),
    ],
)
def test_impossible_budgets_are_refused_in_a_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


def test_protected_tokens_are_kept_whatever_their_score():
    mask = Protected(2, 3, ((10, 12),)).mask(20)
    assert mask.nonzero().flatten().tolist() == [0, 1, 10, 11, 17, 18, 19]
    scores = torch.arange(20.0).flip(0).repeat(2, 1)
    kept = keep_top(scores, 9, mask)
    assert kept.tolist() == [[0, 1, 2, 3, 10, 11, 17, 18, 19]] * 2


def test_spans_of_a_chat_are_markup_system_prompt_and_question():
    tokenizer = build_tokenizer()
    text = "<|bos|><|system|>Be brief.<|end|><|user|>The word is apple.\n\nWhat is the word?<|end|><|assistant|>"
    ids = tokenizer(text)["input_ids"]
    kept = Protected(0, 0, chat_spans(ids, tokenizer)).mask(len(ids))
    shown = tokenizer.decode([token for token, keep in zip(ids, kept, strict=True) if keep])
    assert shown == "<|bos|><|system|>Be brief.<|end|><|user|>\n\nWhat is the word?<|end|><|assistant|>"
    kept = Protected(0, 0, chat_spans(ids, tokenizer, "the word?")).mask(len(ids))
    assert "the word?<|end|>" in tokenizer.decode([token for token, keep in zip(ids, kept, strict=True) if keep])


def shown(text, spans):
    tokenizer = build_tokenizer()
    ids = tokenizer(text)["input_ids"]
    kept = Protected(0, 0, spans(ids, tokenizer)).mask(len(ids))
    return tokenizer.decode([token for token, keep in zip(ids, kept, strict=True) if keep])


def test_the_question_before_an_answer_prefix_is_found():
    text = "<|bos|><|user|>The word is apple.\n\nWhat is the word?<|end|><|assistant|>The word is"
    marks = "<|bos|><|user|>{}<|end|><|assistant|>"
    assert shown(text, chat_spans) == marks.format("\n\nWhat is the word?")
    assert "What is the word?<|end|>" in shown(text, lambda *at: chat_spans(*at, "What is the word?"))
    assert shown(text, lambda *at: chat_spans(*at, "not in the text")) == marks.format("")


@pytest.mark.parametrize("header", ["<|bos|>system\n", "<|bos|>system<|end|>\n\n"])
def test_a_system_prompt_is_found_by_a_role_in_plain_text(header):
    text = f"{header}Be brief.<|end|><|bos|>user\nAll of system\nthis.<|end|>"
    assert shown(text, lambda *at: chat_spans(*at, "this.")).startswith(f"{header}Be brief.<|end|>")
    assert "All of" not in shown(text, lambda *at: chat_spans(*at, "this."))
