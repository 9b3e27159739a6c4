"""The frozen drafter's states for the acceptance head: computed on the fly, or once and kept in a memory-mapped file.

The drafter is no part of the module that is trained, nor of what is saved. With token mixing its input is new in every
epoch, so its states are too. Otherwise they never change: `StateStore` computes them once per run, the processes share
the work, and every epoch after that costs the head only.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drafttrain.distributed import barrier, is_main, progress, rank, world_size
from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from drafttrain.models.branch_states import Branches, batch_branch_states
from drafttrain.run_folder import write_atomically
from drafttrain.training.head_data import Examples, HeadDataset, Trace

# T response positions, M rejected positions, R tokens of a run, H hidden, N examples, S flat states of a response

Wanted = tuple[int, Trace, Examples]

_TOKENS_AT_ONCE = 4096
"""Padded tokens that the drafter reads in one forward while the store is filled."""

_SHARE_OF_DISK = 0.5
"""A store larger than this share of what is free is not made."""


class DrafterStates:
    """States of drafted tokens, computed by the drafter now.

    Args:
        model: the drafter, frozen.
        config: of the head: which state, and whether runs are needed.
    """

    def __init__(self, model: PreTrainedModel, config: AcceptanceHeadConfig) -> None:
        self.model, self.config = model, config
        self.hidden_size: int = model.config.get_text_config().hidden_size
        self.dtype: torch.dtype = model.dtype

    def embed(self, tokens_N: Tensor) -> Tensor:
        """The drafter's input embeddings of tokens: [N, E], on the device of `tokens_N`."""
        weight_VE = self.model.get_input_embeddings().weight
        return weight_VE[tokens_N.to(weight_VE.device)].to(tokens_N.device)

    def __call__(self, wanted: Sequence[Wanted]) -> Tensor:
        """States of the examples of some responses, one after the other: [N, H], on the drafter's device."""
        device = self.model.get_input_embeddings().weight.device
        empty_NH = torch.zeros(0, self.hidden_size, dtype=self.dtype, device=device)
        chosen = [
            states_SH[examples.index_N.to(device)]
            for group in by_size(wanted)
            for (_, _, examples), states_SH in zip(group, self.flat(group), strict=True)
        ]
        return torch.cat([empty_NH, *chosen])

    @torch.no_grad()
    def flat(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """All states of every response, [T + M R, H] with runs and [T, H] without (the layout of head_data.py)."""
        producing, rounds = self.config.state == "producing", self.config.data == "rounds"
        if not rounds and (producing or self.config.data == "mixed"):
            return self._read_through(wanted, shift=1 if producing else 0)
        rows = [
            (trace.prompt, trace.response_T.tolist(), trace.draft_T.tolist(), _runs(trace) if rounds else [])
            for _, trace, _ in wanted
        ]
        flat = []
        for states in batch_branch_states(self.model, rows):
            states_TH = states.producing_TH if producing else states.consumed_TH
            runs_MRH = states.run_producing_MRH if producing else states.run_consumed_MRH
            flat.append(torch.cat([states_TH, runs_MRH.flatten(0, 1)]) if rounds else states_TH)
        return flat

    def _read_through(self, wanted: Sequence[Wanted], shift: int) -> list[Tensor]:
        """States along the tokens themselves: after each (consumed) or before each (producing)."""
        sequences = [[*trace.prompt, *examples.tokens_T.tolist()] for _, trace, examples in wanted]
        hidden_BLH = Branches(self.model, sequences).hidden_BLH
        flat = []
        for b, (_, trace, examples) in enumerate(wanted):
            start = len(trace.prompt) - shift
            flat.append(hidden_BLH[b, start : start + len(examples.tokens_T)])
        return flat


def by_size(wanted: Sequence[Wanted], tokens: int = _TOKENS_AT_ONCE) -> Iterator[list[Wanted]]:
    """Consecutive groups of at most `tokens` padded tokens (one response at least)."""
    group: list[Wanted] = []
    longest = 0
    for item in wanted:
        length = len(item[1].prompt) + len(item[1].response_T)
        if group and max(longest, length) * (len(group) + 1) > tokens:
            yield group
            group, longest = [], 0
        group.append(item)
        longest = max(longest, length)
    if group:
        yield group


class StateStore:
    """States of all responses of a data set, computed once and memory-mapped: a stand-in for `DrafterStates`.

    Rows are dealt to the processes in fixed groups, so the file does not depend on how many there are. A file that was
    finished for the same `key` is used as it is; an unfinished one is made again.

    Args:
        path: of the file; a note beside it says what it holds.
        states: computes what is missing.
        dataset: whose responses.
        key: identifies drafter, traces and layout.
    """

    def __init__(self, path: Path, states: DrafterStates, dataset: HeadDataset, key: str) -> None:
        self.path, self._states, self._dataset = path, states, dataset
        lengths = [flat_length(dataset.trace(row), states.config) for row in range(len(dataset.records))]
        self._starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        self._note = path.with_suffix(".json")
        shape = {"rows": self._starts[-1], "hidden": states.hidden_size, "dtype": str(states.dtype)}
        self._description = {"key": key, **shape}
        done = self._is_done()
        barrier()  # nobody may start writing while another still looks
        if not done:
            self._fill()
        self._map_NH = self._map(shared=False)

    @staticmethod
    def bytes_needed(dataset: HeadDataset, states: DrafterStates) -> int:
        """Size of the file."""
        rows = sum(flat_length(dataset.trace(row), states.config) for row in range(len(dataset.records)))
        return rows * states.hidden_size * states.dtype.itemsize

    @staticmethod
    def fits(folder: Path, size: int) -> bool:
        """Whether a file of `size` bytes leaves room on the disk of `folder`."""
        return size <= _SHARE_OF_DISK * shutil.disk_usage(folder).free

    def embed(self, tokens_N: Tensor) -> Tensor:
        """As `DrafterStates.embed`."""
        return self._states.embed(tokens_N)

    def __call__(self, wanted: Sequence[Wanted]) -> Tensor:
        """As `DrafterStates.__call__`, on the CPU."""
        rows = [self._starts[row] + examples.index_N for row, _, examples in wanted]
        return self._map_NH[torch.cat([torch.zeros(0, dtype=torch.long), *rows])]

    def _is_done(self) -> bool:
        try:
            return self.path.exists() and json.loads(self._note.read_text(encoding="utf-8")) == self._description
        except (OSError, ValueError):
            return False

    def _fill(self) -> None:
        if is_main():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._note.unlink(missing_ok=True)
            size = self._starts[-1] * self._states.hidden_size * self._states.dtype.itemsize
            with self.path.open("wb") as file:
                file.truncate(size)
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)  # a full disk must be an error here, not a signal later
        barrier()
        map_NH = self._map(shared=True)
        rows = [(row, self._dataset.trace(row)) for row in range(len(self._dataset.records))]
        wanted = [(row, trace, _whole(trace)) for row, trace in rows if len(trace.draft_T)]
        mine = [group for number, group in enumerate(by_size(wanted)) if number % world_size() == rank()]
        for group in progress(mine, total=len(mine), description="drafter states"):
            for (row, _, _), states_SH in zip(group, self._states.flat(group), strict=True):
                map_NH[self._starts[row] : self._starts[row + 1]] = states_SH.cpu()
        del map_NH
        barrier()
        if is_main():
            write_atomically(self._note, json.dumps(self._description))
        barrier()

    def _map(self, shared: bool) -> Tensor:
        rows, hidden = self._starts[-1], self._states.hidden_size
        if rows == 0:
            return torch.zeros(0, hidden, dtype=self._states.dtype)
        flat = torch.from_file(str(self.path), shared=shared, size=rows * hidden, dtype=self._states.dtype)
        return flat.view(rows, hidden)


def flat_length(trace: Trace, config: AcceptanceHeadConfig) -> int:
    """Rows of the flat layout of a response."""
    return len(trace.draft_T) + (trace.run_ids_MR.numel() if config.data == "rounds" else 0)


def _whole(trace: Trace) -> Examples:
    """Stands for a response without choosing examples; only its tokens are looked at."""
    none = torch.zeros(0)
    return Examples(trace.response_T, none.long(), none.long(), none, none, none, none, none)


def _runs(trace: Trace) -> list[int]:
    return trace.run_ids_MR.flatten().tolist()
