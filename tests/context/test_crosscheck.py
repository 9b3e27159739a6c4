"""What is kept in a whole prefill, held against the attention weights that transformers itself gives for the text."""

from __future__ import annotations

import pytest
import torch

from drafttrain.context.budgets import Protected
from drafttrain.context.prefill import Prefill, Reading
from drafttrain.context.scorers import LastWindow, LookaheadAttention, Recency
from drafttrain.decoding.engine import Engine
from tests.context.support import PROMPTS
from tests.ops.test_attention import build

FAMILIES = ["llama", "qwen2", "qwen2-sliding", "qwen3", "mistral", "gemma2", "gemma3", "gpt2"]
WINDOW, SINKS, KEPT, POOL = 8, 2, 22, 5
PROMPT = PROMPTS[0]
AHEAD = [3, 1, 4, 1, 5]


def kept_by(engine: Engine, scorer: object) -> list[list[list[int]]]:
    """Positions that each layer and key head keeps of the prompt."""
    protected = Protected(SINKS, scorer.window).mask(len(PROMPT))
    reading = Reading(PROMPT, range(len(PROMPT)), AHEAD, [KEPT] * engine.layers, protected)
    prefill = Prefill(engine, [reading], [len(PROMPT)], scorer, 8)
    prefill.run()
    cache = prefill.cache
    return [
        [own[:KEPT].tolist() for held in cache.held(layer, 0) for own in cache.positions(layer, 0, held.heads)]
        for layer in range(engine.layers)
    ]


def smoothed(weights_NRS: torch.Tensor, key_heads: int, reduction: str) -> list[list[float]]:
    """Scores of the tokens before the window, head by head: SnapKV's smoothing, written out."""
    rows = weights_NRS.double().reshape(key_heads, -1, weights_NRS.shape[-1])
    found = []
    for mass in rows.amax(1) if reduction == "max" else rows.mean(1):
        before = mass[: len(PROMPT) - WINDOW].tolist()
        found.append([max(before[max(0, at - POOL // 2) : at + POOL // 2 + 1]) for at in range(len(before))])
    return found


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("scorer", "ahead"),
    [
        (LastWindow(WINDOW, pool=POOL), 0),
        (LookaheadAttention(WINDOW, pool=POOL), len(AHEAD)),
        (LookaheadAttention(WINDOW, "max", POOL), len(AHEAD)),
    ],
)
def test_the_best_tokens_by_the_models_own_attention_are_kept(family, scorer, ahead):
    """Equal scores may be told apart either way, so the scores of what was kept are compared."""
    model = build(family).double()
    engine = Engine(model)
    text = torch.tensor([[*PROMPT, *AHEAD[:ahead]]])
    weights = model(text, output_attentions=True).attentions
    for layer, heads in enumerate(kept_by(engine, scorer)):
        scores = smoothed(weights[layer][0, :, len(PROMPT) - WINDOW :], len(heads), scorer.reduction)
        for kept, own in zip(heads, scores, strict=True):
            assert kept == sorted(set(kept)) and len(kept) == KEPT
            assert set(range(SINKS)) | set(range(len(PROMPT) - WINDOW, len(PROMPT))) <= set(kept)
            chosen = [own[at] for at in kept[SINKS:-WINDOW]]
            best = sorted(own[SINKS:], reverse=True)[: len(chosen)]
            assert sorted(chosen, reverse=True) == pytest.approx(best, abs=1e-6)  # the models' softmax is in float32


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_keeps_the_same_in_every_layer_and_head(family):
    expected = [*range(SINKS), *range(len(PROMPT) - KEPT + SINKS, len(PROMPT))]
    found = kept_by(Engine(build(family).double()), Recency())
    assert all(kept == expected for heads in found for kept in heads)
