"""Hidden states of a frozen model, computed once by all processes together and memory-mapped by each."""

# N states of a response, H hidden

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from drafttrain.distributed import barrier, is_main, progress, rank, world_size
from drafttrain.run_folder import write_atomically

TOKENS_AT_ONCE = 4096
"""Padded tokens that a model reads in one forward while a file is filled."""

_SHARE_OF_DISK = 0.5
"""A file larger than this share of what is free is not made."""

Group = TypeVar("Group")


class StateFile:
    """States of all responses of a data set, looked up by row.

    A file that was finished for the same `key` is used as it is; an unfinished one is made again. Every process makes
    one of these.

    Args:
        path: of the file; a note beside it says what it holds.
        lengths: states of each response, in order.
        width: H.
        dtype: of the states.
        key: identifies model, data set and layout.

    Attributes:
        finished: whether the states are there; otherwise `fill` comes first.
    """

    def __init__(self, path: Path, lengths: Sequence[int], width: int, dtype: torch.dtype, key: str) -> None:
        self.path, self._dtype = path, dtype
        self._starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self._shape = (self._starts[-1], width)
        self._note = path.with_suffix(".json")
        self._description = {"key": key, "shape": list(self._shape), "dtype": str(dtype)}
        self.finished = self._is_finished()
        barrier()  # nobody may start writing while another still looks
        if self.finished:
            self._map_NH = self._map(shared=False)

    @staticmethod
    def fits(path: Path, size: int) -> bool:
        """Whether a file of `size` bytes is there already, or leaves room on its disk."""
        return path.exists() or size <= _SHARE_OF_DISK * shutil.disk_usage(path.parent).free

    def fill(
        self, groups: Sequence[Group], states: Callable[[Group], Iterable[tuple[int, Tensor]]], description: str
    ) -> None:
        """Compute all states; every process calls it.

        Args:
            groups: of responses that are computed together, dealt to the processes; so the file does not depend on how
                many there are.
            states: of a group, (row, states [N, H]) of each response.
            description: for the progress bar.
        """
        if is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._note.unlink(missing_ok=True)
            size = self._shape[0] * self._shape[1] * self._dtype.itemsize
            with self.path.open("wb") as file:
                file.truncate(size)
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk must be an error here, not a signal later
        barrier()
        map_NH = self._map(shared=True)
        mine = groups[rank() :: world_size()]
        for group in progress(mine, total=len(mine), description=description):
            for row, states_NH in states(group):
                map_NH[self._starts[row] : self._starts[row + 1]] = states_NH.cpu()
        del map_NH
        barrier()
        if is_main():
            write_atomically(self._note, json.dumps(self._description))
        barrier()
        self._map_NH = self._map(shared=False)

    def __call__(self, rows: Iterable[int]) -> list[Tensor]:
        """States [N, H] of some responses, on the CPU; row -1 stands for none and has none."""
        return [self._map_NH[self._starts[row] : self._starts[row + 1]] for row in rows]  # -1: end to start

    def _is_finished(self) -> bool:
        try:
            return self.path.exists() and json.loads(self._note.read_text(encoding="utf-8")) == self._description
        except (OSError, ValueError):
            return False

    def _map(self, shared: bool) -> Tensor:
        rows, width = self._shape
        if rows == 0:
            return torch.zeros(self._shape, dtype=self._dtype)
        return torch.from_file(str(self.path), shared=shared, size=rows * width, dtype=self._dtype).view(rows, width)
