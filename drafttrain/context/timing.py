"""Measures what prompt compression takes and saves on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from drafttrain.context.ahead import DraftAhead
from drafttrain.context.budgets import Budget
from drafttrain.context.compression import PromptCompression
from drafttrain.context.cost import CompressionCost, Seconds
from drafttrain.context.decoder import ApproximateDecoder
from drafttrain.decoding.engine import Engine
from drafttrain.ops.sampling import Sampling


def compression_cost(
    target: Engine,
    compression: PromptCompression,
    ahead: DraftAhead,
    lengths: Sequence[int] = (512, 1024, 4096),
    repeats: int = 2,
) -> CompressionCost:
    """Time a target's reading, and a drafter's reading, drafting ahead and scores, over random tokens.

    Args:
        target: engine.
        compression: of which the scorer matters; what a target reads of a prompt depends on its length alone.
        ahead: the draft pass.
        lengths: of the prompts; those that a model has no positions for are left out.
        repeats: of each, of which the fastest counts.
    """
    half = replace(compression, budget=Budget(0.5), costs=None, documents=())
    decoder = ApproximateDecoder(target, compression=half, ahead=ahead, sampling=Sampling(0.0))
    new = ahead.length + 1
    most = min(engine.max_positions or max(lengths) + new for engine in (target, ahead.engine)) - new
    lengths = [length for length in lengths if length <= most] or [most]

    def choose(prompt: list[int]) -> float:
        decoder.generate([prompt], new)
        return decoder.split.total - decoder.split.target_prefill

    ways: list[Callable[[list[int]], float]] = [lambda prompt: _read(target, prompt), choose]
    return CompressionCost(*(_fitted(seconds, target.entries, lengths, repeats) for seconds in ways))


def _fitted(seconds: Callable[[list[int]], float], entries: int, lengths: Sequence[int], repeats: int) -> Seconds:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, entries, (length,), generator=generator).tolist() for length in lengths]
    return Seconds.fitted(lengths, [min(seconds(prompt) for _ in range(repeats)) for prompt in prompts])


@torch.inference_mode()
def _read(engine: Engine, prompt: list[int]) -> float:
    cache = engine.new_cache(1, len(prompt))
    started = time.perf_counter()
    engine.read(cache, [prompt])
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    return time.perf_counter() - started
