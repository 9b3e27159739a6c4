"""A right decoder passes; decoders with the known bugs do not; a test without power does not count as a proof."""

import copy
import dataclasses

import pytest
import torch

from drafttrain.decoding import loop, verify
from drafttrain.dialogue import end_tokens
from drafttrain.errors import UserError
from drafttrain.evaluation import lossless, pair
from drafttrain.evaluation.pair import Models
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.models.loading import Loaded
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama

METHOD = "Model(drafter, length=4)"
PROMPT = [0, 9, 33, 7]


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    nobody = Fingerprint("t", "a", "w")
    model = build_llama(len(tiny_tokenizer), layers=1, seed=0)
    close = copy.deepcopy(model)
    with torch.no_grad():
        for weight in close.parameters():
            weight += 0.08 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    target, drafter = (Loaded(each, tiny_tokenizer, nobody, "tiny") for each in (model, close))
    return Models(target, drafter, {}, end_tokens(tiny_tokenizer, None), "float32")


@pytest.fixture(scope="module")
def short_models(models, tiny_tokenizer):
    """The same pair, but of a drafter that lacks the last forty tokens, one answer token in eight."""
    drafter = copy.deepcopy(models.drafter.model)
    drafter.resize_token_embeddings(len(tiny_tokenizer) - 40)
    return dataclasses.replace(models, drafter=dataclasses.replace(models.drafter, model=drafter), _engines={})


def found_by(models, answers):
    return lossless.distribution_tests(models, METHOD, PROMPT, Sampling(1.0), 0, answers)


@pytest.mark.parametrize("method", [METHOD, "Model(drafter, stop=Confidence(0.5))", "Autoregressive()"])
def test_the_decoder_is_lossless_and_its_controls_are_rejected(models, method):
    proof = lossless.prove(models, method, [PROMPT, [0, 4]], [Sampling(1.0)], 4.0, 0, answers=1500)
    assert proof.passed, proof
    assert [check.tier for check in proof.tokens] == ["float64", "float32", "low precision"]
    assert proof.tokens[0].identical == 2
    controls = [test for test in proof.distributions if test.must_reject]
    assert len(controls) == (1 if method == "Autoregressive()" else 2)
    assert all(control.p_value < lossless.FALSE_ALARM for control in controls)


def lacks(monkeypatch, *dtypes):
    """Make no copies in these dtypes."""
    real = pair._in_dtype

    def copies(model, dtype, device):
        if dtype in dtypes:
            raise UserError(f"a quantized target cannot be run in {dtype}.")
        return real(model, dtype, device)

    monkeypatch.setattr(pair, "_in_dtype", copies)


def test_a_dtype_that_cannot_be_had_is_not_checked_and_a_missing_reference_refused(models, monkeypatch):
    models = dataclasses.replace(models, _engines={})
    lacks(monkeypatch, "bfloat16")
    proof = lossless.prove(models, METHOD, [PROMPT], [], 4.0, 0)
    assert [check.tier for check in proof.tokens] == ["float64", "float32", "not checked"]
    assert proof.passed and "cannot be run in bfloat16" in proof.tokens[-1].reason
    lacks(monkeypatch, "float64")
    with pytest.raises(UserError, match=r"in float64.* needs it; `drafttrain evaluate`"):
        lossless.prove(models, METHOD, [PROMPT], [], 4.0, 0)


def test_a_drafter_that_lacks_tokens_takes_none_from_the_target(short_models):
    proof = lossless.prove(short_models, METHOD, [PROMPT, [0, 4]], [Sampling(1.0)], 4.0, 0, answers=1500)
    assert proof.passed, proof
    decoder = short_models.decoder(METHOD, Sampling(1.0), 0, "float32")
    lacking = short_models.engines("float32")[1].vocabulary
    assert any(max(answer) >= lacking for answer in lossless.draw(decoder, PROMPT, 100))


def test_a_target_cut_to_its_drafters_tokens_is_caught(short_models, monkeypatch):
    for engine in short_models.engines("float32"):
        monkeypatch.setattr(engine, "vocabulary", short_models.engines("float32")[1].vocabulary)
    [found, *_] = found_by(short_models, lossless.ANSWERS)
    assert not found.passed


def test_a_decoder_that_keeps_rejected_mass_is_caught(models, monkeypatch):
    """The residual forgotten: after a rejection the token is drawn from p instead of (p - q)+."""
    monkeypatch.setattr(verify, "_residual", lambda p_BV, draft, accepted_B: p_BV)
    [found, *_] = found_by(models, lossless.ANSWERS)
    assert not found.passed and found.p_value < lossless.FALSE_ALARM


def test_a_drafter_that_misdeclares_its_distribution_is_caught(models, monkeypatch):
    real = loop.Decoder.__init__

    def wrong(self, target, drafter=None, *rest):
        real(self, target, lossless.Misdeclared(drafter) if drafter else None, *rest)

    monkeypatch.setattr(loop.Decoder, "__init__", wrong)
    [found, *_] = found_by(models, lossless.ANSWERS)
    assert not found.passed


def test_a_control_that_is_not_rejected_fails_the_proof(models):
    """Ten answers can prove nothing."""
    tests = found_by(models, 10)
    assert tests[0].passed
    assert not all(test.passed for test in tests if test.must_reject)
