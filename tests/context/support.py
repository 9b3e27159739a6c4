"""A pair that often agrees, and long enough prompts."""

from __future__ import annotations

import torch

from drafttrain.context.ahead import DraftAhead
from drafttrain.context.budgets import Budget, Protected
from drafttrain.context.compression import DraftAttention, PromptCompression
from drafttrain.context.decoder import ApproximateDecoder
from drafttrain.context.dropping import KVDropping
from drafttrain.context.scorers import LookaheadAttention
from drafttrain.decoding.engine import Engine
from drafttrain.ops.sampling import Sampling
from tests.decoding.support import pair

GREEDY = Sampling(0.0)
generator = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(0, 24, (length,), generator=generator).tolist() for length in (60, 35, 9, 48)]
"""The third is shorter than the window."""

TARGET, SMALL = pair(noise=0.1)


def engines() -> tuple[Engine, Engine]:
    return Engine(TARGET), Engine(SMALL)


def dropping(budget: int | float, **more: object) -> KVDropping:
    return KVDropping(Budget(budget), LookaheadAttention(window=8), Protected(2, 0), **more)


def compression(budget: int | float, **more: object) -> PromptCompression:
    scorer = DraftAttention(window=8, pool=4, neighbours=4)
    return PromptCompression(Budget(budget), scorer, protect=Protected(2, 8), **more)


def decoder(target: Engine, small: Engine, length: int = 5, **more: object) -> ApproximateDecoder:
    return ApproximateDecoder(target, ahead=DraftAhead(small, length), **({"sampling": GREEDY} | more))


def texts(completions) -> list[list[int]]:
    return [completion.token_ids for completion in completions]
