"""How good a drafter is on responses that it was not trained on: real tokens per round, loss, expected acceptance.

The expected acceptance of a loss is a mean over the target's own text; what counts is tau, tokens per round of real
decoding, where an early rejection costs more than a late one. So tau is measured while training, not predicted.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from drafttrain.decoding.counts import Counts
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.longspec import LongSpec
from drafttrain.decoding.loop import Decoder
from drafttrain.distributed import rank, world_size
from drafttrain.models.longspec import LongSpecDrafter
from drafttrain.ops.sampling import Sampling
from drafttrain.run_folder import write_atomically
from drafttrain.training.drafter_data import ResponseDataset, Row
from drafttrain.training.sharding import FrozenTarget, Replica

SCORED = 128
"""Held-out responses that loss and expected acceptance are measured on."""

TOKENS = 64
"""Most tokens decoded for one prompt: enough rounds for tau, too few for a weak target to run in circles long."""

HISTORY = "tau_history.json"


@dataclass(frozen=True)
class HeldOut:
    """Prompts and responses kept apart.

    Attributes:
        scored: rows for loss and expected acceptance.
        prompts: prompts to decode.
        limits: tokens to decode behind each.
        length: drafted tokens per round.
        vocabulary: leading token ids that stand for text.
        eos_ids: tokens that end an answer.
        batch: prompts decoded together; tau does not depend on it.
        sampling: how they are decoded; greedy while training.
    """

    scored: list[Row]
    prompts: list[list[int]]
    limits: list[int]
    length: int
    vocabulary: int
    eos_ids: frozenset[int]
    batch: int
    sampling: Sampling = field(default_factory=lambda: Sampling(0.0))

    @classmethod
    def of(
        cls,
        data: ResponseDataset,
        prompts: int,
        length: int,
        vocabulary: int,
        eos_ids: Collection[int],
        room: int,
        batch: int = 8,
    ) -> HeldOut:
        """The same choice from the same data, always.

        Args:
            data: held-out responses.
            prompts: how many to decode.
            length: drafted tokens per round.
            vocabulary: leading token ids that stand for text.
            eos_ids: tokens that end an answer.
            room: positions that both models have.
            batch: prompts decoded together.
        """
        fitting = [row for row in data.select(len(data)) if row["prompt_length"] and row["prompt_length"] < room]
        count = min(prompts, len(fitting))
        chosen = [fitting[index * len(fitting) // count] for index in range(count)]
        texts = [row["input_ids"][: row["prompt_length"]] for row in chosen]
        limits = [
            min(TOKENS, len(row["input_ids"]) - len(text), room - len(text))
            for row, text in zip(chosen, texts, strict=True)
        ]
        return cls(data.select(SCORED), texts, limits, length, vocabulary, frozenset(eos_ids), batch)

    def decode(self, target: FrozenTarget, replica: Replica) -> Counts:
        """Decode every prompt and count; all ranks call it.

        With a sharded target, whose forwards are collective, all ranks decode the same prompts in step; else they
        share them.
        """
        alone = target.sharded or world_size() == 1
        chosen = range(len(self.prompts)) if alone else range(rank(), len(self.prompts), world_size())
        model = replica.causal_lm
        if isinstance(model, LongSpecDrafter):
            drafter = LongSpec(model, length=self.length)
        else:
            drafter = ModelDrafter(Engine(model, self.vocabulary), length=self.length)
        with target.whole_head():
            decoder = Decoder(Engine(target.model, self.vocabulary), drafter, self.sampling, self.eos_ids)
            counts = Counts()
            for start in range(0, len(chosen), self.batch):
                rows = chosen[start : start + self.batch]
                prompts, limits = [self.prompts[row] for row in rows], [self.limits[row] for row in rows]
                counts = sum((done.counts for done in decoder.generate(prompts, limits)), counts)
        return counts if alone else _summed(counts)

    def shares(self, batch: int) -> list[list[Row]]:
        """This rank's batches of scored rows: as many on every rank, some of them empty."""
        starts = range(0, len(self.scored), batch)
        mine = [self.scored[start : start + batch] for start in starts[rank() :: world_size()]]
        return mine + [[]] * (-(-len(starts) // world_size()) - len(mine))


class TauHistory:
    """The measured points of a run, kept in `tau_history.json` as a list.

    Args:
        path: the file.
        resumed: optimizer steps done; later points belong to a run that was cut off and are dropped.
    """

    def __init__(self, path: Path, resumed: int = 0) -> None:
        self.path = path
        self.points: list[dict[str, Any]] = []
        if resumed and path.is_file():
            points = json.loads(path.read_text(encoding="utf-8"))
            self.points = [point for point in points if point["step"] <= resumed]

    def add(self, point: dict[str, Any], write: bool) -> None:
        """Append a point, in the place of an older one of the same step."""
        self.points = [*(old for old in self.points if old["step"] != point["step"]), point]
        if write:
            write_atomically(self.path, json.dumps(self.points, indent=1) + "\n")


def _summed(counts: Counts) -> Counts:
    parts: list[Counts | None] = [None] * world_size()
    torch.distributed.all_gather_object(parts, counts)
    return sum(parts, Counts())


def tables(points: Sequence[dict[str, Any]]) -> str:
    """The points as lines for a terminal."""
    lines = [f"{'data':>6} {'tau':>6} {'accepted':>9} {'expected':>9} {'loss':>8}"]
    for point in points:
        lines.append(
            f"{point['fraction']:6.0%} {point['tau']:6.3f} {point['acceptance_rate']:9.3f} "
            f"{point['expected_acceptance']:9.3f} {point['loss']:8.4f}"
        )
    return "\n".join(lines)
