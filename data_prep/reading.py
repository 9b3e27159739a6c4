"""Rows of a file with the place where each stands, so that a mistake in one can be pointed at.

JSON lines, JSON, Parquet and plain text, each also gzipped (Parquet aside), a folder of such files, or a data set of
the hub through `datasets`.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from drafttrain.errors import UserError

_LISTS = ("data", "rows", "examples", "prompts", "questions", "instances")
"""Names under which a JSON object keeps its rows."""


@dataclass(frozen=True)
class Row:
    """A value and where it stands, e.g. "prompts.jsonl, line 3"."""

    value: Any
    where: str


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, or of every file of a known kind in a folder, in name order.

    Raises:
        UserError: missing, unreadable, truncated, malformed (with its line) or empty; unknown kind of file.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _kind(file) in _READERS)
        if not files:
            raise UserError(f"{path} holds no file of a known kind ({_known_kinds()}); name a file or another folder.")
    elif path.exists():
        files = [path]
    else:
        raise UserError(f"the prompt file {path} does not exist; check prompts.path.")
    for file in files:
        yield from _read_file(file)


def read_hub(name: str, split: str) -> Iterator[Row]:
    """Rows of a data set of the hub. `name` is `owner/name` or `owner/name:configuration`.

    Raises:
        UserError: unknown data set, configuration or split; no connection; an interrupted download.
    """
    import datasets

    from drafttrain.models.loading import HTTPError

    dataset_id, _, configuration = name.partition(":")
    try:
        rows = datasets.load_dataset(dataset_id, configuration or None, split=split)
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:  # ValueError: configuration or split
        raise UserError(f"the hub has no data set {name!r} with split {split!r} ({_first_line(error)}).") from None
    except RuntimeError as error:  # it needs a script of its own to be read
        raise UserError(
            f"the data set {name!r} cannot be read ({_first_line(error)}); take a copy of it in Parquet, or give a "
            "local file with prompts.source: file."
        ) from None
    except (OSError, HTTPError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"the data set {name!r} could not be fetched ({_first_line(error)}); what is downloaded is kept, "
            "so run the same command again, or give a local file with prompts.source: file."
        ) from None
    for number, value in enumerate(rows, start=1):
        yield Row(value, f"{name}, {split} row {number}")


def _read_file(path: Path) -> Iterator[Row]:
    kind = _kind(path)
    if kind not in _READERS:
        raise UserError(f"{path} is of no known kind; name it after one of {_known_kinds()}.")
    empty = True
    for row in _READERS[kind](path):
        empty = False
        yield row
    if empty:
        raise UserError(f"{path} holds no rows; check prompts.path.")


def _kind(path: Path) -> str:
    """The suffix that tells the format, without .gz."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()


def _known_kinds() -> str:
    return ", ".join([*_READERS, ".jsonl.gz"])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is truncated or not gzip after line {number} ({error}); fetch it again.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 after line {number} ({error.reason}); convert it to UTF-8.") from None


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            yield Row(json.loads(line), where)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); mend or remove it.") from None


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows, an object with such a list under a usual name, or one row; also JSON lines under this name."""
    text = "".join(line for _, line in _lines(path))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _read_jsonl(path)
            return
        raise UserError(f"{path}: not JSON ({error.msg} at line {error.lineno}); mend it or fetch it again.") from None
    if isinstance(value, dict):
        value = next((value[key] for key in _LISTS if isinstance(value.get(key), list)), [value])
    if not isinstance(value, list):
        raise UserError(f"{path}: holds neither a list nor an object; see the README for the shapes that are read.")
    for number, item in enumerate(value, start=1):
        yield Row(item, f"{path}, item {number}")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, f"{path}, row {number}")
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is truncated or not Parquet ({_first_line(error)}); fetch it again.") from None


def _read_text(path: Path) -> Iterator[Row]:
    """One prompt a line."""
    for number, line in _lines(path):
        yield Row(line.rstrip("\r\n"), f"{path}, line {number}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
