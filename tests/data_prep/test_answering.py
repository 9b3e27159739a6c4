"""Answers: one row a turn, the same whatever the batch, each turn given the target's own earlier answers."""

import json
from pathlib import Path

import pytest

from data_prep.answering import Limits, generated, in_order, logged, require_recorded
from data_prep.prompts import prompts_of
from drafttrain.config import PromptsConfig
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.dialogue import answer_text
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from drafttrain.records import SCHEMAS
from tests.conftest import build_tokenizer

TOKENIZER = build_tokenizer()
ENDS = frozenset({5})  # <|end|>


def records(folder: Path, rows, **options):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PromptsConfig(source="file", path=str(path), near_duplicate=1.0, **options)
    return prompts_of(settings, TOKENIZER, 512).records


def chats(number):
    return [{"question_id": at, "turns": ["apple " * at + "?", f"again {at}"][: 1 + at % 2]} for at in range(1, number)]


def decode_with(target, sampling=None):
    decoder = Decoder(Engine(target), None, sampling or Sampling(), ENDS, seed=7)

    def decode(batch):
        return decoder.generate(
            [each.ids for each in batch], [each.room for each in batch], [each.sample_id for each in batch]
        )

    return decode


def answer(prompts, target, sampling=None, context=512, max_new_tokens=12, batch_size=4):
    limits = Limits(context, max_new_tokens, batch_size)
    return in_order(generated(prompts, TOKENIZER, decode_with(target, sampling), limits))


def test_rows_have_the_schema_and_the_order_of_prompts_and_turns(tmp_path, tiny_target):
    prompts = records(tmp_path, chats(9))
    rows = answer(prompts, tiny_target)
    expected = [(each["prompt_id"], turn) for each in prompts for turn in range(1 + int(each["prompt_id"][-1]) % 2)]
    assert [(row["prompt_id"], row["turn"]) for row in rows] == expected
    assert all(set(row) == set(SCHEMAS["responses"].names) for row in rows)


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0), Sampling(0.8, top_k=20, top_p=0.9)])
def test_rows_do_not_depend_on_the_batch(tmp_path, tiny_target, sampling):
    prompts = records(tmp_path, chats(9))
    alone = answer(prompts, tiny_target, sampling, batch_size=1)
    assert answer(prompts, tiny_target, sampling, batch_size=5) == alone
    apart = [row for each in prompts for row in answer([each], tiny_target, sampling)]
    assert apart == alone


def test_a_later_turn_reads_the_answer_that_the_target_gave(tmp_path, tiny_target):
    rows = answer(records(tmp_path, [{"messages": _talk("one", "RECORDED", "two")}]), tiny_target)
    assert [row["turn"] for row in rows] == [0, 1]
    later = TOKENIZER.decode(rows[1]["prompt_ids"])
    assert "RECORDED" not in later
    assert f"<|assistant|>{rows[0]['text']}<|end|><|user|>two" in later


def test_an_answer_ends_with_eos_or_at_its_limit(tmp_path, tiny_target):
    rows = answer(records(tmp_path, chats(30)), tiny_target, max_new_tokens=20)
    assert {row["finish_reason"] for row in rows} == {"eos", "length"}
    for row in rows:
        ids = row["response_ids"]
        assert (ids[-1] in ENDS) == (row["finish_reason"] == "eos")
        assert len(ids) == 20 or row["finish_reason"] == "eos"
        assert not ENDS & set(ids[:-1]) and row["text"] == answer_text(TOKENIZER, ids)


def test_what_does_not_fit_the_context_ends_the_conversation(tmp_path, tiny_target):
    prompts = records(tmp_path, [{"question_id": 1, "turns": ["a", "b " * 30, "c"]}])
    first = len(prompts[0]["prompt_ids"])
    rows = answer(prompts, tiny_target, Sampling(0.0), context=first + 3, max_new_tokens=12)
    assert [row["turn"] for row in rows] == [0]
    assert len(rows[0]["response_ids"]) <= 3


def _talk(first, reply, second):
    return [
        {"role": "user", "content": first},
        {"role": "assistant", "content": reply},
        {"role": "user", "content": second},
    ]


def test_recorded_answers_are_kept_turn_by_turn(tmp_path):
    messages = [*_talk("one", "first", "two"), {"role": "assistant", "content": "second"}]
    prompts = records(tmp_path, [{"messages": messages}])
    rows = in_order(logged(prompts, TOKENIZER, ENDS, Limits(512, 99, 1)))
    assert [(row["turn"], row["text"], row["finish_reason"]) for row in rows] == [
        (0, "first", "eos"),
        (1, "second", "eos"),
    ]
    assert TOKENIZER.decode(rows[1]["prompt_ids"]).endswith("first<|end|><|user|>two<|end|><|assistant|>")


def test_a_recorded_answer_longer_than_allowed_is_cut_and_says_so(tmp_path):
    prompts = records(tmp_path, [{"t": "once", "a": " upon a time"}], fields={"text": "t", "answer": "a"})
    whole = in_order(logged(prompts, TOKENIZER, ENDS, Limits(512, 99, 1)))[0]
    cut = in_order(logged(prompts, TOKENIZER, ENDS, Limits(512, 2, 1)))[0]
    assert (whole["text"], whole["finish_reason"]) == (" upon a time", "eos")
    assert (cut["response_ids"], cut["finish_reason"]) == (whole["response_ids"][:2], "length")


def test_a_log_without_answers_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no prompt has a recorded answer"):
        require_recorded(records(tmp_path, [{"prompt": "one"}]))
