"""Only response tokens are trained, and every row of a batch is what it is alone."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.errors import UserError
from drafttrain.records import ShardedWriter
from drafttrain.training.drafter_data import (
    IGNORED,
    Collator,
    ResponseDataset,
    marked,
    read_responses,
    require_trainable,
)

ids = st.lists(st.integers(2, 60), max_size=8)
FINGERPRINT = {"tokenizer": "a", "architecture": "b", "weights": "c"}


def rows(*pairs):
    return [{"prompt_ids": prompt, "response_ids": response} for prompt, response in pairs]


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=5), st.integers(1, 12))
def test_exactly_the_response_tokens_within_max_length_are_trained(pairs, max_length):
    data = ResponseDataset(rows(*pairs), max_length)
    assert len(data) + data.dropped == len(pairs)
    items = [data[index] for index in range(len(data))]
    trained = 0
    for item, index in zip(items, data._kept, strict=True):
        prompt, response = pairs[index]
        batch = Collator(0)([item])
        labels = batch["labels"][0].tolist()
        whole = (prompt + response)[:max_length]
        expected = [token if place >= max(len(prompt), 1) else IGNORED for place, token in enumerate(whole)]
        assert batch["input_ids"][0].tolist() == whole and labels == expected
        assert batch["weights"][0].tolist() == [float(label != IGNORED) for label in labels]
        trained += int(batch["weights"].sum())
        assert trained > 0
    assert trained == data.tokens
    assert data.lengths == [len(item["input_ids"]) for item in items]


@given(st.lists(st.tuples(ids, st.lists(st.integers(2, 60), min_size=2, max_size=8)), min_size=1, max_size=5))
def test_padding_changes_no_row(pairs):
    data = ResponseDataset(rows(*pairs), 20)
    items = [data[index] for index in range(len(data))]
    together, collate = Collator(0)(items), Collator(0)
    for place, item in enumerate(items):
        alone, length = collate([item]), len(item["input_ids"])
        for name in ("input_ids", "attention_mask", "labels", "weights"):
            assert together[name][place, :length].tolist() == alone[name][0].tolist()
        assert not together["attention_mask"][place, length:].any() and not together["weights"][place, length:].any()


def test_records_and_lists_give_the_same_data():
    pairs = rows(([1, 2], [3, 4, 5]), ([1] * 9, [2]), ([7], [8]))
    plain, records = ResponseDataset(pairs, 6), ResponseDataset(Dataset.from_list(pairs), 6)
    assert [plain[index] for index in range(2)] == [records[index] for index in range(2)]
    assert (
        (plain.dropped, plain.tokens, plain.lengths)
        == (records.dropped, records.tokens, records.lengths)
        == (1, 4, [5, 2])
    )


def test_a_sample_keeps_its_id_whatever_else_is_there():
    row = {"prompt_id": "a", "turn": 1, "prompt_ids": [1], "response_ids": [2]}
    other = {**row, "turn": 2}
    assert ResponseDataset([row], 9)[0]["sample_id"] == ResponseDataset([other, row], 9)[1]["sample_id"]
    assert ResponseDataset([row, other], 9)[0]["sample_id"] != ResponseDataset([row, other], 9)[1]["sample_id"]


def test_selection_is_spread_and_stable():
    data = ResponseDataset(rows(*(([1], [index]) for index in range(10))), 9)
    assert [row["input_ids"][1] for row in data.select(3)] == [0, 3, 6]
    assert len(data.select(99)) == 10


def test_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(UserError, match="has a token to train"):
        require_trainable(ResponseDataset(rows(([1, 2, 3], [4])), 3), tmp_path)


def test_the_example_marks_what_is_trained(tiny_tokenizer):
    prompt, answer = tiny_tokenizer.encode("What is it?"), tiny_tokenizer.encode("apple")
    row = ResponseDataset(rows((prompt, answer)), 99)[0]
    assert marked(row, tiny_tokenizer) == "What is it?[[apple]]"


def write_responses(folder, splits):
    writer = ShardedWriter(folder, {"kind": "responses", "fingerprints": {"target": FINGERPRINT}}, len(splits), 2)
    for shard in writer.pending():
        made = [
            {"prompt_id": str(row), "split": splits[row], "task": "t", "source": "s", "turn": 0, "prompt_ids": [1, 2],
             "response_ids": [3], "finish_reason": "eos", "text": ""}
            for row in writer.source_range(shard)
        ]  # fmt: skip
        writer.write(shard, made)
    writer.finish()
    return folder


def test_responses_are_read_by_split(tmp_path):
    folder = write_responses(tmp_path / "responses", ["train", "test", "tune", "train"])
    _, train, tune = read_responses(folder, FINGERPRINT)
    assert train["prompt_id"] == ["0", "3"] and tune["prompt_id"] == ["2"]


def test_responses_of_another_target_are_refused(tmp_path):
    folder = write_responses(tmp_path / "responses", ["train"])
    with pytest.raises(UserError, match="accept-new-target"):
        read_responses(folder, FINGERPRINT | {"weights": "other"})
    read_responses(folder, FINGERPRINT | {"weights": "other"}, accept_new_target=True)
    with pytest.raises(UserError, match="tokenizer"):
        read_responses(folder, FINGERPRINT | {"tokenizer": "other"}, accept_new_target=True)


@pytest.mark.parametrize("splits", [[], ["test", "tune"]])
def test_responses_without_a_train_split_are_refused(tmp_path, splits):
    folder = write_responses(tmp_path / "responses", splits)
    with pytest.raises(UserError, match="holds no response"):
        read_responses(folder, FINGERPRINT)
