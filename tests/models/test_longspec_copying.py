"""Blocks that copy from their first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from drafttrain.config import BlockConfig, TargetConfig
from drafttrain.errors import UserError
from drafttrain.models.loading import load_target
from drafttrain.models.longspec import rotated
from drafttrain.models.longspec_copying import OFFSETS, rows_for, start_copying
from drafttrain.models.longspec_new import new_block
from drafttrain.models.longspec_states import block_states, read_target
from drafttrain.models.shared_target import RotaryOf
from tests.models.test_longspec import family

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


def with_shared_direction(target):
    """Embeddings of trained models have one; random ones do not."""
    with torch.no_grad():
        target.get_input_embeddings().weight += 0.05 * torch.randn(
            target.config.hidden_size, generator=torch.Generator().manual_seed(1)
        )
    return target


def texts(rows: int = 12, length: int = 64) -> list[torch.Tensor]:
    return [torch.randint(1, 64, (1, length), generator=torch.Generator().manual_seed(row)) for row in range(rows)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {"num_key_value_heads": 1}),
        ("qwen3", {}),
        ("qwen2", {"head_dim": 16}),
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
    ],
)
@torch.no_grad()
def test_heads_look_back_by_their_distance_whatever_the_tokens_are(name, settings):
    target = with_shared_direction(family(name, head_dim=32, **{k: v for k, v in settings.items() if k != "head_dim"}))
    block = new_block(target, BlockConfig(window=32), torch.float32, 0)
    start_copying(block, target, texts())
    ids = texts(14)[-1]
    normed = block.self_norm(target.get_input_embeddings()(ids))
    rotary = RotaryOf(target)(normed, torch.arange(ids.shape[1]).unsqueeze(0) + 1000)
    queries, (keys, _) = block.self_attn.queries(normed, rotary), block.self_attn.keys_values(normed, rotary)
    scores = queries @ keys.repeat_interleave(len(queries[0]) // len(keys[0]), 1).transpose(2, 3) * block.config.scaling
    shares = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
    for head in range(block.config.num_attention_heads):
        offset = OFFSETS[head % len(OFFSETS)]
        assert shares[0, head].diagonal(-offset)[8:].median() > 0.9


@torch.no_grad()
def test_queries_of_the_first_layer_are_found_exactly():
    """There they are a linear function of the token alone."""
    target = with_shared_direction(family("llama", head_dim=32))
    block = new_block(target, BlockConfig(kv_layer=0, warm_start=0), torch.float32, 0)
    assert start_copying(block, target, texts()) > 0.99
    ids = texts(14)[-1]
    reading = read_target(target, ids, None, 0)
    layer = target.model.layers[0]
    own = block.cross_attn.queries(block.cross_norm(reading.embedded_BTH), reading.rotary)
    wanted = layer.self_attn.q_proj(layer.input_layernorm(reading.embedded_BTH)).unflatten(-1, (-1, 32)).transpose(1, 2)
    torch.testing.assert_close(own, rotated(wanted, reading.rotary), atol=0.05, rtol=0.05)


def test_it_keeps_its_dtype_and_is_the_same_every_time():
    target = with_shared_direction(family("llama", head_dim=32))
    blocks = [new_block(target, BlockConfig(), torch.bfloat16, 0) for _ in range(2)]
    for block in blocks:
        start_copying(block, target, texts())
    assert blocks[0].dtype == torch.bfloat16
    for own, other in zip(*(block.parameters() for block in blocks), strict=True):
        assert torch.equal(own, other)


@torch.no_grad()
def test_the_reference_target_is_copied_with_before_any_training():
    """Behind a text that is repeated, guesses are the target's far more often than those of its last layer alone."""
    target = load_target(TargetConfig(path=str(CHECKPOINTS / "reference-target"), dtype="float32")).model
    generator = torch.Generator().manual_seed(0)
    stretches = [torch.randint(300, 4000, (1, 40), generator=generator) for _ in range(40)]
    rows = [torch.cat([stretch] * 3, 1) for stretch in stretches]
    agreed = []
    for copying in (False, True):
        block = new_block(target, BlockConfig(warm_start=11), torch.float32, 0)
        if copying:
            assert start_copying(block, target, rows[:36]) > 0.3
        found = total = 0
        for ids in rows[36:]:
            reading = read_target(target, ids, None, 11)
            guess, choice = (
                target.lm_head(states)[0, 40:].argmax(-1)
                for states in (block_states(block, reading, torch.tensor([3])), reading.hidden_BTH)
            )
            found, total = found + int((guess == choice).sum()), total + len(guess)
        agreed.append(found / total)
    assert agreed[1] > agreed[0] + 0.15


def test_rows_are_taken_until_there_are_enough():
    assert [row.shape for row in rows_for([[1, 2, 3], range(60_000), [4]])] == [(1, 3), (1, 60_000)]


def test_a_target_without_queries_of_their_own_is_refused_in_a_sentence():
    target = family("phi3", num_hidden_layers=1, sliding_window=None)
    block = new_block(target, BlockConfig(), torch.float32, 0)
    with pytest.raises(UserError, match=r"has no q_proj.*copying to false"):
        start_copying(block, target, texts(1))


def test_heads_with_few_pairs_are_refused_in_a_sentence():
    target = family("llama", head_dim=8)
    with pytest.raises(UserError, match=r"4 rotary pairs.*copying to false"):
        start_copying(new_block(target, BlockConfig(), torch.float32, 0), target, texts(1))
