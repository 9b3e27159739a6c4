"""Long prompts with known answers: the reference world at any length, and files in the shapes of RULER and LongBench.

prompts = world_prompts(tokenizer, {"recall/multi_key/prose": 20}, length=4096, answer_prefix=True)
prompts = read_prompts("niah.jsonl", tokenizer)
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from drafttrain.dialogue import encode, render
from drafttrain.errors import UserError
from drafttrain.evaluation.tasks import HELD_OUT, KINDS, generate


@dataclass(frozen=True)
class LongPrompt:
    """One question about a long text.

    Attributes:
        prompt_id: names it.
        task: kind of the reference world, or what a file calls its task.
        length: tokens asked for; the prompt has about as many.
        ids: the prompt's tokens; an answer prefix is their end.
        prefix: the answer prefix, "" for none.
        question: what is asked at the end of the text, "" where that cannot be told from the text.
        references: right answers; of those with ``metric`` "all" every one is wanted.
        metric: a name in `METRICS`.
        limit: most new tokens.
    """

    prompt_id: str
    task: str
    length: int
    ids: tuple[int, ...]
    prefix: str
    question: str
    references: tuple[str, ...]
    metric: str
    limit: int

    def score(self, text: str) -> float:
        """In [0, 1]."""
        return METRICS[self.metric](text, self.references)

    def exact(self, text: str) -> bool:
        """Whether the answer is a reference, spaces around it aside; over-generation is not free here."""
        return any(text.strip() == each.strip() for each in self.references)


# ---- metrics ----


def share_found(text: str, references: Sequence[str]) -> float:
    """RULER: share of the references that occur in the text, upper and lower case alike."""
    return sum(each.lower() in text.lower() for each in references) / len(references)


def any_found(text: str, references: Sequence[str]) -> float:
    """RULER's question answering: whether any reference occurs in the text."""
    return float(any(each.lower() in text.lower() for each in references))


def best_f1(text: str, references: Sequence[str]) -> float:
    """LongBench's question answering: F1 of words, articles and punctuation aside, over the best reference."""
    return max(_f1(_words(text), _words(each)) for each in references)


def best_rouge(text: str, references: Sequence[str]) -> float:
    """LongBench's summaries: F1 of the longest common subsequence of words."""
    return max(_rouge(text.split(), each.split()) for each in references)


def first_line_similarity(text: str, references: Sequence[str]) -> float:
    """LongBench's code: similarity of the first line that is code to the reference."""
    lines = [line for line in text.lstrip("\n").split("\n") if not re.match(r"\s*(```|#|//|$)", line)]
    return max(SequenceMatcher(None, lines[0] if lines else "", each).ratio() for each in references)


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(one: Sequence[str], other: Sequence[str]) -> float:
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other)) if common else 0.0


def _rouge(one: Sequence[str], other: Sequence[str]) -> float:
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for at, against in enumerate(other, 1):
            diagonal, row[at] = row[at], diagonal + 1 if word == against else max(row[at], row[at - 1])
    return 2 * row[-1] / (len(one) + len(other)) if row[-1] else 0.0


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": lambda text, references: float(any(text.strip() == each.strip() for each in references)),
    "all": share_found,
    "any": any_found,
    "f1": best_f1,
    "rouge": best_rouge,
    "code": first_line_similarity,
}


# ---- the reference world ----


def world_prompts(
    tokenizer: Any,
    mixture: Mapping[str, int],
    length: int,
    answer_prefix: bool = False,
    first_seed: int = HELD_OUT,
    limit: int = 128,
    questions: int = 1,
) -> Iterator[LongPrompt]:
    """Questions of the reference world.

    Args:
        tokenizer: of the model that will read them.
        mixture: documents by kind (`drafttrain.evaluation.tasks.KINDS`).
        length: tokens of document, question and answer together.
        answer_prefix: give the answer up to its first value, as RULER does; else the model must find the way there.
        first_seed: of the first prompt of each kind.
        limit: most new tokens of an answer.
        questions: prompts of each document, which differ in their question alone.

    Raises:
        UserError: an unknown kind.
    """

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for kind, number in mixture.items():
        if kind not in KINDS:
            raise UserError(f"there is no task kind {kind}; the kinds are {', '.join(KINDS)}")
        for seed in range(first_seed, first_seed + number):
            example = generate(kind, seed, length, count, questions)
            document = example.turns[0].user.removesuffix(_question(example.turns[0].user))
            for at, turn in enumerate(example.turns):
                name = f"{kind}/{length}/{seed}/{at}"
                prefix, rest = split_prefix(turn.answer) if answer_prefix else ("", turn.answer)
                ids = _chat(tokenizer, document + _question(turn.user), prefix, name)
                question = _question(turn.user)
                yield LongPrompt(name, kind, length, ids, prefix, question, (rest,), "exact", limit)


def _question(user: str) -> str:
    """The last paragraph of a user's turn; the first turn has the document before it."""
    return user.rsplit("\n\n", 1)[-1]


def split_prefix(answer: str) -> tuple[str, str]:
    """An answer's lead ("The code for amber-fox is", "lamp =") and what follows; no lead where it has none."""
    found = re.match(r".*?(?: is| are| in| =)(?= )", answer)
    return (answer[: found.end()], answer[found.end() :]) if found else ("", answer)


def _chat(tokenizer: Any, user: str, prefix: str, where: str) -> tuple[int, ...]:
    """The prompt's tokens, the answer prefix behind the assistant's header."""
    message = [{"role": "user", "content": user}]
    ids = encode(tokenizer, render(tokenizer, message, None, where))
    return (*ids, *tokenizer(prefix, add_special_tokens=False)["input_ids"]) if prefix else tuple(ids)


# ---- files ----


_LONGBENCH = {
    "rouge": ("gov_report", "qmsum", "multi_news", "vcsum", "samsum"),
    "any": ("trec", "lsht", "passage_retrieval_en", "passage_count"),
    "code": ("lcc", "repobench-p"),
}
"""Metric by data set; all others are questions, scored by F1."""


def read_prompts(
    path: str | Path, tokenizer: Any, answer_prefix: bool = True, limit: int = 128, most: int | None = None
) -> list[LongPrompt]:
    """Prompts of a JSONL file in the shape of RULER (input, outputs) or LongBench (context, input, answers).

    Args:
        path: of the file.
        tokenizer: of the model that will read them.
        answer_prefix: append RULER's answer_prefix where a line has one.
        limit: most new tokens of an answer, where a line does not say it.
        most: lines to take; None takes all.

    Raises:
        UserError: no such file, or a line that fits neither shape.
    """
    path = check_file(path)
    found = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if most is not None and len(found) == most:
                    break
                if line.strip():
                    found.append(_read(line, f"{path}, line {number}", tokenizer, answer_prefix, limit))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason}); give a JSONL file.") from None
    return found


def check_file(path: str | Path) -> Path:
    """The path, if there is a file.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; give a JSONL file in the shape of RULER or LongBench.")
    return path


def _read(line: str, where: str, tokenizer: Any, answer_prefix: bool, limit: int) -> LongPrompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); repair or remove it.") from None
    if not isinstance(record, dict):
        raise UserError(f"{where} holds no object; a line is one JSON object.")
    outputs = record.get("outputs", record.get("answers"))
    if isinstance(outputs, str):
        outputs = [outputs]
    if not isinstance(record.get("input"), str) or not outputs or not isinstance(outputs, list):
        raise UserError(f"{where} has no input with outputs (RULER) or context with answers (LongBench).")
    ruler = "outputs" in record
    prefix = str(record.get("answer_prefix", "")) if ruler and answer_prefix else ""
    if ruler:
        task = str(record.get("task", "ruler"))
        metric, text = "any" if task.startswith("qa") else "all", record["input"]
    else:
        task = str(record.get("dataset", "longbench"))
        metric = next((name for name, sets in _LONGBENCH.items() if task.removesuffix("_e") in sets), "f1")
        context = record.get("context") or ""
        if not isinstance(context, str):
            raise UserError(f"{where} has a context that is no text.")
        text = "\n\n".join(part for part in (context, record["input"]) if part)
    ids = _chat(tokenizer, text, prefix, where)
    name = str(record.get("_id", record.get("index", where)))
    tokens = record.get("tokens_to_generate", limit)
    if not isinstance(tokens, int) or tokens < 1:
        raise UserError(f"{where} wants tokens_to_generate of {tokens!r}; it must be a number, at least 1.")
    return LongPrompt(name, task, len(ids), ids, prefix, _last_line(text), tuple(map(str, outputs)), metric, tokens)


def _last_line(text: str) -> str:
    """The question of a file's prompt, where it stands on a line of its own."""
    before, _, last = text.strip().rpartition("\n")
    return last if before else ""
