from __future__ import annotations

import pytest
import torch

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import ModelDrafter, Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.stopping import Confidence
from drafttrain.ops.random import Draws
from drafttrain.ops.sampling import Sampling, seen_tokens
from tests.decoding.support import greedy_reference, pair

CPU = torch.device("cpu")
TEXTS = [[1, 5, 3, 8], [2, 9], [7]]


@pytest.fixture(scope="module")
def model():
    return pair()[1]


def started(model, sampling: Sampling, **settings) -> tuple[ModelDrafter, Committed, Draws]:
    drafter = ModelDrafter(Engine(model), **({"length": 3} | settings))
    committed = Committed([list(text) for text in TEXTS], [0, 1, 2])
    if sampling.penalised:
        committed.seen_BV = seen_tokens(committed.tokens, 24, CPU)
    drafter.start(committed, Setting(sampling, frozenset(), 24, 64))
    return drafter, committed, Draws(0, [0, 1, 2], committed.lengths, CPU)


def test_a_greedy_draft_is_the_models_own_continuation_and_deterministic(model):
    drafter, committed, draws = started(model, Sampling(0.0))
    draft = drafter.propose(committed, None, [5, 5, 5], draws)
    assert draft.rows() == [greedy_reference(model, text, 3) for text in TEXTS]
    assert draft.probs_BKV is None
    assert draft.source == "drafter"


def test_a_budget_cuts_rows_and_leaves_some_out(model):
    drafter, committed, draws = started(model, Sampling(0.0))
    draft = drafter.propose(committed, None, [0, 2, 9], draws)
    expected = [greedy_reference(model, text, count) for text, count in zip(TEXTS, (0, 2, 3), strict=True)]
    assert draft.rows() == expected
    assert drafter.propose(committed, None, [0, 0, 0], draws).width == 0


def test_the_declared_distribution_is_the_one_sampled_from(model):
    """The densities belong to the drawn prefix: recomputed from the text alone, with the penalty of that prefix."""
    sampling = Sampling(0.8, top_p=0.95, repetition_penalty=1.4)
    drafter, committed, draws = started(model, sampling)
    draft = drafter.propose(committed, None, [3, 3, 3], draws)
    for row, text in enumerate(TEXTS):
        for place, token in enumerate(draft.rows()[row]):
            prefix = [*text, *draft.rows()[row][:place]]
            with torch.no_grad():
                logits = model(torch.tensor([prefix])).logits[:, -1]
            q = sampling.probabilities(logits, seen_tokens([prefix], 24, CPU))[0]
            assert torch.allclose(draft.probs_BKV[row, place], q, atol=1e-9)
            assert q[token] > 0


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0), Sampling(1.0, repetition_penalty=1.5)])
def test_extending_a_prefix_is_drafting_behind_it(model, sampling):
    """Of unequal lengths a row; the second stage draws what one longer text would draw."""
    drafter, committed, draws = started(model, sampling)
    prefix = Draft(torch.tensor([[4, 6], [11, 0], [0, 0]]), torch.tensor([2, 1, 0]))
    behind = drafter.propose(committed, prefix, [3, 3, 3], draws)
    other = ModelDrafter(Engine(model), 3)
    longer = Committed([[*text, *more] for text, more in zip(TEXTS, ([4, 6], [11], []), strict=True)], [0, 1, 2])
    if sampling.penalised:
        longer.seen_BV = seen_tokens(longer.tokens, 24, CPU)
    other.start(longer, Setting(sampling, frozenset(), 24, 64))
    expected = other.propose(longer, None, [3, 3, 3], draws)
    assert behind.rows() == expected.rows()
    # One token of each prefix is accepted where there was one, and the target adds its own.
    drafter.commit([1, 1, 0])
    for text, more in zip(committed.tokens, ([4, 20], [11, 20], [20]), strict=True):
        text += more
    if sampling.penalised:
        committed.seen_BV = seen_tokens(committed.tokens, 24, CPU)
    assert [length < len(text) for length, text in zip(drafter.cache.lengths, committed.tokens, strict=True)] == [
        True
    ] * 3
    fresh = ModelDrafter(Engine(model), 3)
    fresh.start(committed, Setting(sampling, frozenset(), 24, 64))
    again, clean = (each.propose(committed, None, [3, 3, 3], draws) for each in (drafter, fresh))
    assert again.rows() == clean.rows()


def test_a_drafter_that_was_not_asked_catches_up(model):
    drafter, committed, draws = started(model, Sampling(0.0))
    for round_tokens in ([4, 6, 2], [9]):
        drafter.commit([0, 0, 0])
        for text in committed.tokens:
            text += round_tokens
    draft = drafter.propose(committed, None, [3, 3, 3], draws)
    assert draft.rows() == [greedy_reference(model, text, 3) for text in committed.tokens]


def test_a_long_backlog_is_read_in_chunks(model):
    drafter, committed, draws = started(model, Sampling(0.0))
    drafter.engine.chunk = 4
    for text in committed.tokens:
        text += [3, 1, 4, 1, 5, 9, 2, 6, 5]
    draft = drafter.propose(committed, None, [2, 2, 2], draws)
    assert draft.rows() == [greedy_reference(model, text, 2) for text in committed.tokens]


def test_reviewing_another_drafters_tokens_gives_its_own_logits(model):
    drafter, committed, _ = started(model, Sampling(0.0))
    draft = Draft(torch.tensor([[4, 6], [11, 3], [5, 5]]))
    logits = drafter.score(committed, None, draft)
    assert logits.shape == (3, 3, 24)
    for row, (text, more) in enumerate(zip(TEXTS, draft.rows(), strict=True)):
        with torch.no_grad():
            own = model(torch.tensor([[*text, *more]])).logits[0, len(text) - 1 :]
        assert torch.allclose(logits[row], own, atol=1e-9)
    drafter.commit([2, 0, 1])
    assert drafter.cache.lengths == [len(text) + agreed for text, agreed in zip(TEXTS, (2, 0, 1), strict=True)]


def test_a_length_or_a_rule_is_needed(model):
    with pytest.raises(ValueError, match="length or a stopping rule"):
        ModelDrafter(Engine(model))


def test_labels_are_one_for_all_or_one_a_token():
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    assert Draft(tokens, source="copy").label(0, 1) == "copy"
    assert Draft(tokens, source=[["copy", "model"]]).label(0, 1) == "model"


@pytest.mark.parametrize("check_every", [1, 4])
def test_every_forward_of_a_single_row_is_counted(model, monkeypatch, check_every):
    """With a threshold of zero the draft is one token; whoever asks later has made the other forwards by then."""
    drafter = ModelDrafter(Engine(model), stop=Confidence(0.0), check_every=check_every)
    committed = Committed([[1, 5, 3, 8]], [0])
    drafter.start(committed, Setting(Sampling(0.0), frozenset(), 24, 64))
    made, forward = [], drafter.engine.forward
    monkeypatch.setattr(drafter.engine, "forward", lambda *args, **more: made.append(1) or forward(*args, **more))
    draft = drafter.propose(committed, None, [9], Draws(0, [0], [4], CPU))
    assert [len(row) for row in draft.rows()] == [1]
    assert draft.forwards == {"drafter": len(made)} and len(made) == check_every
