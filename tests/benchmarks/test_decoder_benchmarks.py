"""The benchmarks of the decoder compare like with like, and make of their rows what they say."""

import math

import pytest
import torch

from benchmarks import batching, identity, verify_attention, vs_transformers
from benchmarks.pair import METHOD
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.schema import AUTOREGRESSIVE, Divergence, Exactness
from drafttrain.evaluation.statistics import Interval
from drafttrain.models.fingerprint import Fingerprint
from drafttrain.models.loading import Loaded
from tests.conftest import build_llama

END = 5


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    nobody = Fingerprint("t", "a", "w")
    pair = build_llama(len(tiny_tokenizer), seed=0), build_llama(len(tiny_tokenizer), layers=1, hidden=16, seed=1)
    return Models(*(Loaded(model, tiny_tokenizer, nobody, "tiny") for model in pair), {}, frozenset({END}), "float32")


@pytest.fixture(scope="module")
def questions():
    return [Question(f"q{i}", "code", 0, (0, 7 + i, 11, 3 * i + 2), 24, None, i) for i in range(4)]


# ---- against transformers ----


def test_every_method_answers_with_the_same_tokens(models, questions):
    methods = vs_transformers.make_methods(models, "float64")
    for question in questions:
        answers = {name: answers(question) for name, answers in methods.items()}
        assert len(set(map(tuple, answers.values()))) == 1, answers


def test_assisted_generation_drafts_five_tokens_whatever_their_confidence(models, questions):
    assisted = vs_transformers.make_methods(models, "float64")[vs_transformers.ASSISTED]
    target, drafter = models.engines("float64")
    with vs_transformers._watched([target.model.get_output_embeddings(), drafter.model.get_decoder()]) as spent:
        tokens = assisted(questions[0])
    rounds, drafted = map(len, spent)
    assert len(tokens) == questions[0].limit  # no end token
    assert drafted >= vs_transformers.K * (rounds - vs_transformers.K)  # the last drafts are cut at the limit


@pytest.mark.parametrize("method", [METHOD, vs_transformers.ASSISTED])
def test_overhead_is_a_part_of_the_time_and_rounds_are_forwards_of_the_target(models, questions, method):
    target, drafter = models.engines("float64")
    answers = vs_transformers.make_methods(models, "float64")[method]
    seconds, module_seconds, rounds = vs_transformers.overhead(answers, [target, drafter], questions[0])
    assert 0 < seconds < module_seconds < 5
    assert math.ceil(24 / 6) <= rounds <= 24
    assert not any("forward" in vars(thing) for thing in (target, target.model, target.model.get_decoder()))


def test_figures_are_rates_over_rates(questions):
    tokens = {name: [[1, 2, 3, 4]] * 4 for name in (METHOD, AUTOREGRESSIVE, "generate", "assisted", "prompt lookup")}
    tokens["assisted"] = [[1, 2, 3, 4]] * 3 + [[1, 2, 9, 4]]
    times = dict.fromkeys(tokens, [2.0] * 4) | {METHOD: [0.5] * 4, "assisted": [1.0] * 4}
    overheads = {METHOD: [(0.01, 0.02, 5)] * 4, "assisted": [(0.2, 0.2, 10)] * 4}
    check = Exactness("float32", False, divergences=[Divergence("q", 3, 1.0, 0.1, False)])
    found = vs_transformers.figures_of(questions, times, tokens, overheads, check)
    assert found["assisted_ratio"].value == 2 and found["autoregressive_ratio"].value == 1
    assert found["overhead_ratio"].value == pytest.approx(0.002 / 0.02)
    assert found["module_overhead_ratio"].value == pytest.approx(0.004 / 0.02)
    assert found["overhead_ms"].value == pytest.approx(2) and found["assisted_overhead_ms"].value == pytest.approx(20)
    assert (found["identical_fraction"].value, found["assisted_identical_fraction"].value) == (1, 0.75)
    assert found["unexplained"].value == 1


def test_the_worse_dtype_counts():
    found = {
        "overhead_ratio_fp32": Interval(0.1, 0, 1),
        "overhead_ratio_bf16": Interval(0.2, 0, 1),
        "assisted_ratio_fp32": Interval(1.5, 1, 2),
        "assisted_ratio_bf16": Interval(1.2, 1, 2),
    }
    worst = vs_transformers.worst(found)
    assert {name: interval.value for name, interval in worst.items()} == {"overhead_ratio": 0.2, "assisted_ratio": 1.2}


# ---- attention ----


@pytest.mark.parametrize("dtype", verify_attention.DTYPES)
@torch.inference_mode()
def test_both_sides_attend_to_the_same_and_may_be_called_again(dtype):
    layer = verify_attention.Layer(verify_attention.DTYPES[dtype])
    ours, theirs = layer.ours(), layer.theirs()
    first = ours()
    assert first.shape == (1, verify_attention.ROWS, verify_attention.HEADS, verify_attention.SIZE)
    for side in (ours, theirs, ours, theirs):
        assert torch.allclose(side(), first, atol=verify_attention.TOLERANCE[dtype])


# ---- batches ----


def test_rows_of_a_batch_differ_in_prompt_and_limit():
    question = Question("q", "code", 0, tuple(range(batching.PROMPT)), 192, None, 0)
    rows = [batching._cut(question, place, 96) for place in range(batching.BATCH)]
    assert len({len(row.ids) for row in rows}) == len({row.limit for row in rows}) == batching.BATCH
    assert min(row.limit for row in rows) == 96 and max(row.limit for row in rows) == 144


@pytest.mark.parametrize("method", batching.METHODS.values())
def test_rows_that_are_not_those_of_their_single_run_are_noticed(models, questions, method):
    decoder = models.decoder(method, batching.GREEDY, 0, "float64")
    assert batching.identical(decoder, [questions]) == [True] * 4
    plain = decoder.generate

    def wrong_in_batches(prompts, *more):
        found = plain(prompts, *more)
        if len(prompts) > 1:
            found[2].token_ids[-1] += 1
        return found

    decoder.generate = wrong_in_batches
    assert batching.identical(decoder, [questions]) == [True, True, False, True]


def test_throughput_is_of_all_turns_together():
    rows = [{"batch_number": at % 2, "batch": (100, 1.0), "single": (100, 4.0)} for at in range(6)]
    assert batching.ratio(rows) == Interval(4, 4, 4)


# ---- identity ----


def test_growth_is_measured_from_the_first_batch_behind_a_share():
    memory = [(100 * at, (50 + min(at, 5)) * 2**20) for at in range(1, 11)]
    assert identity.growth(memory, 0.1) == 4
    assert identity.growth(memory, 0.5) == 0


def test_batches_are_counted_together(models, questions):
    total = Exactness("float64", True)
    for group in (questions[:3], questions[3:]):
        identity.add(total, identity.compare(models, "float64", group))
    assert total.passed and total.answers == total.identical == 4 and not total.divergences
    figures = identity.figures_of({"float64": total}, [(total.tokens, 0)])
    assert figures["identical_fraction_float64"] == 1 and figures["tokens_float64"] == total.tokens


def test_an_ended_run_of_identity_goes_on_with_what_it_found(tmp_path):
    part = tmp_path / "results.part.json"
    found = {"float32": Exactness("float32", True, 3, 2, 90, [Divergence("code:1", 7, 0.1, 0.2, True)])}
    assert identity.load(part, 5)[0] == 0
    identity.save(part, 4, 5, found)
    assert identity.load(part, 5) == (4, found)
    with pytest.raises(SystemExit, match="is of a run of 5 batches"):
        identity.load(part, 6)


def test_at_least_a_thousand_prompts_are_asked_and_more_for_more_tokens():
    count = {tokens: sum(identity.mixture(tokens, 1000, 256, 0).values()) for tokens in (1_000, 1_000_000)}
    assert 1000 <= count[1_000] < 1010
    assert count[1_000_000] > 1_000_000 / 256
    assert sum(identity.mixture(1_000, 1000, 256, given=1138).values()) == len(identity.SHARES)
