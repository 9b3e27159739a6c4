"""The target's hidden states at the trained tokens, computed once and memory-mapped.

Responses stay the same from epoch to epoch, and so do the target's states, which take most of a step's arithmetic. Kept
is one number a hidden unit and trained token, hundreds of times less than the logits. What a drafter writes itself is
new each time and never stored.
"""

# N trained tokens, T time, H hidden

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from drafttrain.distributed import barrier, is_main, progress, rank, world_size
from drafttrain.run_folder import write_atomically
from drafttrain.training.drafter_data import Collator, ResponseDataset
from drafttrain.training.sharding import FrozenTarget

TOKENS_AT_ONCE = 4096
"""Padded tokens that the target reads in one forward while the file is filled."""

SHARE_OF_DISK = 0.5
"""A file larger than this share of what is free is not made."""


class TargetStates:
    """States of all responses of a data set, looked up by row.

    Rows are dealt to the processes in fixed groups, so the file does not depend on how many there are. A file that was
    finished for the same `key` is used as it is; an unfinished one is made again. Every process makes one.

    Args:
        path: of the file; a note beside it says what it holds.
        target: not sharded.
        data: whose responses.
        collator: of the data.
        key: identifies target and responses.
    """

    def __init__(self, path: Path, target: FrozenTarget, data: ResponseDataset, collator: Collator, key: str) -> None:
        self.path, self._data = path, data
        self._starts = torch.tensor([0, *data.trained]).cumsum(0).tolist()
        self._shape = (self._starts[-1], _width(target))
        self._dtype: torch.dtype = target.model.dtype
        self._note = path.with_suffix(".json")
        self._description = {"key": key, "shape": list(self._shape), "dtype": str(self._dtype)}
        done = self._is_done()
        barrier()  # nobody may start writing while another still looks
        if not done:
            self._fill(target, collator)
        self._map_NH = self._map(shared=False)

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """States of the trained tokens of some rows, one row after the other; rows below 0 have none. [N, H], CPU."""
        parts = [self._map_NH[self._starts[row] : self._starts[row + 1]] for row in rows if row >= 0]
        return torch.cat([self._map_NH[:0], *parts])

    @staticmethod
    def bytes_needed(target: FrozenTarget, data: ResponseDataset) -> int:
        """Size of the file."""
        return data.tokens * _width(target) * target.model.dtype.itemsize

    @staticmethod
    def fits(folder: Path, size: int) -> bool:
        """Whether a file of `size` bytes leaves room on the disk of `folder`."""
        return size <= SHARE_OF_DISK * shutil.disk_usage(folder).free

    def _is_done(self) -> bool:
        try:
            return self.path.exists() and json.loads(self._note.read_text(encoding="utf-8")) == self._description
        except (OSError, ValueError):
            return False

    def _fill(self, target: FrozenTarget, collator: Collator) -> None:
        if is_main():
            self._note.unlink(missing_ok=True)
            size = self._shape[0] * self._shape[1] * self._dtype.itemsize
            with self.path.open("wb") as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk must be an error here, not a signal later
        barrier()
        map_NH = self._map(shared=True)
        mine = _groups(self._data.lengths)[rank() :: world_size()]
        device = target.model.get_input_embeddings().weight.device
        for group in progress(mine, total=len(mine), description="target states"):
            batch = collator([self._data[row] for row in group])
            hidden_BTH = target.hidden(batch["input_ids"].to(device), batch["attention_mask"].to(device))
            for row, hidden_TH in zip(group, hidden_BTH, strict=True):
                length, trained = self._data.lengths[row], self._data.trained[row]
                states_NH = hidden_TH[length - trained - 1 : length - 1]
                map_NH[self._starts[row] : self._starts[row + 1]] = states_NH.cpu()
        del map_NH
        barrier()
        if is_main():
            write_atomically(self._note, json.dumps(self._description))
        barrier()

    def _map(self, shared: bool) -> Tensor:
        rows, width = self._shape
        return torch.from_file(str(self.path), shared=shared, size=rows * width, dtype=self._dtype).view(rows, width)


def _width(target: FrozenTarget) -> int:
    return target.model.config.get_text_config().hidden_size


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of like length together, at most `TOKENS_AT_ONCE` padded tokens each (one row at least)."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        # ascending: the newest row is the longest of its group
        if groups and lengths[row] * (len(groups[-1]) + 1) <= TOKENS_AT_ONCE:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
