"""Records on disk: Parquet shards written atomically, and a manifest that says what they are.

    writer = ShardedWriter(run.responses, {"kind": "responses", "sampling": {...}, "fingerprints": {...}}, 1000, 64)
    for shard in writer.pending(rank(), world_size()):
        writer.write(shard, [answer(row) for row in writer.source_range(shard)])
    writer.finish()

A shard stands for a fixed range of source rows, whoever makes it. So a pipeline that was killed at any moment ends,
started again with any number of processes, with exactly the rows it would have had.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from drafttrain.distributed import barrier, is_main
from drafttrain.errors import UserError
from drafttrain.run_folder import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset

_IDS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())

SCHEMAS: dict[str, pa.Schema] = {
    "prompts": pa.schema(
        {
            "prompt_id": pa.string(),
            "split": pa.string(),  # train, tune or test
            "task": pa.string(),
            "source": pa.string(),
            "messages": pa.string(),  # JSON list of messages; null for raw text
            "text": pa.string(),  # raw continuation without chat template; null for a chat
            "tools": pa.string(),  # JSON list of tool descriptions for the chat template, null when there are none
            "recorded": pa.string(),  # recorded answer to `text`; those of a chat are among its messages
            "kind": pa.string(),  # reference tasks: what made the prompt, so that it can be scored
            "seed": pa.int64(),
            "length": pa.int32(),
            "reference": pa.string(),  # JSON of the right answer, null when there is none
            "prompt_ids": _IDS,
        }
    ),
    "responses": pa.schema(
        {
            "prompt_id": pa.string(),
            "split": pa.string(),
            "task": pa.string(),
            "source": pa.string(),
            "turn": pa.int32(),
            "prompt_ids": _IDS,  # the whole context of this turn
            "response_ids": _IDS,  # with the end-of-sequence token when it was reached
            "finish_reason": pa.string(),  # eos, stop or length
            "text": pa.string(),
        }
    ),
    # T response positions; k, temperatures, rule names and R are in the manifest (top_k, temperatures, scores,
    # run_length); lists of more dimensions are flattened row-major.
    "traces": pa.schema(
        {
            "prompt_id": pa.string(),
            "split": pa.string(),
            "task": pa.string(),
            "source": pa.string(),
            "turn": pa.int32(),
            "prompt_ids": _IDS,
            "response_ids": _IDS,  # X [T]
            "draft_ids": _IDS,  # Y [T], coupled to X
            "log_p": _FLOATS,  # [T] of Y
            "log_q": _FLOATS,  # [T] of Y
            "overlap": _FLOATS,  # [T] sum of min(p, q)
            "entropy": _FLOATS,  # [T] of q, nats
            "p_top_ids": _IDS,  # [T, k]
            "p_top_logits": _FLOATS,  # [T, k]
            "q_top_ids": _IDS,  # [T, k]
            "q_top_logits": _FLOATS,  # [T, k]
            "log_z_p": _FLOATS,  # [T, temperatures]
            "log_z_q": _FLOATS,  # [T, temperatures]
            "top_p_leaves_k": pa.list_(pa.bool_()),  # [T]
            "scores": _FLOATS,  # [rules, T]
            "run_ids": _IDS,  # [rejected positions, R]
            "run_log_q": _FLOATS,  # [rejected positions, R]
            "run_scores": _FLOATS,  # [rules, rejected positions, R]
        }
    ),
    # As traces, of LongSpec drafters: one row a response and step of the round.
    "step_traces": pa.schema(
        {
            "prompt_id": pa.string(),
            "split": pa.string(),
            "task": pa.string(),
            "source": pa.string(),
            "turn": pa.int32(),
            "step": pa.int32(),  # from 1: the target's last so many tokens are not there to be read
            "prompt_ids": _IDS,
            "response_ids": _IDS,  # X [T]
            "draft_ids": _IDS,  # Y [T], coupled to X
            "reached": pa.list_(pa.bool_()),  # [T] whether the tokens before, at the steps before, were accepted
            "log_p": _FLOATS,
            "log_q": _FLOATS,
            "overlap": _FLOATS,
            "entropy": _FLOATS,
            "p_top_ids": _IDS,
            "p_top_logits": _FLOATS,
            "q_top_ids": _IDS,
            "q_top_logits": _FLOATS,
            "log_z_p": _FLOATS,
            "log_z_q": _FLOATS,
        }
    ),
}

SCHEMA_VERSIONS: dict[str, int] = {"prompts": 1, "responses": 1, "traces": 1, "step_traces": 1, "readings": 1}

MANIFEST = "manifest.json"

_BOOKKEEPING = ("complete", "rows", "shards")


class ShardedWriter:
    """Writes a data set shard by shard, each one whole or not at all.

    Every process makes one with the same arguments.

    Args:
        folder: where the shards and the manifest go.
        manifest: JSON-able; `kind` and whatever decides what the rows are (sampling, seeds, fingerprints, ...).
        total_rows: number of source rows (prompts, responses); a source row may give any number of records.
        shard_rows: source rows of one shard.

    Raises:
        UserError: the folder holds records made with other settings, or of another schema.
    """

    suffix = "parquet"

    def __init__(self, folder: str | os.PathLike[str], manifest: dict[str, Any], total_rows: int, shard_rows: int):
        self.folder = Path(folder)
        self.kind = manifest["kind"]
        existing = _load_manifest(self.folder) if (self.folder / MANIFEST).exists() else None
        # How the rows are cut into files decides nothing about them: what was begun is finished as it was begun.
        self.shard_rows = existing.get("shard_rows", shard_rows) if existing else shard_rows
        self.total_rows = total_rows
        self.shards = -(-total_rows // self.shard_rows)
        self.manifest = json.loads(json.dumps({"schema_version": SCHEMA_VERSIONS[self.kind], **manifest}))
        self.manifest |= {"source_rows": total_rows, "shard_rows": self.shard_rows}
        self._tag = _digest(self.manifest)
        self._prepare(existing)

    def _prepare(self, existing: dict[str, Any] | None) -> None:
        if existing is not None:
            recorded = {key: value for key, value in existing.items() if key not in _BOOKKEEPING}
            refuse_differences(
                self.folder, differences(recorded, self.manifest), "delete it to start over or choose another --run"
            )
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            if existing is None:
                self._write_manifest({"complete": False})
        barrier()

    def source_range(self, shard: int) -> range:
        """Source rows that shard `shard` stands for."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.total_rows))

    def path(self, shard: int) -> Path:
        """File of a shard."""
        return self.folder / f"part-{shard:05d}.{self.suffix}"

    def pending(self, rank: int = 0, world: int = 1) -> list[int]:
        """Shards that process `rank` of `world` has still to make; damaged files count as missing."""
        return [shard for shard in range(rank, self.shards, world) if not self._is_done(shard)]

    def write(self, shard: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write one shard: temporary name, fsync, rename.

        Args:
            shard: its number.
            rows: records with exactly the fields of the schema, in the order of the source rows.
        """
        schema = SCHEMAS[self.kind]
        for row in rows:
            if set(row) != set(schema.names):
                raise ValueError(f"fields of a {self.kind} record differ: {sorted(set(row) ^ set(schema.names))}")
        table = pa.Table.from_pylist(list(rows), schema=schema.with_metadata({"drafttrain": self._tag}))
        self._put(shard, lambda file: pq.write_table(table, file, compression="zstd", write_page_checksum=True))

    def _put(self, shard: int, write: Callable[[Path], None]) -> None:
        """Write a shard's file by a function of its temporary path: there it is whole or not at all."""
        temporary = self.folder / f".{self.path(shard).name}.{os.getpid()}.tmp"
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path(shard))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(self.folder)

    def finish(self) -> None:
        """Wait for all processes, read the footer of every shard, and mark the data set complete.

        Raises:
            UserError: a shard is missing or damaged.
        """
        barrier()
        if is_main():
            shards = []
            for shard in range(self.shards):
                path = self.path(shard)
                shards.append({"file": path.name, "rows": self._rows_in(shard), "bytes": path.stat().st_size})
            rows = sum(shard["rows"] for shard in shards)
            self._write_manifest({"complete": True, "rows": rows, "shards": shards})
        barrier()

    def _write_manifest(self, bookkeeping: dict[str, Any]) -> None:
        write_atomically(self.folder / MANIFEST, json.dumps(self.manifest | bookkeeping, indent=1) + "\n")

    def _rows_in(self, shard: int) -> int:
        return _footer(self.path(shard)).num_rows

    def _is_done(self, shard: int) -> bool:
        try:
            metadata = pq.read_schema(self.path(shard)).metadata or {}
        except (OSError, pa.ArrowException):
            return False
        return metadata.get(b"drafttrain") == self._tag.encode()


def read_manifest(folder: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The manifest of a complete data set.

    Raises:
        UserError: there is none, it is of another kind or schema version, or the data set is unfinished.
    """
    folder = Path(folder)
    manifest = _load_manifest(folder)
    if manifest.get("kind") != kind:
        raise UserError(f"{folder} holds {manifest.get('kind')}, not {kind}; check the path.")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSIONS[kind]:
        raise UserError(
            f"{folder} has schema version {version} of {kind}, this program reads version {SCHEMA_VERSIONS[kind]}; "
            "make it again."
        )
    if not manifest.get("complete"):
        raise UserError(
            f"{folder} is unfinished; run the program that makes the {kind} again, it goes on where it was."
        )
    return manifest


def read_records(
    folder: str | os.PathLike[str],
    kind: str,
    expect: Mapping[str, Any] | None = None,
    columns: Sequence[str] | None = None,
    accept_new_weights: bool = False,
) -> Dataset:
    """All records of a data set, in source order.

    Args:
        folder: where the shards are.
        kind: prompts, responses or traces.
        expect: what must stand in the manifest, e.g. {"fingerprints": {"target": fingerprint.to_dict()}}.
        columns: read these only; the others cost nothing.
        accept_new_weights: let `weights` parts of fingerprints differ (--accept-new-target).

    Raises:
        UserError: missing, damaged or foreign shards, or something differs from `expect`.
    """
    from datasets import Dataset

    tables = list(_tables(folder, kind, expect, columns, accept_new_weights))
    names = list(columns or SCHEMAS[kind].names)
    empty = pa.schema([SCHEMAS[kind].field(name) for name in names]).empty_table()
    return Dataset(pa.concat_tables([table.replace_schema_metadata(None) for table in tables] or [empty]))


def iter_records(
    folder: str | os.PathLike[str],
    kind: str,
    expect: Mapping[str, Any] | None = None,
    columns: Sequence[str] | None = None,
    accept_new_weights: bool = False,
) -> Iterator[dict[str, Any]]:
    """Records one by one, in source order, one shard in memory at a time. Arguments as in `read_records`."""
    for table in _tables(folder, kind, expect, columns, accept_new_weights):
        yield from table.to_pylist()


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Where two nested mappings differ: (dotted key, recorded, asked), keys of `asked` first."""
    found = []
    for key in [*asked, *(key for key in recorded if key not in asked)]:
        left, right = recorded.get(key), asked.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append((f"{prefix}{key}", left, right))
    return found


def _tables(
    folder: str | os.PathLike[str],
    kind: str,
    expect: Mapping[str, Any] | None,
    columns: Sequence[str] | None,
    accept_new_weights: bool,
) -> Iterator[pa.Table]:
    folder = Path(folder)
    manifest = read_manifest(folder, kind)
    _check_expected(folder, manifest, expect or {}, accept_new_weights)
    for shard in manifest["shards"]:
        yield _read_shard(folder / shard["file"], shard, kind, columns)


def _check_expected(
    folder: Path, manifest: dict[str, Any], expect: Mapping[str, Any], accept_new_weights: bool
) -> None:
    expect = json.loads(json.dumps(expect))
    found = differences(_restrict(manifest, expect), expect)
    if accept_new_weights:
        found = [difference for difference in found if not difference[0].endswith(".weights")]
    advice = "make it again for the present models and settings"
    if all(key.endswith(".weights") for key, _, _ in found):
        advice += " or pass --accept-new-target"
    refuse_differences(folder, found, advice)


def _restrict(recorded: Any, asked: Any) -> Any:
    """The part of `recorded` that `asked` speaks of."""
    if not isinstance(recorded, Mapping) or not isinstance(asked, Mapping):
        return recorded
    return {key: _restrict(recorded[key], asked[key]) for key in asked if key in recorded}


def refuse_differences(folder: Path, found: list[tuple[str, Any, Any]], advice: str) -> None:
    """End in a sentence where `differences` were found.

    Raises:
        UserError: says which, and what to do.
    """
    if not found:
        return
    told = "; ".join(f"{key} was {_short(left)} and is now {_short(right)}" for key, left, right in found[:3])
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    raise UserError(f"{folder} was made with other settings ({told}{more}); {advice}.")


def _short(value: Any) -> str:
    text = "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:32]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        sound = manifest.get("shard_rows", 1) >= 1 and ("shards" in manifest or not manifest.get("complete"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no records (no {MANIFEST}); make them first or check the path.") from None
    except (ValueError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged; delete {folder} and make it again.")
    return manifest


def damaged(path: Path) -> UserError:
    """What a file deserves that is not as it was written."""
    return UserError(f"{path} is damaged or truncated; delete this file and run the program that made it again.")


def _footer(path: Path) -> pq.FileMetaData:
    if not path.exists():
        raise UserError(f"{path} is missing; run the program that made it again.")
    try:
        return pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        raise damaged(path) from None


def _read_shard(path: Path, shard: dict[str, Any], kind: str, columns: Sequence[str] | None) -> pa.Table:
    metadata = _footer(path)
    if path.stat().st_size != shard["bytes"] or metadata.num_rows != shard["rows"]:
        raise damaged(path)
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read(columns=list(columns) if columns else None)
    except (OSError, pa.ArrowException):
        raise damaged(path) from None
    expected = [SCHEMAS[kind].field(name) for name in columns or SCHEMAS[kind].names]
    if not all(field.name in table.schema.names and table.schema.field(field.name) == field for field in expected):
        raise UserError(f"{path} does not have the columns of {kind}; it was written by something else, make it again.")
    return table
