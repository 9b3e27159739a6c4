"""Drafting and decoding with trees: the target's text, whatever the shape, and caches that hold it."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine, Output
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, FixedLength
from drafttrain.decoding.synthetic import SyntheticAcceptance
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.decoding.trees import TreeGrowth
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from drafttrain.ops.tree import ABSENT, ROOT, depth_of
from drafttrain.testing import check_drafter
from tests.decoding.support import WatchedDrafter, greedy_reference, pair

GREEDY = Sampling(0.0)
PROMPTS = [[1, 2, 3, 4, 5, 6], [7], [9, 8, 3]]
EOS = (4, 11)


@functools.cache
def engines() -> tuple[Engine, Engine]:
    target, drafter = pair()
    return Engine(target), Engine(drafter)


class WatchedTrees(WatchedDrafter, TreeDrafter):
    """A tree drafter whose cache is compared before every round."""


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5),
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.sampled_from([(), EOS]),
)
@settings(max_examples=25, deadline=None)
def test_greedy_text_is_the_targets_whatever_the_tree(widths, limits, eos):
    target, engine = engines()
    drafter = WatchedTrees(engine, widths)
    prompts = PROMPTS[: len(limits)]
    for prompt, limit, own in zip(
        prompts, limits, Decoder(target, drafter, GREEDY, eos).generate(prompts, limits), strict=True
    ):
        assert own.token_ids == greedy_reference(target.model, prompt, limit, eos)
        counts = own.counts
        assert counts.tokens == len(own.token_ids) == counts.rounds + counts.accepted - (own.sources[-1] == "drafter")
        assert len(counts.drafted_at) <= len(widths) and sum(counts.accepted_at) == counts.accepted


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 1.3, "top_k": 6, "repetition_penalty": 1.4}])
def test_with_deterministic_children_sampled_text_is_that_without_a_drafter(options):
    """Token by token: at every node the target draws what it would draw alone."""
    target, engine = engines()
    sampling = Sampling(**options)
    alone = Decoder(target, None, sampling, EOS, seed=3).generate(PROMPTS, 25)
    drafter = WatchedTrees(engine, [5, 6, 3], drawn=False)
    found = Decoder(target, drafter, sampling, EOS, seed=3).generate(PROMPTS, 25)
    assert [own.token_ids for own in found] == [own.token_ids for own in alone]
    assert sum(own.counts.accepted for own in found) > 4


def test_a_drawn_tree_of_one_token_a_level_is_the_drawn_chain():
    target, engine = engines()
    chain = Decoder(target, ModelDrafter(engine, 3), Sampling(1.0), EOS).generate(PROMPTS, 25)
    tree = Decoder(target, TreeDrafter(engine, [1, 1, 1]), Sampling(1.0), EOS).generate(PROMPTS, 25)
    assert [own.token_ids for own in tree] == [own.token_ids for own in chain]
    assert [own.counts.accepted_at for own in tree] == [own.counts.accepted_at for own in chain]


def test_a_greedy_tree_of_one_token_a_level_is_the_greedy_chain():
    target, engine = engines()
    chain = Decoder(target, ModelDrafter(engine, 4), GREEDY).generate(PROMPTS, 25)
    tree = Decoder(target, TreeDrafter(engine, [1] * 4), GREEDY).generate(PROMPTS, 25)
    assert [own.counts.accepted_at for own in tree] == [own.counts.accepted_at for own in chain]


def test_wider_trees_are_accepted_further():
    target, engine = engines()
    tau = [
        sum(own.counts for own in Decoder(target, TreeDrafter(engine, widths), GREEDY).generate(PROMPTS, 40)).tau
        for widths in ([1, 1, 1], [4, 6, 6])
    ]
    assert tau[1] > 1.15 * tau[0]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(0.9, repetition_penalty=1.3)])
def test_rows_of_a_batch_are_decoded_as_they_are_alone(sampling):
    target, engine = engines()
    limits = [19, 5, 30]
    together = Decoder(target, TreeDrafter(engine, [3, 4, 2]), sampling, EOS).generate(PROMPTS, limits)
    for row, own in enumerate(together):
        [alone] = Decoder(target, TreeDrafter(engine, [3, 4, 2]), sampling, EOS).generate(
            [PROMPTS[row]], [limits[row]], [row]
        )
        assert own.token_ids == alone.token_ids
        assert own.counts.accepted_at == alone.counts.accepted_at
        assert own.counts.drafted == alone.counts.drafted


@pytest.mark.parametrize("drawn", [True, False])
def test_a_tree_drafter_keeps_to_the_interface(drawn):
    """State, budgets, rows and the exact distribution by chi-square; see `check_drafter`."""
    checked = check_drafter(lambda engine: TreeDrafter(engine, [3, 4, 2], drawn=drawn))
    assert 0 < checked.accepted < checked.drafted
    assert checked.controls == (4 if drawn else 2)


def test_a_rule_ends_the_tree_of_its_row_alone():
    target, engine = engines()
    free = Decoder(target, TreeDrafter(engine, [3, 3, 3, 3]), GREEDY)
    ruled = Decoder(target, WatchedTrees(engine, [3, 3, 3, 3], stop=Confidence(0.75, max_length=4)), GREEDY)
    some, fewer = (sum(own.counts for own in each.generate(PROMPTS, 30)) for each in (free, ruled))
    assert 0 < fewer.drafted < some.drafted
    assert len(fewer.drafted_at) < 2 or fewer.drafted_at[1] < fewer.drafted_at[0]
    for prompt, own in zip(PROMPTS, ruled.generate(PROMPTS, 30), strict=True):
        assert own.token_ids == greedy_reference(target.model, prompt, 30)


class Half:
    """A head that gives every token one half, whatever it reads."""

    features = ("log_q", "entropy", "step")

    def __init__(self, state: str) -> None:
        self.state = state

    def score(self, hidden_BH, q_B, entropy_B, step_B):
        assert len(hidden_BH) == len(q_B) == len(entropy_B) == len(step_B)
        return torch.full_like(q_B, 0.5)


@pytest.mark.parametrize(("state", "levels"), [("producing", 2), ("consumed", 3)])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)])
def test_an_acceptance_head_ends_trees(state, levels, sampling):
    """1 - 0.5 * 0.5 exceeds 0.6: after two tokens of known score, which on the consumed state are known one later."""
    target, engine = engines()
    drafter = WatchedTrees(engine, [3, 3, 3, 3, 3], stop=AcceptanceHeadRule(Half(state), 0.6))
    done = Decoder(target, drafter, sampling).generate(PROMPTS, 20)
    assert max(len(own.counts.drafted_at) for own in done) == levels
    if sampling.greedy:
        assert [own.token_ids for own in done] == [greedy_reference(target.model, prompt, 20) for prompt in PROMPTS]


def test_a_rules_maximum_cuts_the_tree():
    _, engine = engines()
    assert TreeDrafter(engine, [4, 3, 2], FixedLength(2)).max_length == 7


# ---- growth by itself ----


def grown(widths, table, sampling=GREEDY, u_BDN=None, limits=(9,), eos=()):
    """A tree over a drafter whose next token depends on the last one alone: ``table`` [V, V] of probabilities."""
    logits = torch.tensor(table).log()
    rows = len(limits)
    growth = TreeGrowth(widths, limits, sampling, len(table), eos, "drafter", u_BDN=u_BDN)
    hidden = torch.zeros(rows, 1, 2)
    first = Output(logits[0].expand(rows, 1, -1), hidden)
    return growth.run(first, lambda tokens, tree: Output(logits[tokens], hidden.expand(-1, tokens.shape[1], -1)))


TABLE = [[0.1, 0.6, 0.3], [0.5, 0.4, 0.1], [0.05, 0.05, 0.9]]


def test_levels_hold_the_likeliest_paths():
    draft = grown([2, 3, 2], TABLE)
    assert draft.rows() == [[1, 2, 0, 2, 1, 2, 1]]
    # paths of two: 10 has 0.30, 22 0.27, 11 0.24; of three: 222 has 0.243, 101 0.18
    assert draft.parents_BK.tolist() == [[ROOT, ROOT, 0, 1, 0, 3, 2]]


def test_nothing_is_drafted_behind_an_end_or_beyond_a_rows_limit():
    draft = grown([2, 3], TABLE, eos=(1,), limits=(2, 1, 0))
    assert draft.parents_BK.tolist() == [[ROOT, ROOT, 1, 1, 1], [ROOT, ROOT, *[ABSENT] * 3], [ABSENT] * 5]
    assert draft.inside().sum(1).tolist() == [5, 2, 0]
    assert [depth_of(row) for row in draft.parents_BK.tolist()] == [2, 1, 0]
    assert draft.forwards["drafter"].tolist() == [2, 1, 0]


def test_drawn_children_are_as_many_as_the_likeliest_paths_have():
    """And siblings are distinct; the counts come from q and the level above alone."""
    u = torch.rand(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for number in range(40):
        draft = grown([3, 3], TABLE, Sampling(1.0), (u + 0.618 * number) % 1)
        tokens, parents = draft.tokens_BK[0].tolist(), draft.parents_BK[0].tolist()
        assert sorted(tokens[:3]) == [0, 1, 2] and parents[:3] == [ROOT] * 3
        families = {parent: [t for t, p in zip(tokens, parents, strict=True) if p == parent] for parent in range(3)}
        assert all(len(set(family)) == len(family) for family in families.values())


def test_filters_leave_fewer_children_than_the_shape_asks_for():
    draft = grown([3, 4], TABLE, Sampling(1.0, top_k=1), torch.full((1, 2, 4), 0.5, dtype=torch.float64))
    assert draft.rows() == [[1, 0, 0, 0, 0, 0, 0]]
    assert draft.parents_BK.tolist() == [[ROOT, ABSENT, ABSENT, 0, ABSENT, ABSENT, ABSENT]]


# ---- errors ----


@pytest.mark.parametrize(
    ("widths", "message"),
    [([], "at least one level"), ([3, 0], "level 2 of a tree has 0"), ([2.5], "has 2.5"), ([True], "has True")],
)
def test_shapes_that_no_tree_has_are_refused(widths, message):
    with pytest.raises(UserError, match=message):
        TreeDrafter(engines()[1], widths)


def test_a_tree_wider_than_the_vocabulary_is_refused():
    target, engine = engines()
    with pytest.raises(UserError, match="level 1 of the tree"):
        Decoder(target, TreeDrafter(engine, [25]), GREEDY).generate(PROMPTS, 5)
    with pytest.raises(UserError, match="1 x 24 tokens are all that there are"):
        Decoder(target, TreeDrafter(engine, [1, 25]), GREEDY).generate(PROMPTS, 5)
    assert Decoder(target, TreeDrafter(engine, [24, 30]), GREEDY).generate(PROMPTS, 5)


def test_synthetic_acceptance_refuses_trees():
    target, engine = engines()
    with pytest.raises(UserError, match="cannot judge a tree"):
        Decoder(target, TreeDrafter(engine, [2]), GREEDY, synthetic=SyntheticAcceptance([0.5])).generate(PROMPTS, 5)
