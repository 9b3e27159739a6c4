"""The target's hidden states at the trained tokens, computed once and memory-mapped.

Responses stay the same from epoch to epoch, and so do the target's states, which take most of a step's arithmetic. Kept
is one number a hidden unit and trained token, hundreds of times less than the logits. What a drafter writes itself is
new each time and never stored.
"""

# N trained tokens, T time, H hidden

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from drafttrain.training.drafter_data import Collator, ResponseDataset
from drafttrain.training.sharding import FrozenTarget
from drafttrain.training.state_file import TOKENS_AT_ONCE, StateFile


class TargetStates:
    """States of all responses of a data set, looked up by row.

    Args:
        path: see `StateFile`.
        target: not sharded.
        data: whose responses.
        collator: of the data.
        key: identifies target and responses.
    """

    def __init__(self, path: Path, target: FrozenTarget, data: ResponseDataset, collator: Collator, key: str) -> None:
        self._target, self._data, self._collator = target, data, collator
        self._file = StateFile(path, data.trained, _width(target), target.model.dtype, key)
        if not self._file.finished:
            self._file.fill(_groups(data.lengths), self._trained, "target states")

    def __call__(self, rows: Sequence[int]) -> Tensor:
        """States of the trained tokens of some rows, one row after the other; row -1 has none. [N, H], CPU."""
        return torch.cat(self._file([-1, *rows]))

    @staticmethod
    def bytes_needed(target: FrozenTarget, data: ResponseDataset) -> int:
        """Size of the file."""
        return data.tokens * _width(target) * target.model.dtype.itemsize

    def _trained(self, group: list[int]) -> Iterator[tuple[int, Tensor]]:
        """States of the trained tokens of each row."""
        batch = self._collator([self._data[row] for row in group])
        device = self._target.model.get_input_embeddings().weight.device
        hidden_BTH = self._target.hidden(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        for row, hidden_TH in zip(group, hidden_BTH, strict=True):
            end = self._data.lengths[row] - 1
            yield row, hidden_TH[end - self._data.trained[row] : end]


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
