"""Whatever ends an answer first ends it: end tokens, stop strings and limits, anywhere in a block, for every row."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stop_strings import StopStrings
from drafttrain.decoding.stopping import Confidence
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_tokenizer
from tests.decoding.support import pair

PROMPTS = [[9, 5, 3], [7], [40, 41]]
MOST = 16
SAMPLINGS = {"greedy": Sampling(0.0), "penalised": Sampling(0.0, repetition_penalty=1.5), "sampled": Sampling(0.8)}
DRAFTERS = {
    "none": lambda engine: None,
    "fixed": lambda engine: ModelDrafter(engine, 5),
    "adaptive": lambda engine: ModelDrafter(engine, stop=Confidence(0.5, max_length=7)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def engines(tokenizer):
    return tuple(Engine(model) for model in pair(len(tokenizer), layers=1, noise=0.1))


@pytest.fixture(scope="module")
def free(engines):
    """Texts that nothing ends but their length, by drafter and sampling."""
    found = {}
    for drafter, make in DRAFTERS.items():
        for name, sampling in SAMPLINGS.items():
            completions = Decoder(engines[0], make(engines[1]), sampling).generate(PROMPTS, MOST)
            found[drafter, name] = [completion.token_ids for completion in completions]
    return found


def cut(tokenizer, tokens, eos, stops, limit) -> tuple[list[int], str]:
    """The plain definition: token by token until something ends the text; a stop string before an end token."""
    for count in range(1, limit + 1):
        if any(stop in tokenizer.decode(tokens[:count]) for stop in stops):
            return tokens[:count], "stop"
        if tokens[count - 1] in eos:
            return tokens[:count], "eos"
    return tokens[:limit], "length"


@settings(deadline=None, max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_first_end_ends_a_text_whatever_it_is_and_whoever_drafted_it(
    tokenizer, engines, free, drafter, sampling, data
):
    """Ends change nothing before them: the text is the free one, cut. (A drafter draws nothing behind an end token, so
    sampled drafts, and with them the text, may be others; where they end is told by the same definition.)"""
    texts = free[drafter, sampling]
    everything = sorted({token for text in texts for token in text})
    eos = data.draw(st.sets(st.sampled_from(everything), max_size=3), "end tokens")
    whole = tokenizer.decode(texts[0])
    places = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 4))
    stops = [whole[start : start + size] for start, size in data.draw(st.lists(places, max_size=2), "stop strings")]
    stops = [stop for stop in stops if "\N{REPLACEMENT CHARACTER}" not in stop]  # stands for a part of a character
    limits = data.draw(st.lists(st.integers(1, MOST), min_size=3, max_size=3), "limits")
    strings = StopStrings(tokenizer, stops) if stops else None
    decoder = Decoder(engines[0], DRAFTERS[drafter](engines[1]), SAMPLINGS[sampling], eos, stop_strings=strings)
    found = [(each.token_ids, each.finish_reason) for each in decoder.generate(PROMPTS, limits)]
    if SAMPLINGS[sampling].greedy or drafter == "none":
        expected = [cut(tokenizer, text, eos, stops, limit) for text, limit in zip(texts, limits, strict=True)]
        assert found == expected
    for (tokens, reason), limit in zip(found, limits, strict=True):
        assert (tokens, reason) == cut(tokenizer, tokens, eos, stops, len(tokens))
        assert reason != "length" or len(tokens) == limit
