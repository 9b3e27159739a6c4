"""Pairs of given shapes with random weights and caches filled without a prefill: what decode_gpu.py measures on.

Needs torch, transformers and numpy alone. Keys and values of a context are random, for what they are costs no time: a
context of 32k tokens is there as soon as memory has been written. Everything else is the decoder as it is.
"""

# B batch, Q query width, M key heads, D head size

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import Drafter, ModelDrafter, Setting
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.graphs import GraphForward
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.synthetic import SyntheticAcceptance
from drafttrain.evaluation.environment import streamed_bytes
from drafttrain.models.loading import random_causal_lm
from drafttrain.ops.cache import DenseCache
from drafttrain.ops.random import Draws
from drafttrain.ops.sampling import Sampling

GREEDY = Sampling(0.0)
RAGGED = 3
"""Rows of a batch differ in length by this many tokens, as rows of a real batch do."""

_COMMON = {
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

SHAPES: dict[str, tuple[dict, dict]] = {
    "8b": (_LLAMA_8B, _LLAMA_1B),
    "70b": (_LLAMA_70B, _LLAMA_1B),
    "tiny": ({**_TINY, "num_hidden_layers": 2}, {**_TINY, "num_hidden_layers": 1, "tie_word_embeddings": True}),
}
"""Sizes of target and drafter: those of Llama 3.1 and 3.2, and a pair that any machine runs in seconds."""


def config_of(sizes: dict) -> LlamaConfig:
    """The configuration of a model of these sizes."""
    return LlamaConfig(**{**_COMMON, **sizes})


def parameters(config: LlamaConfig, embedding: bool = True) -> int:
    """Weights of a model; without its input embedding, where that is no output head too, those that a step reads."""
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * size
    layer = hidden * heads + 3 * hidden * inner + 2 * hidden
    tables = 1 if config.tie_word_embeddings or not embedding else 2
    return config.num_hidden_layers * layer + tables * config.vocab_size * hidden + hidden


def kv_bytes(config: LlamaConfig, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of a token."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Case:
    """What is measured together: a context in tokens and a batch size."""

    context: int
    batch: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's context."""
        return [self.context - RAGGED * row for row in range(self.batch)]

    @property
    def prompts(self) -> list[list[int]]:
        """Stand-ins for the text: only its length and last token matter."""
        return [[1] * length for length in self.lengths]


class FilledEngine(Engine):
    """An engine that has read a prompt as soon as it is asked to: it writes random keys and values."""

    def read(self, cache: DenseCache, rows: Sequence[Sequence[int]]) -> None:
        """Fill the rows' slots."""
        config = self.config
        heads, size = config.num_key_value_heads, config.head_dim
        longest = max(map(len, rows))
        shape = (len(rows), heads, min(self.chunk, longest), size)
        states_BMQD = torch.randn(shape, dtype=self.dtype, device=self.device)
        for start in range(0, longest, self.chunk):
            width = min(self.chunk, longest - start)
            cache.open(width)
            for layer in cache.layers:
                layer.update(states_BMQD[:, :, :width], states_BMQD[:, :, :width])
            cache.advance([min(max(len(row) - start, 0), width) for row in rows])


@dataclass
class Pair:
    """Engines of a target and a drafter, eager or compiled."""

    target: FilledEngine
    drafter: FilledEngine

    @property
    def device(self) -> torch.device:
        """Of both."""
        return self.target.device

    @property
    def refused(self) -> bool:
        """Whether a model that was to run as graphs could not be captured, and is read eagerly."""
        graphs = [each.compiled for each in (self.target, self.drafter)]
        return any(isinstance(each, GraphForward) and each.refused for each in graphs)

    def bytes_of_step(self, case: Case) -> int:
        """Bytes that an autoregressive step has to read: the weights once, keys and values of every row."""
        return streamed_bytes(self.target.model) + kv_bytes(self.target.config, self.target.dtype) * sum(case.lengths)


def make_models(shape: str, dtype: torch.dtype, device: torch.device) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Target and drafter of a shape with random weights, made on the device."""
    sizes = enumerate(SHAPES[shape])
    target, drafter = (random_causal_lm(config_of(each), dtype, device, seed) for seed, each in sizes)
    return target, drafter


def pair_of(models: tuple[torch.nn.Module, torch.nn.Module], compiled: bool) -> Pair:
    """Engines of both models; eager and compiled ones share the weights."""
    return Pair(*(FilledEngine(model, compiled=compiled) for model in models))


# ---------------------------------------------------------------------------------------------------------------------
# Timing. Nothing inside of what is timed waits for the device, but for what the decode loop itself reads.


def synchronize(device: torch.device) -> None:
    """Wait until everything that was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, run: Callable[[], object], count: int) -> float:
    """Seconds of one of ``count`` runs back to back, after one that does not count."""
    run()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(count):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / count


@torch.inference_mode()
def forward_seconds(engine: FilledEngine, case: Case, widths: Sequence[int], count: int) -> dict[int, float]:
    """Seconds of a forward of each width, all logits included."""
    cache = engine.new_cache(case.batch, case.context + (count + 1) * max(widths))
    engine.read(cache, case.prompts)
    found = {}
    for width in widths:
        cache.rollback(case.lengths)
        tokens_BQ = torch.ones(case.batch, width, dtype=torch.int64, device=engine.device)
        found[width] = seconds_of(engine.device, lambda tokens=tokens_BQ: engine.forward(cache, tokens), count)
    return found


@torch.inference_mode()
def draft_seconds(engine: FilledEngine, case: Case, count: int) -> float:
    """Seconds of a draft step: a forward of one token a row and the choice of the next."""
    cache = engine.new_cache(case.batch, case.context + count + 1)
    engine.read(cache, case.prompts)
    last: list[Tensor] = [torch.ones(case.batch, 1, dtype=torch.int64, device=engine.device)]

    def step() -> None:
        last[0] = GREEDY.choose(engine.forward(cache, last[0], keep="last").logits)

    return seconds_of(engine.device, step, count)


def step_seconds(pair: Pair, case: Case, steps: int) -> float:
    """Seconds of a step of autoregressive decoding, its loop included."""
    completions = Decoder(pair.target, None, GREEDY).generate(case.prompts, steps)
    return sum(each.counts.decode_seconds for each in completions) / steps


@dataclass(frozen=True)
class Rounds:
    """Rounds of speculative decoding in which every row drafted ``length`` tokens.

    Attributes:
        length: K.
        rounds: how many.
        seconds: of all of them.
        tokens: emitted in all rows together.
    """

    length: int
    rounds: int
    seconds: float
    tokens: int


def speculative_rounds(
    pair: Pair, case: Case, length: int, synthetic: SyntheticAcceptance, rounds: int, seed: int
) -> Rounds:
    """Time rounds of a full batch; two before them do not count."""
    skipped = 2
    meter = Meter(ModelDrafter(pair.drafter, length), skipped + rounds)
    decoder = Decoder(pair.target, meter, GREEDY, seed=seed, synthetic=synthetic)
    limit = (skipped + rounds + 1) * (length + 1)  # never reached
    with suppress(Enough):
        decoder.generate(case.prompts, limit)
    (began, before), (ended, after) = meter.marks[skipped], meter.marks[-1]
    return Rounds(length, rounds, ended - began, after - before)


class Enough(Exception):
    """As many rounds as were asked for."""


class Meter(Drafter):
    """Stands between loop and drafter: notes every round's beginning, when the host has read all of the last round.

    It ends the run after so many rounds, so that no row ever ends and the batch stays full.

    Attributes:
        marks: of every round, when it began, and the tokens of all rows by then.
    """

    def __init__(self, drafter: ModelDrafter, rounds: int) -> None:
        self.drafter = drafter
        self.rounds = rounds
        self.name = drafter.name
        self.max_length = drafter.max_length
        self.marks: list[tuple[float, int]] = []

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """As the drafter does."""
        self.drafter.start(committed, setting, resume)

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: object | None = None,
    ) -> Draft:
        """As the drafter does.

        Raises:
            Enough: so many rounds are over.
        """
        self.marks.append((time.perf_counter(), sum(committed.lengths)))
        if len(self.marks) > self.rounds:
            raise Enough
        return self.drafter.propose(committed, prefix, budget, random, target_view)

    def commit(self, agreed: Sequence[int]) -> None:
        """As the drafter does."""
        self.drafter.commit(agreed)

    def keep(self, rows: Sequence[int]) -> None:
        """As the drafter does."""
        self.drafter.keep(rows)
