"""The reference corpus: one stable split, and code prefixes that never cross it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import code_prefix, held_out_modules, modules, train_modules, write_corpus
from drafttrain.config import parse
from drafttrain.errors import UserError


def test_modules_fall_on_one_side():
    train, held_out = ({m.name for m in side} for side in (train_modules(), held_out_modules()))
    assert train and held_out and not train & held_out
    assert 0.03 < len(held_out) / len(modules()) < 0.2
    assert not any("test" in name.split("/") for name in train | held_out)


def test_the_split_hangs_on_the_name_alone():
    sides = {module.name: module.held_out for module in modules()}
    assert sides["ast.py"] and not sides["argparse.py"]


@given(seed=st.integers(0, 10**6), tokens=st.integers(8, 64), held_out=st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_prefix_is_reproducible_and_has_its_length(tiny_tokenizer, seed, tokens, held_out):
    ids = code_prefix(seed, tokens, tiny_tokenizer, held_out)
    assert len(ids) == tokens and ids[0] == tiny_tokenizer.bos_token_id
    assert ids == code_prefix(seed, tokens, tiny_tokenizer, held_out)


def test_a_prefix_longer_than_every_module_is_told(tiny_tokenizer, few_modules, monkeypatch):
    monkeypatch.setattr("data_prep.corpus._TRIES", 5)
    with pytest.raises(UserError, match=r"gives 1000000 tokens of code; lower prompts\.length"):
        code_prefix(0, 10**6, tiny_tokenizer, held_out=False)


@pytest.fixture
def few_modules(monkeypatch):
    some = tuple([m for m in modules() if not m.table][:12])
    monkeypatch.setattr("data_prep.corpus.modules", lambda: some)


def test_corpus_files(tmp_path, few_modules):
    write_corpus(tmp_path / "corpus", vocab_size=400, task_documents=20, table_weight=0.0, seed=0)
    train = np.load(tmp_path / "corpus" / "train.npy")
    assert train.dtype == np.uint16 and train.max() < 400 and train[0] == 1


def test_a_corpus_that_was_cut_off_is_not_there(tmp_path, few_modules, monkeypatch):
    settings = {"vocab_size": 400, "task_documents": 0, "table_weight": 0.0}
    save = np.save

    def dies(path, ids):
        if path.name == "held_out.npy":
            raise KeyboardInterrupt
        save(path, ids)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            write_corpus(tmp_path / "corpus", **settings, seed=0)
    assert not (tmp_path / "corpus").exists()
    write_corpus(tmp_path / "corpus", **settings, seed=0)
    write_corpus(tmp_path / "corpus", **settings, seed=0)  # in the place of an older one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]
    assert sorted(path.name for path in (tmp_path / "corpus").iterdir()) == ["held_out.npy", "tokenizer", "train.npy"]


def test_a_vocabulary_that_16_bits_cannot_number_is_refused():
    with pytest.raises(UserError, match=r"corpus\.vocab_size must be between 300 and 65536"):
        parse("", ("corpus",), ["--corpus.vocab_size", "70000", "--run", "r"])
