"""The frozen drafter's states for the acceptance head: computed on the fly, or once and kept in a memory-mapped file.

The drafter is no part of the module that is trained, nor of what is saved. With token mixing its input is new in every
epoch, so its states are too. Otherwise they never change: `StateStore` computes them once per run, the processes share
the work, and every epoch after that costs the head only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from drafttrain.models.branch_states import Branches, batch_branch_states
from drafttrain.models.longspec_states import BesideTarget, block_states, read_target
from drafttrain.training.head_data import Examples, HeadDataset, Trace
from drafttrain.training.state_file import TOKENS_AT_ONCE, StateFile

# T response positions, M rejected positions, R tokens of a run, H hidden, N examples, S flat states of a response

Wanted = tuple[int, Trace, Examples]


class DrafterStates:
    """States of drafted tokens, computed by the drafter now.

    Args:
        model: the drafter, frozen.
        config: of the head: which state, of which tokens.
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
        """The states of every response, [T, H] each."""
        producing = self.config.state == "producing"
        if producing or self.config.data == "mixed":
            return self._read_through(wanted, shift=1 if producing else 0)
        rows = [(trace.prompt, trace.response_T.tolist(), trace.draft_T.tolist(), []) for _, trace, _ in wanted]
        return [states.consumed_TH for states in batch_branch_states(self.model, rows)]

    def _read_through(self, wanted: Sequence[Wanted], shift: int) -> list[Tensor]:
        """States along the tokens themselves: after each (consumed) or before each (producing)."""
        sequences = [[*trace.prompt, *examples.tokens_T.tolist()] for _, trace, examples in wanted]
        hidden_BLH = Branches(self.model, sequences).hidden_BLH
        flat = []
        for b, (_, trace, examples) in enumerate(wanted):
            start = len(trace.prompt) - shift
            flat.append(hidden_BLH[b, start : start + len(examples.tokens_T)])
        return flat


class BlockStates(DrafterStates):
    """States of a LongSpec drafter's tokens, each drafted at the step of its trace.

    Args:
        model: block and target.
        config: of the head; its state is the producing one.
    """

    model: BesideTarget

    @torch.no_grad()
    def flat(self, wanted: Sequence[Wanted]) -> list[Tensor]:
        """As `DrafterStates.flat`; a text that several steps were traced of is read once."""
        block, target = self.model.block, self.model.target
        texts: dict[tuple[int, ...], int] = {}
        for _, trace, examples in wanted:
            texts.setdefault((*trace.prompt, *examples.tokens_T.tolist()), len(texts))
        lengths = [len(text) for text in texts]
        device = target.get_input_embeddings().weight.device
        ids_1T = torch.tensor([[token for text in texts for token in text]], device=device)
        positions_1T = torch.cat([torch.arange(length, device=device) for length in lengths]).unsqueeze(0)
        reading = read_target(target, ids_1T, None, block.config.kv_layer, positions_1T, lengths=lengths)
        steps = {trace.step for _, trace, _ in wanted}
        lags = {step: torch.full((len(texts),), step, device=device) for step in steps}
        states = {step: block_states(block, reading, lag_B)[0] for step, lag_B in lags.items()}
        found = []
        for _, trace, examples in wanted:
            tokens = examples.tokens_T.tolist()
            start = reading.documents[texts[*trace.prompt, *tokens]].start + len(trace.prompt) - 1
            found.append(states[trace.step][start : start + len(tokens)])
        return found


def states_of(model: PreTrainedModel | BesideTarget, config: AcceptanceHeadConfig) -> DrafterStates:
    """What computes a drafter's states."""
    return (BlockStates if isinstance(model, BesideTarget) else DrafterStates)(model, config)


def by_size(wanted: Sequence[Wanted], tokens: int = TOKENS_AT_ONCE) -> Iterator[list[Wanted]]:
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

    Args:
        path: see `StateFile`.
        states: computes what is missing.
        dataset: whose responses.
        key: identifies drafter, traces and layout.
    """

    def __init__(self, path: Path, states: DrafterStates, dataset: HeadDataset, key: str) -> None:
        self._states = states
        self._file = StateFile(path, _lengths(dataset, states), states.hidden_size, states.dtype, key)
        if not self._file.finished:
            rows = [(row, dataset.trace(row)) for row in range(len(dataset.records))]
            groups = list(by_size([(row, trace, _whole(trace)) for row, trace in rows if len(trace.draft_T)]))
            self._file.fill(groups, self._flat, "drafter states")

    @staticmethod
    def bytes_needed(dataset: HeadDataset, states: DrafterStates) -> int:
        """Size of the file."""
        return sum(_lengths(dataset, states)) * states.hidden_size * states.dtype.itemsize

    def embed(self, tokens_N: Tensor) -> Tensor:
        """As `DrafterStates.embed`."""
        return self._states.embed(tokens_N)

    def __call__(self, wanted: Sequence[Wanted]) -> Tensor:
        """As `DrafterStates.__call__`, on the CPU."""
        stored = self._file([-1, *(row for row, _, _ in wanted)])
        chosen = [states_SH[examples.index_N] for states_SH, (_, _, examples) in zip(stored[1:], wanted, strict=True)]
        return torch.cat([stored[0], *chosen])

    def _flat(self, group: list[Wanted]) -> Iterator[tuple[int, Tensor]]:
        return zip((row for row, _, _ in group), self._states.flat(group), strict=True)


def _lengths(dataset: HeadDataset, states: DrafterStates) -> list[int]:
    return [len(dataset.trace(row).draft_T) for row in range(len(dataset.records))]


def _whole(trace: Trace) -> Examples:
    """Stands for a response without choosing examples; only its tokens are looked at."""
    none = torch.zeros(0)
    return Examples(trace.response_T, none.long(), none.long(), none, none, none, none, none)
