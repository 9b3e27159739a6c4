"""Sampled text of the whole decoder against distributions computed by the models' own forward, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, EntropyBound
from drafttrain.ops.sampling import Sampling
from tests.decoding.support import FALSE_ALARM, p_value, pair
from tests.ops.test_sampling import reference

V = 5
PROMPT = [1, 3]
LENGTH = 3
SAMPLES = 4000
SAMPLINGS = {
    "plain": Sampling(),
    "cool": Sampling(0.6),
    "filtered": Sampling(1.3, top_k=4, top_p=0.9),
    "min-p-and-penalty": Sampling(1.0, min_p=0.08, repetition_penalty=1.6),
}


@cache
def models():
    return pair(V, layers=1, noise=0.6)


@cache
def expected(name: str) -> torch.Tensor:
    """The probability of every text of LENGTH tokens, [V ** LENGTH]."""
    target, sampling = models()[0], SAMPLINGS[name]

    def conditional(text: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            logits = target(torch.tensor([[*PROMPT, *text]])).logits[0, -1].tolist()
        return torch.tensor(reference(logits, sampling, {*PROMPT, *text}), dtype=torch.float64)

    tables = {text: conditional(text) for size in range(LENGTH) for text in itertools.product(range(V), repeat=size)}
    probs = [
        torch.stack([tables[text[:place]][token] for place, token in enumerate(text)]).prod()
        for text in itertools.product(range(V), repeat=LENGTH)
    ]
    return torch.stack(probs)


def counted(name: str, drafter: ModelDrafter | None) -> torch.Tensor:
    decoder = Decoder(Engine(models()[0]), drafter, SAMPLINGS[name], seed=2)
    completions = decoder.generate([PROMPT] * SAMPLES, LENGTH)
    tokens = torch.tensor([completion.token_ids for completion in completions])
    if drafter:
        total = sum(completion.counts for completion in completions)
        assert total.accepted > 0.05 * total.drafted
        assert total.discarded > 0.05 * total.drafted
    codes = (tokens * torch.tensor([V**place for place in reversed(range(LENGTH))])).sum(1)
    return torch.bincount(codes, minlength=V**LENGTH)


class Half:
    state, features = "consumed", ()

    def score(self, hidden_BH, q_B, entropy_B, step_B):
        return torch.sigmoid(2 * hidden_BH[:, 0])


def rules():
    return {
        "fixed": None,
        "confidence": Confidence(0.6, max_length=4),
        "entropy": EntropyBound(1.3, max_length=4),
        "consumed": AcceptanceHeadRule(Half(), 0.5, 1, 4),
    }


@pytest.mark.parametrize("name", SAMPLINGS)
def test_autoregressive_text_follows_the_target(name):
    assert p_value(counted(name, None), expected(name)) > FALSE_ALARM


@pytest.mark.parametrize(
    ("name", "rule"), [*((name, "fixed") for name in SAMPLINGS), *(("plain", rule) for rule in list(rules())[1:])]
)
def test_speculative_text_follows_the_target(name, rule):
    stop = rules()[rule]
    drafter = ModelDrafter(Engine(models()[1]), 2 if stop is None else None, stop)
    assert p_value(counted(name, drafter), expected(name)) > FALSE_ALARM


class WrongQ(ModelDrafter):
    """Declares a distribution that is not the one sampled from."""

    def propose(self, *args, **kwargs):
        draft = super().propose(*args, **kwargs)
        if draft.probs_BKV is None:
            return draft
        probs = draft.probs_BKV**2.5
        return replace(draft, probs_BKV=probs / probs.sum(-1, keepdim=True))


class OneSlotOff(ModelDrafter):
    """Keeps the slot of a rejected token: a cache that is off by one. It costs acceptance, never exactness."""

    def commit(self, agreed):
        super().commit([count + 1 for count in agreed])


class GreedyDeclaredSampled(ModelDrafter):
    """Proposes the argmax and declares the softmax."""

    def propose(self, *args, **kwargs):
        draft = super().propose(*args, **kwargs)
        return draft if draft.probs_BKV is None else replace(draft, tokens_BK=draft.probs_BKV.argmax(-1))


@pytest.mark.parametrize("wrong", [WrongQ, GreedyDeclaredSampled])
def test_wrong_declarations_are_caught(wrong):
    """Negative controls: the test above can fail."""
    assert p_value(counted("plain", wrong(Engine(models()[1]), 2)), expected("plain")) < FALSE_ALARM


def test_a_target_cache_that_is_off_by_one_is_caught(monkeypatch):
    """Negative control for the target's own rollback."""
    from drafttrain.ops.cache import DenseCache

    own = DenseCache.rollback
    monkeypatch.setattr(DenseCache, "rollback", lambda self, n: own(self, [length - (length > 2) for length in n]))
    assert p_value(counted("plain", None), expected("plain")) < FALSE_ALARM


def test_a_drafter_with_a_broken_cache_is_still_exact():
    drafter = OneSlotOff(Engine(models()[1]), 2)
    assert p_value(counted("plain", drafter), expected("plain")) > FALSE_ALARM
