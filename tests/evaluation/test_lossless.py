"""A right decoder passes; decoders with the known bugs do not; a test without power does not count as a proof."""

import copy
import dataclasses

import pytest
import torch

from drafttrain.decoding import loop, verify
from drafttrain.dialogue import end_tokens
from drafttrain.errors import UserError
from drafttrain.evaluation import controls, distributions, findings, identity, lossless, pair
from drafttrain.evaluation.distributions import FAMILY, SAMPLINGS
from drafttrain.evaluation.pair import Models
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.models.loading import Loaded
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama

METHOD = "Model(drafter, length=4)"
PROMPT = [0, 9, 33, 7]
PLAIN = (Sampling(1.0),)
PROMPTS = {"a": PROMPT, "b": [0, 4], "c": [0, 50, 12, 7, 7, 3], "d": [0, 61], "e": [0, 7, 11, 80]}
NEEDS_Q = {
    *("wrong q", "greedy draft declared as sampled", "sampled beams pruned", "a drawn token dropped for its value"),
    "probabilities of node numbers",
}


def loaded(model, tokenizer):
    return Loaded(model, tokenizer, Fingerprint("t", "a", "w"), "tiny")


def models_of(target, drafter, tokenizer):
    pair = (loaded(each, tokenizer) for each in (target, drafter))
    return Models(*pair, {}, end_tokens(tokenizer, None), "float32")


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    target = build_llama(len(tiny_tokenizer), layers=1, seed=0)
    drafter = copy.deepcopy(target)
    with torch.no_grad():
        for weight in drafter.parameters():
            weight += 0.08 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return models_of(target, drafter, tiny_tokenizer)


@pytest.fixture(scope="module")
def short_models(models, tiny_tokenizer):
    """The same pair, but of a drafter that lacks the last forty tokens, one answer token in eight."""
    drafter = copy.deepcopy(models.drafter.model)
    drafter.resize_token_embeddings(len(tiny_tokenizer) - 40)
    return models_of(models.target.model, drafter, tiny_tokenizer)


@pytest.fixture(scope="module")
def padded_models(models, tiny_tokenizer):
    """The same pair in vocabularies padded unequally, by rows that would win if they were looked at."""
    padded = []
    for model, more in ((models.target.model, 24), (models.drafter.model, 8)):
        model = copy.deepcopy(model)
        known = len(tiny_tokenizer)
        model.resize_token_embeddings(known + more)
        with torch.no_grad():
            head = model.get_output_embeddings().weight
            head[known:] = 3 * head[:more]
        padded.append(model)
    return models_of(*padded, tiny_tokenizer)


def questions(prompts=PROMPTS, limit=24):
    return lossless.questions_of(prompts, 512, limit)


def trial(models, samplings=PLAIN, answers=200, prompt=PROMPT):
    cases = distributions.cases_of(models, samplings, prompt)
    return distributions.Trial(prompt, cases, answers, distributions.level_of(len(cases)), 0)


def first_distribution(models, answers=200, samplings=PLAIN, method=METHOD):
    one = trial(models, samplings, answers)
    return distributions.case_finding(models, method, one, one.cases[0])


def results(found, part):
    return {finding.test: finding.result for finding in found if part in finding.test}


# ---- right decoders ----


def test_the_decoder_is_lossless_and_every_control_is_caught(models):
    proof = lossless.prove(models, METHOD, questions(), trial(models, answers=400), 4.0)
    assert proof.passed and proof.verdict == "lossless", proof
    caught = results(proof.findings, "control")
    assert set(caught.values()) == {"caught"}
    assert {name.partition("control: ")[2] for name in caught} == {control.name for control in controls.CONTROLS}
    assert "greedy, float64, control: off-by-one cache" in caught


def test_every_combination_of_options_passes_and_several_end_tokens_do(models):
    found = trial(models, SAMPLINGS, answers=100)
    assert len(found.cases) == len(SAMPLINGS) + 1
    assert len(found.cases[-1].ends) == len(models.ends) + 2
    assert any(case.sampling.penalised for case in found.cases)
    for case in found.cases:
        assert distributions.case_finding(models, METHOD, found, case).result == "passed"


def test_greedy_text_is_compared_on_every_prompt_alone_and_in_batches(models):
    found = identity.float64_findings(models, METHOD, questions(), 0)
    assert [each.figures["answers"] for each in found] == [5] * 4
    assert [each.figures["match_rate"] for each in found[:3]] == [1.0] * 3
    assert ["one at a time" in found[0].test, "batches" in found[1].test, "penalty" in found[2].test] == [True] * 3


def test_a_method_that_drafts_by_confidence_passes(models):
    assert first_distribution(models, method="Model(drafter, stop=Confidence(0.5))").result == "passed"


def test_drawn_trees_are_lossless_and_every_control_is_caught(models):
    proof = lossless.prove(models, "Model(drafter, tree=[3, 4, 2])", questions(), trial(models, answers=400), 4.0)
    assert proof.passed and proof.verdict == "lossless", proof
    assert set(results(proof.findings, "control").values()) == {"caught"}


def test_trees_of_likeliest_tokens_pass_and_controls_that_need_no_q_are_caught(models, tiny_tokenizer):
    """Where such tokens are often the target's: a cold target that is its own drafter."""
    method, own = "Model(drafter, tree=[3, 4, 2], drawn=False)", models_of(*[models.target.model] * 2, tiny_tokenizer)
    one = trial(own, [Sampling(0.3)])
    assert distributions.case_finding(own, method, one, one.cases[0]).result == "passed"
    found = results(distributions.control_findings(own, method, one), "")
    told = {name.partition("control: ")[2]: result for name, result in found.items()}
    assert {name for name, result in told.items() if result == "not applicable"} == NEEDS_Q
    assert {result for name, result in told.items() if name not in NEEDS_Q} == {"caught"}


def test_controls_of_autoregressive_decoding_are_made_of_the_pairs_drafter(models):
    assert distributions.broken_method(models, METHOD) == METHOD
    fallback = "Model(drafter, length=5)"
    assert distributions.broken_method(models, "Autoregressive()") == fallback
    found = results(identity.float64_findings(models, "Autoregressive()", questions(), 0), "control")
    assert found == {f"greedy, float64, control: off-by-one cache ({fallback})": "caught"}


class Deterministic:
    """Another's draft, declared as deterministic whatever it was."""

    def __init__(self, drafter):
        self.drafter = drafter
        self.name, self.max_length = drafter.name, drafter.max_length

    def start(self, committed, setting, *more):
        self.drafter.start(committed, dataclasses.replace(setting, sampling=Sampling(0.0)), *more)

    def __getattr__(self, name):
        return getattr(self.drafter, name)


def test_controls_that_need_q_do_not_apply_to_deterministic_drafts(models, monkeypatch, tiny_tokenizer):
    own = models_of(models.target.model, models.target.model, tiny_tokenizer)
    real = pair.build
    monkeypatch.setattr(pair, "build", lambda *given: (drafter := real(*given)) and Deterministic(drafter))
    found = distributions.control_findings(own, METHOD, trial(own, [Sampling(0.3)]))
    told = {name.partition("control: ")[2]: result for name, result in results(found, "").items()}
    assert {name for name, result in told.items() if result == "not applicable"} == NEEDS_Q
    assert told["residual omitted"] == told["off-by-one cache"] == "caught"


def test_a_drafter_that_lacks_tokens_takes_none_from_the_target(short_models):
    assert first_distribution(short_models).result == "passed"
    decoder = short_models.decoder(METHOD, Sampling(1.0), 0, "float64")
    lacking = short_models.engines("float64")[1].vocabulary
    assert any(max(answer) >= lacking for answer in distributions.draw(decoder, PROMPT, 100))


def test_padding_of_the_vocabulary_is_never_drafted_nor_emitted(padded_models, tiny_tokenizer):
    assert first_distribution(padded_models).result == "passed"
    assert set(results(identity.float64_findings(padded_models, METHOD, questions(), 0)[:3], "").values()) == {"passed"}
    decoder = padded_models.decoder(METHOD, Sampling(1.0), 0, "float64")
    assert max(max(answer) for answer in distributions.draw(decoder, PROMPT, 100)) < len(tiny_tokenizer)


# ---- wrong ones ----


def test_a_decoder_that_keeps_rejected_mass_fails(models, monkeypatch):
    """The residual forgotten: after a rejection the token is drawn from p instead of (p - q)+."""
    monkeypatch.setattr(verify, "_residual", lambda p_BV, draft, accepted_B: p_BV)
    found = first_distribution(models)
    assert found.result == "FAILED" and found.figures["p_value"] < FAMILY


def test_a_drafter_that_misdeclares_its_distribution_fails(models, monkeypatch):
    real = loop.Decoder.__init__

    def wrong(self, target, drafter=None, *rest):
        real(self, target, controls.Misdrawn(drafter, controls.sharper) if drafter else None, *rest)

    monkeypatch.setattr(loop.Decoder, "__init__", wrong)
    found = first_distribution(models)
    assert found.result == "FAILED"


def test_a_penalty_that_misses_the_drafted_prefix_fails(models, monkeypatch):
    """Tokens of the block are penalised only once they are committed."""

    def blind(seen_BV, tokens_BK, parents_BK):
        return seen_BV.unsqueeze(1).expand(-1, tokens_BK.shape[1] + 1, -1)

    monkeypatch.setattr(loop, "seen_along", blind)
    found = first_distribution(models, samplings=[Sampling(1.0, repetition_penalty=3.0)])
    greedy = identity.float64_findings(models, METHOD, questions(), 0)
    assert "FAILED" in [found.result, greedy[2].result]
    assert [each.result for each in greedy[:2]] == ["passed", "passed"]


def test_a_target_cut_to_its_drafters_tokens_fails(short_models, monkeypatch):
    for engine in short_models.engines("float64"):
        monkeypatch.setattr(engine, "vocabulary", short_models.engines("float64")[1].vocabulary)
    found = first_distribution(short_models)
    assert found.result == "FAILED"


def test_a_wrong_token_fails_in_every_precision(models, monkeypatch):
    monkeypatch.setattr(loop, "accepted_greedily", lambda drafted, choice: len(drafted))
    found = identity.float64_findings(models, METHOD, questions(), 0)
    low = [identity.low_precision_finding(models, METHOD, questions(), each, 4.0, 0) for each in identity.LOW_PRECISION]
    for each in [*found[:3], *low]:
        assert each.result == "FAILED", each
        assert each.figures["match_rate"] < 1
        [first, *_] = each.figures["divergences"]
        assert first["gap"] > 4 * first["noise"]
        assert f"first difference: {first['prompt_id']}, token {first['position']}, gap" in each.number


# ---- power ----


def test_a_control_that_is_not_caught_is_no_proof(models, capsys):
    """Ten answers can prove nothing."""
    weak = trial(models, answers=10)
    tests = distributions.distribution_findings(models, METHOD, weak)
    proof = lossless.Proof(METHOD, tests)
    assert tests[0].passed
    assert "NOT CAUGHT" in results(tests, "control").values()
    assert not proof.passed and proof.verdict == "NOT PROVEN"
    lossless._show([proof], weak)
    assert "give more answers (--answers 40)" in capsys.readouterr().out


def test_the_bound_on_false_alarms_is_shared_by_all_tests():
    assert distributions.level_of(14) * 14 == pytest.approx(FAMILY)
    assert FAMILY <= 1e-6


def test_drawing_twice_and_keeping_the_likelier_has_the_distribution_stated():
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    both = torch.zeros(3, dtype=torch.float64)
    for first in range(3):
        for second in range(3):
            both[first if q[first] > q[second] else second] += q[first] * q[second]
    assert torch.allclose(controls.likelier_of_two(q), both)


# ---- what cannot be had ----


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
    finding = identity.low_precision_finding(models, METHOD, questions(), "bfloat16", 4.0, 0)
    assert (finding.result, finding.passed) == ("not checked", True)
    assert "cannot be run in bfloat16" in finding.number
    lacks(monkeypatch, "float64")
    with pytest.raises(UserError, match=r"in float64.* needs it; `drafttrain evaluate`"):
        lossless.trial_of(models, questions(), [Sampling(1.0)], 1, 100, 0)


def test_prompts_without_room_for_an_answer_are_left_out_and_none_is_refused():
    found = lossless.questions_of({"short": [1] * 5, "long": [1] * 9, "none": []}, context=9, limit=64)
    assert [(each.prompt_id, each.limit) for each in found] == [("short", 4)]
    with pytest.raises(UserError, match="no prompt of fewer than 9 tokens"):
        lossless.questions_of({"long": [1] * 9}, context=9, limit=64)


def test_the_table_names_a_method_once():
    rows = [findings.Finding("m", test, "passed", "p = 0.5") for test in ("one", "another")]
    lines = findings.aligned(rows)
    assert [line.split() for line in lines] == [
        ["method", "test", "result", "number"],
        ["m", "one", "passed", "p", "=", "0.5"],
        ["another", "passed", "p", "=", "0.5"],
    ]
    assert lines[1].index("passed") == lines[2].index("passed")
