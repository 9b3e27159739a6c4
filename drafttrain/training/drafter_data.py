"""What a drafter learns from: the target's responses as token ids, with the prompt in sight but not trained."""

# B batch, T time

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset as Records
from torch import Tensor
from torch.utils.data import Dataset

from drafttrain.errors import UserError
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.ops.random import sample_id, uniform
from drafttrain.records import read_manifest, read_records

IGNORED = -100
"""Label of a token that is not trained, or that nobody recorded."""

COLUMNS = ("prompt_id", "split", "turn", "prompt_ids", "response_ids")

Row = dict[str, Any]

EMPTY: Row = {"input_ids": [0], "prompt_length": 1, "sample_id": -1, "row": -1}
"""A row that trains nothing: it fills the last batch, and the batches of ranks that have no rows left."""

WINDOW = 8
"""Global batches among which rows of like length are put together, so that little is padded."""


class ResponseDataset(Dataset):
    """Responses that have at least one token to train within `max_length`.

    Args:
        rows: responses records, or any sequence of mappings with `prompt_ids` and `response_ids`.
        max_length: sequences are cut to this many tokens.

    Attributes:
        dropped: rows without a token to train: empty, or with a prompt of `max_length` tokens or more.
        tokens: tokens trained in one pass.
        lengths: length of each sequence, in tokens.
        trained: how many of its last tokens are trained.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]] | Records, max_length: int) -> None:
        self.rows, self.max_length = rows, max_length
        prompts, responses = _lengths(rows, "prompt_ids"), _lengths(rows, "response_ids")
        trained = [
            min(max_length - prompt, response) if prompt else min(max_length, response) - 1
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        self._kept = [row for row, tokens in enumerate(trained) if tokens > 0]
        self.dropped = len(trained) - len(self._kept)
        self.trained = [trained[row] for row in self._kept]
        self.tokens = sum(self.trained)
        self.lengths = [min(max_length, prompts[row] + responses[row]) for row in self._kept]

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[self._kept[index]]
        prompt, response = list(row["prompt_ids"]), list(row["response_ids"])
        return {
            "input_ids": (prompt + response)[: self.max_length],
            "prompt_length": len(prompt),
            "sample_id": sample_id(row["prompt_id"], row["turn"]) if "prompt_id" in row else self._kept[index],
            "row": index,
        }

    def select(self, count: int) -> list[Row]:
        """At most `count` rows, spread evenly, always the same ones."""
        count = min(count, len(self))
        return [self[index * len(self) // count] for index in range(count)]


class Epochs(Dataset):
    """Responses in an order of their own in every epoch, in whole global batches.

    The order depends on (seed, epoch) alone, and the last batch is filled with empty rows: any number of processes
    sees the same global batches, every row once, and a resumed run goes on exactly.

    Args:
        data: the responses.
        seed: of the order.
        global_batch: rows per optimizer step over all processes.
    """

    def __init__(self, data: ResponseDataset, seed: int, global_batch: int) -> None:
        self.data, self.seed, self.global_batch = data, seed, global_batch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        rows = torch.arange(len(self.data))
        order = uniform(self.seed, f"response order, epoch {epoch}", torch.zeros_like(rows), rows).argsort().tolist()
        batches = []
        for start in range(0, len(order), WINDOW * self.global_batch):
            window = order[start : start + WINDOW * self.global_batch]
            window.sort(key=lambda row: self.data.lengths[row])
            batches += [window[at : at + self.global_batch] for at in range(0, len(window), self.global_batch)]
        places = torch.arange(len(batches))
        shuffled = uniform(self.seed, f"batch order, epoch {epoch}", torch.zeros_like(places), places).argsort()
        # The one incomplete batch stays last, where empty rows fill it.
        whole = [batches[place] for place in shuffled.tolist() if len(batches[place]) == self.global_batch]
        self._order = [row for batch in [*whole, *(b for b in batches if len(b) < self.global_batch)] for row in batch]

    def __len__(self) -> int:
        return -(-len(self.data) // self.global_batch) * self.global_batch

    def __getitem__(self, position: int) -> Row:
        return self.data[self._order[position]] if position < len(self._order) else EMPTY


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right.

    Args:
        pad_id: token that fills.
    """

    pad_id: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Batch of rows.

        Returns:
            input_ids, attention_mask, labels (-100 on prompt and padding), all int64 [B, T]; weights float32 [B, T],
            1 on the tokens that are trained; prompt_length, sample_id and row (in its data set) int64 [B].
        """
        width = max(len(row["input_ids"]) for row in rows)
        ids_BT = torch.full((len(rows), width), self.pad_id)
        mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
        labels_BT = torch.full((len(rows), width), IGNORED)
        for place, row in enumerate(rows):
            ids_T = torch.tensor(row["input_ids"])
            ids_BT[place, : len(ids_T)] = ids_T
            mask_BT[place, : len(ids_T)] = 1
            first = max(row["prompt_length"], 1)  # nothing predicts a sequence's first token
            labels_BT[place, first : len(ids_T)] = ids_T[first:]
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "labels": labels_BT,
            "weights": (labels_BT != IGNORED).float(),
            **{name: torch.tensor([row[name] for row in rows]) for name in ("prompt_length", "sample_id", "row")},
        }


def read_responses(
    folder: Path, target: Fingerprint | Mapping[str, str], accept_new_target: bool = False
) -> tuple[dict[str, Any], Records, Records]:
    """The responses of a run, split.

    Args:
        folder: of the responses records.
        target: whose answers they must be; a mapping may name some parts of a fingerprint only.
        accept_new_target: tolerate other weights.

    Returns:
        manifest, rows to train on, rows held out for tuning.

    Raises:
        UserError: missing or damaged records, another target's answers, or nothing to train on.
    """
    parts = target.to_dict() if isinstance(target, Fingerprint) else dict(target)
    records = read_records(folder, "responses", {"fingerprints": {"target": parts}}, COLUMNS, accept_new_target)
    if not len(records):
        raise UserError(f"{folder} holds no responses; give prompts (prompts.source) and make them again.")
    splits = records["split"]
    chosen = [[row for row, split in enumerate(splits) if split == name] for name in ("train", "tune")]
    if not chosen[0]:
        raise UserError(
            f"{folder} holds no response of the split train; give more prompts or a smaller prompts.held_out."
        )
    return read_manifest(folder, "responses"), records.select(chosen[0]), records.select(chosen[1])


def require_trainable(data: ResponseDataset, folder: Path) -> ResponseDataset:
    """Refuse data without a single token to train.

    Raises:
        UserError: every prompt fills `max_length`, or every response is empty.
    """
    if not len(data):
        raise UserError(
            f"none of the {data.dropped} responses in {folder} has a token to train within training.max_length "
            f"{data.max_length}; raise it or use shorter prompts."
        )
    return data


def marked(row: Row, tokenizer: Any, shown: int = 400) -> str:
    """A row as text, what is trained between [[ and ]]; long prompts lose their beginning, long answers their end."""
    first = max(row["prompt_length"], 1)
    prompt, response = row["input_ids"][:first], row["input_ids"][first:]
    before = "..." * (len(prompt) > shown) + tokenizer.decode(prompt[-shown:])
    return f"{before}[[{tokenizer.decode(response[:shown])}{'...' * (len(response) > shown)}]]"


def _lengths(rows: Sequence[Mapping[str, Any]] | Records, name: str) -> list[int]:
    if isinstance(rows, Records):  # without making Python objects of every token
        column: pa.ChunkedArray = rows.select_columns(name).with_format("arrow")[:][name] if len(rows) else pa.array([])
        return pc.list_value_length(column).to_pylist() if len(rows) else []
    return [len(row[name]) for row in rows]
