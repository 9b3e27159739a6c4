"""Traces: drawn from the right distributions, equal to what plain forwards give, whatever the batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.errors import UserError
from drafttrain.evaluation.trace_scores import RULES, Scores, flat_scores, known_probabilities, score_rows, unpack
from drafttrain.evaluation.tracing import Tracer, TraceSettings, couple
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.ops.random import sample
from drafttrain.ops.sampling import Sampling, seen_tokens
from drafttrain.records import SCHEMAS
from tests.conftest import build_llama

VOCABULARY = 300

# Wilson-Hilferty: the chi-square quantile that is exceeded with probability 1e-9
_Z = 5.998


def chi_square_limit(freedom: int) -> float:
    return freedom * (1 - 2 / (9 * freedom) + _Z * (2 / (9 * freedom)) ** 0.5) ** 3


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


# --- the coupling ---------------------------------------------------------------------------------------------------


@pytest.fixture
def random():
    return torch.Generator().manual_seed(3)


def distributions(random, tokens: int = 8):
    return (torch.randn(2, tokens, generator=random, dtype=torch.float64) * 1.5).softmax(-1)


def test_the_drafted_token_is_distributed_as_q_and_accepted_as_often_as_can_be(random):
    p, q = distributions(random)
    count = 40_000
    u = torch.rand(3, count, generator=random, dtype=torch.float64)
    x_N = sample(p.expand(count, -1), u[0])
    y_N = couple(p.expand(count, -1), q.expand(count, -1), x_N, u[1], u[2])
    limit = chi_square_limit(len(q) - 1)
    counts = torch.bincount(y_N, minlength=len(q)).double()
    assert chi_square(counts, count * q) < limit
    overlap = float(torch.minimum(p, q).sum())
    assert abs(float((x_N == y_N).double().mean()) - overlap) < 6 * (overlap * (1 - overlap) / count) ** 0.5
    # negative controls: neither p, nor a q that is a little different, passes for the distribution of Y
    assert chi_square(counts, count * p) > 2 * limit
    wrong = (q.log() + 0.1 * torch.tensor([1.0, -1.0] * 4)).softmax(-1)
    assert chi_square(counts, count * wrong) > 2 * limit


def test_a_coupling_with_another_q_is_found_out(random):
    """The test above can fail: tokens coupled for the wrong q are not distributed as q."""
    p, q = distributions(random)
    wrong = (q.log() + 0.1 * torch.tensor([1.0, -1.0] * 4)).softmax(-1)
    u = torch.rand(3, 40_000, generator=random, dtype=torch.float64)
    x_N = sample(p.expand(40_000, -1), u[0])
    y_N = couple(p.expand(40_000, -1), wrong.expand(40_000, -1), x_N, u[1], u[2])
    counts = torch.bincount(y_N, minlength=len(q)).double()
    assert chi_square(counts, 40_000 * q) > 2 * chi_square_limit(len(q) - 1)


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_rejected_token_is_one_that_q_likes_better(seed, sparse):
    random = torch.Generator().manual_seed(seed)
    p_NV, q_NV = distributions(random, 6).unsqueeze(1).repeat(1, 200, 1)
    if sparse:  # as after top-k: tokens that one of the two cannot say
        p_NV[:, 0] = q_NV[:, 5] = 0
    u = torch.rand(2, 200, generator=random, dtype=torch.float64)
    x_N = torch.randint(0, 6, (200,), generator=random)
    y_N = couple(p_NV, q_NV, x_N, *u)
    rejected = torch.nonzero(x_N != y_N).flatten()
    assert bool((q_NV[rejected, y_N[rejected]] > p_NV[rejected, y_N[rejected]]).all())
    assert bool((q_NV[rejected, x_N[rejected]] <= p_NV[rejected, x_N[rejected]]).all())


def test_equal_models_are_never_rejected(random):
    p, _ = distributions(random)
    u = torch.rand(2, 500, generator=random, dtype=torch.float64)
    x_N = sample(p.expand(500, -1), u[0])
    y_N = couple(p.expand(500, -1), p.expand(500, -1), x_N, *u)
    assert torch.equal(x_N, y_N)


def test_a_token_outside_both_nuclei_is_replaced_by_one_that_q_can_say(random):
    """Top-p keeps one token, the same of both models, and the recorded one is another."""
    p_NV = torch.tensor([[0.0, 1.0, 0.0]]).expand(50, -1)
    u = torch.rand(2, 50, generator=random, dtype=torch.float64)
    assert couple(p_NV, p_NV, torch.full((50,), 2), *u).tolist() == [1] * 50


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    """A target and a drafter that agrees with it about two times in three, in float64."""
    target, drafter = build_llama(seed=0).double(), build_llama(seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return target, drafter


def responses(models, sampling: Sampling, count: int = 5, tokens: int = 12):
    rng = np.random.default_rng(2)
    prompts = [rng.integers(6, VOCABULARY, 3 + index).tolist() for index in range(count)]
    decoder = Decoder(Engine(models[0]), None, sampling, {5})
    limits = [tokens + 2 * index for index in range(count)]
    return [
        {"prompt_id": f"p{index}", "split": "train", "task": "code", "source": "test", "turn": index % 2}
        | {"prompt_ids": prompt, "response_ids": completion.token_ids}
        for index, (prompt, completion) in enumerate(zip(prompts, decoder.generate(prompts, limits), strict=True))
    ]


def tracer(models, sampling: Sampling, heads=None, **changes) -> Tracer:
    given = {"top_k": 4, "temperatures": (0.5, 1.0), "run_length": 3} | changes
    return Tracer(Engine(models[0]), Engine(models[1]), TraceSettings(sampling, **given), heads or {})


def logits_after(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


SAMPLINGS = {
    "plain": Sampling(1.0),
    "warped": Sampling(0.7, top_k=20, top_p=0.8, repetition_penalty=1.3),
    "greedy": Sampling(0.0),
    "greedy with a penalty": Sampling(0.0, repetition_penalty=1.5),
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_columns_are_what_separate_forwards_give(models, name):
    sampling = SAMPLINGS[name]
    rows = responses(models, sampling, 2)
    for row, made in zip(rows, tracer(models, sampling).trace(rows), strict=True):
        for place, token in enumerate(row["response_ids"]):
            text = row["prompt_ids"] + row["response_ids"][:place]
            p_logits, q_logits = (logits_after(model, text) for model in models)
            seen = seen_tokens([text], VOCABULARY, torch.device("cpu"))[0]
            p, q = (sampling.probabilities(logits, seen) for logits in (p_logits, q_logits))
            drafted = made["draft_ids"][place]
            if sampling.greedy:
                assert drafted == q.argmax()
                assert p.argmax() == token
            measured = sampling.scoring.probabilities(q_logits, seen)
            entropy = -(measured[measured > 0] * measured[measured > 0].log()).sum()
            assert made["log_p"][place] == pytest.approx(float(p[drafted].log()), abs=1e-5)
            assert made["log_q"][place] == pytest.approx(float(measured[drafted].log()), abs=1e-5)
            assert made["overlap"][place] == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-5)
            assert made["entropy"][place] == pytest.approx(float(entropy), abs=1e-5)
            for model, logits in (("p", p_logits), ("q", q_logits)):
                top = logits.topk(4)
                stored = slice(4 * place, 4 * place + 4)
                assert made[f"{model}_top_ids"][stored].tolist() == top.indices.tolist()
                np.testing.assert_allclose(made[f"{model}_top_logits"][stored], top.values, atol=1e-5)
                log_z = [float((logits / t).logsumexp(0)) for t in (0.5, 1.0)]
                np.testing.assert_allclose(made[f"log_z_{model}"][2 * place : 2 * place + 2], log_z, atol=1e-5)
            kept = max(int((p > 0).sum()), int((q > 0).sum()))
            assert made["top_p_leaves_k"][place] == (sampling.top_p < 1 and kept > 4)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_rows_do_not_depend_on_the_batch(models, name):
    sampling = SAMPLINGS[name]
    rows = responses(models, sampling)
    making = tracer(models, sampling)
    for row, together in zip(rows, making.trace(rows), strict=True):
        [alone] = making.trace([row])
        assert set(together) == set(SCHEMAS["traces"].names)
        for field, value in alone.items():
            if isinstance(value, np.ndarray):
                np.testing.assert_allclose(together[field], value, atol=1e-6, err_msg=field)
            else:
                assert together[field] == value


def test_runs_are_what_the_drafter_says_by_itself(models):
    """Greedy: the run behind a rejected token is the drafter's own continuation of it."""
    rows = responses(models, Sampling(0.0))
    alone = Decoder(Engine(models[1]), None, Sampling(0.0))
    checked = 0
    for row in tracer(models, Sampling(0.0), run_length=4).trace(rows):
        places = np.flatnonzero(row["draft_ids"] != np.array(row["response_ids"]))
        runs = row["run_ids"].reshape(len(places), 4)
        for place, run in zip(places, runs, strict=True):
            text = row["prompt_ids"] + row["response_ids"][:place] + [int(row["draft_ids"][place])]
            assert alone.generate([text], 4)[0].token_ids == run.tolist()
            checked += 1
    assert checked > 5


def test_sampled_runs_are_drawn_from_q(models):
    """First run tokens of many rows with one text: chi-square against the drafter's q, and a control that fails."""
    prompt, response = [7, 9, 11], [20]
    rows = [
        {"prompt_id": f"p{index}", "split": "train", "task": "", "source": "", "turn": 0}
        | {"prompt_ids": prompt, "response_ids": response}
        for index in range(3000)
    ]
    made = tracer(models, Sampling(1.0, top_k=2), run_length=1).trace(rows)
    rejected = [row for row in made if row["draft_ids"][0] != 20]
    drafted = int(np.bincount([row["draft_ids"][0] for row in rejected]).argmax())
    runs = torch.tensor([int(row["run_ids"][0]) for row in rejected if row["draft_ids"][0] == drafted])
    q = Sampling(1.0, top_k=2).probabilities(logits_after(models[1], [*prompt, drafted]))
    support = q.nonzero().flatten()
    counts = torch.bincount(runs, minlength=VOCABULARY).double()[support]
    assert len(runs) > 500
    assert counts.sum() == len(runs)
    assert chi_square(counts, len(runs) * q[support]) < chi_square_limit(1)
    assert chi_square(counts, len(runs) * q[support].flip(0)) > chi_square_limit(1)


def make_head(state: str, features: tuple[str, ...], drafter_size: int = 32) -> AcceptanceHead:
    torch.manual_seed(4)
    head = AcceptanceHead(AcceptanceHeadConfig(drafter_size, state, 1, features=features, max_length=3))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head.eval().requires_grad_(False)


@pytest.mark.parametrize("state", ["producing", "consumed"])
@pytest.mark.parametrize("features", [(), ("log_q", "entropy", "step")])
def test_head_scores_are_those_of_states_read_alone(models, state, features):
    head = make_head(state, features)
    rows = responses(models, Sampling(1.0), 2)
    making = tracer(models, Sampling(1.0), {"head": head}, run_length=2)
    names = list(RULES) + (["head@1", "head@2", "head@3"] if features else ["head"])
    manifest = {"scores": names, "run_length": 2}

    def alone(text, token, log_q, entropy, step):
        read = text if state == "producing" else [*text, token]
        with torch.no_grad():
            hidden = models[1].model(torch.tensor([read])).last_hidden_state[0, -1:]
        return float(head.score(hidden, *(torch.tensor([float(value)]) for value in (math.exp(log_q), entropy, step))))

    for row in making.trace(rows):
        found = unpack(row, manifest)
        scores, entropy = found["head"], found["entropy"]
        run_log_q = row["run_log_q"].reshape(-1, 2)
        rejections = 0
        for place, (x, y) in enumerate(zip(row["response_ids"], row["draft_ids"].tolist(), strict=True)):
            text = row["prompt_ids"] + row["response_ids"][:place]
            for step, score in enumerate(scores.values_TC[place], start=1):
                expected = alone(text, y, row["log_q"][place], row["entropy"][place], step)
                assert score == pytest.approx(expected, abs=1e-5)
            if x == y:
                continue
            text = [*text, y]
            for beyond, token in enumerate(row["run_ids"].reshape(-1, 2)[rejections].tolist()):
                facts = (run_log_q[rejections, beyond], entropy.run_values_MRC[rejections, beyond, 0])
                for step, score in enumerate(scores.run_values_MRC[rejections, beyond], start=1):
                    assert score == pytest.approx(alone(text, token, *facts, step), abs=1e-5)
                text = [*text, token]
            rejections += 1
        # a head that is trained later gives the same scores to the finished traces
        again = score_rows(models[1], head, [{**row, "run_entropy": entropy.run_values_MRC}])[0]
        for late, early in zip(again, scores, strict=True):
            np.testing.assert_allclose(late, early, atol=1e-6)


def test_scores_survive_their_flat_form():
    rng = np.random.default_rng(0)
    row = {"response_ids": [1, 2, 3], "draft_ids": [1, 5, 4]}
    scores = [Scores(rng.random((3, columns)), rng.random((2, 4, columns))) for columns in (1, 3)]
    row["scores"], row["run_scores"] = flat_scores(scores)
    found = unpack(row, {"scores": ["entropy", "h@1", "h@2", "h@3"], "run_length": 4})
    for name, expected in zip(("entropy", "h"), scores, strict=True):
        for stored, value in zip(found[name], expected, strict=True):
            np.testing.assert_allclose(stored, value, rtol=1e-6)


def test_known_probabilities_are_those_of_acceptance_and_zero_behind_a_rejection():
    row = {"log_p": np.log([0.2, 0.6]), "log_q": np.log([0.4, 0.3]), "run_entropy": np.ones((1, 3, 1))}
    [known] = known_probabilities([row])
    assert known.values_TC[:, 0].tolist() == pytest.approx([0.5, 1.0])
    assert known.run_values_MRC.tolist() == [[[0.0]] * 3]


def test_the_draft_of_the_record_is_the_drafters_in_greedy_decoding(models):
    """A round of the real decoder proposes the traced tokens up to its first rejection, and the run beyond it."""
    rows = responses(models, Sampling(0.0), 3, tokens=20)
    drafter = ModelDrafter(Engine(models[1]), length=4)
    decoder = Decoder(Engine(models[0]), drafter, Sampling(0.0), {5})
    proposed = []
    propose = drafter.propose
    drafter.propose = lambda *given: proposed.append((list(given[0].tokens[0]), propose(*given))) or proposed[-1][1]
    for row, made in zip(rows, tracer(models, Sampling(0.0), run_length=3).trace(rows), strict=True):
        proposed.clear()
        decoder.generate([row["prompt_ids"]], len(row["response_ids"]))
        drafted, response = made["draft_ids"].tolist(), row["response_ids"]
        rejected = [place for place in range(len(response)) if drafted[place] != response[place]]
        for text, draft in proposed:
            start = len(text) - len(row["prompt_ids"])
            first = next((place for place in rejected if place >= start), len(response))
            said = drafted[start : first + 1]
            if first < len(response):
                said += made["run_ids"].reshape(-1, 3)[rejected.index(first)].tolist()
            [tokens] = draft.rows()
            assert tokens == said[: len(tokens)]


def test_empty_responses_give_empty_rows(models):
    row = {
        "prompt_id": "p",
        "split": "train",
        "task": "",
        "source": "",
        "turn": 0,
        "prompt_ids": [4],
        "response_ids": [],
    }
    [made] = tracer(models, Sampling(1.0)).trace([row])
    assert all(len(made[name]) == 0 for name in ("draft_ids", "scores", "run_ids", "p_top_ids"))


def test_rows_that_cannot_be_traced_are_refused(models):
    row = {"prompt_id": "p", "split": "train", "task": "", "source": "", "turn": 1}
    with pytest.raises(UserError, match=r"prompt p \(turn 1\) is empty"):
        tracer(models, Sampling(1.0)).trace([row | {"prompt_ids": [], "response_ids": [4]}])
    with pytest.raises(UserError, match="600 tokens, more than the 512 positions of the target"):
        tracer(models, Sampling(1.0)).trace([row | {"prompt_ids": [4] * 300, "response_ids": [4] * 300}])
    broken = build_llama(seed=0).double()
    with torch.no_grad():
        broken.lm_head.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the drafter gives logits that are not finite"):
        tracer((models[0], broken), Sampling(1.0)).trace([row | {"prompt_ids": [4], "response_ids": [4]}])


@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0), Sampling(1.0, repetition_penalty=1.3)])
def test_tokens_that_the_drafter_lacks_are_rejected_and_read_as_its_last(sampling):
    """As in decoding: p keeps its whole vocabulary, and q gives nothing to what it does not know."""
    target, drafter = build_llama(seed=0).double(), build_llama(VOCABULARY - 40, seed=0).double()
    response = {"prompt_id": "p", "split": "tune", "task": "", "source": "", "turn": 0}
    response |= {"prompt_ids": [4, VOCABULARY - 1, 9], "response_ids": [7, VOCABULARY - 3, 12, 30]}
    engines = Engine(target), Engine(drafter)
    [row] = Tracer(*engines, TraceSettings(sampling, top_k=4, run_length=2)).trace([response])
    assert row["draft_ids"][1] != VOCABULARY - 3 and max(*row["draft_ids"], *row["run_ids"]) < VOCABULARY - 40
    if sampling != Sampling(1.0):
        return
    text = [*response["prompt_ids"], *response["response_ids"]]
    read = torch.tensor([text]).clamp(max=VOCABULARY - 41)
    with torch.no_grad():
        p, q = target(torch.tensor([text])).logits[0].softmax(-1), drafter(read).logits[0].softmax(-1)
    overlap = torch.minimum(p[2:-1, : q.shape[1]], q[2:-1]).sum(1)
    assert np.allclose(row["overlap"], overlap.numpy(), atol=1e-6)
