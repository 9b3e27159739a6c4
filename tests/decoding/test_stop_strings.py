"""An answer ends with the token that completes a stop string, whoever proposed it and wherever in a block it lies."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stop_strings import StopStrings
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_tokenizer
from tests.decoding.support import pair


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


TEXTS = st.text(alphabet="ab\n é.", max_size=12)


@given(before=TEXTS, after=TEXTS, stop=st.text(alphabet="ab\n é.", min_size=1, max_size=3))
def test_the_end_is_the_first_token_with_which_the_text_contains_the_string(tokenizer, before, after, stop):
    old, new = encode(tokenizer, before), encode(tokenizer, after)
    if stop in tokenizer.decode(old):
        return
    containing = [k for k in range(1, len(new) + 1) if stop in tokenizer.decode(old + new[:k])]
    assert StopStrings(tokenizer, [stop]).end(old, new) == (containing[0] if containing else None)


def test_an_empty_stop_string_is_refused(tokenizer):
    with pytest.raises(UserError, match="empty"):
        StopStrings(tokenizer, ["\n\n", ""])


@pytest.mark.parametrize("length", [1, 3, 6])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafted_answers_stop_where_autoregressive_ones_do(tokenizer, length, temperature):
    target, drafter = pair(vocabulary=len(tokenizer), noise=0.1)
    prompts = [[9, 5, 3], [7], [40, 41]]
    free = Decoder(Engine(target), None, Sampling(temperature)).generate(prompts, 40)
    # a string that begins inside a token of the first answer and ends some tokens later
    text = tokenizer.decode(free[0].token_ids[4:8])
    stops = StopStrings(tokenizer, [text[1:] or text])
    plain = Decoder(Engine(target), None, Sampling(temperature), stop_strings=stops).generate(prompts, 40)
    drafted = Decoder(
        Engine(target), ModelDrafter(Engine(drafter), length), Sampling(temperature), stop_strings=stops
    ).generate(prompts, 40)
    assert plain[0].finish_reason == "stop"
    assert len(plain[0].token_ids) <= 8
    if temperature == 0:
        assert [c.token_ids for c in drafted] == [c.token_ids for c in plain]
        assert [c.finish_reason for c in drafted] == [c.finish_reason for c in plain]
    for completion in drafted:
        found = [k for k in range(1, len(completion.token_ids) + 1) if stops.end([], completion.token_ids[:k])]
        assert (completion.finish_reason == "stop") == bool(found)
        assert not found or found == [len(completion.token_ids)]
