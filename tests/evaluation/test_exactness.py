"""The checks pass exact decoding, and fail a decoder that is wrong in the ways decoders are wrong."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.errors import UserError
from drafttrain.evaluation import exactness
from drafttrain.evaluation.command import Evaluation
from drafttrain.evaluation.questions import Question, to_sample
from drafttrain.evaluation.runner import answer
from drafttrain.evaluation.schema import AUTOREGRESSIVE
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama

VOCABULARY = 64


@pytest.fixture(scope="module")
def models():
    return build_llama(VOCABULARY, seed=0), build_llama(VOCABULARY, layers=1, seed=1)


def questions(count=6, limit=40):
    return [Question(f"q{i}", "code", 0, (0, 7 + i, 11, 3 * i + 2), limit, None, i) for i in range(count)]


class Words:
    """A tokenizer that needs no words."""

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def samples(decoder, asked):
    return [to_sample(q, [c], "m", "s", Words()) for q, c in zip(asked, answer(decoder, asked), strict=True)]


def decoders(models, sampling, dtype=torch.float32, length=4):
    target, small = (Engine(model.to(dtype)) for model in models)
    return Decoder(target, None, sampling, ()), Decoder(target, ModelDrafter(small, length), sampling, ())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_greedy_decoding_passes_in_every_dtype(models, dtype):
    plain, speculative = decoders(models, Sampling(0.0), dtype)
    asked = questions()
    check = exactness.greedy_check(
        plain.target, Sampling(0.0), asked, samples(speculative, asked), samples(plain, asked), [2, 5], 4.0
    )
    assert check.passed, check
    assert check.answers == 6 and check.tokens == 240
    assert check.identical + len(check.divergences) == 6
    if dtype == torch.float64:
        assert check.tier == "float64" and check.identical == 6
    for model in models:
        model.float()


def test_a_wrong_token_is_no_rounding(models):
    plain, speculative = decoders(models, Sampling(0.0))
    asked = questions()
    base, own = samples(plain, asked), samples(speculative, asked)
    own[2].token_ids[7] = (own[2].token_ids[7] + 1) % VOCABULARY
    check = exactness.greedy_check(plain.target, Sampling(0.0), asked, own, base, [2, 5], 4.0)
    assert not check.passed and check.identical == 5
    [found] = check.divergences
    assert (found.prompt_id, found.position) == ("q2", 7) and found.gap > 4 * found.noise
    assert check.reason.startswith("q2, token 7: departs by")


def test_an_answer_that_ends_early_fails(models):
    plain, _ = decoders(models, Sampling(0.0))
    asked = questions()
    base = samples(plain, asked)
    own = [dataclasses.replace(sample, token_ids=sample.token_ids[:-1]) for sample in base]
    assert not exactness.greedy_check(plain.target, Sampling(0.0), asked, own, base, [2], 4.0).passed


def test_noise_is_what_the_width_of_a_forward_does(models):
    engine = Engine(models[0].bfloat16())
    one = exactness.logits_at(engine, [0, 7, 11], [5, 9, 2, 8, 4], 1)
    again = exactness.logits_at(engine, [0, 7, 11], [5, 9, 2, 8, 4], 1)
    wide = exactness.logits_at(engine, [0, 7, 11], [5, 9, 2, 8, 4], 4)
    assert torch.equal(one, again)
    assert (one - wide).abs().max() < 0.5
    models[0].float()
    engine = Engine(models[0])
    wide = exactness.logits_at(engine, [0, 7, 11], [5, 9, 2, 8, 4], 4)
    whole = models[0](torch.tensor([[0, 7, 11, 5, 9, 2, 8, 4]])).logits[0, -1]
    assert torch.allclose(wide, whole, atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=8), Sampling(0.9, top_p=0.8), Sampling(1.0, repetition_penalty=1.3)],
)
def test_sampled_tokens_of_the_exact_decoder_pass(models, sampling):
    plain, speculative = decoders(models, sampling)
    asked = questions(16)
    for decoder in (plain, speculative):
        check = exactness.sampled_check(plain.target, sampling, asked, samples(decoder, asked))
        assert check.passed and abs(check.z) < 4, check
        assert check.tokens == 640


@pytest.mark.parametrize("sampling", [Sampling(0.9, top_p=0.8), Sampling(1.0, repetition_penalty=1.3)])
def test_the_check_holds_few_distributions_at_a_time_and_does_not_depend_on_how_many(models, sampling, monkeypatch):
    plain, _ = decoders(models, sampling)
    asked = questions(3, limit=35)
    found, held, add = [], [], exactness.SurpriseSum.add
    monkeypatch.setattr(exactness.SurpriseSum, "add", lambda own, p, ids: (held.append(len(p)), add(own, p, ids)))
    for chunk in (64, 8):
        monkeypatch.setattr(exactness, "CHUNK", chunk)
        found.append(exactness.sampled_check(plain.target, sampling, asked, samples(plain, asked)))
    assert held == [35] * 3 + [8, 8, 8, 8, 3] * 3
    assert found[0].tokens == found[1].tokens == 105
    assert found[0].z == pytest.approx(found[1].z, abs=1e-3)


def test_tokens_of_a_sharper_distribution_fail(models):
    sharper, _ = decoders(models, Sampling(0.7))
    asked = questions(16)
    check = exactness.sampled_check(sharper.target, Sampling(1.0), asked, samples(sharper, asked))
    assert not check.passed and check.z > 5


def test_tokens_of_the_drafter_fail(models):
    _, speculative = decoders(models, Sampling(1.0))
    wrong = Decoder(speculative.drafter.engine, None, Sampling(1.0), ())
    asked = questions(16)
    assert not exactness.sampled_check(speculative.target, Sampling(1.0), asked, samples(wrong, asked)).passed


def test_a_token_outside_the_support_fails_at_once(models):
    plain, _ = decoders(models, Sampling(1.0))
    asked = questions(2)
    check = exactness.sampled_check(plain.target, Sampling(1.0, top_k=4), asked, samples(plain, asked))
    assert not check.passed and "cannot draw" in check.reason


def test_few_tokens_are_not_judged_by_their_score(models):
    plain, _ = decoders(models, Sampling(1.0))
    asked = questions(2, limit=5)
    check = exactness.sampled_check(plain.target, Sampling(1.0), asked, samples(plain, asked))
    assert check.passed and "only 10 tokens" in check.reason


def test_identity_names_answer_and_place():
    checks = exactness.identity_check({"a": [[1, 2], [3]], "b": [[1, 2], [4]]}, [[1, 2], [3]])
    assert checks["a"].passed and checks["a"].identical == 2
    assert not checks["b"].passed and checks["b"].reason == "answer 1 differs at token 0"


@pytest.mark.parametrize("error", [UserError("too big."), torch.OutOfMemoryError("out of memory.\nTried to")])
def test_a_report_is_written_though_float64_does_not_fit(error):
    def answers(*_):
        raise error

    samples = {AUTOREGRESSIVE: [], "Model(drafter, length=2)": []}
    measured = SimpleNamespace(questions=[], samples=samples, lossless={method: [] for method in samples})
    evaluation = SimpleNamespace(_float64_answers=answers, models=SimpleNamespace(release=lambda _: None))
    Evaluation._check_float64(evaluation, [measured])
    [check] = measured.lossless["Model(drafter, length=2)"]
    assert (check.tier, check.passed) == ("not checked", True) and check.reason.startswith("float64: ")
    assert "\n" not in check.reason
