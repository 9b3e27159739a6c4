"""The stream the reference target is trained on: library code and procedural tasks, packed into blocks.

A block is a pure function of (settings, number), so a run that is killed goes on with the very next block, and a run
with other processes reads the same stream. Only answers and code carry full loss weight: the filler of a document is
random by construction, and learning to predict it would buy nothing.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from drafttrain.evaluation.tasks import KINDS, generate, kinds

CODE = "code"
ECHO = "echo"
"""A stretch of random tokens, said again: nothing but copying can predict it, so that copying is learnt first."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training with one mixture.

    Args:
        steps: optimizer steps, one block each.
        tokens: tokens of a block; a block holds tokens // length rows.
        lengths: row length -> share of the steps.
        mixture: `code`, `echo`, a task or a kind -> share of the segments drawn.
        jumps: share of the rows whose positions jump ahead at one or two places, so that short rows also train the
            long distances between positions (the anchor-offset idea, with several gaps).
    """

    steps: int
    tokens: int
    lengths: dict[int, float]
    mixture: dict[str, float]
    jumps: float = 0.0


@dataclass
class Blocks(Dataset):
    """Block i of the stream: `input_ids`, `weights` and `position_ids`, each [rows, length]."""

    stages: list[Stage]
    corpus: np.ndarray
    tokenizer: PreTrainedTokenizerFast
    max_position: int
    seed: int = 0
    code_weight: float = 0.3
    prompt_weight: float = 0.03
    answer_weight: float = 24.0
    """what an answer weighs at least in all: short answers would drown among the long ones of *revise*"""
    first_seed: int = 0
    _count: object = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # one function object for all examples: the tasks cache word costs by it
        self._count = lambda text: len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, number: int) -> Stage:
        """The stage that block `number` belongs to."""
        for stage in self.stages:
            if number < stage.steps:
                return stage
            number -= stage.steps
        raise IndexError(number)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        stage = self.stage_of(number)
        draw = random.Random(f"block/{self.seed}/{number}")
        length = draw.choices(list(stage.lengths), weights=list(stage.lengths.values()))[0]
        rows = [self._row(stage, length, draw) for _ in range(max(1, stage.tokens // length))]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, stage: Stage, length: int, draw: random.Random) -> dict[str, Tensor]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) < length:
            for token, weight in self._segment(stage, length - len(ids), length, draw):
                ids.append(token)
                weights.append(weight)
        return {
            "input_ids": torch.tensor(ids[:length]),
            "weights": torch.tensor(weights[:length], dtype=torch.float32),
            "position_ids": _positions(length, stage.jumps, self.max_position, draw),
        }

    def _segment(self, stage: Stage, room: int, length: int, draw: random.Random) -> Iterator[tuple[int, float]]:
        name = draw.choices(list(stage.mixture), weights=list(stage.mixture.values()))[0]
        size = min(room - 8, int(math.exp(draw.uniform(math.log(128), math.log(length)))))
        if name == ECHO:
            return self._echo(draw)
        if name != CODE and size >= 100:
            kind = name if name in KINDS else draw.choice(kinds(name))
            questions = draw.randint(1, max(1, min(12, size // 100)))
            try:
                example = generate(kind, draw.randrange(10**9), size, self._count, questions)
            except ValueError:  # too small for this kind: code fills the room instead
                return self._code(room, draw)
            return self._chat(example)
        return self._code(min(room, max(size, 64)), draw)

    def _chat(self, example) -> Iterator[tuple[int, float]]:
        tokenizer = self.tokenizer
        user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
        yield tokenizer.bos_token_id, 0.0
        for turn in example.turns:
            yield user, 0.0
            for token in tokenizer(turn.user, add_special_tokens=False)["input_ids"]:
                yield token, self.prompt_weight
            yield tokenizer.eos_token_id, 0.0
            yield assistant, 0.0
            answer = [*tokenizer(turn.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            weight = max(1.0, self.answer_weight / len(answer))
            for token in answer:
                yield token, weight

    def _echo(self, draw: random.Random) -> Iterator[tuple[int, float]]:
        stretch = [draw.randrange(len(self.tokenizer)) for _ in range(draw.randint(4, 48))]
        yield self.tokenizer.bos_token_id, 0.0
        for time in range(draw.randint(2, 4)):
            for place, token in enumerate(stretch):
                yield token, float(time > 0 and place > 0)

    def _code(self, size: int, draw: random.Random) -> Iterator[tuple[int, float]]:
        start = draw.randrange(len(self.corpus) - size)
        if size:
            yield self.tokenizer.bos_token_id, 0.0
        for token in self.corpus[start : start + size - 1]:
            yield int(token), self.code_weight


def _positions(length: int, jumps: float, max_position: int, draw: random.Random) -> Tensor:
    positions = torch.arange(length)
    room = max_position - length
    if draw.random() >= jumps or room <= 0:
        return positions
    for _ in range(draw.randint(1, 2)):
        gap = int(math.exp(draw.uniform(0, math.log(max(2, room // 2)))))
        positions[draw.randrange(1, length) :] += gap
    return positions
