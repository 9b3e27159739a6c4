"""What the decoder's tests share: pairs of models, an independent reference, a chi-square test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, ModelDrafter
from drafttrain.decoding.engine import Engine
from tests.conftest import build_llama

FALSE_ALARM = 1e-7
"""Probability that a right sampler fails one chi-square test."""


def pair(vocabulary: int = 24, layers: int = 2, noise: float = 0.25) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A target and a drafter that often agree, both float64: the drafter is the target with disturbed weights."""
    target = build_llama(vocabulary, layers=layers, hidden=16, seed=3).double()
    drafter = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return target, drafter


@torch.no_grad()
def greedy_reference(model: torch.nn.Module, prompt: Sequence[int], count: int, eos: Collection[int] = ()) -> list[int]:
    """Greedy decoding without any cache: the whole text is read again for every token."""
    text = list(prompt)
    while len(text) < len(prompt) + count and not (len(text) > len(prompt) and text[-1] in eos):
        text.append(model(torch.tensor([text])).logits[0, -1].argmax().item())
    return text[len(prompt) :]


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Chi-square test that counts were drawn from probs; cells with an expectation below 5 are pooled."""
    expected = probs.double() * counts.sum()
    if counts[expected == 0].sum() > 0:
        return 0.0
    small = expected < 5
    observed = torch.cat([counts[~small].double(), counts[small].sum().double().reshape(1)])
    expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    if expected[-1] < 5:  # too little even when pooled: the largest cell takes it
        top = expected[:-1].argmax()
        observed[top] += observed[-1]
        expected[top] += expected[-1]
        observed, expected = observed[:-1], expected[:-1]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


@torch.inference_mode()
def greedy_matches(drafter: Engine, prompt: Sequence[int], response: Sequence[int]) -> list[bool]:
    """Where the drafter's greedy token, given the reference before it, is the reference's.

    Args:
        drafter: the model that will draft.
        prompt: token ids.
        response: the target's greedy continuation.

    Returns:
        one flag a position of prompt ++ response; the prompt's are False.
    """
    text = [*prompt, *response]
    cache = drafter.new_cache(1, len(text))
    drafter.read(cache, [text[: len(prompt) - 1]])
    block = torch.tensor([text[len(prompt) - 1 : -1]], device=drafter.device)
    choice = drafter.forward(cache, block).logits[0].float().argmax(-1).tolist()
    return [False] * len(prompt) + [mine == theirs for mine, theirs in zip(choice, response, strict=True)]


class Successors(Drafter):
    """A model that a person can follow: the most probable token is a function of the one before.

    Args:
        next_token: the function.
        vocabulary: V.
        name: label.
    """

    max_length = 1

    def __init__(self, next_token: Callable[[int], int], vocabulary: int, name: str) -> None:
        self.next_token, self.vocabulary, self.name = next_token, vocabulary, name

    def propose(self, committed, prefix, budget, random, target_view=None):
        rows = [
            [self.next_token(text[-1])][:most] for text, most in zip(committed.extended(prefix), budget, strict=True)
        ]
        return Draft.of(rows, self.name)

    def score(self, committed, prefix, draft):
        texts = [[text[-1], *more] for text, more in zip(committed.extended(prefix), draft.rows(), strict=True)]
        logits = torch.zeros(len(texts), draft.width + 1, self.vocabulary)
        for row, text in enumerate(texts):
            for place, token in enumerate(text):
                logits[row, place, self.next_token(token)] = 9.0
        return logits


class InStep(ModelDrafter):
    """Asserts whenever it is asked that its cache holds a beginning of committed ++ prefix and nothing else."""

    checks = 0

    def _join(self, committed, prefix):
        texts = super()._join(committed, prefix)
        InStep.checks += 1
        for row, text in enumerate(texts):
            held = self.cache.lengths[row]
            assert held < len(text), "at least the last token is pending"
            fresh = Engine(self.engine.model)
            cache = fresh.new_cache(1)
            if held:
                fresh.read(cache, [text[:held]])
                for mine, clean in zip(self.cache.layers, cache.layers, strict=True):
                    assert torch.allclose(mine.keys[row, :, :held], clean.keys[0, :, :held], atol=1e-9)
        return texts


class WatchedDrafter(ModelDrafter):
    """Asserts after every round that its cache ++ pending tokens = committed ++ prefix."""

    rounds = 0

    def propose(self, committed, prefix, budget, random, target_view=None):
        self.check(committed)
        draft = super().propose(committed, prefix, budget, random, target_view)
        self.rounds += 1
        return draft

    def check(self, committed: Committed) -> None:
        """Compare the cache with one that has read the committed text and nothing else."""
        for row, text in enumerate(committed.tokens):
            held = self.cache.lengths[row]
            assert held < len(text), "at least the last token is pending"
            fresh = Engine(self.engine.model)
            cache = fresh.new_cache(1)
            if held:
                fresh.read(cache, [text[:held]])
                for mine, clean in zip(self.cache.layers, cache.layers, strict=True):
                    assert torch.allclose(mine.keys[row, :, :held], clean.keys[0, :, :held], atol=1e-9)
                    assert torch.allclose(mine.values[row, :, :held], clean.values[0, :, :held], atol=1e-9)
