"""Engines of a pair know every token that their own model knows, however few its drafter has."""

import pytest

from drafttrain.evaluation.pair import Models
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.models.loading import Loaded
from tests.conftest import build_llama


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    nobody = Fingerprint("t", "a", "w")
    padded = build_llama(len(tiny_tokenizer) + 20, layers=1, hidden=16)
    short = build_llama(len(tiny_tokenizer) - 20, layers=1, hidden=16, max_position_embeddings=128)
    target, drafter = (Loaded(model, tiny_tokenizer, nobody, "tiny") for model in (padded, short))
    return Models(target, drafter, {}, frozenset(), "float32")


def test_the_target_keeps_the_tokens_that_its_drafter_lacks(models, tiny_tokenizer):
    target, drafter = models.engines()
    assert target.vocabulary == models.vocabulary == len(tiny_tokenizer)
    assert drafter.vocabulary == len(tiny_tokenizer) - 20


def test_the_context_is_that_of_the_shorter_model(models):
    assert models.context == 128
