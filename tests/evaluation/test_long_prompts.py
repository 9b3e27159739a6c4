"""Long prompts of the reference world and of files in other benchmarks' shapes."""

from __future__ import annotations

import json

import pytest

from drafttrain.errors import UserError
from drafttrain.evaluation.long_prompts import METRICS, read_prompts, split_prefix, world_prompts
from tests.conftest import build_tokenizer

KIND = "recall/multi_key/prose"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("length", [400, 1600])
def test_a_world_prompt_is_as_long_as_asked_and_scores_its_own_answer(tokenizer, length):
    [prompt] = world_prompts(tokenizer, {KIND: 1}, length)
    assert 0.8 * length < len(prompt.ids) <= length + 20
    [answer] = prompt.references
    assert prompt.score(answer) == prompt.score(f" {answer}\n") == 1.0 and prompt.exact(answer)
    assert prompt.score(answer + " And more.") == 0.0 and not prompt.exact(answer + " And more.")
    assert tokenizer.decode(prompt.ids).endswith("<|assistant|>")


def test_questions_share_their_document(tokenizer):
    prompts = list(world_prompts(tokenizer, {KIND: 2}, 600, questions=3))
    assert len(prompts) == 6 and len({prompt.prompt_id for prompt in prompts}) == 6
    first, second = tokenizer.decode(prompts[0].ids), tokenizer.decode(prompts[1].ids)
    assert first.rsplit("\n\n", 1)[0] == second.rsplit("\n\n", 1)[0]
    assert first != second and prompts[0].references != prompts[1].references
    for prompt in prompts:  # each answer quotes the document
        assert prompt.references[0] in tokenizer.decode(prompt.ids).replace("\n", " ")


def test_an_answer_prefix_is_the_end_of_the_prompt_and_no_part_of_the_answer(tokenizer):
    [plain] = world_prompts(tokenizer, {KIND: 1}, 400)
    [prefixed] = world_prompts(tokenizer, {KIND: 1}, 400, answer_prefix=True)
    assert prefixed.prefix and prefixed.ids[: len(plain.ids)] == plain.ids
    assert tokenizer.decode(prefixed.ids).endswith("<|assistant|>" + prefixed.prefix)
    assert prefixed.prefix + prefixed.references[0] == plain.references[0]
    assert split_prefix("The code for amber-fox is 48213.") == ("The code for amber-fox is", " 48213.")
    assert split_prefix("lamp = fox\nfox = 5") == ("lamp =", " fox\nfox = 5")
    assert split_prefix("pear, fig") == ("", "pear, fig")


def test_metrics_are_those_of_their_benchmarks():
    assert METRICS["all"]("It is AMBER, not fox", ["amber", "Fox", "lamp"]) == pytest.approx(2 / 3)
    assert METRICS["any"]("in Oslo", ["Bergen", "oslo"]) == 1.0 and METRICS["any"]("in Rome", ["Oslo"]) == 0.0
    assert METRICS["f1"]("The old town of Bergen.", ["bergen town", "x"]) == pytest.approx(2 * 2 / (4 + 2))
    assert METRICS["rouge"]("a b c d", ["a c e"]) == pytest.approx(2 * 2 / (4 + 3))
    assert METRICS["code"]("```python\n# first\nx = 1\ny = 2", ["x = 1"]) == 1.0
    assert METRICS["code"]("", ["x = 1"]) == 0.0


def written(tmp_path, *records: object):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in records) + "\n")
    return path


def test_ruler_files_are_read_with_their_answer_prefix(tokenizer, tmp_path):
    record = {"index": 3, "input": "The hay. Where?", "outputs": ["here", "there"], "answer_prefix": " It is"}
    path = written(
        tmp_path, {**record, "task": "niah_multivalue"}, {**record, "task": "qa_1", "tokens_to_generate": 32}
    )
    needle, question = read_prompts(path, tokenizer)
    assert (needle.metric, question.metric, question.limit) == ("all", "any", 32)
    assert tokenizer.decode(needle.ids).endswith("<|assistant|> It is")
    assert needle.score("here it is") == 0.5 and question.score("here it is") == 1.0
    [bare] = read_prompts(path, tokenizer, answer_prefix=False, most=1)
    assert bare.prefix == "" and tokenizer.decode(bare.ids).endswith("<|assistant|>")


def test_longbench_files_are_read_with_the_metric_of_their_set(tokenizer, tmp_path):
    record = {"context": "A long text.", "input": "Who?", "answers": ["Ann"], "_id": "x1"}
    sets = {"qasper": "f1", "gov_report": "rouge", "trec": "any", "lcc": "code", "hotpotqa_e": "f1", "qmsum_e": "rouge"}
    path = written(tmp_path, *({**record, "dataset": name} for name in sets))
    prompts = read_prompts(path, tokenizer)
    assert {prompt.task: prompt.metric for prompt in prompts} == sets
    assert "A long text.\n\nWho?" in tokenizer.decode(prompts[0].ids)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 holds no object"),
        ({"input": "x"}, "line 1 has no input with outputs"),
        ({"outputs": ["x"]}, "line 1 has no input with outputs"),
        ({"input": "x", "answers": []}, "line 1 has no input with outputs"),
        ({"input": "x", "outputs": ["y"], "tokens_to_generate": "many"}, "tokens_to_generate of 'many'"),
        ({"input": "x", "outputs": ["y"], "tokens_to_generate": 0}, "tokens_to_generate of 0"),
        ({"input": "x", "context": ["y"], "answers": ["z"]}, "a context that is no text"),
    ],
)
def test_other_lines_are_refused_in_a_sentence(tokenizer, tmp_path, line, sentence):
    with pytest.raises(UserError, match=sentence):
        read_prompts(written(tmp_path, line), tokenizer)


def test_a_file_that_is_no_text_is_refused_in_a_sentence(tokenizer, tmp_path):
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_prompts(tmp_path / "binary.jsonl", tokenizer)


def test_a_missing_file_and_an_unknown_kind_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(UserError, match="no task kind recall/none"):
        next(world_prompts(tokenizer, {"recall/none": 1}, 400))
