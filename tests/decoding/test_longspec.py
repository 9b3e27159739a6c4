"""LongSpec in the loop: exact whatever it drafts, nothing of a rejected token left, memory and start-up flat."""

from __future__ import annotations

import pytest
import torch

from drafttrain import testing
from drafttrain.decoding.drafters import ModelDrafter
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.expression import build
from drafttrain.decoding.longspec import MARGIN, LongSpec
from drafttrain.decoding.loop import Conversation, Decoder
from drafttrain.decoding.stopping import AcceptanceHeadRule, Confidence, EntropyBound
from drafttrain.decoding.target_view import TargetView
from drafttrain.errors import UserError
from drafttrain.ops.sampling import Sampling
from tests.conftest import build_llama
from tests.decoding.longspec_pairs import block_of, longspec_pair
from tests.decoding.support import greedy_reference

GREEDY = Sampling(0.0)
PROMPTS = [[1, 5, 3], [2], [7, 8, 9, 10, 11, 3, 4, 12, 13, 14, 15, 1], [1, 2, 3], [20, 4]]


class FirstEntry:
    features = ("log_q", "step")

    def __init__(self, state: str) -> None:
        self.state = state

    def score(self, hidden_BH, q_B, entropy_B, step_B):
        return torch.sigmoid(2 + hidden_BH[:, 0] + q_B.log() / step_B)


@pytest.fixture(scope="module")
def models():
    return longspec_pair()


@pytest.mark.parametrize("window", [2, 9, 64])
def test_a_longspec_drafter_keeps_the_contract_of_drafters(window):
    """State after rejections, prefixes, turns and rows that leave; text greedy and sampled, with negative controls."""
    target, _ = testing._engines()
    block = block_of(target.model, window)
    checked = testing.check_drafter(lambda engine: LongSpec(block, length=3))
    assert 0 < checked.accepted < checked.drafted
    assert checked.controls == 4


@pytest.mark.parametrize(
    "stop",
    [
        Confidence(0.3, max_length=6),
        EntropyBound(1.2, max_length=6),
        AcceptanceHeadRule(FirstEntry("producing"), 0.6, max_length=6),
        AcceptanceHeadRule(FirstEntry("consumed"), 0.6, 2, 6),
    ],
)
def test_stopping_rules_stop_it_and_the_text_stays_the_targets(models, stop):
    target, block = models
    drafter = LongSpec(block, stop=stop)
    done = Decoder(Engine(target), drafter, GREEDY).generate(PROMPTS, 20)
    assert [each.token_ids for each in done] == [greedy_reference(target, prompt, 20) for prompt in PROMPTS]
    drafted = sum(each.counts.drafted for each in done)
    rounds = sum(each.counts.rounds for each in done)
    assert rounds / 2 < drafted < 5 * rounds


def test_drafts_are_often_accepted(models):
    """Else the tests of this file would test rejections alone."""
    target, block = models
    [done] = Decoder(Engine(target), LongSpec(block, length=4), GREEDY).generate([[1, 5, 3]], 60)
    assert 1.3 < done.counts.tau < 5


def test_a_step_drafts_what_the_block_says_of_the_whole_text(models):
    """The ring and the target's cache give what the block computes from the whole text with lags 1, 2, 3, ..."""
    from drafttrain.models.longspec_states import block_states, read_target

    target, block = models
    engine, text = Engine(target), [7, 8, 9, 10, 11, 3, 4, 12, 13, 14, 15, 1, 5, 5, 2, 9]
    decoder = Decoder(engine, LongSpec(block, length=4), GREEDY)
    drafted = {}
    plain = decoder.drafter.propose

    def propose(committed, prefix, budget, random, target_view=None):
        draft = plain(committed, prefix, budget, random, target_view)
        drafted[tuple(committed.tokens[0])] = draft.rows()[0]
        return draft

    decoder.drafter.propose = propose
    decoder.generate([text], 16)
    assert len(drafted) > 3
    for committed, tokens in drafted.items():
        for step, token in enumerate(tokens):
            ids_BT = torch.tensor([[*committed, *tokens[:step]]])
            reading = read_target(target, ids_BT, torch.ones_like(ids_BT), block.config.kv_layer)
            states_BTH = block_states(block, reading, torch.tensor([step + 1]))
            assert engine.logits(states_BTH)[0, -1].argmax().item() == token


def test_turns_of_a_chat_read_only_what_is_new(models):
    target, block = models
    chat = Conversation(Decoder(Engine(target), LongSpec(block, length=3), GREEDY))
    text = [1, 5, 3]
    for added in ([4, 4], [9], [2, 2, 2, 7]):
        text += added
        reply = chat.reply(text, 10).token_ids
        assert reply == greedy_reference(target, text, 10)
        text += reply


def test_memory_and_start_up_do_not_grow_with_the_prompt(models):
    target, block = models
    engine, found = Engine(target), []
    for length in (40, 400):
        drafter = LongSpec(block, length=3)
        read = []
        decoder = Decoder(engine, drafter, GREEDY)
        forward = drafter.model.self_attn.k_proj.register_forward_hook(
            lambda module, inputs, output, read=read: read.append(inputs[0].shape[1])
        )
        decoder.generate([[index % 24 for index in range(length)]], 2)
        forward.remove()
        found.append((drafter.cache.memory_bytes(), drafter.cache.slots, sum(read)))
    assert found[0] == found[1]
    assert found[0][1] == block.config.window + MARGIN
    assert found[0][2] <= block.config.window + 3


def test_the_targets_keys_are_read_where_they_lie(models):
    target, _ = models
    engine = Engine(target)
    cache = engine.new_cache(2)
    engine.read(cache, [[1, 2, 3], [4, 5]])
    keys, values = TargetView(engine, cache).keys_values(1)
    assert keys.data_ptr() == cache.layers[1].keys.data_ptr()
    assert values.shape == (2, 2, cache.slots, 4)


@pytest.mark.parametrize("config", [{"head_dim": 8}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}])
def test_shapes_of_heads_do_not_matter(config):
    target, block = longspec_pair(**config)
    [done] = Decoder(Engine(target), LongSpec(block, length=3), GREEDY).generate([[1, 5, 3]], 30)
    assert done.token_ids == greedy_reference(target, [1, 5, 3], 30)
    assert done.counts.accepted


def test_it_is_written_as_an_expression(models):
    target, block = models
    drafter = build("LongSpec(drafter, length=4)", {"drafter": block})
    assert drafter.max_length == 4
    with pytest.raises(UserError, match="is not a LongSpec drafter"):
        build("LongSpec(drafter, length=4)", {"drafter": Engine(target)})
    with pytest.raises(UserError, match=r"write LongSpec\(drafter"):
        build("Model(drafter, length=4)", {"drafter": block})
    with pytest.raises(UserError, match="needs a length or a stopping rule"):
        build("LongSpec(drafter)", {"drafter": block})


def test_a_target_of_another_shape_is_refused(models):
    _, block = models
    other = Engine(build_llama(24, layers=2, hidden=32).double())
    with pytest.raises(UserError, match="another shape"):
        Decoder(other, LongSpec(block, length=3), GREEDY).generate([[1, 2]], 4)


def test_the_context_of_the_target_bounds_it(models):
    target, block = models
    with pytest.raises(UserError, match="512 positions"):
        Decoder(Engine(target), LongSpec(block, length=3), GREEDY).generate([[1] * 510], 4)


def test_as_a_model_it_would_cost_more_each_token(models):
    """What the ring spares: the cache of a drafter of equal depth holds every token of the text."""
    target, block = models
    ring = LongSpec(block, length=3)
    usual = ModelDrafter(Engine(build_llama(24, layers=1, hidden=16).double()), length=3)
    for drafter in (ring, usual):
        Decoder(Engine(target), drafter, GREEDY).generate([[1] * 400], 2)
    assert ring.cache.slots < usual.cache.slots / 5
