"""Methods counted by look-up are the methods as they run: rounds, forwards, accepted and drafted tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build
from drafttrain.decoding.loop import Decoder
from drafttrain.errors import UserError
from drafttrain.evaluation.guesses import look_up
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.sketch import count
from drafttrain.models.acceptance_head import AcceptanceHead, AcceptanceHeadConfig
from drafttrain.ops.sampling import Sampling
from tests.decoding.support import pair

PROMPTS = [[1, 5, 3, 1, 5], [7, 8, 9, 10, 11, 3, 4, 7, 8], [20, 4, 20, 4]]
METHODS = [
    "Autoregressive()",
    "Model(small, length=3)",
    "Model(small, length=6)",
    "Model(small, stop=Confidence(0.6, max=5))",
    "Model(small, stop=Confidence(0.9, per_token=True, min=2, max=6))",
    "Model(small, stop=Entropy(1.0, min=2, max=6))",
    "Model(small, length=5, stop=AcceptanceHead(own, 0.7, max=8))",
    "Model(small, stop=AcceptanceHead(published, 0.7, min=2, max=6))",
    "Copy(gamma=1, length=4)",
    "FirstOf(Copy(gamma=2, length=4), Model(small, length=2))",
    "Reviewed(small, inner=Copy(gamma=1, length=3))",
    "Then((Reviewed(small, inner=MaxGram(length=3)), 3), (MaxGram(length=4), 4))",
    "Then((Model(small, length=2), 2), (Copy(gamma=1), 4))",
    "Then((Reviewed(base, inner=Reviewed(small, inner=MaxGram(length=4))), 3), (Model(small, length=2), 2))",
]
TWO_MODELS = METHODS[-1]
"""Behind wrong tokens of another a model's own are taken to be those of the answer's path."""


@pytest.fixture(scope="module")
def engines():
    target, small = pair()
    _, base = pair(noise=0.1)
    return {"target": Engine(target), "small": Engine(small), "base": Engine(base)}


@pytest.fixture(scope="module")
def heads(engines):
    """Untrained heads whose scores are spread by the state."""
    torch.manual_seed(0)
    found = {}
    for name, state, features in (("own", "producing", ("log_q", "step")), ("published", "consumed", ())):
        size = engines["small"].config.hidden_size
        found[name] = AcceptanceHead(AcceptanceHeadConfig(size, state, 0, features=features, max_length=6)).eval()
        with torch.no_grad():
            found[name].output.weight.mul_(8)
    return found


def known(engines, sampling, heads=None, prompts=PROMPTS, tokens=24, limit=None, ends=(), names=("small", "base")):
    models = {name: engines[name] for name in names}
    rows = Decoder(engines["target"], None, sampling, ends).generate(prompts, tokens)
    own = {"small": heads or {}}
    return [
        look_up(
            models,
            engines["target"],
            Question(str(key), "task", 0, tuple(prompt), limit or tokens, None, key),
            row.token_ids,
            sampling,
            own,
        )
        for key, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]


@pytest.fixture(scope="module")
def answers(engines, heads):
    return known(engines, Sampling(0.0), heads)


def real(engines, heads, method, answer, monkeypatch, ends=frozenset()):
    """The row of a real run, and the drafting models' forwards by name and width."""
    widths: Counter = Counter()
    names = {id(engine): name for name, engine in engines.items()}
    own = Engine.forward

    def forward(self, cache, tokens, counts=None, keep="all", tree=None):
        if self is not engines["target"] and keep in ("all", "last"):
            widths[names[id(self)], tokens.shape[1]] += 1
        return own(self, cache, tokens, counts, keep, tree)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "forward", forward)
        drafter = build(method, {**engines, **heads})
        [row] = Decoder(engines["target"], drafter, Sampling(0.0), ends).generate([answer.prompt], answer.limit)
    return row, widths


@pytest.mark.parametrize("method", METHODS)
def test_greedy_counts_are_those_of_a_real_run(engines, heads, answers, method, monkeypatch):
    for answer, sketch in zip(answers, count(method, answers, 24, frozenset(), heads), strict=True):
        row, widths = real(engines, heads, method, answer, monkeypatch)
        assert row.token_ids == list(answer.tokens)
        assert sketch.tokens == row.counts.tokens
        assert sketch.rounds.total() == row.counts.rounds
        assert sum(sketch.accepted.values()) == row.counts.accepted
        if method != TWO_MODELS:
            assert sketch.drafted.total() == row.counts.drafted
            read = Counter({(name, width): n for name, each in sketch.reads.items() for width, n in each.items()})
            assert read == widths


@pytest.mark.parametrize("method", METHODS[:-1])
def test_drafts_go_on_where_an_answer_ends(engines, heads, answers, method, monkeypatch):
    """A real run may draft beyond the end, which costs wider forwards; what is counted does, too."""
    end = answers[0].tokens[9]
    length = answers[0].tokens.index(end) + 1
    [ended] = known(engines, Sampling(0.0), heads, PROMPTS[:1], 24, 60, {end})
    assert len(ended.tokens) == length < ended.limit
    [sketch] = count(method, [ended], 24, frozenset({end}), heads)
    row, _ = real(engines, heads, method, ended, monkeypatch, {end})
    assert row.token_ids == list(ended.tokens)
    assert sketch.rounds.total() == row.counts.rounds
    if method.startswith("Model") and "stop" not in method:
        assert sketch.drafted.total() == row.counts.drafted


def test_a_rule_that_is_asked_costs_what_it_is_asked_about(answers, heads):
    asked, fixed = (
        sum(each.judged for each in count(method, answers, 24, frozenset(), heads))
        for method in ("Model(small, stop=Confidence(0.6, max=5))", "Model(small, length=5)")
    )
    assert asked > 0 == fixed


def test_sampled_counts_are_right_on_average(engines, monkeypatch):
    monkeypatch.setattr("drafttrain.evaluation.guesses.RUN", 2)
    prompts = [PROMPTS[0]] * 250
    answers = known(engines, Sampling(), None, prompts, 8, names=["small"])
    for method in ("Model(small, length=3)", "FirstOf(Copy(gamma=1, length=2), Model(small, length=2))"):
        rows = Decoder(engines["target"], build(method, engines), Sampling(), seed=9).generate(prompts, 8)
        real = sum(row.counts for row in rows).tau
        sketches = count(method, answers, 24, frozenset(), {})
        counted = sum(each.tokens for each in sketches) / sum(each.rounds.total() for each in sketches)
        assert abs(counted / real - 1) < 0.06


def test_a_head_whose_scores_were_not_recorded_is_refused(engines, heads, answers):
    other = replace(heads["own"].config, max_length=5)
    with pytest.raises(UserError, match="no scores of AcceptanceHeadRule's head for base"):
        count("Model(base, stop=AcceptanceHead(own, 0.5))", answers, 24, frozenset(), heads)
    with pytest.raises(UserError, match="no scores of AcceptanceHeadRule's head for small"):
        count("Model(small, stop=AcceptanceHead(new, 0.5))", answers, 24, frozenset(), {"new": AcceptanceHead(other)})
