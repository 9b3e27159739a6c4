"""Runs are interleaved and paired; instrumented runs account for every round and leave the decoder as it was."""

import dataclasses

import pytest
import torch

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import Confidence
from drafttrain.evaluation import runner
from drafttrain.evaluation.measure import breakdown, costs_by_family, rising_fit
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.runner import Round, Timings, instrument, instrument_all, interleave
from drafttrain.evaluation.schema import AUTOREGRESSIVE
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama


@pytest.fixture(scope="module")
def engines():
    return Engine(build_llama(64, seed=0)), Engine(build_llama(64, layers=1, seed=1))


def questions(count, limit=12):
    return [Question(f"q{i}", "code", 0, (0, 7 + i, 11), limit, None, i) for i in range(count)]


def decoders(engines, sampling=None):
    target, small = engines
    sampling = sampling or Sampling(0.0)
    return {
        "plain": Decoder(target, None, sampling),
        "fixed": Decoder(target, ModelDrafter(small, 3), sampling),
        "adaptive": Decoder(target, ModelDrafter(small, stop=Confidence(0.5)), sampling),
    }


def test_every_method_answers_every_question_as_often_and_in_changing_order(engines, monkeypatch):
    asked = []
    monkeypatch.setattr(
        runner, "answer", lambda decoder, group: asked.append((decoder, group[0].prompt_id)) or list(group)
    )
    made = decoders(engines)
    found = interleave(made, questions(4), 1, repeats=3, warmup=1, description="")
    assert {method: [len(repeats) for repeats in rows] for method, rows in found.items()} == dict.fromkeys(
        made, [3] * 4
    )
    timed = asked[3:]  # after one warm-up each
    firsts = [timed[i][0] for i in range(0, len(timed), 3)]
    assert {id(decoder) for decoder in firsts} == {id(decoder) for decoder in made.values()}
    assert [name for _, name in timed] == [f"q{i}" for i in range(4) for _ in range(9)]


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_hold_the_answers_of_their_rows(engines, batch):
    asked = questions(5)
    found = interleave(decoders(engines), asked, batch, repeats=2, warmup=0, description="")
    for rows in found.values():
        assert len(rows) == 5 and all(len(repeats) == 2 for repeats in rows)
        assert [first.token_ids for first, _ in rows] == [second.token_ids for _, second in rows]
    assert [r[0].token_ids for r in found["fixed"]] == [r[0].token_ids for r in found["plain"]]  # greedy


@pytest.mark.parametrize("method", ["plain", "fixed", "adaptive"])
@pytest.mark.parametrize("batch", [1, 2])
def test_an_instrumented_run_accounts_for_every_round(engines, method, batch):
    decoder = decoders(engines)[method]
    asked = questions(4)
    timings = instrument(decoder, runner.batches(asked, batch), engines)
    counts = timings.counts
    if batch == 1:
        assert len(timings.rounds) == counts.rounds == counts.target_forwards
        assert sum(each.steps for each in timings.rounds) == sum(counts.draft_forwards.values())
        assert sum(sum(each.forwards.values()) for each in timings.rounds) == sum(counts.draft_forwards.values())
        assert sum(each.width - 1 for each in timings.rounds) == counts.drafted
    assert all(each.width >= 1 and each.verify > 0 for each in timings.rounds)
    assert timings.rounds[0].rows == batch and all(1 <= each.rows <= batch for each in timings.rounds)
    assert all(each.draft + each.verify <= each.total * (1 + 1e-6) for each in timings.rounds)
    whole = sum(each.total for each in timings.rounds)
    assert whole == pytest.approx(counts.decode_seconds, rel=0.35)
    assert timings.kv_bytes > 0
    spent = breakdown(timings)
    assert spent.draft + spent.verify + spent.loop == pytest.approx(whole / counts.tokens)
    assert (spent.draft > 0) == (method != "plain")


def test_instruments_leave_no_trace(engines):
    decoder = decoders(engines)["fixed"]
    before = runner.answer(decoder, questions(1))[0].token_ids
    instrument(decoder, [questions(1)], engines)
    for thing, name in ((decoder.target, "forward"), (decoder.drafter, "propose"), (engines[1], "new_cache")):
        assert name not in vars(thing)
    assert runner.answer(decoder, questions(1))[0].token_ids == before


def test_a_drafter_that_is_the_target_is_told_apart(engines):
    decoder = Decoder(engines[0], ModelDrafter(engines[0], 3), Sampling(0.0))
    timings = instrument(decoder, [questions(1)], engines)
    assert len(timings.rounds) == timings.counts.rounds == 3
    assert [each.steps for each in timings.rounds] == [3, 3, 3]


# ---- costs ----


def rounds(width, verify, draft=0.0, loop=0.0, count=40, steps=0, unit=1.0):
    times = [unit * seconds for seconds in (draft, verify, draft + verify + loop)]
    return [Round(0.0, *times, width, steps, unit) for _ in range(count)]


def timings(*parts):
    made = Timings([each for part in parts for each in part])
    made.counts.draft_forwards = {"drafter": 1} if any(each.steps for each in made.rounds) else {}
    return made


def test_costs_are_in_the_autoregressive_steps_beside_them():
    baseline = timings(rounds(1, 0.8, loop=0.2), rounds(1, 0.8, loop=0.2, unit=3.0))
    quiet, busy = (rounds(5, 1.2, draft=0.8, loop=0.3, steps=4, unit=unit) for unit in (1.0, 3.0))
    costs = costs_by_family({"fixed": timings(quiet, busy)}, baseline, 6)["fixed"]
    assert costs.c == {"drafter": pytest.approx(0.2)}
    assert costs.o == pytest.approx(0.3)
    assert costs.v == pytest.approx([0.8, 0.9, 1.0, 1.1, 1.2, 1.3])


def test_what_a_draft_costs_however_short_belongs_to_the_round():
    fixed = timings(*[rounds(k + 1, 1.0, draft=0.1 + 0.2 * k, steps=k) for k in (1, 2, 4, 8)])
    costs = costs_by_family({"fixed": fixed}, timings(rounds(1, 1.0)), 9)["fixed"]
    assert costs.c == {"drafter": pytest.approx(0.2)} and costs.o == pytest.approx(0.1)


def test_a_stopping_rule_never_makes_a_draft_step_cheaper():
    parts = {
        "fixed": timings(rounds(3, 1.0, draft=0.4, steps=2)),
        "confidence": timings(rounds(3, 1.0, draft=0.3, steps=2)),
        "head head": timings(rounds(3, 1.0, draft=0.6, steps=2)),
    }
    found = costs_by_family(parts, timings(rounds(1, 1.0)), 3)
    assert {family: round(costs.c["drafter"], 6) for family, costs in found.items()} == {
        "fixed": 0.2,
        "confidence": 0.2,
        "head head": 0.3,
    }
    assert len({costs.o for costs in found.values()}) == 1


def test_the_cost_of_a_rule_is_that_of_most_steps_not_of_most_rounds():
    fixed = timings(rounds(3, 1.0, draft=0.4, steps=2))
    short, long = rounds(2, 1.0, draft=0.5, steps=1, count=6), rounds(9, 1.0, draft=2.4, steps=8, count=2)
    found = costs_by_family({"fixed": fixed, "head head": timings(short, long)}, timings(rounds(1, 1.0)), 9)
    assert found["head head"].c == {"drafter": pytest.approx(0.3)}


def outside(*parts):
    """Rounds of a drafter from outside, each with the forwards that it counts."""
    counted = [dataclasses.replace(each, forwards=forwards) for forwards, part in parts for each in part]
    made = timings(counted)
    made.counts.draft_forwards = dict.fromkeys((name for each in counted for name in each.forwards), 1)
    return made


def test_a_drafter_from_outside_pays_its_own_price():
    """By the forwards that it counts, several members' and those of the longest row; else by the round."""
    fixed = timings(rounds(3, 1.0, draft=0.4, steps=2))
    members = outside(
        ({"a": 1, "b": torch.tensor([0, 1])}, rounds(6, 1.0, draft=0.1 + 0.3 * 2, loop=0.05, steps=5)),
        ({"a": 4, "b": 0}, rounds(6, 1.0, draft=0.1 + 0.3 * 4, loop=0.05, steps=5)),
    )
    free = outside(({}, rounds(6, 1.0, draft=0.02, loop=0.05, steps=5)), ({}, rounds(1, 1.0, draft=0.02)))
    found = costs_by_family({"fixed": fixed, "other x.A": members, "other x.B": free}, timings(rounds(1, 1.0)), 6)
    assert found["other x.A"].c == {"a": pytest.approx(0.3), "b": pytest.approx(0.3)}
    assert found["other x.B"].c == {}
    assert found["other x.A"].o - found["fixed"].o == pytest.approx(0.1)
    assert found["other x.B"].o - found["fixed"].o == pytest.approx(0.02)


def test_a_round_that_waited_for_somebody_else_does_not_count():
    calm, waited = rounds(5, 1.0, draft=0.4, steps=4), rounds(5, 50.0, draft=30.0, loop=9.0, steps=4, count=9)
    baseline = timings(rounds(1, 1.0))
    assert costs_by_family({"fixed": timings(calm, waited)}, baseline, 5) == costs_by_family(
        {"fixed": timings(calm)}, baseline, 5
    )


def test_a_wider_forward_never_costs_less():
    assert rising_fit([1.0, 3.0, 2.0, 4.0], [1, 1, 3, 1]) == pytest.approx([1.0, 2.25, 2.25, 4.0])
    assert rising_fit([3.0, 2.0, 1.0], [1, 1, 1]) == pytest.approx([2.0, 2.0, 2.0])


def test_instrumented_runs_take_turns_and_carry_their_unit(engines):
    made = {AUTOREGRESSIVE: decoders(engines)["plain"], "Model(drafter, length=3)": decoders(engines)["fixed"]}
    found = instrument_all(made, [[question] for question in questions(2)], engines)
    base, drafted = ([each.unit for each in found[method].rounds] for method in made)
    totals = [each.total for each in found[AUTOREGRESSIVE].rounds]
    assert len(set(base)) == len(set(drafted)) == 2, "one unit a batch"
    assert all(min(totals) <= unit <= max(totals) for unit in base)
    assert not set(base) & set(drafted), "every method has the unit of runs of its own"
