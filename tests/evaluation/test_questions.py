"""Every method is asked the same; answers are scored; the choice of prompts is stable; pieces are the answer's text."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.decoding.counts import Completion, Counts
from drafttrain.errors import UserError
from drafttrain.evaluation.examples import examples, pieces, sample_path
from drafttrain.evaluation.inputs import split, split_probe
from drafttrain.evaluation.questions import Limits, Question, choose, prompts_hash, questions_of, to_sample

LIMITS = Limits(8, 400, 2)


def record(name, task="chat", split="test", messages=None, ids=(0, 3, 4), reference=None):
    return {
        "prompt_id": name,
        "split": split,
        "task": task,
        "kind": "",
        "messages": None if messages is None else json.dumps(messages),
        "tools": None,
        "recorded": None,
        "text": None if messages else "raw",
        "reference": None if reference is None else json.dumps({"answers": reference}),
        "prompt_ids": list(ids),
    }


def turns(*said):
    found = []
    for text in said:
        found += [{"role": "user", "content": text}, {"role": "assistant", "content": None}]
    return found


def completion(ids, seconds=1.0):
    counts = Counts(tokens=len(ids), rounds=len(ids), target_forwards=len(ids), decode_seconds=seconds)
    return Completion(list(ids), "length", ["target"] * len(ids), counts)


def answering(tokenizer, text="pear"):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = []

    def answer(group):
        asked.append([question.prompt_id for question in group])
        return [completion(ids) for _ in group]

    return answer, asked


def test_later_turns_read_the_targets_own_answers(tiny_tokenizer):
    records = [
        record("a", messages=turns("one", "two", "three"), reference=["x", "y", "z"]),
        record("b", messages=turns("one")),
        record("c", messages=turns("one", "two")),
    ]
    answer, asked = answering(tiny_tokenizer)
    found = questions_of(records, tiny_tokenizer, LIMITS, answer)
    assert [(q.prompt_id, q.turn) for q in found] == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("c", 1)]
    assert asked == [["a", "c"], ["a"]]  # the last turn of a conversation is not answered beforehand
    context = tiny_tokenizer.decode(found[2].ids)
    assert context.count("pear") == 2 and context.endswith("<|user|>three<|end|><|assistant|>")
    assert [q.reference for q in found[:3]] == ["x", "y", "z"]
    assert len({q.sample_id for q in found}) == 6


def test_answers_are_cut_to_the_context_and_no_room_is_refused(tiny_tokenizer):
    answer, _ = answering(tiny_tokenizer)
    [question] = questions_of([record("a", ids=range(5))], tiny_tokenizer, Limits(8, 9, 1), answer)
    assert question.limit == 4
    with pytest.raises(UserError, match="prompt a has 9 tokens, which leaves no room"):
        questions_of([record("a", ids=range(9))], tiny_tokenizer, Limits(8, 9, 1), answer)


def test_a_reference_of_another_form_is_no_reference(tiny_tokenizer):
    answer, _ = answering(tiny_tokenizer)
    odd = {**record("a"), "reference": json.dumps("42")}
    assert questions_of([odd], tiny_tokenizer, LIMITS, answer)[0].reference is None


@given(st.permutations(range(12)), st.integers(1, 4))
def test_the_choice_does_not_depend_on_the_order_or_on_other_prompts(order, per_task):
    records = [record(f"p{i}", task="ab"[i % 2]) for i in range(12)]
    chosen = choose([records[i] for i in order], ("test",), per_task)
    assert chosen == choose(records, ("test",), per_task)
    assert [r["task"] for r in chosen].count("a") == per_task
    more = choose([*records, record("new", split="train")], ("test",), per_task)
    assert more == chosen


def test_a_probe_tunes_on_prompts_that_it_does_not_test():
    records = [record(f"p{i}", split=("train", "tune", "test")[i % 3]) for i in range(12)]
    tune, test = split_probe(records, 5)
    names = [{r["prompt_id"] for r in part} for part in (tune, test)]
    assert len(names[0]) == 4 and len(names[1]) == 5 and not names[0] & names[1]
    tune, test = split(records, 5)
    assert {r["split"] for r in tune} == {"tune"} and {r["split"] for r in test} == {"test"}


def test_samples_are_scored_and_timed_by_the_median(tiny_tokenizer):
    question = Question("a", "revise", 0, (0,), 8, "pear pear", 0)
    ids = tiny_tokenizer("pear pear", add_special_tokens=False)["input_ids"]
    repeats = [completion(ids, seconds) for seconds in (3.0, 1.0, 2.0)]
    sample = to_sample(question, repeats, "m", "greedy", tiny_tokenizer)
    assert sample.right is True and sample.score == 1.0
    assert sample.decode_seconds == 2.0 and sample.repeats == [3.0, 1.0, 2.0]
    wrong = to_sample(question, [completion(ids[:1])], "m", "greedy", tiny_tokenizer)
    assert wrong.right is False and wrong.score < 1


def test_the_hash_of_prompts_ignores_their_order_and_sees_their_text():
    a, b = (Question(name, "t", 0, (1, 2), 8, None, 0) for name in "ab")
    assert prompts_hash([a, b]) == prompts_hash([b, a])
    assert prompts_hash([a, b]) != prompts_hash([a])


@given(st.text(max_size=40), st.lists(st.sampled_from(["target", "drafter"]), min_size=200, max_size=200))
def test_pieces_together_are_the_text(text, sources):
    from tests.conftest import build_tokenizer

    tokenizer = test_pieces_together_are_the_text.__dict__.setdefault("tokenizer", build_tokenizer())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:200]
    found = pieces(tokenizer, ids, sources[: len(ids)])
    whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(piece.text for piece in found) == whole
    assert all(a.source != b.source for a, b in pairwise(found))


def test_pieces_say_where_they_were_copied_from(tiny_tokenizer):
    ids = tiny_tokenizer("q1z2x3", add_special_tokens=False)["input_ids"][:6]
    sources = ["target", *["copy"] * (len(ids) - 1)]
    origins = [None, 4, 5, 1, 2, 3][: len(ids)]
    found = pieces(tiny_tokenizer, ids, sources, origins)
    assert [(piece.source, piece.tokens, piece.origin) for piece in found] == [
        ("target", 1, None),
        ("copy", 2, 4),
        ("copy", 3, 1),
    ]


def test_a_character_of_several_tokens_is_never_torn(tiny_tokenizer):
    ids = tiny_tokenizer("a東b", add_special_tokens=False)["input_ids"]
    sources = ["drafter" if i % 2 else "target" for i in range(len(ids))]
    assert all("\ufffd" not in piece.text for piece in pieces(tiny_tokenizer, ids, sources))


def test_examples_are_of_different_tasks_and_do_not_loop(tiny_tokenizer):
    questions = [Question(f"q{i}", "ab"[i % 2], 0, (0, 3), 8, None, i) for i in range(4)]
    samples = [to_sample(q, [completion([10 + i] * 3)], "m", "s", tiny_tokenizer) for i, q in enumerate(questions)]
    samples[1].looping = True
    shown = examples(tiny_tokenizer, questions, samples)
    assert [(e.task, e.prompt_id) for e in shown] == [("a", "q0"), ("b", "q3")]


def test_files_of_samples_have_different_readable_names():
    names = {sample_path("greedy", f"Model(drafter, length={k})") for k in range(1, 13)}
    assert len(names) == 12 and "samples/greedy--Model-drafter-length=3.jsonl" in names
