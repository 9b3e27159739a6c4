"""What a LongSpec drafter learns of its target, computed once and memory-mapped: then no layer of the target runs.

Of every token the keys and values of the one layer that is read, 4 KiB a token in bfloat16 for eight heads of 128, so
half a GiB for a text of 128k; and of the tokens that are trained, the target's last hidden state, from which its head
makes the exact distribution again. For answers behind long prompts the states are the smaller part: of the k likeliest
tokens' log-probabilities less would have to be kept, but the loss would not be the same.

Positions are drawn when the file is made and kept in it. Keys are kept as the target made them, after the rotary
embedding: turning them to other positions would not do, because beyond the first layer keys and values depend on where
all the tokens before stood to each other. So all epochs see a row at the same place; lags are drawn anew.
"""

# B documents, T tokens of all of them, N trained tokens, M key heads, D head size, H hidden

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.models.longspec_states import Reading, read_target
from drafttrain.models.shared_target import RotaryOf
from drafttrain.records import ShardedWriter, damaged, differences, read_manifest, refuse_differences
from drafttrain.training.drafter_data import ResponseDataset
from drafttrain.training.positions import Placing
from drafttrain.training.state_file import TOKENS_AT_ONCE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KIND = "readings"

_LEARNT = ("settling", "depth")
"""Of a placing: what says which predictions are learnt, not where rows stand."""

STEP = 0
"""Of the training whose positions are drawn for the files."""

SHARD_BYTES = 2**28
"""A shard has as many rows as fit, one at least: it is in memory while it is made."""

_OPEN_SHARDS = 64


def manifest_of(
    fingerprint: Mapping[str, str],
    layer: int,
    dtype: torch.dtype,
    placing: Placing,
    responses: Mapping[str, Any],
    data: ResponseDataset,
) -> dict[str, Any]:
    """All that decides what the files hold.

    Args:
        fingerprint: of the target.
        layer: that is read.
        dtype: of the target.
        placing: what it says of positions.
        responses: the manifest of the responses.
        data: those that are trained.
    """
    return {
        "kind": KIND,
        "target": dict(fingerprint),
        "layer": layer,
        "dtype": str(dtype).removeprefix("torch."),
        "positions": {name: value for name, value in dataclasses.asdict(placing).items() if name not in _LEARNT},
        "responses": hashlib.sha256(json.dumps(responses, sort_keys=True).encode()).hexdigest()[:32],
        "max_length": data.max_length,
    }


def bytes_needed(config: Any, size: int, data: ResponseDataset) -> int:
    """Of all files.

    Args:
        config: of the target.
        size: bytes of a value.
        data: whose rows.
    """
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return sum(data.lengths) * (2 * heads * width * size + 4) + data.tokens * config.hidden_size * size


class ReadingWriter(ShardedWriter):
    """Shards of readings; a source row is a row of the data set.

    Args:
        folder: of the shards.
        manifest: of `manifest_of`.
        data: whose rows.
        row_bytes: of a row, on average.
    """

    suffix = "safetensors"

    def __init__(self, folder: Path, manifest: dict[str, Any], data: ResponseDataset, row_bytes: float) -> None:
        self.data = data
        super().__init__(folder, manifest, len(data), max(1, int(SHARD_BYTES / max(1.0, row_bytes))))

    def fill(self, target: PreTrainedModel, placing: Placing, shards: Sequence[int]) -> Iterator[int]:
        """Make some shards, one after the other; gives each row that was read."""
        for shard in shards:
            rows = self.source_range(shard)
            parts: dict[str, list[Tensor]] = {name: [] for name in ("keys", "values", "positions", "hidden")}
            for group in _groups(rows, self.data.lengths):
                for name, states in _read(target, self.manifest["layer"], placing, self.data, group).items():
                    parts[name].append(states)
                yield from group
            tensors = {name: torch.cat(found).contiguous() for name, found in parts.items()}
            note = {"drafttrain": f"{self._tag} {len(rows)}"}  # one entry: the order of several is not kept
            self._put(shard, functools.partial(save_file, tensors, metadata=note))

    def _rows_in(self, shard: int) -> int:
        return int(_note(self.path(shard))[1])

    def _is_done(self, shard: int) -> bool:
        try:
            return _note(self.path(shard))[0] == self._tag
        except (OSError, SafetensorError):
            return False


class StoredReadings:
    """Readings of a data set's rows.

    Args:
        folder: of the shards.
        manifest: what they must be of, see `manifest_of`.
        data: whose rows.

    Raises:
        UserError: there are none, they are unfinished or damaged, or they were made of something else: another target,
            layer, dtype, other positions or responses.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], data: ResponseDataset) -> None:
        found = check_readings(folder, manifest)
        self._per = found["shard_rows"]
        self._shards = [folder / shard["file"] for shard in found["shards"]]
        for path, shard in zip(self._shards, found["shards"], strict=True):
            if not path.exists() or path.stat().st_size != shard["bytes"]:
                raise damaged(path)
        self._tokens, self._trained = (_starts(sizes, self._per) for sizes in (data.lengths, data.trained))

        @functools.lru_cache(_OPEN_SHARDS)
        def opened(shard: int) -> Any:
            return safe_open(self._shards[shard], framework="pt")

        self._opened = opened

    def positions(self, rows: Sequence[int]) -> list[Tensor]:
        """Of each row's tokens, int64 [tokens]; row -1, which fills batches, has one token."""
        return [torch.zeros(1, dtype=torch.long) if row < 0 else self._part("positions", row).long() for row in rows]

    def __call__(
        self, rows: Sequence[int], target: PreTrainedModel, ids_1T: Tensor, positions_1T: Tensor, lengths: Sequence[int]
    ) -> tuple[Reading, Tensor]:
        """What `read_target` gives for rows end to end, and the target's last states of the tokens that are trained.

        Args:
            rows: of the data set, or -1.
            target: its embedding, whole on this rank, and its rotary embedding are used.
            ids_1T, positions_1T: of the tokens.
            lengths: of the rows.

        Returns:
            a reading without `hidden_BTH`, and the states [N, H].
        """
        device = ids_1T.device
        embedded = target.get_input_embeddings()(ids_1T)
        keys, values = (self._end_to_end(name, rows).to(device) for name in ("keys", "values"))
        hidden_NH = torch.cat([self._part("hidden", row) for row in rows if row >= 0] or [embedded[0, :0].cpu()])
        rotary = RotaryOf(target)(embedded, positions_1T)
        reading = Reading(embedded, None, keys, values, rotary, positions_1T, tuple(lengths))
        return reading, hidden_NH.to(device)

    def _end_to_end(self, name: str, rows: Sequence[int]) -> Tensor:
        """[1, M, T, D]."""
        some = self._opened(0).get_slice(name)
        empty = torch.zeros(1, *some.get_shape()[1:])
        parts = [None if row < 0 else self._part(name, row) for row in rows]
        dtype = next((part.dtype for part in parts if part is not None), torch.float32)
        parts_TMD = torch.cat([empty.to(dtype) if part is None else part for part in parts])
        return parts_TMD.transpose(0, 1).unsqueeze(0)

    def _part(self, name: str, row: int) -> Tensor:
        shard, place = divmod(row, self._per)
        starts = (self._trained if name == "hidden" else self._tokens)[shard]
        return self._opened(shard).get_slice(name)[starts[place] : starts[place + 1]]


def check_readings(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of finished readings that are of what is asked for.

    Args:
        folder: of the shards.
        manifest: what they must be of, see `manifest_of`; parts of it may be left out.

    Raises:
        UserError: as `StoredReadings`.
    """
    found, asked = read_manifest(folder, KIND), json.loads(json.dumps(manifest))
    recorded = {name: found.get(name) for name in asked}
    if isinstance(asked.get("target"), dict) and isinstance(recorded["target"], dict):
        recorded["target"] = {name: recorded["target"].get(name) for name in asked["target"]}
    advice = "make it again (data_prep/readings.py), or train with training.readings live"
    refuse_differences(folder, differences(recorded, asked), advice)
    return found


@torch.no_grad()
def _read(
    target: PreTrainedModel, layer: int, placing: Placing, data: ResponseDataset, rows: Sequence[int]
) -> dict[str, Tensor]:
    """Everything that is kept of some rows: the rows end to end."""
    items = [data[row] for row in rows]
    lengths = [len(item["input_ids"]) for item in items]
    samples = torch.tensor([item["sample_id"] for item in items])
    placed = placing.positions(torch.tensor(lengths), max(lengths), samples, STEP)
    positions_T = torch.cat([at[:length] for at, length in zip(placed, lengths, strict=True)])
    ids_T = torch.tensor([token for item in items for token in item["input_ids"]])
    device = target.get_input_embeddings().weight.device
    reading = read_target(
        target, ids_T.unsqueeze(0).to(device), None, layer, positions_T.unsqueeze(0).to(device), lengths=lengths
    )
    predicting = [
        reading.hidden_BTH[0, part.stop - 1 - data.trained[row] : part.stop - 1]
        for part, row in zip(reading.documents, rows, strict=True)
    ]
    return {
        "keys": reading.keys_BMTD[0].transpose(0, 1).cpu(),
        "values": reading.values_BMTD[0].transpose(0, 1).cpu(),
        "positions": positions_T.int(),
        "hidden": torch.cat(predicting).cpu(),
    }


def _groups(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive rows of at most `TOKENS_AT_ONCE` tokens, or one."""
    group: list[int] = []
    for row in rows:
        if group and sum(lengths[each] for each in group) + lengths[row] > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _starts(sizes: Sequence[int], per: int) -> list[list[int]]:
    """Where each row of each shard begins, and where the last one ends."""
    return [[0, *itertools.accumulate(sizes[at : at + per])] for at in range(0, len(sizes), per)]


def _note(path: Path) -> list[str]:
    """What a shard is of, and its rows."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("drafttrain", " ").split(" ")
