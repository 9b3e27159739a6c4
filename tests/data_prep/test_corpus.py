"""The reference corpus: one stable split, and code prefixes that never cross it."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus import code_prefix, held_out_modules, modules, train_modules, write_corpus


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


def test_corpus_files(tmp_path, monkeypatch):
    import numpy as np

    some = [m for m in modules() if not m.table][:12]
    monkeypatch.setattr("data_prep.corpus.modules", lambda: tuple(some))
    write_corpus(tmp_path / "corpus", vocab_size=400, task_documents=20, table_weight=0.0, seed=0)
    train = np.load(tmp_path / "corpus" / "train.npy")
    assert train.dtype == np.uint16 and train.max() < 400 and train[0] == 1
