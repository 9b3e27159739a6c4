"""The stream of blocks: reproducible, the right shape, and weighted where there is something to learn."""

import re

import numpy as np
import pytest
import torch

from drafttrain.recipe import StageConfig
from drafttrain.training.pretrain_data import Blocks, choices


@pytest.fixture
def blocks(tiny_tokenizer) -> Blocks:
    stages = [
        StageConfig(steps=3, tokens=1024, lengths={256: 1.0}, mixture={"frequent_words": 0.5, "code": 0.5}, jumps=1.0),
        StageConfig(steps=2, tokens=1024, lengths={512: 0.5, 1024: 0.5}, mixture={"revise/append": 1.0}),
    ]
    corpus = np.arange(5000, dtype=np.uint16) % len(tiny_tokenizer)
    return Blocks(stages, corpus, tiny_tokenizer, max_position=4096, seed=1)


def test_a_block_is_a_function_of_its_number(blocks):
    again = Blocks(blocks.stages, blocks.corpus, blocks.tokenizer, blocks.max_position, seed=1)
    for number in (4, 0, 3):
        assert all(torch.equal(blocks[number][name], again[number][name]) for name in blocks[number])


def test_another_seed_is_another_stream(blocks):
    other = Blocks(blocks.stages, blocks.corpus, blocks.tokenizer, blocks.max_position, seed=2)
    assert not torch.equal(blocks[0]["input_ids"], other[0]["input_ids"])


def test_blocks_hold_the_tokens_of_their_stage(blocks):
    assert len(blocks) == 5
    for number in range(5):
        block = blocks[number]
        assert block["input_ids"].numel() == 1024
        assert block["input_ids"].shape == block["weights"].shape == block["position_ids"].shape
    with pytest.raises(IndexError):
        blocks[5]


def test_positions_grow_and_jump_only_where_asked(blocks):
    jumping, plain = blocks[0]["position_ids"], blocks[3]["position_ids"]
    assert (jumping.diff(dim=1) >= 1).all() and jumping.max() < 4096
    assert (jumping.diff(dim=1) > 1).any()
    assert torch.equal(plain[0], torch.arange(plain.shape[1]))


def test_choices_weigh_more_than_copies_and_those_more_than_documents(blocks):
    weights = blocks[3]["weights"]
    assert {0.0, 1.0, blocks.stages[1].choice_weight} <= set(weights.unique().tolist())
    assert (weights == 1.0).sum() > (weights == blocks.stages[1].choice_weight).sum() > 0


def test_choices_are_what_copying_on_does_not_tell():
    passage = [9, 8, 7, 1, 2, 3, 4, 5, 6]
    assert list(choices(passage, [7, 1, 2, 3, 40, 5, 6])) == [0, 1, 2, 4, 5, 6]  # copying begins, and is left
    assert list(choices([1, 2, 3, 4, 1, 2, 3, 5], [1, 2, 3, 4])) == [0, 1, 2, 3]  # two ways to go on


def test_needles_in_a_crowd_look_alike_and_hold_every_answer(tiny_tokenizer):
    stage = StageConfig(steps=1, tokens=2048, lengths={2048: 1.0}, mixture={"crowd": 1.0})
    [row] = Blocks([stage], np.arange(99, dtype=np.uint16), tiny_tokenizer, max_position=4096, seed=3)[0]["input_ids"]
    chat = tiny_tokenizer.decode(row).split(tiny_tokenizer.bos_token)[1]
    document = chat.partition("\n\n")[0]
    needles = dict(re.findall(r"for (\S+) is (\d+)\.", document))
    answered = re.findall(r"for (\S+) is (\d+)\.", chat.removeprefix(document))
    assert answered and all(needles[key] == value for key, value in answered)
    assert len(needles) == len(set(needles.values())) and len(set("".join(needles.values()))) <= 3
