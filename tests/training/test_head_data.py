"""Examples of the acceptance head: labels, features, and states against forward passes of their own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from drafttrain.training.head_data import HeadDataset, Layout, Trace, collate, features_and_labels, make_examples
from drafttrain.training.head_states import DrafterStates, StateStore
from tests.conftest import build_llama
from tests.training.synthetic_traces import make_manifest, make_records

HIDDEN = 16


@pytest.fixture(scope="module")
def pair():
    # close enough that drafts are accepted about half of the time
    target, drafter = build_llama(64, hidden=HIDDEN, seed=0), build_llama(64, layers=1, hidden=HIDDEN, seed=0)
    drafter.model.embed_tokens.load_state_dict(target.model.embed_tokens.state_dict())
    drafter.lm_head.load_state_dict(target.lm_head.state_dict())
    return target.double(), drafter.double()


@pytest.fixture(scope="module")
def records(pair):
    return make_records(*pair, count=6, tune=0)


LAYOUT = Layout(greedy=False)


def config(**settings) -> AcceptanceHeadConfig:
    return AcceptanceHeadConfig(HIDDEN, **settings)


def dataset(records, seed=0, **settings) -> HeadDataset:
    return HeadDataset(records, LAYOUT, config(**settings), seed)


def state_after(model, tokens):
    return model.model(torch.tensor([tokens])).last_hidden_state[0, -1]


def test_soft_labels_are_the_acceptance_probability(records):
    labels = torch.cat([LAYOUT.trace(record).label_T for record in records])
    expected = [min(1.0, math.exp(p - q)) for r in records for p, q in zip(r["log_p"], r["log_q"], strict=True)]
    assert labels.tolist() == pytest.approx(expected, rel=1e-5)
    assert 0.1 < float(labels.mean()) < 0.95  # the fixture has both kinds


def test_greedy_labels_say_whether_the_target_agreed(pair):
    manifest = make_manifest(*pair, _Tokenizer(), temperature=0.0)
    layout = Layout.of(manifest)
    assert layout.greedy
    for record in make_records(*pair, count=3, tune=0, temperature=0.0):
        agreed = [float(x == y) for x, y in zip(record["response_ids"], record["draft_ids"], strict=True)]
        assert layout.trace(record).label_T.tolist() == agreed


@torch.no_grad()
def test_expected_labels_are_of_all_likely_tokens_and_of_the_drawn_one_where_it_is_none(pair, records):
    layout = Layout.of(make_manifest(*pair, _Tokenizer()))
    data = HeadDataset(records, layout, config(data="expected"), seed=0, shuffle=False)
    drawn = 0
    for record, (_, trace, examples) in zip(records, map(data.__getitem__, range(len(data))), strict=True):
        masses_TV = [
            [
                model(torch.tensor([[*trace.prompt, *trace.response_T.tolist()[:i]]])).logits[0, -1].softmax(-1)
                for model in pair
            ]
            for i in range(len(trace.response_T))
        ]
        covered = [set() for _ in masses_TV]
        columns = (examples.index_N, examples.drafted_N, examples.log_q_N, examples.label_N, examples.weight_N)
        for i, token, log_q, label, weight in zip(*(column.tolist() for column in columns), strict=True):
            p, q = (float(mass_V[token]) for mass_V in masses_TV[i])
            assert (math.exp(log_q), label) == pytest.approx((q, min(1.0, p / q)), rel=1e-4)
            drawn += weight == 1
            assert weight == pytest.approx(q, rel=1e-4) or (weight == 1 and token == record["draft_ids"][i])
            assert token not in covered[i]
            covered[i].add(token)
        assert all(y in tokens for y, tokens in zip(record["draft_ids"], covered, strict=True))
    assert drawn > 0


def test_expected_labels_want_a_plain_temperature(pair):
    manifest = make_manifest(*pair, _Tokenizer())
    with pytest.raises(UserError, match="plain temperature"):
        Layout.of(manifest | {"sampling": manifest["sampling"] | {"top_p": 0.9}}).check(config(data="expected"))
    Layout.of(make_manifest(*pair, _Tokenizer(), temperature=0.0)).check(config(data="expected"))


def test_columns_of_unequal_length_are_refused(records):
    with pytest.raises(UserError, match="p0"):
        LAYOUT.trace(records[0] | {"log_q": [0.0]})


@pytest.mark.parametrize("state", ["producing", "consumed"])
@pytest.mark.parametrize("data", ["exact", "rounds"])
def test_states_are_those_of_decoding(pair, records, state, data):
    drafter = pair[1]
    examples = dataset(records, state=state, data=data)
    items = [examples[i] for i in range(len(examples))]
    hidden_NH = DrafterStates(drafter, config(state=state, data=data))(items)
    row = 0
    for _, trace, examples in items:
        for index in examples.index_N.tolist():
            seen = _context(trace, index, with_token=state == "consumed")
            torch.testing.assert_close(hidden_NH[row], state_after(drafter, seen))
            row += 1
    assert row == len(hidden_NH) > 20


def _context(trace: Trace, index: int, with_token: bool) -> list[int]:
    """What the drafter has read when it proposes the token of a position."""
    x, y = trace.response_T.tolist(), trace.draft_T.tolist()
    return [*trace.prompt, *x[:index], *([y[index]] if with_token else [])]


def test_mixed_states_have_read_the_mixture(pair, records):
    drafter = pair[1]
    data = dataset(records, state="consumed", data="mixed", mixing=0.5)
    items = [data[i] for i in range(len(data))]
    hidden_NH = DrafterStates(drafter, data.config)(items)
    row = 0
    for _, trace, examples in items:
        z = examples.tokens_T.tolist()
        for index in examples.index_N.tolist():
            assert z[index] == trace.draft_T[index]
            torch.testing.assert_close(hidden_NH[row], state_after(drafter, [*trace.prompt, *z[: index + 1]]))
            row += 1
    assert 0 < row < sum(len(trace.draft_T) for _, trace, _ in items)


def test_mixing_is_new_every_epoch_and_the_states_of_exact_data_are_not(records):
    mixed = dataset(records, state="consumed", data="mixed", mixing=0.5)
    before = [mixed[i] for i in range(len(mixed))]
    mixed.set_epoch(1)
    after = {row: examples for row, _, examples in (mixed[i] for i in range(len(mixed)))}
    assert any(not torch.equal(examples.tokens_T, after[row].tokens_T) for row, _, examples in before)


def test_the_store_gives_what_the_drafter_computes(pair, records, tmp_path):
    for state, data in (("producing", "exact"), ("consumed", "exact"), ("consumed", "rounds")):
        examples = dataset(records, state=state, data=data)
        states = DrafterStates(pair[1], examples.config)
        store = StateStore(tmp_path / f"{state}-{data}.bin", states, examples, "key")
        items = [examples[i] for i in range(len(examples))]
        torch.testing.assert_close(store(items), states(items))
        assert store(items[:0]).shape == (0, HIDDEN)


def test_a_finished_store_is_used_and_another_is_made_again(pair, records, tmp_path):
    examples = dataset(records)
    path = tmp_path / "states.bin"
    first = StateStore(path, DrafterStates(pair[1], examples.config), examples, "a")
    items = [examples[0]]
    expected = first(items)

    class Refuses(DrafterStates):
        def flat(self, wanted):
            raise AssertionError("computed again")

    assert torch.equal(StateStore(path, Refuses(pair[1], examples.config), examples, "a")(items), expected)
    with pytest.raises(AssertionError, match="computed again"):
        StateStore(path, Refuses(pair[1], examples.config), examples, "b")
    # the attempt that failed left no note that would pass the file off as finished
    with pytest.raises(AssertionError, match="computed again"):
        StateStore(path, Refuses(pair[1], examples.config), examples, "a")


tokens = st.lists(st.booleans(), min_size=1, max_size=40)


def _trace(accepted: list[bool]) -> Trace:
    total = len(accepted)
    return Trace(
        sample=5,
        prompt=[1],
        response_T=torch.zeros(total, dtype=torch.long),
        draft_T=torch.tensor([0 if kept else 1 for kept in accepted]),
        label_T=torch.linspace(0.1, 0.9, total),
        log_q_T=-torch.ones(total),
        entropy_T=torch.ones(total),
    )


@given(tokens, st.integers(1, 3), st.integers(0, 6), st.integers(0, 3))
def test_rounds_are_a_walk_of_speculative_decoding(accepted, low, more, epoch):
    limits = config(data="rounds", min_length=low, max_length=low + more)
    examples = make_examples(_trace(accepted), limits, seed=0, epoch=epoch)
    index, step = examples.index_N.tolist(), examples.step_N.tolist()
    starts = [place for place, k in enumerate(step) if k == 1]
    position = 0
    for start, end in zip(starts, [*starts[1:], len(step)], strict=True):
        drafted = index[start:end]
        assert drafted == list(range(position, position + len(drafted)))
        assert step[start:end] == list(range(1, len(drafted) + 1))
        assert all(accepted[place] for place in drafted[:-1])
        rejected, last = not accepted[drafted[-1]], drafted[-1] == len(accepted) - 1
        assert len(drafted) <= low + more and (len(drafted) >= low or rejected or last)
        position = drafted[-1] + (1 if rejected else 2)
    assert position >= len(accepted)


@given(tokens, st.integers(1, 8), st.integers(0, 3))
def test_exact_steps_only_look_back_over_accepted_tokens(accepted, max_length, epoch):
    trace = _trace(accepted)
    examples = make_examples(trace, config(max_length=max_length), seed=0, epoch=epoch)
    assert examples.index_N.tolist() == list(range(len(accepted)))
    for position, step in enumerate(examples.step_N.long().tolist()):
        assert 1 <= step <= max_length
        assert all(accepted[position - step + 1 : position])


def test_steps_reach_as_far_back_as_they_may():
    steps = [
        make_examples(_trace([True] * 12), config(max_length=8), seed=0, epoch=epoch).step_N for epoch in range(60)
    ]
    assert torch.stack(steps).amax(0).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8, 8, 8, 8]


def test_every_epoch_has_every_response_once_in_an_order_of_its_own(records):
    data = HeadDataset(records, LAYOUT, config(), seed=3, global_batch=4)
    assert len(data) == 8
    orders = []
    for epoch in (0, 1):
        data.set_epoch(epoch)
        items = [data[i] for i in range(len(data))]
        assert items[6:] == [None, None]
        orders.append([row for row, _, _ in items[:6]])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(6))
    assert orders[0] != orders[1]
    again = HeadDataset(records, LAYOUT, config(), seed=3, global_batch=4)
    assert [again[i][0] for i in range(6)] == orders[0]


def test_a_batch_of_nothing_has_no_examples():
    batch = collate([None, None])
    assert batch["wanted"] == []
    assert all(batch[name].shape == (0,) for name in ("log_q", "entropy", "step", "labels"))


def test_features_and_labels_cover_every_drafted_token(records):
    columns = features_and_labels(dataset(records))
    assert {len(column) for column in columns} == {sum(len(record["draft_ids"]) for record in records)}


class _Tokenizer:
    def get_vocab(self):
        return {"a": 0}

    def encode(self, text, add_special_tokens):
        return [0]
