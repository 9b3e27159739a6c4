"""Methods counted by look-up are the methods as they run: rounds, forwards, accepted tokens."""

from __future__ import annotations

from collections import Counter

import pytest

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build
from drafttrain.decoding.loop import Decoder
from drafttrain.errors import UserError
from drafttrain.evaluation.sketch import count, look_up
from drafttrain.ops.sampling import Sampling
from tests.decoding.support import pair

PROMPTS = [[1, 5, 3, 1, 5], [7, 8, 9, 10, 11, 3, 4, 7, 8], [20, 4, 20, 4]]
METHODS = [
    "Autoregressive()",
    "Model(small, length=3)",
    "Model(small, stop=Confidence(0.6, max=5))",
    "Copy(gamma=1, length=4)",
    "FirstOf(Copy(gamma=2, length=4), Model(small, length=2))",
    "Then((Model(small, length=2), 2), (Copy(gamma=1), 4))",
    "Reviewed(small, inner=Copy(gamma=1, length=3))",
    "Then((Reviewed(base, inner=Reviewed(small, inner=MaxGram(length=4))), 3), (Model(small, length=2), 2))",
]


@pytest.fixture(scope="module")
def engines():
    target, small = pair()
    _, base = pair(noise=0.1)
    return {"target": Engine(target), "small": Engine(small), "base": Engine(base)}


def known(engines, sampling, prompts=PROMPTS, tokens=24):
    models = {name: engines[name] for name in ("small", "base")}
    rows = Decoder(engines["target"], None, sampling).generate(prompts, tokens)
    return [
        look_up(models, engines["target"], prompt, row.token_ids, sampling, "task", key)
        for key, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]


@pytest.mark.parametrize("method", METHODS)
def test_greedy_counts_are_those_of_a_real_run(engines, method, monkeypatch):
    answers = known(engines, Sampling(0.0))
    widths: Counter = Counter()
    own = Engine.forward

    def forward(self, cache, tokens, counts=None, keep="all", tree=None):
        if self is not engines["target"] and keep in ("all", "last"):
            widths["small" if self is engines["small"] else "base", tokens.shape[1]] += 1
        return own(self, cache, tokens, counts, keep, tree)

    for answer, sketch in zip(answers, count(method, answers, 24, frozenset(), {}), strict=True):
        widths.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "forward", forward)
            drafter = build(method, engines)
            [row] = Decoder(engines["target"], drafter, Sampling(0.0)).generate([answer.prompt], len(answer.tokens))
        assert row.token_ids == list(answer.tokens)
        assert sketch.tokens == row.counts.tokens
        assert sketch.rounds.total() == row.counts.rounds
        assert sum(sketch.accepted.values()) == row.counts.accepted
        read = Counter({(name, width): n for name, each in sketch.reads.items() for width, n in each.items()})
        if "Reviewed" not in method:
            assert read == widths
        if method in METHODS[:5]:  # no member behind another's wrong token
            assert sketch.drafted.total() == row.counts.drafted


def test_sampled_counts_are_right_on_average(engines):
    prompts = [PROMPTS[0]] * 400
    answers = known(engines, Sampling(), prompts, 8)
    for method in ("Model(small, length=3)", "FirstOf(Copy(gamma=1, length=2), Model(small, length=2))"):
        rows = Decoder(engines["target"], build(method, engines), Sampling(), seed=9).generate(prompts, 8)
        real = sum(row.counts for row in rows).tau
        sketches = count(method, answers, 24, frozenset(), {})
        counted = sum(each.tokens for each in sketches) / sum(each.rounds.total() for each in sketches)
        assert abs(counted / real - 1) < 0.06


def test_a_rule_that_needs_a_models_state_is_refused(engines):
    answers = known(engines, Sampling(0.0))
    with pytest.raises(UserError, match="EntropyBound cannot be counted"):
        count("Model(small, stop=Entropy(1.0))", answers, 24, frozenset(), {})
