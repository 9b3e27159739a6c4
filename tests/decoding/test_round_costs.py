"""What a round may cost beside its forwards: how often the host reads, what grows with the text, who is still read."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Conversation, Decoder
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, EntropyBound
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.ops.sampling import Sampling
from tests.decoding.support import pair

PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 3, 4]]
SAMPLINGS = {
    "greedy": Sampling(0.0),
    "penalised": Sampling(0.0, repetition_penalty=1.3),
    "sampled": Sampling(0.9, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
}

_OF_VALUES = {
    "item",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "is_nonzero",
    "equal",
}
"""Operations whose result, or its shape, the host has to wait for."""


class _Lists(TorchFunctionMode):
    """Counts `tolist`, which on a CPU is no operation."""

    def __init__(self, reads: Counter) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.tolist:
            self.reads["tolist"] += 1
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Counts reads of values, and keeps the sizes of what is concatenated."""

    def __init__(self, reads: Counter, joined: list[int]) -> None:
        super().__init__()
        self.reads, self.joined = reads, joined

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in _OF_VALUES:
            self.reads[name] += 1
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.reads["index by bool"] += 1
        if name == "cat":
            self.joined.append(result.numel())
        return result


@pytest.fixture
def rounds(monkeypatch):
    """Reads by the host in all rounds, by their kind, and the entries of every concatenation."""
    reads, joined = Counter(), []

    def within(method):
        def counted(self, *given):
            with _Lists(reads), _Operations(reads, joined):
                return method(self, *given)

        return counted

    for name in ("_round", "_settle", "_leave"):
        monkeypatch.setattr(Decoder, name, within(getattr(Decoder, name)))
    return reads, joined


@pytest.fixture(scope="module")
def engines():
    return tuple(Engine(model) for model in pair())


def head(state: str) -> AcceptanceHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AcceptanceHead(AcceptanceHeadConfig(16, depth=1, state=state)).double().eval()


RULES = {
    "confidence": lambda: Confidence(0.9, max_length=6),
    "entropy": lambda: EntropyBound(2.5, max_length=6),
    "producing": lambda: AcceptanceHeadRule(head("producing"), 0.95, max_length=6),
    "consumed": lambda: AcceptanceHeadRule(head("consumed"), 0.95, max_length=6),
}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "batch"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_round_of_fixed_length_is_one_read(engines, rounds, prompts, sampling, length):
    drafter = ModelDrafter(engines[1], length) if length else None
    decoder = Decoder(engines[0], drafter, SAMPLINGS[sampling], eos_ids={3, 17})
    completions = decoder.generate(prompts, [20, 7, 13][: len(prompts)])
    assert rounds[0] == {"tolist": max(completion.counts.rounds for completion in completions)}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "batch"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("check_every", [1, 3])
def test_an_adaptive_rule_reads_at_most_one_flag_a_drafted_token(
    engines, rounds, monkeypatch, prompts, sampling, rule, check_every
):
    drafts = []
    drafter = ModelDrafter(engines[1], stop=RULES[rule](), check_every=check_every)
    own = drafter.propose
    monkeypatch.setattr(drafter, "propose", lambda *given: drafts.append(own(*given)) or drafts[-1])
    decoder = Decoder(engines[0], drafter, SAMPLINGS[sampling], eos_ids={3, 17})
    completions = decoder.generate(prompts, [20, 7, 13][: len(prompts)])
    reads, _ = rounds
    assert reads.pop("tolist") == max(completion.counts.rounds for completion in completions)
    assert 0 < reads.total() <= sum(draft.width // check_every for draft in drafts)


def test_a_rule_that_reads_what_it_decides_by_is_noticed(engines, rounds):
    """Negative control: the counting sees a read."""

    class Reading(Confidence):
        def stop(self, step):
            return super().stop(step) if step.q_B.max().item() < 2 else None

    drafter = ModelDrafter(engines[1], stop=Reading(0.9, max_length=6))
    [completion] = Decoder(engines[0], drafter, Sampling(0.0)).generate(PROMPTS[:1], 20)
    assert rounds[0]["item"] > completion.counts.drafted


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_nothing_that_is_concatenated_grows_with_the_text(engines, rounds, sampling):
    """Behind a text thirty times as long a round joins tensors of the same sizes, and each as often."""
    sizes = []
    for length in (8, 240):
        rounds[1].clear()
        decoder = Decoder(engines[0], ModelDrafter(engines[0], 3), SAMPLINGS[sampling])
        [completion] = decoder.generate([[1 + place % 23 for place in range(length)]], 12)
        assert completion.counts.rounds == 3
        sizes.append(Counter(rounds[1]))
    assert sizes[0] == sizes[1] and sizes[0]


def test_finished_rows_are_not_read_any_more(engines, monkeypatch):
    """Neither by the target nor by the drafter, and of their lengths nothing remains: keys are read up to the longest
    row that is still there."""
    seen = {id(engine): [] for engine in engines}
    own = Engine.forward

    def forward(self, cache, tokens, counts=None, keep="all"):
        if keep != "cache":
            seen[id(self)].append((len(tokens), max(cache.lengths) + tokens.shape[1]))
        return own(self, cache, tokens, counts, keep)

    monkeypatch.setattr(Engine, "forward", forward)
    prompts, limits = [[1] * 60, [2], [3, 4]], [4, 30, 12]
    completions = Decoder(engines[0], ModelDrafter(engines[1], 3), Sampling(0.0)).generate(prompts, limits)
    lived = [completion.counts.rounds for completion in completions]
    assert lived[0] < lived[2] < lived[1]
    living = [sum(number < each for each in lived) for number in range(max(lived))]
    target = seen[id(engines[0])]
    assert [rows for rows, _ in target] == living
    assert target[0][1] > 60 and all(bound <= 1 + 30 for _, bound in target[lived[2] :])
    forwards = sum(sum(completion.counts.draft_forwards.values()) for completion in completions)
    assert sum(rows for rows, _ in seen[id(engines[1])]) <= forwards + sum(living)


@pytest.mark.parametrize("drafts", [False, True])
def test_the_turns_of_a_chat_read_every_token_of_the_text_once(engines, monkeypatch, drafts):
    """Prompts, replies and the person's words: what a later turn reads before its first round is what is new."""
    read = {id(engine): 0 for engine in engines}
    own = Engine.read

    def watched_read(self, cache, rows):
        read[id(self)] += sum(map(len, rows))
        own(self, cache, rows)

    monkeypatch.setattr(Engine, "read", watched_read)
    chat = Conversation(Decoder(engines[0], ModelDrafter(engines[1], 3) if drafts else None, Sampling(0.0)))
    text: list[int] = []
    for words in ([1, 5, 3, 9], [2, 14, 8], [6], [4, 4, 1, 0, 2]):
        before = dict(read)
        text += words
        # the last token of a reply was never read, the last one of the words is in the first round
        unread = len(words) - 1 + (before[id(engines[0])] > 0)
        text += chat.reply(text, 9).token_ids
        assert read[id(engines[0])] - before[id(engines[0])] == unread
        if drafts:  # which may lack the last drafted token besides, where all were accepted
            assert unread <= read[id(engines[1])] - before[id(engines[1])] <= unread + 1
