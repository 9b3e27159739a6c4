"""Prompts: splits never share a conversation, nothing near-duplicate survives, mistakes name file and line."""

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.prompts import ensure_prompts, prompts_of
from drafttrain.config import PromptsConfig
from drafttrain.errors import UserError
from drafttrain.records import iter_records
from drafttrain.run_folder import RunFolder
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()
CONTEXT = 100_000


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(path, context=CONTEXT, tokenizer=TOKENIZER, **options):
    return prompts_of(PromptsConfig(source="file", path=path, **options), tokenizer, context)


def questions(number):
    return [{"prompt": f"Question {at}: what is {at * 7919 % 1013} plus {at}?"} for at in range(number)]


def test_split_shares_and_stability_when_a_file_grows(tmp_path):
    small = make(write(tmp_path / "a.jsonl", questions(400)), near_duplicate=1.0)
    large = make(write(tmp_path / "b.jsonl", questions(600)), near_duplicate=1.0)
    counts = small.counts()
    assert 20 <= counts["test"] <= 60 and 20 <= counts["tune"] <= 60
    before = {record["prompt_id"]: record["split"] for record in small.records}
    after = {record["prompt_id"]: record["split"] for record in large.records}
    assert all(after[name] == split for name, split in before.items())


def test_records_of_one_conversation_stand_on_one_side(tmp_path):
    def log(start, turns):
        texts = [f"{start} opening of a talk"] + [f"{start} follow-up number {turn} about it" for turn in range(turns)]
        messages = []
        for text in texts:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
        return {"messages": messages[:-1]}

    rows = [log(start, turns) for start in range(60) for turns in (0, 2, 5)]
    made = make(write(tmp_path / "a.jsonl", rows), near_duplicate=1.0, held_out=0.2)
    sides = {}
    for record in made.records:
        sides.setdefault(json.loads(record["messages"])[0]["content"], set()).add(record["split"])
    assert len(made.records) == 180 and all(len(side) == 1 for side in sides.values())


def test_near_duplicates_go_before_the_split_and_shared_system_prompts_do_not_count(tmp_path):
    system = " ".join(f"rule{number}" for number in range(300))
    rows = [
        {"messages": [{"role": "system", "content": system}, {"role": "user", "content": f"topic {at} " * 3}]}
        for at in range(20)
    ]
    made = make(write(tmp_path / "a.jsonl", rows + rows[:5]))
    assert len(made.records) == 20
    assert made.notes == ["left out: 5 near-duplicates (Jaccard >= 0.8)"]


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_few_conversations_still_give_every_split_one(tmp_path, number):
    counts = make(write(tmp_path / "a.jsonl", questions(number)), near_duplicate=1.0).counts()
    expected = {"tune", "test", "train"} if number >= 3 else {"train"}
    assert set(counts) == expected


def test_a_limit_takes_a_sample_and_says_the_same_each_time(tmp_path):
    path = write(tmp_path / "a.jsonl", questions(100))
    one, two = make(path, limit=30), make(path, limit=30)
    assert len(one.records) == 30 and one == two
    assert {record["prompt_id"] for record in one.records} != {
        record["prompt_id"] for record in make(path).records[:30]
    }


def test_a_chat_goes_through_the_template_and_raw_text_does_not(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "apple"}])
    chat = make(path, system="Be brief.").records[0]
    raw = make(path, fields={"text": "prompt"}).records[0]
    assert TOKENIZER.decode(chat["prompt_ids"]) == (
        "<|bos|><|system|>Be brief.<|end|><|user|>apple<|end|><|assistant|>"
    )
    assert TOKENIZER.decode(raw["prompt_ids"]) == "<|bos|>apple"
    assert (chat["text"], raw["messages"], raw["text"]) == (None, None, "apple")


def test_a_base_model_reads_the_plain_form_of_a_preset(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    row = {"task_id": "HumanEval/0", "prompt": "def add(a, b):\n", "entry_point": "add"}
    record = make(write(tmp_path / "a.jsonl", [row]), tokenizer=tokenizer).records[0]
    assert (record["text"], record["messages"]) == ("def add(a, b):\n", None)


def test_names_repeated_in_a_file_are_told_apart(tmp_path):
    rows = [{"q": f"question about {word}", "id": "same"} for word in ("apples", "pears")]
    made = make(write(tmp_path / "a.jsonl", rows), fields={"prompt": "q", "id": "id"})
    names = {record["prompt_id"] for record in made.records}
    assert len(names) == 2 and all(name.startswith("same#") for name in names)


def test_a_prompt_that_fills_the_context_is_told_and_left_out_on_request(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "short"}, {"prompt": "long " * 50}])
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: the prompt has \d+ tokens .*--prompts.max_tokens 63"):
        make(path, context=64)
    made = make(path, context=64, max_tokens=63)
    assert len(made.records) == 1
    assert "1 prompts of more than 63 tokens" in made.notes[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"near_duplicate": 0.0}, "near_duplicate"),
        ({"max_tokens": 1}, "no prompts are left"),
    ],
)
def test_impossible_settings_are_told(tmp_path, options, told):
    with pytest.raises(UserError, match=told):
        make(write(tmp_path / "a.jsonl", questions(3)), **options)


def test_a_source_without_a_path_is_told():
    for source in ("file", "hub"):
        with pytest.raises(UserError, match=r"prompts.path is not set"):
            prompts_of(PromptsConfig(source=source), TOKENIZER, CONTEXT)


def test_a_path_is_meant_though_the_source_is_left_at_its_default(tmp_path):
    path = write(tmp_path / "a.jsonl", questions(4))
    assert prompts_of(PromptsConfig(path=path), TOKENIZER, CONTEXT) == make(path)


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def test_prompts_are_written_once_and_other_settings_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", questions(40))
    asked = PromptsConfig(source="file", path=path, near_duplicate=1.0)
    run = RunFolder(tmp_path / "run")
    assert ensure_prompts(asked, TOKENIZER, CONTEXT, run) == 40
    before = {file.name: file.stat().st_mtime_ns for file in run.prompts.iterdir()}
    assert ensure_prompts(asked, TOKENIZER, CONTEXT, run) == 40
    assert {file.name: file.stat().st_mtime_ns for file in run.prompts.iterdir()} == before
    with pytest.raises(UserError, match=r"settings.held_out was 0.1 and is now 0.2"):
        ensure_prompts(dataclasses.replace(asked, held_out=0.2), TOKENIZER, CONTEXT, run)


def test_a_moved_file_is_the_same_file_and_a_changed_one_is_not(tmp_path):
    run = RunFolder(tmp_path / "run")
    rows = questions(5)
    asked = PromptsConfig(source="file", path=write(tmp_path / "a.jsonl", rows), near_duplicate=1.0)
    ensure_prompts(asked, TOKENIZER, CONTEXT, run)
    moved = dataclasses.replace(asked, path=write(tmp_path / "b.jsonl", rows))
    assert ensure_prompts(moved, TOKENIZER, CONTEXT, run) == 5
    write(tmp_path / "b.jsonl", rows[:4])
    with pytest.raises(UserError, match=r"settings\.file"):
        ensure_prompts(moved, TOKENIZER, CONTEXT, run)


def test_written_records_are_those_made(tmp_path):
    asked = PromptsConfig(source="file", path=write(tmp_path / "a.jsonl", questions(9)))
    run = RunFolder(tmp_path / "run")
    ensure_prompts(asked, TOKENIZER, CONTEXT, run)
    assert list(iter_records(run.prompts, "prompts")) == prompts_of(asked, TOKENIZER, CONTEXT).records


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 60), st.floats(0.05, 0.5), st.integers(0, 5))
def test_every_prompt_has_one_split_and_one_name(tmp_path_factory, number, held_out, seed):
    path = write(tmp_path_factory.mktemp("prompts") / "a.jsonl", questions(number))
    made = make(path, near_duplicate=1.0, held_out=held_out, seed=seed)
    names = Counter(record["prompt_id"] for record in made.records)
    assert len(made.records) == number and max(names.values()) == 1
    assert {record["split"] for record in made.records} <= {"train", "tune", "test"}
