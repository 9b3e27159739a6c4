"""A prompt as a conversation that the target answers turn by turn: from a prompts record to token ids and back.

Every assistant message after the first user message is an answer asked for. Its content is None in plain prompts and
the recorded answer in chat logs. What a turn reads is rendered from text, as a server renders it: earlier answers
enter as decoded text and are tokenized again, in the target's own chat template.

    dialogue = Dialogue.from_record(record)
    answers = []
    for turn in range(dialogue.turns):
        ids = dialogue.context(tokenizer, answers)
        answers.append(answer_text(tokenizer, generate(ids)))
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drafttrain.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

Message = dict[str, Any]

TODAY = datetime.date(2024, 7, 26)
"""The date that chat templates write."""

_ASKS_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class Dialogue:
    """One conversation.

    Attributes:
        prompt_id: the record's.
        prompt_ids: what the first turn reads.
        messages: chat messages; empty for a raw continuation.
        tools: tool descriptions for the chat template, or None.
        recorded_text: the recorded answer of a raw continuation, or None.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    recorded_text: str | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Dialogue:
        """The conversation of a prompts record."""
        chat = json.loads(record["messages"]) if record["messages"] else []
        return cls(
            prompt_id=record["prompt_id"],
            prompt_ids=tuple(record["prompt_ids"]),
            messages=tuple(chat),
            tools=tuple(json.loads(record["tools"])) if record["tools"] else None,
            recorded_text=record["recorded"],
        )

    @property
    def turns(self) -> int:
        """Answers asked for, at least one."""
        return len(asked(self.messages)) if self.messages else 1

    @property
    def has_recorded(self) -> bool:
        """Whether any turn has a recorded answer."""
        return self.recorded_text is not None or any(map(self._is_recorded, asked(self.messages)))

    def _is_recorded(self, at: int) -> bool:
        message = self.messages[at]
        return message["content"] is not None or bool(message.get("tool_calls"))

    def context(self, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[int]:
        """What the target reads before turn `len(answers)`, given its own earlier answers.

        A recorded call of a tool stays in later contexts: the tool's recorded result answers that very call.

        Raises:
            UserError: the chat template refuses the messages.
        """
        if not answers:
            return list(self.prompt_ids)
        places = asked(self.messages)
        own = dict(zip(places, answers, strict=False))
        messages = [
            {"role": "assistant", "content": own[at]} if at in own and not message.get("tool_calls") else message
            for at, message in enumerate(self.messages[: places[len(answers)]])
        ]
        return encode(tokenizer, render(tokenizer, messages, self.tools, self.prompt_id))

    def recorded(
        self, tokenizer: PreTrainedTokenizerBase, turn: int, ends: Collection[int]
    ) -> tuple[list[int], list[int]] | None:
        """Context and recorded answer of a turn, with its end token; None where nothing is recorded.

        Args:
            ends: from `end_tokens`.

        Raises:
            UserError: the chat template refuses the messages, or renders an answer otherwise than it asks for one.
        """
        if not self.messages:
            if self.recorded_text is None:
                return None
            return list(self.prompt_ids), _ended(tokenizer, self.recorded_text)
        at = asked(self.messages)[turn]
        if not self._is_recorded(at):
            return None
        return self._recorded_chat(tokenizer, at, ends)

    def _recorded_chat(
        self, tokenizer: PreTrainedTokenizerBase, at: int, ends: Collection[int]
    ) -> tuple[list[int], list[int]]:
        before = render(tokenizer, self.messages[:at], self.tools, self.prompt_id)
        if tokenizer.chat_template is None:
            return encode(tokenizer, before), _ended(tokenizer, self.messages[at]["content"])
        after = render(tokenizer, self.messages[: at + 1], self.tools, self.prompt_id, ask=False)
        if not after.startswith(before):
            raise UserError(
                f"{self.prompt_id}: the target's chat template writes a recorded answer otherwise than it asks for "
                "one, so the answer's tokens cannot be found; use responses.source: generate."
            )
        ids = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
        return encode(tokenizer, before), _until_end(ids, ends)


def asked(messages: Sequence[Message]) -> list[int]:
    """Indices of the assistant messages that answer somebody; a greeting before the first user message does not."""
    roles = [message["role"] for message in messages]
    first = roles.index("user") if "user" in roles else 0
    return [at for at, role in enumerate(roles) if role == "assistant" and at > first]


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    where: str,
    ask: bool = True,
) -> str:
    """Messages as the text that the target reads.

    A tokenizer without a chat template belongs to a base model: it reads the contents, a blank line between them. A
    template that writes today's date is told a fixed one, so that a run resumed tomorrow renders the same.

    Args:
        ask: end with the opening of the assistant's turn.
        where: names the conversation in errors.

    Raises:
        UserError: the template refuses the messages, or there is none and the conversation has tools.
    """
    import jinja2

    if tokenizer.chat_template is None:
        if tools or any(message.get("tool_calls") for message in messages):
            raise UserError(f"{where}: has tools, but the target's tokenizer has no chat template to show them.")
        return "\n\n".join([message["content"] for message in messages] + [""] * (ask and len(messages) > 1))
    plain = [{**message, "content": message["content"] or ""} for message in messages]
    try:
        return tokenizer.apply_chat_template(
            plain,
            tools=list(tools) if tools else None,
            add_generation_prompt=ask,
            tokenize=False,
            chat_template=_dated(tokenizer.get_chat_template(tools=tools)),
        )
    except (jinja2.exceptions.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"{where}: the target's chat template refuses the messages ({error}).") from None


def _dated(template: str) -> str:
    """A template with the calls that ask for today's date answered: `strftime_now("%d %b %Y")` is "26 Jul 2024"."""
    return _ASKS_DATE.sub(lambda call: json.dumps(TODAY.strftime(call[2])), template)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a context: a chat template writes its own special tokens, other text gets the tokenizer's."""
    ids = tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token) else ids


def encode_raw(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text to be continued without a chat template, led by BOS where the model has one."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """An answer as a server returns it: decoded, special tokens left out."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's end of sequence and those of the generation config (ends of turns)."""
    more = None if generation_config is None else generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])]
    return frozenset(token for token in found if token is not None)


def _ended(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer with the end of sequence behind it, if the tokenizer has one."""
    end = tokenizer.eos_token_id
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], *([] if end is None else [end])]


def _until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """Tokens up to the first end token; what a template writes after it belongs to the next turn."""
    return next((ids[: at + 1] for at, token in enumerate(ids) if token in ends), ids)
