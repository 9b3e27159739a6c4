"""Conversations are rendered as a server renders them, turn by turn, and recorded answers are found again."""

import json

import pytest
from transformers import GenerationConfig

from drafttrain.dialogue import Dialogue, answer_text, encode, encode_raw, end_tokens, render
from drafttrain.errors import UserError
from tests.conftest import build_tokenizer

CALL = {"type": "function", "function": {"name": "now", "arguments": {}}}
ENDS = frozenset({5})  # <|end|>
TOOLS = [{"type": "function", "function": {"name": "now"}}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def record(messages, tokenizer, tools=None, **more):
    first = next(at for at, message in enumerate(messages) if message["role"] == "assistant" and at)
    ids = encode(tokenizer, render(tokenizer, messages[:first], tools, "here"))
    fields = {"text": None, "recorded": None, "tools": json.dumps(tools) if tools else None}
    return {"prompt_id": "p", "messages": json.dumps(messages), "prompt_ids": ids, **fields, **more}


def test_a_later_turn_reads_the_answers_given_not_the_recorded_ones(tiny_tokenizer):
    dialogue = Dialogue.from_record(
        record([user("one"), assistant("OLD"), user("two"), assistant(None)], tiny_tokenizer)
    )
    assert dialogue.turns == 2
    ids = dialogue.context(tiny_tokenizer, ["NEW"])
    assert (
        tiny_tokenizer.decode(ids) == "<|bos|><|user|>one<|end|><|assistant|>NEW<|end|><|user|>two<|end|><|assistant|>"
    )


def test_the_first_turn_reads_exactly_the_recorded_tokens(tiny_tokenizer):
    odd = {"messages": None, "text": "ab", "prompt_ids": [0, 70, 71], "tools": None, "recorded": None, "prompt_id": "p"}
    dialogue = Dialogue.from_record(odd)
    assert (dialogue.turns, dialogue.context(tiny_tokenizer, [])) == (1, [0, 70, 71])
    assert dialogue.recorded(tiny_tokenizer, 0, ENDS) is None


def test_a_recorded_answer_is_found_behind_its_context_and_ends_with_eos(tiny_tokenizer):
    messages = [user("one"), assistant("first"), user("two"), assistant("second")]
    dialogue = Dialogue.from_record(record(messages, tiny_tokenizer))
    context, answer = dialogue.recorded(tiny_tokenizer, 1, ENDS)
    assert tiny_tokenizer.decode(answer) == "second<|end|>"
    assert tiny_tokenizer.decode(context).endswith("first<|end|><|user|>two<|end|><|assistant|>")
    assert answer_text(tiny_tokenizer, answer) == "second"


def test_an_answer_ends_at_eos_though_the_template_writes_more_after_it():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>'", "<|end|>' + '\\n'")
    _, answer = Dialogue.from_record(record([user("one"), assistant("first")], tokenizer)).recorded(tokenizer, 0, ENDS)
    assert tokenizer.decode(answer) == "first<|end|>"


def test_a_template_that_rewrites_answers_is_refused_for_recorded_ones_only():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>think' }}")
    dialogue = Dialogue.from_record(record([user("one"), assistant("first"), user("two")], tokenizer))
    with pytest.raises(UserError, match=r"^p: .*responses.source: generate"):
        dialogue.recorded(tokenizer, 0, ENDS)


def test_a_greeting_is_no_answer(tiny_tokenizer):
    messages = [assistant("Hello!"), user("one"), assistant(None)]
    fields = {"text": None, "recorded": None, "tools": None}
    ids = encode(tiny_tokenizer, render(tiny_tokenizer, messages[:2], None, "here"))
    dialogue = Dialogue.from_record({"prompt_id": "p", "messages": json.dumps(messages), "prompt_ids": ids, **fields})
    assert dialogue.turns == 1
    assert "Hello!" in tiny_tokenizer.decode(dialogue.context(tiny_tokenizer, []))


def test_a_recorded_tool_call_stays_since_its_result_answers_it():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role if m.role != 'tool' else 'user' }}|>"
        "{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [user("time?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "12"}, assistant(None)]
    dialogue = Dialogue.from_record(record(messages, tokenizer, TOOLS))
    assert dialogue.turns == 2
    later = tokenizer.decode(dialogue.context(tokenizer, ["something else"]))
    assert "now<|end|>" in later and "something else" not in later
    assert tokenizer.decode(dialogue.recorded(tokenizer, 0, ENDS)[1]) == "now<|end|>"


def test_a_base_model_reads_contents_with_blank_lines_between():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    assert render(tokenizer, [user("one")], None, "here") == "one"
    assert render(tokenizer, [user("one"), assistant("two"), user("three")], None, "here") == "one\n\ntwo\n\nthree\n\n"
    with pytest.raises(UserError, match="here: has tools"):
        render(tokenizer, [user("one")], TOOLS, "here")


def test_a_template_that_writes_the_date_writes_the_same_every_day():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% set day = strftime_now('%d %b %Y') %}{{ day }}, {{ strftime_now(\"%Y\") }}"
    assert render(tokenizer, [user("one")], None, "here") == "26 Jul 2024, 2024"


def test_raw_text_is_led_by_bos_once(tiny_tokenizer):
    assert encode_raw(tiny_tokenizer, "ab")[0] == tiny_tokenizer.bos_token_id
    assert encode_raw(tiny_tokenizer, "<|bos|>ab").count(tiny_tokenizer.bos_token_id) == 1


def test_what_a_template_refuses_is_told_with_the_place():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"^f.jsonl, line 3: .*roles must alternate"):
        render(tokenizer, [user("one")], None, "f.jsonl, line 3")


@pytest.mark.parametrize(("more", "expected"), [(None, {5}), (7, {5, 7}), ([5, 7, 9], {5, 7, 9})])
def test_ends_are_those_of_tokenizer_and_generation_config(tiny_tokenizer, more, expected):
    assert end_tokens(tiny_tokenizer, GenerationConfig(eos_token_id=more)) == expected
