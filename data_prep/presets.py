"""Shapes of prompt files: what each row of a known data set means as a conversation.

A preset turns a row into a `Conversation`; `auto` recognises it from the field names of the first row. Nothing of any
data set is shipped; the shapes are those of the public files.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.reading import Row
from drafttrain.config import nearest
from drafttrain.dialogue import Message, asked
from drafttrain.errors import UserError


@dataclass(frozen=True)
class Conversation:
    """A prompt before it is tokenized.

    Attributes:
        where: where it stands, for errors.
        task: what kind of work it is; figures are reported by task.
        name: its name in its file, unique there, or None.
        messages: a chat; every assistant message after a user's is an answer asked for, None where none is recorded.
        text: a raw continuation instead of a chat.
        plain: what a target without a chat template reads instead of `messages`.
        tools: tool descriptions for the chat template.
        recorded: the recorded answer to `text`.
        reference: what is known of the right answer, kept for scorers.
        kind, seed, length: how a task of the reference world was made.
        prompt_ids: the exact tokens of a prompt that is not made from text.
        split: where it must go; decided by hash when None.
    """

    where: str
    task: str
    name: str | None = None
    messages: tuple[Message, ...] = ()
    text: str | None = None
    plain: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    recorded: str | None = None
    reference: Any = None
    kind: str | None = None
    seed: int | None = None
    length: int | None = None
    prompt_ids: tuple[int, ...] | None = None
    split: str | None = None

    def said(self) -> list[str]:
        """What the user says. System prompt and tools are left out: a log's conversations share them."""
        if self.text is not None:
            return [self.text]
        return [message["content"] or "" for message in self.messages if message["role"] == "user"]


@dataclass(frozen=True)
class Preset:
    """A shape: how it is recognised, which fields it cannot do without, and how a row is read."""

    read: Callable[[dict[str, Any], str], Conversation]
    recognises: Callable[[set[str]], bool]
    needs: tuple[str, ...] = ()


def conversations(rows: Iterable[Row], preset: str, fields: dict[str, str]) -> Iterator[Conversation]:
    """Rows read by a preset, each checked.

    Args:
        preset: a name in `PRESETS`, `auto`, or `fields`.
        fields: for `fields`: role -> name of the field that plays it; roles are those of `ROLES`.

    Raises:
        UserError: unknown preset or role, unrecognised rows, a missing field, an empty prompt; names file and line.
    """
    rows = list(rows)
    if not rows:
        return
    shape = _choose(rows, preset, fields)
    for row in rows:
        yield _checked(_convert(shape, row))


def chat(turns: Iterable[str], system: str | None = None) -> tuple[Message, ...]:
    """Messages of a conversation in which every turn waits for an answer."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": None}]
    return tuple(messages)


def _choose(rows: list[Row], preset: str, fields: dict[str, str]) -> Preset:
    first = rows[0]
    if fields and preset in ("auto", "fields"):
        return _fields_preset(fields, first.where)
    if preset == "fields":
        raise UserError("prompts.fields is empty; say which field holds the prompt, e.g. --prompts.fields.prompt text.")
    if preset != "auto":
        if preset not in PRESETS:
            guess = nearest(preset, tuple(PRESETS))
            raise UserError(f"unknown prompts.preset {preset!r}; did you mean {guess}? Known: {', '.join(PRESETS)}.")
        return PRESETS[preset]
    keys = _keys(first)
    for shape in PRESETS.values():
        if shape.recognises(keys):
            return PRESETS["spec_bench"] if shape is PRESETS["mt_bench"] and _is_spec_bench(rows) else shape
    raise UserError(
        f"{first.where}: fields {_listed(keys)} fit no preset ({', '.join(PRESETS)}); "
        "say which hold the prompt with prompts.fields, e.g. prompt: <field>."
    )


def _keys(row: Row) -> set[str]:
    if isinstance(row.value, str):
        return {"text"}
    if isinstance(row.value, dict):
        return set(row.value)
    raise UserError(f"{row.where}: a row must be an object or a text, not {type(row.value).__name__}.")


def _convert(shape: Preset, row: Row) -> Conversation:
    keys = _keys(row)
    value = {"text": row.value} if isinstance(row.value, str) else row.value
    missing = [name for name in shape.needs if value.get(name) is None]
    if missing:
        raise UserError(f"{row.where}: field {_listed(missing)} is missing (found: {_listed(keys)}).")
    try:
        return shape.read(value, row.where)
    except (AttributeError, KeyError, TypeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(
            f"{row.where}: a field is of another type than this shape of row has there ({detail}); mend the row, or "
            "check prompts.preset and prompts.fields."
        ) from error


def _checked(conversation: Conversation) -> Conversation:
    said = conversation.said()
    if not said:
        raise UserError(f"{conversation.where}: no message of a user, so there is nothing to answer; remove the row.")
    if not all(isinstance(text, str) for text in said):
        raise UserError(f"{conversation.where}: the prompt is not text; check prompts.preset and prompts.fields.")
    if not all(text.strip() for text in said):
        raise UserError(f"{conversation.where}: the prompt is empty; remove the row.")
    return conversation


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, names))) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# The shapes


def _humaneval(row: dict[str, Any], where: str) -> Conversation:
    wish = f"Complete this Python function. Give the whole function.\n\n```python\n{row['prompt'].rstrip()}\n```"
    reference = {key: row[key] for key in ("canonical_solution", "test", "entry_point") if key in row}
    return Conversation(where, "humaneval", str(row["task_id"]), chat([wish]), plain=row["prompt"], reference=reference)


def _mbpp(row: dict[str, Any], where: str) -> Conversation:
    wish = row.get("text") or row.get("prompt")
    if wish is None:
        raise UserError(f"{where}: field text is missing (found: {_listed(row)}).")
    tests = "\n".join(row["test_list"])
    return Conversation(
        where,
        "mbpp",
        f"mbpp/{row['task_id']}",
        chat([f"{wish.strip()}\nThe code must pass these tests:\n\n{tests}"]),
        plain=f'"""\n{wish.strip()}\n{tests}\n"""\n',
        reference={"code": row.get("code"), "test_list": list(row["test_list"])},
    )


def _gsm8k(row: dict[str, Any], where: str) -> Conversation:
    number = row["answer"].rsplit("####", 1)[-1].strip()
    return Conversation(
        where, "gsm8k", None, chat([row["question"]]), plain=f"Question: {row['question']}\nAnswer:", reference=number
    )


def _mt_bench(row: dict[str, Any], where: str) -> Conversation:
    turns = _texts(row["turns"], where)
    task = f"mt_bench/{row.get('category', 'chat')}"
    return Conversation(where, task, f"mt_bench/{row['question_id']}", chat(turns), reference=row.get("reference"))


def _mt_redundant(row: dict[str, Any], where: str) -> Conversation:
    """MT-Bench's shape; the second turn asks for a variation of the first answer (CopySpec)."""
    turns = _texts(row["turns"], where)
    task = f"mt_redundant/{row.get('category', 'chat')}"
    return Conversation(where, task, f"mt_redundant/{row['question_id']}", chat(turns), reference=row.get("reference"))


_SELF_CORRECT = (
    "Write a Python function `solution()` that returns the answer to this problem.\n\n{question}",
    "Look through your function for mistakes. Say what must be changed, or that nothing must.",
    "Give the final function, whole. Keep the first one where it was right.",
)


def _gsm8k_self_correct(row: dict[str, Any], where: str) -> Conversation:
    """A problem of GSM8K in three turns: a program, a look at it, the program again."""
    number = row["answer"].rsplit("####", 1)[-1].strip()
    turns = [turn.format(question=row["question"].strip()) for turn in _SELF_CORRECT]
    return Conversation(where, "gsm8k_self_correct", None, chat(turns), reference=number)


def _extraction(row: dict[str, Any], where: str) -> Conversation:
    """Articles of CNN/DM's shape; the answer is sentences of the article itself."""
    wish = "Choose the two or three sentences of this article that say most of it, and repeat them word by word."
    name = f"extraction/{row['id']}" if row.get("id") else None
    return Conversation(
        where, "extraction", name, chat([f"{wish}\n\n{row['article'].strip()}"]), reference=row.get("highlights")
    )


SPEC_BENCH_TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")


def _is_spec_bench(rows: list[Row]) -> bool:
    """Whether rows of MT-Bench's shape name any of the other tasks of Spec-Bench."""
    return any(isinstance(row.value, dict) and row.value.get("category") in SPEC_BENCH_TASKS for row in rows)


def _spec_bench(row: dict[str, Any], where: str) -> Conversation:
    """Spec-Bench counts the eight categories of MT-Bench as one task."""
    turns = _texts(row["turns"], where)
    task = row["category"] if row["category"] in SPEC_BENCH_TASKS else "mt_bench"
    name = f"spec_bench/{row['question_id']}"
    return Conversation(where, f"spec_bench/{task}", name, chat(turns), reference=row.get("reference"))


def _alpaca(row: dict[str, Any], where: str) -> Conversation:
    extra = f"\nInput: {row['input']}" if row.get("input") else ""
    return Conversation(where, "alpaca", None, chat([row["instruction"] + extra]), reference=row.get("output"))


def _text(row: dict[str, Any], where: str) -> Conversation:
    text = row.get("text", row.get("prompt"))
    if text is None:
        raise UserError(f"{where}: field text is missing (found: {_listed(row)}).")
    return Conversation(where, str(row.get("task") or "text"), messages=chat([text]))


_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_ROLES_OF_MESSAGES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}


def _messages(row: dict[str, Any], where: str) -> Conversation:
    """Chat logs: `messages` of role and content, or `conversations` of from and value."""
    raw = _decoded(row["messages"] if row.get("messages") is not None else row.get("conversations"), where)
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: messages must be a list of messages (found fields: {_listed(row)}).")
    messages = [_message(entry, where) for entry in raw]
    if row.get("system") and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": str(row["system"])})
    if messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    if not asked(messages):
        raise UserError(f"{where}: no message of a user, so there is nothing to answer; remove the row.")
    tools = _decoded(row.get("tools"), where)
    name = next((str(row[key]) for key in ("conversation_id", "prompt_id", "id") if row.get(key)), None)
    task = str(row.get("task") or row.get("category") or "chat")
    return Conversation(where, task, name, tuple(messages), tools=tuple(tools) if tools else None)


def _message(entry: Any, where: str) -> Message:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: a message must be an object with role and content, not {type(entry).__name__}.")
    role = entry.get("role", entry.get("from"))
    role = _SHAREGPT_ROLES.get(role, role)
    if role not in _ROLES_OF_MESSAGES:
        raise UserError(f"{where}: unknown role {role!r} in messages; known: {_listed(_ROLES_OF_MESSAGES)}.")
    kept = {key: value for key, value in entry.items() if key not in ("role", "from", "value") and value is not None}
    kept |= {"role": role, "content": _content(entry.get("content", entry.get("value")), where)}
    calls = _decoded(kept.pop("tool_calls", None), where)
    if calls:  # templates ask whether the key is there, so an empty list must not stay
        kept["tool_calls"] = [_tool_call(call) for call in calls]
    return kept


def _content(content: Any, where: str) -> str | None:
    """Text of a message; a list of text parts is joined."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(part["text"] for part in content)
    raise UserError(f"{where}: a message holds something that is not text; remove the row.")


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an object: logs keep them as JSON text, templates write them as JSON themselves."""
    function = call.get("function", call)
    if not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except json.JSONDecodeError:
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def _decoded(value: Any, where: str) -> Any:
    """Lists that a Parquet file or a log keeps as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: a list (messages, turns or tools) is kept as text that is not JSON ({error.msg})."
        ) from None


def _texts(turns: Any, where: str) -> list[str]:
    turns = _decoded(turns, where)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{where}: turns must be a list of texts.")
    return turns


PRESETS: dict[str, Preset] = {
    "humaneval": Preset(_humaneval, lambda keys: {"prompt", "entry_point"} <= keys, ("task_id", "prompt")),
    "mbpp": Preset(_mbpp, lambda keys: {"test_list", "task_id"} <= keys, ("test_list", "task_id")),
    "messages": Preset(_messages, lambda keys: bool({"messages", "conversations"} & keys)),
    "spec_bench": Preset(_spec_bench, lambda keys: False, ("turns", "question_id", "category")),
    "mt_redundant": Preset(_mt_redundant, lambda keys: False, ("turns", "question_id")),
    "gsm8k_self_correct": Preset(_gsm8k_self_correct, lambda keys: False, ("question", "answer")),
    "extraction": Preset(_extraction, lambda keys: {"article", "highlights"} <= keys, ("article",)),
    "mt_bench": Preset(_mt_bench, lambda keys: {"turns", "question_id"} <= keys, ("turns", "question_id")),
    "gsm8k": Preset(_gsm8k, lambda keys: {"question", "answer"} <= keys, ("question", "answer")),
    "alpaca": Preset(_alpaca, lambda keys: {"instruction", "output"} <= keys, ("instruction",)),
    "text": Preset(_text, lambda keys: bool({"text", "prompt"} & keys)),
}

# ---------------------------------------------------------------------------------------------------------------------
# Declared fields

ROLES = ("prompt", "turns", "messages", "text", "answer", "system", "tools", "task", "id", "reference")
"""prompt: a user's message; turns: a list of them; messages: a chat; text: to be continued without a chat template;
answer: what the target answered (for responses.source: logged); reference: a right answer, kept for scorers."""

_SOURCES = ("prompt", "turns", "messages", "text")


def _fields_preset(fields: dict[str, str], where: str) -> Preset:
    for role in fields:
        if role not in ROLES:
            raise UserError(f"unknown key {role!r} in prompts.fields; did you mean {nearest(role, ROLES)}?")
    given = [role for role in _SOURCES if role in fields]
    if len(given) != 1:
        raise UserError(f"prompts.fields must name exactly one of {', '.join(_SOURCES)}; it names {_listed(given)}.")
    needs = tuple(fields[role] for role in (given[0], "answer") if role in fields)
    return Preset(lambda row, where: _by_fields(row, fields, given[0], where), lambda keys: True, needs)


def _by_fields(row: dict[str, Any], fields: dict[str, str], source: str, where: str) -> Conversation:
    values = {role: row.get(name) for role, name in fields.items()}
    task = str(values.get("task") or ("chat" if source == "messages" else "text"))
    name = None if values.get("id") is None else str(values["id"])
    if source == "text":
        return Conversation(
            where, task, name, text=values["text"], recorded=values.get("answer"), reference=values.get("reference")
        )
    shaped = {"messages": _fields_messages(values, source, where)}
    shaped |= {"system": values.get("system"), "tools": values.get("tools"), "task": task, "id": name}
    read = _messages(shaped, where)
    return Conversation(where, task, name, read.messages, tools=read.tools, reference=values.get("reference"))


def _fields_messages(values: dict[str, Any], source: str, where: str) -> list[Message]:
    if source == "messages":
        return _decoded(values["messages"], where)
    turns = [values["prompt"]] if source == "prompt" else _texts(values["turns"], where)
    answers = values.get("answer")
    answers = answers if isinstance(answers, list) else [answers]
    if len(answers) != len(turns) and answers != [None]:
        raise UserError(f"{where}: {len(turns)} turn(s) but {len(answers)} recorded answer(s).")
    messages = list(chat(turns))
    for at, answer in zip(asked(messages), answers, strict=False):
        messages[at]["content"] = answer
    return messages
