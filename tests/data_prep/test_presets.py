"""Rows of known shapes become conversations; whatever is wrong with one names the row."""

import json

import pytest

from data_prep.presets import PRESETS, conversations
from data_prep.reading import Row
from drafttrain.errors import UserError

HUMANEVAL = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "", "canonical_solution": ""}
MBPP = {"text": "Write f.", "code": "def f(): 1", "task_id": 7, "test_list": ["assert f()", "assert not g()"]}
GSM8K = {"question": "How many?", "answer": "2 + 2 = 4\n#### 4"}
MT_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]}
SPEC_BENCH = {"question_id": 161, "category": "translation", "turns": ["Translate: Hallo"], "reference": ["Hello"]}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
SHAREGPT = {"id": "x1", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
ARTICLE = {"article": "Rain fell. It stopped.", "highlights": "Rain fell.", "id": "a1"}
CALL = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
LOG = {
    "conversation_id": "c7",
    "system": "Be brief.",
    "tools": json.dumps([{"type": "function", "function": {"name": "now"}}]),
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "time?"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "12:00", "tool_call_id": "1"},
        {"role": "assistant", "content": "Noon.", "tool_calls": []},
        {"role": "user", "content": "Thanks"},
    ],
}


def read(*values, preset="auto", fields=None):
    rows = [Row(value, f"f.jsonl, line {number}") for number, value in enumerate(values, start=1)]
    return list(conversations(rows, preset, fields or {}))


@pytest.mark.parametrize(
    ("row", "task", "name", "said"),
    [
        (HUMANEVAL, "humaneval", "HumanEval/0", ["def f():"]),
        (MBPP, "mbpp", "mbpp/7", ["Write f."]),
        (GSM8K, "gsm8k", None, ["How many?"]),
        (MT_BENCH, "mt_bench/writing", "mt_bench/81", ["Write.", "Rewrite."]),
        (SPEC_BENCH, "spec_bench/translation", "spec_bench/161", ["Translate: Hallo"]),
        (ALPACA, "alpaca", None, ["Add."]),
        (SHAREGPT, "chat", "x1", ["Hi"]),
        (LOG, "chat", "c7", ["What time?", "Thanks"]),
        (ARTICLE, "extraction", "extraction/a1", ["Rain fell. It stopped."]),
        ("Just a line", "text", None, ["Just a line"]),
        ({"prompt": "A prompt"}, "text", None, ["A prompt"]),
    ],
)
def test_auto_recognises_a_shape_by_its_fields(row, task, name, said):
    (conversation,) = read(row)
    assert (conversation.task, conversation.name) == (task, name)
    assert all(wanted in text for wanted, text in zip(said, conversation.said(), strict=True))


def test_sets_of_a_known_shape_with_another_meaning_are_named():
    (redundant,) = read(MT_BENCH, preset="mt_redundant")
    assert (redundant.task, redundant.name) == ("mt_redundant/writing", "mt_redundant/81")
    (corrected,) = read(GSM8K, preset="gsm8k_self_correct")
    assert corrected.task == "gsm8k_self_correct" and corrected.reference == "4"
    assert len(corrected.said()) == 3 and "How many?" in corrected.said()[0]


def test_mt_bench_inside_spec_bench_is_one_task():
    assert [each.task for each in read(MT_BENCH, SPEC_BENCH)] == ["spec_bench/mt_bench", "spec_bench/translation"]


def test_every_turn_of_plain_prompts_waits_for_an_answer():
    (conversation,) = read(MT_BENCH)
    assert [(message["role"], message["content"]) for message in conversation.messages] == [
        ("user", "Write."),
        ("assistant", None),
        ("user", "Rewrite."),
        ("assistant", None),
    ]


def test_right_answers_are_kept_for_scorers_and_never_shown_as_recorded_ones():
    (math,) = read(GSM8K)
    assert math.reference == "4"
    assert all(message["content"] is None for message in math.messages if message["role"] == "assistant")


def test_a_chat_log_keeps_system_tools_calls_and_answers():
    (log,) = read(LOG)
    assert [message["role"] for message in log.messages] == [
        "system", "user", "assistant", "tool", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert log.tools[0]["function"]["name"] == "now"
    assert log.messages[2]["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    assert log.messages[4] == {"role": "assistant", "content": "Noon."}, "templates ask whether tool_calls is there"
    assert log.messages[6]["content"] is None, "the last user message waits for an answer"


def test_declared_fields_of_a_prompt_and_its_recorded_answer():
    row = {"q": "Why?", "a": "Because.", "kind": "why", "uid": 5, "sys": "Think."}
    fields = {"prompt": "q", "answer": "a", "task": "kind", "id": "uid", "system": "sys"}
    (conversation,) = read(row, fields=fields)
    assert (conversation.task, conversation.name) == ("why", "5")
    assert [message["content"] for message in conversation.messages] == ["Think.", "Why?", "Because."]


def test_declared_turns_with_one_recorded_answer_each():
    (conversation,) = read({"q": ["a", "b"], "r": ["1", "2"]}, fields={"turns": "q", "answer": "r"})
    assert [message["content"] for message in conversation.messages] == ["a", "1", "b", "2"]


def test_declared_text_is_continued_without_a_chat_template():
    (conversation,) = read({"t": "Once upon", "c": " a time"}, fields={"text": "t", "answer": "c"})
    assert (conversation.text, conversation.recorded, conversation.messages) == ("Once upon", " a time", ())


@pytest.mark.parametrize(
    ("rows", "options", "told"),
    [
        ([GSM8K, {"question": "x"}], {}, r"line 2: field answer is missing \(found: question\)"),
        ([{"a": 1}], {}, "line 1: fields a fit no preset"),
        ([5], {}, "line 1: a row must be an object or a text, not int"),
        (["fine", "  "], {}, "line 2: the prompt is empty"),
        ([{"messages": []}], {}, "line 1: messages must be a list"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], {}, "line 1: unknown role 'robot'"),
        ([{"messages": [{"role": "system", "content": "x"}]}], {}, "line 1: no message of a user"),
        ([{"messages": [{"role": "user", "content": ""}]}], {}, "line 1: the prompt is empty"),
        ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}], {}, "line 1: .* not text"),
        ([{"messages": "[not json"}], {}, "line 1: .* not JSON"),
        ([MT_BENCH | {"turns": "x"}], {}, "line 1"),
        ([MT_BENCH | {"turns": [1]}], {}, "line 1: turns must be a list of texts"),
        ([GSM8K, {"question": "x", "answer": 42}], {}, "line 2: a field is of another type"),
        ([HUMANEVAL | {"prompt": ["def f():"]}], {}, "line 1: a field is of another type"),
        ([ALPACA | {"instruction": 5}], {}, "line 1: a field is of another type"),
        ([{"messages": [{"role": "user", "content": "x", "tool_calls": ["now"]}]}], {}, "line 1: a field is of"),
        ([GSM8K], {"preset": "gsm8"}, "did you mean gsm8k"),
        ([GSM8K], {"preset": "fields"}, "prompts.fields is empty"),
        ([GSM8K], {"fields": {"promt": "question"}}, "did you mean prompt"),
        ([GSM8K], {"fields": {"prompt": "question", "text": "answer"}}, "exactly one"),
        ([GSM8K], {"fields": {"prompt": "frage"}}, r"line 1: field frage is missing \(found: answer, question\)"),
        ([{"q": ["a", "b"], "r": ["1"]}], {"fields": {"turns": "q", "answer": "r"}}, r"2 turn\(s\) but 1"),
    ],
)
def test_a_bad_row_or_setting_is_told_in_one_sentence(rows, options, told):
    with pytest.raises(UserError, match=told) as error:
        read(*rows, **options)
    assert "\n" not in str(error.value)


def test_every_preset_reads_what_it_recognises():
    shapes = {
        "humaneval": HUMANEVAL, "mbpp": MBPP, "gsm8k": GSM8K, "mt_bench": MT_BENCH, "spec_bench": SPEC_BENCH,
        "alpaca": ALPACA, "messages": LOG, "text": "a line", "extraction": ARTICLE, "mt_redundant": MT_BENCH,
        "gsm8k_self_correct": GSM8K,
    }  # fmt: skip
    assert set(shapes) == set(PRESETS), "a preset without a test"
    for preset, row in shapes.items():
        assert read(row, preset=preset)[0].said()
