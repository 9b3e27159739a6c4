"""LongSpec with trees: exact like its chains, and a tree's tokens are drafted as if their path had been read."""

from __future__ import annotations

import pytest
import torch

from drafttrain import testing
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build
from drafttrain.decoding.longspec import LongSpec, LongSpecTree
from drafttrain.decoding.loop import Decoder
from drafttrain.decoding.stopping import Confidence
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from tests.decoding.longspec_pairs import block_of, longspec_pair
from tests.decoding.support import greedy_reference

GREEDY = Sampling(0.0)
PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 3, 4, 12, 13, 14, 15, 1], [1, 2, 3], [20, 4]]


@pytest.fixture(scope="module")
def models():
    return longspec_pair()


@pytest.mark.parametrize("window", [2, 9])
def test_a_longspec_tree_keeps_the_contract_of_drafters(window):
    target, _ = testing._engines()
    block = block_of(target.model, window)
    checked = testing.check_drafter(lambda engine: LongSpecTree(block, [3, 4, 2]))
    assert 0 < checked.accepted < checked.drafted
    assert checked.controls == 4


@pytest.mark.parametrize("widths", [[4], [3, 2, 5], [1, 1, 1, 1], [4, 6, 6, 6, 6]])
def test_greedy_text_is_the_targets(models, widths):
    target, block = models
    done = Decoder(Engine(target), LongSpecTree(block, widths), GREEDY).generate(PROMPTS, 20)
    assert [each.token_ids for each in done] == [greedy_reference(target, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)])
@pytest.mark.parametrize("window", [2, 3, 40])
def test_a_tree_of_one_token_a_level_is_the_chain(sampling, window):
    """Windows shorter than the tree included: then the first levels are out of sight of the last."""
    target, block = longspec_pair(window=window)
    found = [
        Decoder(Engine(target), drafter, sampling).generate(PROMPTS, 30)
        for drafter in (LongSpec(block, length=5), LongSpecTree(block, [1] * 5))
    ]
    assert [own.counts.accepted_at for own in found[0]] == [own.counts.accepted_at for own in found[1]]
    assert [own.token_ids for own in found[0]] == [own.token_ids for own in found[1]]
    assert sum(own.counts.accepted for own in found[0]) > 10


def test_a_tree_is_accepted_further_than_the_chain(models):
    target, block = models
    taus = [
        sum(own.counts for own in Decoder(Engine(target), drafter, GREEDY).generate(PROMPTS, 40)).tau
        for drafter in (LongSpec(block, length=4), LongSpecTree(block, [4, 8, 8, 8]))
    ]
    assert taus[1] > 1.1 * taus[0]


@torch.inference_mode()
def test_nothing_of_a_tree_is_left_in_the_ring(models):
    target, block = models
    decoder = Decoder(Engine(target), LongSpecTree(block, [3, 4]), GREEDY)
    read = []
    plain = LongSpecTree.commit

    def commit(self, agreed, paths=None):
        before = self.cache.keys.clone()
        plain(self, agreed, paths)
        read.append(torch.equal(before, self.cache.keys))

    decoder.drafter.commit = commit.__get__(decoder.drafter)
    decoder.generate(PROMPTS, 12)
    assert read and all(read)


def test_rules_stop_its_trees(models):
    target, block = models
    drafter = LongSpecTree(block, [3, 3, 3, 3], stop=Confidence(0.7))
    done = Decoder(Engine(target), drafter, GREEDY).generate(PROMPTS, 20)
    assert [each.token_ids for each in done] == [greedy_reference(target, prompt, 20) for prompt in PROMPTS]
    total = sum(each.counts for each in done)
    assert total.drafted_at[0] > total.drafted_at[-1]


def test_it_is_written_as_an_expression(models):
    _, block = models
    drafter = build("LongSpec(drafter, tree=[4, 8])", {"drafter": block})
    assert isinstance(drafter, LongSpecTree) and drafter.max_length == 12


@pytest.mark.parametrize("widths", [[25], [4, 97]])
def test_a_tree_wider_than_the_vocabulary_is_refused(models, widths):
    target, block = models
    for drafter in (LongSpecTree(block, widths), TreeDrafter(Engine(target), widths)):
        with pytest.raises(UserError, match="wider than the vocabulary"):
            Decoder(Engine(target), drafter, GREEDY).generate([[1, 5, 3]], 4)
