"""Batches that the drafter writes itself: it continues prefixes of responses, and the target scores what it wrote.

A drafter that only ever reads the target's text never sees the states that its own mistakes lead to (Agarwal et al.
2024, GKD). Whether a step is on-policy, where a response is cut and what is drawn behind the cut are functions of
(seed, step, sample), so that a resumed run or another number of processes writes the same text.
"""

# B batch, T time

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.decoding.loop import Decoder
from drafttrain.ops.random import uniform
from drafttrain.ops.sampling import Sampling
from drafttrain.training.drafter_data import IGNORED, Collator


@dataclass(frozen=True)
class OnPolicy:
    """When the drafter writes, and how.

    Attributes:
        fraction: share of the steps.
        tokens: length of a continuation, on all ranks alike; what lies behind an end token is not trained.
        sampling: how tokens are drawn.
        vocabulary: leading token ids that stand for text.
        eos_ids: tokens that end an answer.
        max_length: no sequence grows beyond it.
        pad_id: fills behind end tokens.
        seed: of all draws.
    """

    fraction: float
    tokens: int
    sampling: Sampling
    vocabulary: int
    eos_ids: Collection[int]
    max_length: int
    pad_id: int
    seed: int

    def at(self, step: int) -> bool:
        """Whether the drafter writes in this step; the same answer on every rank."""
        if self.fraction <= 0:
            return False
        return float(uniform(self.seed, "on-policy step", torch.tensor(step), torch.tensor(0))) < self.fraction

    def key(self, step: int) -> int:
        """Seed of the draws of a step's text."""
        return self.seed * 1_000_003 + step + 1

    def continued(self, batch: dict[str, Tensor], writer: Decoder, step: int) -> dict[str, Tensor]:
        """The batch with responses cut somewhere and continued by the drafter.

        Args:
            batch: of a `Collator`.
            writer: writes as the drafter does now, with the seed of `key`.
            step: optimizer steps done, which keys the draws.

        Returns:
            a batch of the same kind without `row`; only what the drafter wrote has weight, and nothing has a label.
        """
        prefixes = self.prefixes(batch, step)
        written = writer.generate(prefixes, self.tokens, batch["sample_id"].tolist())
        rows = [
            {"input_ids": prefix + done.token_ids, "prompt_length": len(prefix), "sample_id": sample, "row": -1}
            for prefix, done, sample in zip(prefixes, written, batch["sample_id"].tolist(), strict=True)
        ]
        width = max(map(len, prefixes)) + self.tokens
        made = _padded(Collator(self.pad_id)(rows), width, self.pad_id)
        made["labels"].fill_(IGNORED)
        made["weights"][made["sample_id"] < 0] = 0.0  # empty rows stay empty
        del made["row"]  # nobody has seen this text before
        return made

    def prefixes(self, batch: dict[str, Tensor], step: int) -> list[list[int]]:
        """Prompt and a part of the response, of random length, with room for the continuation; never empty."""
        ids_B = batch["sample_id"].cpu()
        cut_B = uniform(self.seed, "on-policy cut", ids_B, torch.full_like(ids_B, step)).tolist()
        rows = []
        for place, share in enumerate(cut_B):
            length = int(batch["attention_mask"][place].sum())
            prompt = min(int(batch["prompt_length"][place]), length)
            keep = prompt + int(share * (length - prompt))
            keep = max(1, min(keep, self.max_length - self.tokens))
            rows.append(batch["input_ids"][place, :keep].tolist())
        return rows


def _padded(batch: dict[str, Tensor], width: int, pad_id: int) -> dict[str, Tensor]:
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED, "weights": 0.0}
    missing = width - batch["input_ids"].shape[1]
    return {
        name: torch.nn.functional.pad(value, (0, missing), value=fill[name]) if name in fill else value
        for name, value in batch.items()
    }
