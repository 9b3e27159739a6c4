"""Choosing tokens of a prompt by a drafter's attention, and when that pays."""

from __future__ import annotations

from dataclasses import replace
from time import sleep

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.context.ahead import DraftAhead
from drafttrain.context.budgets import Budget, Protected, document_spans
from drafttrain.context.compression import (
    ChunkAttention,
    DraftAttention,
    PromptCompression,
    WindowAttention,
    first_distinct,
)
from drafttrain.context.cost import CompressionCost, Seconds
from drafttrain.context.timing import compression_cost
from drafttrain.context.watching import QueryWatch
from drafttrain.decoding.engine import Engine
from drafttrain.errors import UserError
from tests.conftest import build_tokenizer
from tests.context.support import PROMPTS, compression, engines
from tests.context.test_scoring import made, weights
from tests.ops.test_attention import build

_, SMALL = engines()


@settings(deadline=None)
@given(st.data())
def test_tokens_are_taken_in_order_each_once(data):
    size = data.draw(st.integers(1, 20))
    order = data.draw(st.lists(st.integers(0, size - 1), max_size=40))
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    count = data.draw(st.integers(int(kept.sum()), size))
    expected = dict.fromkeys([*kept.nonzero().flatten().tolist(), *order, *range(size)])
    found = first_distinct(torch.tensor(order, dtype=torch.long), kept, count).tolist()
    assert found == sorted(list(expected)[:count])


def test_draft_attention_is_the_weighted_maximum_of_the_upper_layers():
    layers = [made(4, 2, 6, 30, seed) for seed in range(4)]
    rows = torch.linspace(0, 1, 6).double()[:, None]
    expected = torch.stack([(weights(each) * rows).amax((0, 1)) for each in layers[2:]]).amax(0)
    scores = DraftAttention(window=6, skip=0.5, pool=1).score(layers, 30)
    assert (scores - expected).abs().max() < 1e-6


def test_drafted_tokens_weigh_as_much_as_the_last_of_the_prompt():
    looked = made(4, 2, 6, 30)  # a window of 4 and two drafted tokens behind a text of 28
    rows = torch.tensor([0, 1 / 3, 2 / 3, 1, 1, 1]).double()[:, None]
    expected = (weights(looked) * rows).amax((0, 1))[:28]
    assert (DraftAttention(window=4, pool=1).score([looked], 28) - expected).abs().max() < 1e-6


def test_neighbours_come_with_a_token_the_nearest_first():
    scores = torch.zeros(12)
    scores[[2, 8]] = torch.tensor([1.0, 2.0])
    order = DraftAttention(neighbours=4).order(scores)
    assert order[:8].tolist() == [8, 7, 9, 10, 2, 1, 3, 4]


def test_chunks_are_scored_as_specprefill_scores_them():
    layers = [made(4, 2, 3, 40, seed) for seed in (1, 2)]
    rows = []
    for row in range(3):
        best = torch.zeros(40, dtype=torch.float64)
        for looked in layers:
            for head in weights(looked)[:, row]:
                smooth = [head[max(0, at - 2) : at + 3].sum() / 5 for at in range(40)]
                best = torch.maximum(best, torch.stack(smooth))
        rows.append(best)
    expected = [float(part.mean()) for part in torch.stack(rows).mean(0).split(8)]
    scores = ChunkAttention(chunk=8, pool=5).score(layers, 40)
    assert scores[::8].tolist() == pytest.approx(expected, abs=1e-12)
    order = ChunkAttention(chunk=8).order(scores).tolist()
    best = max(range(5), key=lambda chunk: expected[chunk])
    assert order[:8] == list(range(8 * best, 8 * best + 8))


def test_window_attention_is_a_mean():
    looked = made(4, 2, 5, 30)
    expected = weights(looked).mean((0, 1))
    assert (WindowAttention(window=5, pool=1).score([looked], 30) - expected).abs().max() < 1e-12


def test_every_document_keeps_its_minimum():
    layers = [made(4, 2, 8, 60)]
    documents = tuple((start, start + 10) for start in range(0, 50, 10))
    kept = (
        PromptCompression(
            Budget(25),
            DraftAttention(8, pool=1, neighbours=1),
            protect=Protected(0, 8),
            documents=documents,
            min_per_document=3,
        )
        .choose(layers, PROMPTS[0], 25)
        .tolist()
    )
    assert len(kept) == 25 == len(set(kept))
    assert all(sum(start <= at < end for at in kept) >= 3 for start, end in documents)


def test_a_budget_that_does_not_hold_every_documents_minimum_is_refused():
    """Protected tokens of a document count as its own."""
    spans = [(start, start + 10) for start in range(0, 60, 10)]
    method = compression(0.5, documents=lambda tokens: spans, min_per_document=4)  # 2 sinks and a window of 8
    assert method.count(PROMPTS[0]) == 30  # 10, and 4 less 2, and 4 in each of four
    with pytest.raises(UserError, match="less than the 33 that are protected or the 5 of each document"):
        replace(method, min_per_document=5).count(PROMPTS[0])
    with pytest.raises(UserError, match="a minimum of -1"):
        replace(method, min_per_document=-1)


def test_documents_are_found_between_separators():
    tokenizer = build_tokenizer()
    ids = tokenizer("Document 1: The word is apple.\n\nDocument 2: The word is tree.\n\nWhat is the word?")["input_ids"]

    def parts(between):
        return [tokenizer.decode(ids[start:end]) for start, end in document_spans(ids, tokenizer, between)]

    blank = ["Document 1: The word is apple.\n\n", "Document 2: The word is tree.\n\n", "What is the word?"]
    assert parts("\n\n") == blank
    assert parts(r"(?=Document \d)") == [blank[0], blank[1] + blank[2]]
    assert parts("zebra") == ["".join(blank)]


def test_a_prompt_whose_compression_does_not_pay_is_left_whole():
    costs = CompressionCost(Seconds(0, 1.0, 0.0), Seconds(10, 0.1, 0.0))
    method = compression(0.5, costs=costs)
    assert method.count([0] * 24) == 24
    assert method.count([0] * 26) == 13
    assert not costs.pays(24, 12) and costs.pays(26, 13) and costs.break_even(0.5) == 26
    assert costs.break_even(0.5, protected=10) == 26 and costs.break_even(0.5, protected=20) == 40
    assert CompressionCost(costs.choosing, costs.target).break_even(0.5) is None
    assert compression(4, costs=costs).count([0] * 12) == 12  # less than is protected, but it would not pay anyway


def test_a_fitted_cost_finds_the_parts_again_and_none_is_negative():
    true = Seconds(0.01, 2e-5, 3e-9)
    lengths = [256, 1024, 4096, 8192]
    found = Seconds.fitted(lengths, [true.of(n) for n in lengths])
    assert vars(found) == pytest.approx(vars(true), rel=1e-6)
    falling = Seconds.fitted([100, 200, 300], [2.0, 3.9, 5.7])
    assert min(vars(falling).values()) >= 0


def test_what_compression_costs_is_measured_on_the_engines_with_all_that_comes_first(monkeypatch):
    """A drafter that is slow to draft, and scores that are slow, both move the length from which it pays."""
    target, method = engines()[0], compression(0.25)
    lengths = (64, 200, 400)

    def choosing(ahead=1):
        return compression_cost(target, method, DraftAhead(SMALL, ahead), lengths, repeats=2).choosing.of(200)

    usual, own = choosing(), SMALL.forward
    assert 0 < usual < 0.2
    monkeypatch.setattr(SMALL, "forward", lambda *args, **kwargs: (sleep(0.02), own(*args, **kwargs))[1])
    assert choosing(ahead=6) > 0.1  # six steps of drafting and one of reading
    monkeypatch.undo()
    score = DraftAttention.score
    monkeypatch.setattr(DraftAttention, "score", lambda *args: (sleep(0.2), score(*args))[1])
    assert choosing() > 0.18


# ---- watching ----


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("chunk", [3, 100])
def test_watched_attention_is_the_models_own(family, chunk):
    """Against the weights that the model itself returns, over a ragged batch read in chunks, drafted tokens too."""
    model = build(family).double()
    engine = Engine(model, chunk=chunk)
    texts = [[token % 64 for token in PROMPTS[0][:23]], [token % 64 for token in PROMPTS[1][:14]]]
    watch = QueryWatch(engine, [20, 11], window=5, ahead=3)
    with watch.watching():
        cache = engine.new_cache(2)
        engine.read(cache, [text[:-4] for text in texts])
        for step in range(4):
            tokens = torch.tensor([[text[len(text) - 4 + step]] for text in texts])
            engine.forward(cache, tokens)
    for row, text in enumerate(texts):
        own = model(torch.tensor([text]), output_attentions=True).attentions
        for layer in range(3):
            looked = watch.looked(layer, row, 3)
            found = DraftAttention(window=5, pool=1, weighted=False).score([looked], len(text))
            expected = own[layer][0, :, -8:].amax((0, 1))
            assert (found - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_a_prompt_shorter_than_the_window_is_watched_whole():
    watch = QueryWatch(SMALL, [4], window=9, ahead=0)
    with watch.watching():
        cache = SMALL.new_cache(1)
        SMALL.forward(cache, torch.tensor([[1, 2, 3, 4]]))
    assert watch.looked(0, 0).query.shape[1] == 4
    assert SMALL.watch is None
