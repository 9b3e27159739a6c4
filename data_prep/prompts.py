"""Prompts: from the reference world, a file or the hub to records with token ids and a split.

Near-duplicates go first, then conversations are split by a hash of how they begin, so that no two turns of one
conversation, and no two records of one log, stand on both sides. `prompts_of` makes the records, `ensure_prompts`
writes them to the run folder once.
"""

import dataclasses
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.dedup import Seen
from data_prep.presets import Conversation, conversations
from data_prep.reading import read_hub, read_rows
from drafttrain.config import PromptsConfig
from drafttrain.dialogue import asked, encode, encode_raw, render
from drafttrain.distributed import progress, rank, say, world_size
from drafttrain.errors import UserError
from drafttrain.models.fingerprint import tokenizer_hash
from drafttrain.records import MANIFEST, ShardedWriter, iter_records
from drafttrain.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "tune", "test")
_SHARD_ROWS = 4096


@dataclass(frozen=True)
class Prompts:
    """Records of the schema `prompts`, and what was left out on the way, in words."""

    records: list[dict[str, Any]]
    notes: list[str]

    def counts(self) -> Counter[str]:
        """Records of each split."""
        return Counter(record["split"] for record in self.records)


def ensure_prompts(settings: PromptsConfig, tokenizer: "PreTrainedTokenizerBase", context: int, run: RunFolder) -> int:
    """Make the prompts of a run unless they are there. Every process calls it.

    Args:
        settings: the recipe's `prompts` section.
        tokenizer: the target's.
        context: tokens the target can read and write together.

    Returns:
        Number of prompts.

    Raises:
        UserError: bad input (see `prompts_of`), or prompts made with other settings are there.
    """
    manifest = prompts_manifest(settings, tokenizer, context)
    if is_complete(run.prompts):
        return sum(1 for _ in iter_records(run.prompts, "prompts", expect=manifest, columns=["prompt_id"]))
    made = prompts_of(settings, tokenizer, context)
    for note in made.notes:
        say(note)
    writer = ShardedWriter(run.prompts, manifest, len(made.records), _SHARD_ROWS)
    for shard in writer.pending(rank(), world_size()):
        writer.write(shard, [made.records[at] for at in writer.source_range(shard)])
    writer.finish()
    counts = made.counts()
    say(f"prompts: {', '.join(f'{counts[split]} {split}' for split in SPLITS)} in {run.prompts}")
    return len(made.records)


def prompts_manifest(settings: PromptsConfig, tokenizer: "PreTrainedTokenizerBase", context: int) -> dict[str, Any]:
    """Everything that decides what the prompts are."""
    values = dataclasses.asdict(settings)
    path = values.pop("path")
    if settings.source == "file":
        values["file"] = _file_digest(_required_path(settings))  # a moved file is the same file
    elif settings.source == "hub":
        values["hub"] = path
    else:
        values["python"] = ".".join(platform.python_version_tuple()[:2])  # whose library the code is from
    template = tokenizer.chat_template or ""
    return {
        "kind": "prompts",
        "settings": values,
        "context": context,
        "fingerprints": {"tokenizer": tokenizer_hash(tokenizer), "chat_template": _hash(str(template))},
    }


def prompts_of(settings: PromptsConfig, tokenizer: "PreTrainedTokenizerBase", context: int) -> Prompts:
    """The prompts of a recipe, in an order that mixes tasks.

    Raises:
        UserError: names file and line of a malformed, incomplete, empty or too long prompt; or nothing is left.
    """
    if settings.near_duplicate == 0:
        raise UserError("prompts.near_duplicate must be above 0: at 0 all prompts are the same.")
    collected = progress(_collect(settings, tokenizer), description="prompts")
    found = [_for_target(each, settings.system, tokenizer) for each in collected]
    kept, repeated = _without_duplicates(found, settings.near_duplicate, settings.limit, settings.seed)
    fitting, too_long = _fitting(kept, tokenizer, settings.max_tokens, context)
    splits = _split([each for each, _ in fitting], settings.held_out)
    names = _unique_names([each for each, _ in fitting])
    source = _source_name(settings)
    records = [
        _record(each, ids, name, split, source) for (each, ids), name, split in zip(fitting, names, splits, strict=True)
    ]
    if not records:
        raise UserError("no prompts are left; check prompts.path, prompts.limit and prompts.max_tokens.")
    records.sort(key=lambda record: _hash(f"{settings.seed}/{record['prompt_id']}"))
    notes = [f"left out: {repeated} near-duplicates (Jaccard >= {settings.near_duplicate})"] if repeated else []
    notes += [f"left out: {too_long} prompts of more than {settings.max_tokens} tokens"] if too_long else []
    return Prompts(records, notes)


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def _collect(settings: PromptsConfig, tokenizer: "PreTrainedTokenizerBase") -> Iterator[Conversation]:
    if settings.source == "reference":
        from data_prep.reference_prompts import reference_conversations

        return reference_conversations(settings, tokenizer)
    path = _required_path(settings)
    rows = read_hub(str(path), settings.hub_split) if settings.source == "hub" else read_rows(Path(path))
    return conversations(rows, settings.preset, settings.fields)


def _required_path(settings: PromptsConfig) -> str:
    if settings.path is None:
        raise UserError(f"prompts.source is {settings.source} but prompts.path is not set; name the file or data set.")
    return settings.path


def _for_target(conversation: Conversation, system: str | None, tokenizer: "PreTrainedTokenizerBase") -> Conversation:
    """What this target reads: a base model the plain form if there is one, others the recipe's system prompt first."""
    messages = conversation.messages
    if not messages:
        return conversation
    if tokenizer.chat_template is None and conversation.plain is not None:
        return dataclasses.replace(conversation, messages=(), text=conversation.plain)
    if system is None or messages[0]["role"] in ("system", "developer"):
        return conversation
    return dataclasses.replace(conversation, messages=({"role": "system", "content": system}, *messages))


def _without_duplicates(
    found: Sequence[Conversation], threshold: float, limit: int | None, seed: int
) -> tuple[list[Conversation], int]:
    """Conversations that repeat no other, at most `limit` of them, chosen by hash; and how many repeated one."""
    order = range(len(found))
    if limit is not None:
        order = sorted(order, key=lambda at: _hash(f"{seed}/{at}"))
    seen, kept, repeated = Seen(threshold), [], 0
    for at in order:
        if limit is not None and len(kept) >= limit:
            break
        if seen.add("\n".join(found[at].said())) is None:
            kept.append(at)
        else:
            repeated += 1
    return [found[at] for at in sorted(kept)], repeated


def _fitting(
    kept: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", max_tokens: int | None, context: int
) -> tuple[list[tuple[Conversation, list[int]]], int]:
    """Conversations with the token ids of their first turn; and how many were longer than `max_tokens`."""
    fitting, too_long = [], 0
    for conversation in kept:
        ids = _first_ids(conversation, tokenizer)
        if max_tokens is not None and len(ids) > max_tokens:
            too_long += 1
        elif len(ids) >= context:
            raise UserError(
                f"{conversation.where}: the prompt has {len(ids)} tokens and the target's context is {context}; "
                f"shorten it, or pass --prompts.max_tokens {context - 1} to leave out such prompts."
            )
        else:
            fitting.append((conversation, ids))
    return fitting, too_long


def _first_ids(conversation: Conversation, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    if conversation.prompt_ids is not None:
        return list(conversation.prompt_ids)
    if conversation.text is not None:
        return encode_raw(tokenizer, conversation.text)
    first = asked(conversation.messages)[0]
    text = render(tokenizer, conversation.messages[:first], conversation.tools, conversation.where)
    return encode(tokenizer, text)


def _split(kept: Sequence[Conversation], held_out: float) -> list[str]:
    """Split by a hash of the first thing said: stable when the file grows, the same for all records of one log."""
    places = [_place(conversation) for conversation in kept]
    distinct = sorted(set(places))
    tests = max(_below(distinct, held_out), 1) if held_out > 0 and len(distinct) >= 3 else 0
    tunes = max(_below(distinct, 2 * held_out) - tests, 1) if tests else 0
    order = {place: at for at, place in enumerate(distinct)}
    by_hash = ["test" if order[p] < tests else "tune" if order[p] < tests + tunes else "train" for p in places]
    return [conversation.split or drawn for conversation, drawn in zip(kept, by_hash, strict=True)]


def _place(conversation: Conversation) -> float:
    """A conversation's place in [0, 1)."""
    return int(_hash(conversation.said()[0])[:13], 16) / 16**13


def _below(places: Sequence[float], bound: float) -> int:
    return sum(place < bound for place in places)


def _unique_names(kept: Sequence[Conversation]) -> list[str]:
    """Names that stay the same when other prompts come or go: the file's own, else a hash of what is said."""
    names = []
    for conversation in kept:
        content = _hash(json.dumps([conversation.said(), [dict(message) for message in conversation.messages]]))[:12]
        names.append((conversation.name or f"{conversation.task}/{content}", content))
    repeated = {name for name, number in Counter(name for name, _ in names).items() if number > 1}
    return [f"{name}#{content}" if name in repeated else name for name, content in names]


def _record(conversation: Conversation, ids: list[int], name: str, split: str, source: str) -> dict[str, Any]:
    return {
        "prompt_id": name,
        "split": split,
        "task": conversation.task,
        "source": source,
        "messages": _json(list(conversation.messages) or None),
        "text": conversation.text,
        "tools": _json(conversation.tools),
        "recorded": conversation.recorded,
        "kind": conversation.kind,
        "seed": conversation.seed,
        "length": conversation.length,
        "reference": _json(conversation.reference),
        "prompt_ids": ids,
    }


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _source_name(settings: PromptsConfig) -> str:
    """Where the prompts are from, as every record says it: reference, a file's name, or a hub id."""
    if settings.source == "reference":
        return "reference"
    return Path(_required_path(settings)).name if settings.source == "file" else _required_path(settings)


def is_complete(folder: Path) -> bool:
    """Whether a finished set of records is there; unfinished prompts are made again."""
    try:
        return bool(json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("complete"))
    except (FileNotFoundError, ValueError):
        return False


def _file_digest(path: str) -> str:
    """Hash of what a file, or every file of a folder, holds."""
    digest = hashlib.sha256()
    files = sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]
    for file in files:
        if not file.exists():
            raise UserError(f"the prompt file {file} does not exist; check prompts.path.")
        if file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:32]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
