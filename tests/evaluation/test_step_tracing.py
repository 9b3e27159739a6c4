"""Step traces: what a LongSpec drafter drafts at each step of a round, and where a round gets to it."""

from __future__ import annotations

import pytest
import torch

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.longspec import LongSpec
from drafttrain.decoding.loop import Decoder
from drafttrain.evaluation.step_tracing import StepTracer
from drafttrain.evaluation.tracing import TraceSettings
from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from drafttrain.models.longspec_states import BesideTarget
from drafttrain.ops.sampling import Sampling
from drafttrain.records import SCHEMAS
from drafttrain.training.head_data import Layout, make_examples
from drafttrain.training.head_states import states_of
from tests.decoding.longspec_pairs import longspec_pair

PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 3, 4, 12, 13, 14, 15, 1], [20, 4]]
GREEDY, SAMPLED = Sampling(0.0), Sampling(1.0)


@pytest.fixture(scope="module")
def models():
    return longspec_pair()


def answers(target, sampling, tokens=24):
    done = Decoder(Engine(target), None, sampling, seed=1).generate(PROMPTS, tokens)
    about = {"split": "train", "task": "noise", "source": "test", "turn": 0}
    return [
        {"prompt_id": f"p{row}", **about, "prompt_ids": prompt, "response_ids": each.token_ids}
        for row, (prompt, each) in enumerate(zip(PROMPTS, done, strict=True))
    ]


def traced(models, sampling, rows):
    target, block = models
    return StepTracer(Engine(target), block, TraceSettings(sampling, seed=4, top_k=3)).trace(rows)


def test_greedy_traces_are_what_rounds_draft(models):
    """Every token of every real round stands in the trace of its step, at a place that is marked as reached."""
    target, block = models
    drafter = LongSpec(block, length=block.config.depth)
    plain, rounds = drafter.propose, []

    def propose(committed, *args):
        draft = plain(committed, *args)
        rounds.append((list(committed.tokens[0]), draft.rows()[0]))
        return draft

    drafter.propose = propose
    seen = 0
    for row, steps in zip(answers(target, GREEDY), traced(models, GREEDY, answers(target, GREEDY)), strict=True):
        rounds.clear()
        Decoder(Engine(target), drafter, GREEDY).generate([row["prompt_ids"]], 24)
        for text, tokens in rounds:
            for step, token in enumerate(tokens):
                place = len(text) - len(row["prompt_ids"]) + step
                if place >= 24:
                    break
                assert steps[step]["reached"][place] and steps[step]["draft_ids"][place] == token
                seen += step > 0
                if token != row["response_ids"][place]:
                    break
    assert seen > 20


def test_a_step_is_reached_where_the_tokens_before_it_were_accepted(models):
    for row in traced(models, SAMPLED, answers(models[0], SAMPLED)):
        assert [each["step"] for each in row] == list(range(1, models[1].config.depth + 1))
        assert all(set(each) == set(SCHEMAS["step_traces"].names) for each in row)
        for step, each in enumerate(row):
            for place, reached in enumerate(each["reached"]):
                before = [
                    place - back >= 0
                    and row[step - back]["draft_ids"][place - back] == each["response_ids"][place - back]
                    for back in range(1, step + 1)
                ]
                assert reached == all(before)
    assert 0 < sum(row["reached"].sum() for row in [each]) < 24


def test_rows_do_not_depend_on_the_batch(models):
    rows = answers(models[0], SAMPLED)
    together, alone = traced(models, SAMPLED, rows), [traced(models, SAMPLED, [row])[0] for row in rows]
    for some, other in zip(together, alone, strict=True):
        for one, two in zip(some, other, strict=True):
            assert (one["draft_ids"] == two["draft_ids"]).all() and (one["reached"] == two["reached"]).all()


@pytest.mark.parametrize("data", ["exact", "expected"])
def test_examples_are_of_their_step_where_it_is_reached(models, data):
    target, block = models
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    layout = Layout.of({"sampling": sampling, "temperatures": [0.5, 0.7, 1.0], "top_k": 3})
    config = AcceptanceHeadConfig(hidden_size=block.config.hidden_size, data=data, max_length=5)
    [steps] = traced(models, SAMPLED, answers(target, SAMPLED)[:1])
    states = states_of(BesideTarget(block, target), config)
    for record in steps:
        trace = layout.trace(record, likely=data == "expected")
        examples = make_examples(trace, config, seed=0, epoch=0)
        assert (examples.step_N == record["step"]).all() and record["reached"][examples.index_N.numpy()].all()
        if data == "exact":
            assert len(examples.index_N) == record["reached"].sum()
        [flat] = states.flat([(0, trace, examples)])
        log_q = Engine(target).logits(flat).log_softmax(1)  # the states are those that drew the tokens
        chosen = log_q[examples.index_N, examples.drafted_N]
        torch.testing.assert_close(chosen.float(), examples.log_q_N, atol=1e-4, rtol=1e-4)
    grouped = [(row, layout.trace(record), None) for row, record in enumerate(steps)]
    grouped = [(row, trace, make_examples(trace, config, 0, 0)) for row, trace, _ in grouped]
    together = states.flat(grouped)
    for item, flat in zip(grouped, together, strict=True):
        torch.testing.assert_close(flat, states.flat([item])[0])
