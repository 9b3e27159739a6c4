"""Bigram tables: what is learned, and which files are refused."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.errors import UserError
from drafttrain.models.bigrams import UNSEEN, BigramTable, learn


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), max_size=5))
def test_each_token_has_its_most_frequent_successor(texts):
    table = learn(texts, 6, "t")
    pairs = [pair for text in texts for pair in pairwise(text)]
    assert table.pairs == len(pairs)
    for token in range(6):
        counts = Counter(second for first, second in pairs if first == token)
        best = min(counts, key=lambda second: (-counts[second], second), default=UNSEEN)
        assert table.successors[token] == best


def test_a_table_is_read_as_it_was_written_and_only_for_its_tokenizer(tmp_path):
    table = learn([[1, 2, 3, 1, 2]], 5, "0123456789")
    table.save(tmp_path / "bigrams.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bigrams.safetensors"]
    assert BigramTable.load(tmp_path / "bigrams.safetensors", "0123456789") == table
    with pytest.raises(UserError, match="of the tokenizer 01234567, but the target's is abcdefgh; learn one"):
        BigramTable.load(tmp_path / "bigrams.safetensors", "abcdefghij")


@pytest.mark.parametrize("content", [b"", b"not a table" * 9])
def test_a_damaged_table_is_refused(tmp_path, content):
    (tmp_path / "bigrams.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is no bigram table"):
        BigramTable.load(tmp_path / "bigrams.safetensors", "t")
