"""The cheap comparison says of every candidate what the approximate decoder would really do."""

from __future__ import annotations

import pytest
import torch

from drafttrain.context.ahead import DraftAhead
from drafttrain.context.budgets import Budget, Protected
from drafttrain.context.compression import ChunkAttention, DraftAttention, PromptCompression
from drafttrain.context.decoder import ApproximateDecoder
from drafttrain.context.dropping import KVDropping
from drafttrain.context.scorers import LastWindow, LookaheadAttention, Oracle, Random, Recency
from drafttrain.context.study import Candidate, DensePass, Reader, choices, compressed_outcome, draft_pass
from drafttrain.decoding.loop import Decoder
from tests.context.support import GREEDY, PROMPTS, engines, texts
from tests.decoding.support import greedy_reference

TARGET, SMALL = engines()
SINKS = Protected(2, 0)
LIMIT = 9


def candidates(budget: int | float) -> list[Candidate]:
    kept = Budget(budget)
    return [
        Candidate("ahead", LookaheadAttention(8), kept, SINKS, 5, verified=True),
        Candidate("snapkv", LastWindow(8), kept, SINKS),
        Candidate("streaming", Recency(), kept, SINKS),
        Candidate("random", Random(), kept, Protected(2, 8)),
        Candidate("max", LookaheadAttention(8, "max"), kept, SINKS, 5, verified=True),
    ]


def decoded(candidate: Candidate, prompt: list[int]) -> list[int]:
    ahead = DraftAhead(SMALL, candidate.ahead) if candidate.ahead else None
    method = KVDropping(candidate.budget, candidate.scorer, candidate.protect)
    return texts(ApproximateDecoder(TARGET, method, ahead=ahead, sampling=GREEDY).generate([prompt], LIMIT))[0]


@torch.inference_mode()
def studied(prompt: list[int], answer: list[int], budget: int | float, readers=None):
    target, drafter = readers or (Reader(TARGET), Reader(SMALL))
    _, drafted = draft_pass(drafter, prompt, 5)
    return DensePass(target, prompt, drafted, answer).compare(candidates(budget))


@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS[1], PROMPTS[3]])
def test_an_answer_is_exact_where_the_decoder_writes_it(prompt):
    """Held against what each candidate really decodes: its own answer is exact, and any other is not."""
    own = [decoded(each, prompt) for each in candidates(16)]
    assert len({tuple(answer) for answer in own}) > 1
    for answer in own:
        outcomes = studied(prompt, answer, 16)
        for outcome, other in zip(outcomes, own, strict=True):
            assert outcome.exact == (other == answer)
            agreeing = next((at for at, (a, b) in enumerate(zip(other, answer, strict=True)) if a != b), LIMIT)
            assert outcome.right == agreeing


def test_a_prompt_that_shares_its_beginning_is_studied_as_it_is_alone():
    readers = Reader(TARGET), Reader(SMALL)
    for prompt in (PROMPTS[0], [*PROMPTS[0][:40], 3, 1, 4, 1, 5], PROMPTS[0][:43], PROMPTS[1]):
        answer = decoded(candidates(16)[1], prompt)
        together, alone = studied(prompt, answer, 16, readers), studied(prompt, answer, 16)
        for one, other in zip(together, alone, strict=True):
            assert (one.exact, one.right) == (other.exact, other.right)
            assert one.kl == pytest.approx(other.kl, abs=1e-9)
            assert (one.recall, one.mass) == pytest.approx((other.recall, other.mass), abs=1e-6)


@torch.inference_mode()
def test_the_dense_target_and_a_budget_of_everything_are_exact():
    [answer] = texts(Decoder(TARGET, None, GREEDY).generate(PROMPTS[:1], LIMIT))
    dense = DensePass(Reader(TARGET), PROMPTS[0], [], answer)
    assert dense.outcome.exact
    for outcome in studied(PROMPTS[0], answer, 1.0):
        assert outcome.exact and outcome.kl < 1e-12
        assert (outcome.recall, outcome.mass) == (1.0, pytest.approx(1.0))
    assert not DensePass(Reader(TARGET), PROMPTS[0], [], [*answer[:-1], (answer[-1] + 1) % 24]).outcome.exact


@torch.inference_mode()
def test_no_method_keeps_more_of_the_answers_attention_than_the_oracle():
    [answer] = texts(Decoder(TARGET, None, GREEDY).generate(PROMPTS[:1], LIMIT))
    dense = DensePass(Reader(TARGET), PROMPTS[0], draft_pass(Reader(SMALL), PROMPTS[0], 5)[1], answer)
    [best] = dense.compare([Candidate("oracle", Oracle(window=0), Budget(16), Protected(0, 0))])
    assert best.recall == 1.0
    for outcome in dense.compare(candidates(16)):
        assert outcome.recall < 1 and outcome.mass < best.mass


@torch.inference_mode()
def test_what_is_accepted_is_what_the_target_would_have_written():
    [answer] = texts(Decoder(TARGET, None, GREEDY).generate(PROMPTS[:1], 6))
    ahead = [*answer[:3], (answer[3] + 1) % 24, answer[4]]
    dense = DensePass(Reader(TARGET), PROMPTS[0], ahead, answer)
    assert [dense.accepted(length) for length in (0, 2, 3, 5)] == [0, 2, 3, 3]
    assert dense.emitted(5) == answer[:4]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("scorer", [DraftAttention(8, pool=4, neighbours=4), ChunkAttention(chunk=4, pool=3)])
def test_compression_is_studied_as_it_is_decoded(positions, scorer):
    method = PromptCompression(Budget(20), scorer, positions, Protected(2, 8))
    for prompt in (PROMPTS[0], PROMPTS[3]):
        own = ApproximateDecoder(TARGET, compression=method, ahead=DraftAhead(SMALL, 5), sampling=GREEDY)
        [answer] = texts(own.generate([prompt], LIMIT))
        with torch.inference_mode():
            watch, drafted = draft_pass(Reader(SMALL), prompt, 5)
            chosen = choices(watch, {"own": method}, prompt, {"own": len(drafted) - 1})
            assert chosen["own"] == own.kept[0]
            assert compressed_outcome(TARGET, prompt, chosen["own"], answer, positions).exact
            wrong = [*answer[:-1], (answer[-1] + 1) % 24]
            assert compressed_outcome(TARGET, prompt, chosen["own"], wrong, positions).right == LIMIT - 1


def test_a_reader_that_was_interrupted_reads_anew(monkeypatch):
    reader = Reader(TARGET)
    with torch.inference_mode():
        reader.begin(PROMPTS[0], 4, 8)
        monkeypatch.setattr(TARGET.model.model.layers[0].mlp, "forward", None)
        with pytest.raises(TypeError):
            reader.begin([*PROMPTS[0][:20], *PROMPTS[1]], 4, 8)
        monkeypatch.undo()
    answer = decoded(candidates(16)[0], PROMPTS[0])
    assert studied(PROMPTS[0], answer, 16, (reader, Reader(SMALL)))[0].exact
    assert TARGET.watch is None


@torch.inference_mode()
def test_a_prompt_no_longer_than_what_is_protected_is_kept_whole():
    prompt = PROMPTS[0][:20]
    dense = DensePass(Reader(TARGET), prompt, [], greedy_reference(TARGET.model, prompt, 4))
    [outcome] = dense.compare([Candidate("snapkv", LastWindow(32), Budget(0.25))])
    assert outcome.exact and outcome.recall == 1.0
