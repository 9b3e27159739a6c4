"""The load study asks what counted, takes the best of each kind, and derives latencies from the counts there are."""

import dataclasses
import itertools
import types
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.config import EvaluateConfig
from drafttrain.decoding import loop
from drafttrain.decoding.counts import Completion, Counts
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.evaluation import load_study
from drafttrain.evaluation.load_study import (
    Study,
    best_of_groups,
    finish_times,
    latencies,
    live_rows,
    request_count,
    requests_of,
    sizes_of,
)
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.runner import Round, Timings
from drafttrain.evaluation.schema import AUTOREGRESSIVE
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama
from tests.evaluation import synthetic


def completions(rounds, seconds, prefill=0.0):
    """Rows of a batch that last so many rounds each; `seconds`: of every round."""
    alive = [sum(count > number for count in rounds) for number in range(len(seconds))]
    share = [sum(seconds[n] / alive[n] for n in range(count)) for count in rounds]
    return [
        Completion([], "eos", [], Counts(rounds=count, prefill_seconds=prefill / len(rounds), decode_seconds=own))
        for count, own in zip(rounds, share, strict=True)
    ]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.lists(st.floats(1e-3, 5), min_size=6, max_size=6))
def test_the_end_of_a_row_follows_from_shares_of_rounds(rounds, seconds):
    ends = finish_times(completions(rounds, seconds[: max(rounds)], prefill=0.5))
    assert ends == pytest.approx([0.5 + sum(seconds[:count]) for count in rounds])


def test_rows_of_a_real_batch_end_when_their_last_round_does(monkeypatch):
    """Every reading of the clock is a second later: reading the prompts and every round take one."""
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
    batch = Decoder(Engine(build_llama(64)), None, Sampling(0.0)).generate([[0, 7 + i] for i in range(4)], [3, 9, 5, 5])
    assert finish_times(batch) == pytest.approx([4, 10, 6, 6])


def test_latency_is_the_median_of_the_repeats_of_every_request():
    repeats = [
        [*completions([1, 3], [each] * 3), *completions([2, 2], [each] * 2, prefill=1.0)] for each in (1.0, 2.0, 9.0)
    ]
    found = [list(each) for each in zip(*repeats, strict=True)]
    assert latencies(found, 2) == pytest.approx([2.0, 6.0, 5.0, 5.0])
    assert live_rows(found, 2) == pytest.approx((1 + 3 + 2 + 2) / (3 + 2))


# ---- what is asked ----


def asked(prompts=8):
    names = [(f"{task}-{i}", task) for task in synthetic.TASKS for i in range(prompts)]
    return [Question(name, task, 0, (0, 1), 16, None, 100 * at) for at, (name, task) in enumerate(names)]


def answers(**changes):
    method = synthetic.METHODS[1][0]
    return {
        AUTOREGRESSIVE: synthetic.samples(AUTOREGRESSIVE, "greedy", 0),
        method: synthetic.samples(method, "greedy", 4, **changes),
    }


def test_of_what_counts_with_every_method_the_longest_answers_are_asked_for():
    given_answers = answers(looping=("code-0",), wrong=("revise-2",))
    lengths = {sample.prompt_id: len(sample.token_ids) for sample in given_answers[AUTOREGRESSIVE]}
    counted = {each.prompt_id for each in asked()} - {"code-0", "revise-2"}
    found = [each.prompt_id for each in requests_of(asked(), given_answers, 16)]
    assert [lengths[name] for name in found] == sorted((lengths[name] for name in counted), reverse=True)[:16]
    assert len(counted & set(found)) == 16
    assert {each.prompt_id for each in requests_of(asked(), given_answers, 99)} == counted
    assert requests_of(asked(), answers(looping=[each.prompt_id for each in asked()]), 16) == []


def test_too_few_questions_are_asked_again_with_other_draws():
    found = requests_of(asked()[:3], answers(), 7)
    assert sorted(Counter(each.prompt_id for each in found).values()) == [2, 2, 3]
    assert len({each.sample_id for each in found}) == 7
    assert {each.sample_id for each in asked()[:3]} <= {each.sample_id for each in found}


def test_the_method_that_replay_chose_stands_for_its_kind():
    report, _ = synthetic.report(samplings=("greedy",))
    rows = report.methods
    for row in rows:
        row.replayed_speedup = 1.5
    rows[2].replayed_speedup, rows[5].replayed_speedup = 1.6, 1.7
    rows[1].overall.speedup = dataclasses.replace(rows[1].overall.speedup, value=9.0)
    assert [row.kind for row in (rows[2], rows[5])] == ["fixed", "confidence"]
    assert best_of_groups(rows) == [rows[2].method, rows[5].method]
    for row in rows:
        row.replayed_speedup = None
    assert best_of_groups(rows)[0] == rows[1].method  # as fast as measured, where nothing was replayed
    rows[1].overall.speedup = rows[2].overall.speedup = None
    assert rows[1].method not in best_of_groups(rows) and len(best_of_groups(rows)) == 1


@pytest.mark.parametrize(
    ("sizes", "studied"), [([], []), ([1], []), ([1, 1], []), ([16, 1, 4, 4], [1, 4, 16]), ([8], [8])]
)
def test_one_request_at_a_time_is_no_study(sizes, studied):
    assert sizes_of(EvaluateConfig(batch_sizes=sizes)) == studied


def test_the_largest_batch_is_filled():
    assert request_count([1, 4]) == 16 and request_count([4, 64]) == 64


# ---- runs ----


class Models:
    """No models: nothing is decoded here."""

    chain = "Model"

    def decoder(self, *_):
        return None

    def engines(self):
        return ()


def study(**config):
    return Study(Models(), Sampling(0.0), "greedy", EvaluateConfig(**config), 0)


def rounds(rows, width, verify):
    return [Round(0.0, verify=verify, total=1.0, width=width, rows=rows) for _ in range(5)]


def test_the_cost_of_width_is_of_full_batches_and_relative_to_width_one(monkeypatch):
    """A batch that has shrunk is cheaper and says nothing of its size."""
    shrunk = [*rounds(1, 1, 0.1), *rounds(1, 3, 7.0)]
    timings = {"a": Timings(rounds(4, 1, 0.8) + shrunk), "b": Timings(rounds(4, 3, 1.6))}
    monkeypatch.setattr(load_study, "instrument_all", lambda decoders, groups, engines: timings)
    assert study(max_length=2)._verify(4, ["a", "b"], asked()) == pytest.approx([1.0, 1.5, 2.0])


def test_sizes_beyond_the_memory_are_left_out_and_told(monkeypatch):
    def points(self, size, methods, questions):
        if size > 4:
            raise torch.OutOfMemoryError("no")
        assert len(questions) % size == 0
        return [synthetic.load("greedy").batches[0].points[at] for at in range(len(methods))]

    monkeypatch.setattr(Study, "_points", points)
    monkeypatch.setattr(Study, "_verify", lambda *_: [1.0])
    made, given_answers = synthetic.report(samplings=("greedy",))
    of = {method: own for (_, method), own in given_answers.items()}
    tried = study(batch_sizes=[1, 3, 32])
    found = tried.run(made.methods, asked(), of)
    assert [each.batch_size for each in found.batches] == [1, 3]
    assert (found.requests, found.repeated, found.prompts) == (32, 0, 32)
    assert any("at a batch of 32" in note for note in tried.notes)
