"""The stream the reference target is trained on: library code and procedural tasks, packed into blocks.

A block is a pure function of (settings, number), so a run that is killed goes on with the very next block, and a run
with other processes reads the same stream. Answers carry full loss weight, their choices more, code less (`Blocks`)
and prompts next to none: the filler of a document is random by construction, and learning to predict it would buy
nothing.
"""

import contextlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from drafttrain.evaluation.tasks import KINDS, Example, Turn, generate, kinds
from drafttrain.evaluation.tasks.recall import question, statement
from drafttrain.evaluation.tasks.revise import instruction
from drafttrain.evaluation.tasks.words import ADJECTIVES, NOUNS
from drafttrain.recipe import StageConfig

CODE = "code"
ECHO = "echo"
"""A stretch of random tokens, said again: nothing but copying can predict it, so that copying is learnt first."""
CHANGES = "changes"
"""Lists of words and a change to them, asked for as in *revise*: the same lesson without sentences to copy."""
CROWD = "crowd"
"""Needles of *recall* made of few words and digits: as many look-alikes as a document many times as long has."""
DRILLS = (ECHO, CHANGES, CROWD)

BRIEF = ("revise", "self_correct", "recall/multi_value")
"""Tasks kept brief where a mixture names them: the change asked for, and the choice of a value, are learnt up close."""

LONG = 4096
"""Rows from this length on are there for their long documents."""


@dataclass
class Blocks(Dataset):
    """Block i of the stream: `input_ids`, `weights` and `position_ids`, each [rows, length]."""

    stages: list[StageConfig]
    corpus: np.ndarray
    tokenizer: PreTrainedTokenizerFast
    max_position: int
    seed: int = 0
    code_weight: float = 0.3
    prompt_weight: float = 0.03
    _count: object = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # one function object for all examples: the tasks cache word costs by it
        self._count = lambda text: len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def __len__(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_of(self, number: int) -> StageConfig:
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

    def _row(self, stage: StageConfig, length: int, draw: random.Random) -> dict[str, Tensor]:
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

    def _segment(self, stage: StageConfig, room: int, length: int, draw: random.Random) -> Iterator[tuple[int, float]]:
        name = draw.choices(list(stage.mixture), weights=list(stage.mixture.values()))[0]
        if name in DRILLS:
            return getattr(self, f"_{name}")(stage, room, draw)
        size = min(room - 8, _size(name, length, draw))
        if name != CODE and size >= 60:
            kind = name if name in KINDS else draw.choice(kinds(name))
            questions = draw.randint(1, max(1, min(48, size // 100)))
            with contextlib.suppress(ValueError):  # too small for this kind: code instead
                return self._chat(generate(kind, draw.randrange(10**9), size, self._count, questions), stage)
        return self._code(min(room, max(size, 64)), draw)

    def _chat(self, example: Example, stage: StageConfig) -> Iterator[tuple[int, float]]:
        tokenizer = self.tokenizer
        user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
        yield tokenizer.bos_token_id, 0.0
        context: list[int] = []
        for turn in example.turns:
            yield user, 0.0
            prompt = tokenizer(turn.user, add_special_tokens=False)["input_ids"]
            yield from ((token, self.prompt_weight) for token in prompt)
            yield tokenizer.eos_token_id, 0.0
            yield assistant, 0.0
            answer = [*tokenizer(turn.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            chosen = set(choices(context := context + prompt, answer))
            for place, token in enumerate(answer):
                yield token, stage.choice_weight if place in chosen else 1.0
            context = context + answer

    def _echo(self, _stage: StageConfig, _room: int, draw: random.Random) -> Iterator[tuple[int, float]]:
        length = draw.randint(4, 96)
        # with few different tokens the last one does not say where in the stretch one is: the ones before it must
        different = int(math.exp(draw.uniform(math.log(4), math.log(4 * length))))
        alphabet = [draw.randrange(len(self.tokenizer)) for _ in range(different)]
        stretch = draw.choices(alphabet, k=length)
        yield self.tokenizer.bos_token_id, 0.0
        for time in range(draw.randint(2, 3)):
            for place, token in enumerate(stretch):
                yield token, float(time > 0 and place > 0)

    def _changes(self, stage: StageConfig, _room: int, draw: random.Random) -> Iterator[tuple[int, float]]:
        old, new, *words = draw.sample(NOUNS, draw.randint(6, 40))
        change = draw.choice(("replace", "replace", "append", "prepend"))
        lines = [f"- {' '.join(draw.choices(words, k=draw.randint(1, 4)))}" for _ in range(draw.randint(2, 8))]
        line = draw.choices(words, k=draw.randint(1, 4))
        line.insert(draw.randint(0, len(line)), old)
        after = [f"- {' '.join(new if word == old else word for word in line)}"]
        before = [f"- {' '.join(line)}"] if change == "replace" else []
        at = {"append": len(lines), "prepend": 0}.get(change, draw.randint(0, len(lines)))
        passage, answer = ("\n".join([*lines[:at], *unit, *lines[at:]]) for unit in (before, after))
        asked = f"{instruction(change, 'line', before, after)}\n\n{passage}"
        return self._chat(Example("revise", "revise/changes", 0, (Turn(asked, answer),)), stage)

    def _crowd(self, stage: StageConfig, room: int, draw: random.Random) -> Iterator[tuple[int, float]]:
        number = draw.randint(4, max(4, min(80, room // 20)))
        side = math.isqrt(2 * number) + 2
        words = itertools.product(draw.sample(ADJECTIVES, side), draw.sample(NOUNS, side))
        keys = ["-".join(pair) for pair in draw.sample(list(words), number)]
        digits = itertools.product(draw.sample("123456789", 3), repeat=5)
        values = ["".join(value) for value in draw.sample(list(digits), number)]
        what = draw.choice(("code", "password"))
        needles = [(key, statement(what, key, value)) for key, value in zip(keys, values, strict=True)]
        asked = [draw.sample(keys, draw.randint(1, 3)) for _ in range(draw.randint(1, 8))]
        first, *others = [question(what, group, needles, draw) for group in asked]
        document = draw.choice((" ", "\n")).join(sentence for _, sentence in needles)
        turns = (Turn(f"{document}\n\n{first.user}", first.answer), *others)
        return self._chat(Example("recall", "recall/crowd", 0, turns), stage)

    def _code(self, size: int, draw: random.Random) -> Iterator[tuple[int, float]]:
        start = draw.randrange(len(self.corpus) - size)
        if size:
            yield self.tokenizer.bos_token_id, 0.0
        for token in self.corpus[start : start + size - 1]:
            yield int(token), self.code_weight


def choices(context: list[int], answer: list[int], order: int = 3) -> Iterator[int]:
    """Places of an answer whose token does not follow from copying: what followed the same `order` tokens before.

    Those are where a revision departs from its passage, where the next needle or value must be picked, where to end.
    """
    said = context + answer
    followed: dict[tuple[int, ...], set[int]] = {}
    for place in range(order, len(said)):
        before = tuple(said[place - order : place])
        if place >= len(context) and followed.get(before) != {said[place]}:
            yield place - len(context)
        followed.setdefault(before, set()).add(said[place])


def _size(name: str, length: int, draw: random.Random) -> int:
    """Tokens of a segment: all orders of magnitude alike, and a third of the documents as long as the row allows.

    In the longest rows, which cost the most, nearly all of the documents.
    """
    if name.startswith(BRIEF):
        return int(math.exp(draw.uniform(math.log(70), math.log(min(length, 300)))))
    if name != CODE and draw.random() < (1 / 3 if length < LONG else 0.8):
        return draw.randint(length // 2, length)
    return int(math.exp(draw.uniform(math.log(128), math.log(length))))


def _positions(length: int, jumps: float, max_position: int, draw: random.Random) -> Tensor:
    positions = torch.arange(length)
    room = max_position - length
    if draw.random() >= jumps or room <= 0:
        return positions
    for _ in range(draw.randint(1, 2)):
        # all orders of magnitude alike half the time, all distances alike the other half: the long ones are the hardest
        longest = max(2, room // 2)
        gap = draw.choice((int(math.exp(draw.uniform(0, math.log(longest)))), draw.randrange(longest)))
        positions[draw.randrange(1, length) :] += gap
    return positions
