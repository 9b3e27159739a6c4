"""Fingerprints: equal for the same model however loaded, different for any change, told part by part."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.errors import UserError
from drafttrain.models.fingerprint import (
    SAMPLE,
    Fingerprint,
    _sample,
    architecture_hash,
    fingerprint,
    tokenizer_hash,
    weights_hash,
)

SAME = Fingerprint("t", "a", "w")


def test_it_is_stable_and_survives_a_dictionary(tiny_target, tiny_tokenizer):
    first, second = fingerprint(tiny_target, tiny_tokenizer), fingerprint(tiny_target, tiny_tokenizer)
    assert first == second == Fingerprint.from_dict(first.to_dict())
    assert first.short == second.short and len(first.short) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_that_weights_are_loaded_in_does_not_count(tiny_target, dtype):
    assert weights_hash(copy.deepcopy(tiny_target).to(dtype)) == weights_hash(tiny_target)


def test_one_changed_weight_in_any_small_tensor_counts(tiny_target):
    before = weights_hash(tiny_target)
    for name, parameter in tiny_target.named_parameters():
        if parameter.numel() <= SAMPLE:
            changed = copy.deepcopy(tiny_target)
            dict(changed.named_parameters())[name].data.view(-1)[-1] += 1
            assert weights_hash(changed) != before, name


def test_training_every_weight_a_little_counts(tiny_target):
    changed = copy.deepcopy(tiny_target)
    for parameter in changed.parameters():
        parameter.data *= 1.02
    assert weights_hash(changed) != weights_hash(tiny_target)


def test_equal_weights_under_swapped_names_are_another_model(tiny_target):
    changed = copy.deepcopy(tiny_target)
    first, second = changed.model.layers[0].mlp, changed.model.layers[1].mlp
    first.gate_proj, second.gate_proj = second.gate_proj, first.gate_proj
    assert weights_hash(changed) != weights_hash(tiny_target)


def test_tied_weights_hash_alike_before_and_after_a_copy(tiny_target):
    tiny_target.config.tie_word_embeddings = True
    tiny_target.tie_weights()
    assert weights_hash(copy.deepcopy(tiny_target)) == weights_hash(tiny_target)


def test_offloaded_weights_are_fetched(tiny_target):
    from accelerate import cpu_offload

    before = weights_hash(tiny_target)
    cpu_offload(tiny_target, execution_device=torch.device("cpu"))
    assert next(tiny_target.parameters()).is_meta
    assert weights_hash(tiny_target) == before
    assert next(tiny_target.parameters()).is_meta, "the hash must not undo the offloading"


def test_partitioned_weights_are_a_bug_not_a_hash_of_nothing(tiny_target):
    next(tiny_target.parameters()).ds_id = 0
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        weights_hash(tiny_target)


@given(st.integers(1, 5000))
def test_the_sample_takes_both_ends(size):
    values = torch.arange(size, dtype=torch.int32)
    sampled = torch.frombuffer(bytearray(_sample(values)), dtype=torch.int32)
    assert sampled[0] == 0 and sampled[-1] == size - 1 and len(sampled) == min(size, SAMPLE)
    assert (sampled.diff() > 0).all()


def test_architecture_counts_shape_and_rotary_base_but_not_the_context_length(tiny_target):
    config = tiny_target.config

    def changed(**values):
        other = copy.deepcopy(config)
        for key, value in values.items():
            setattr(other, key, value)
        return architecture_hash(other)

    same = architecture_hash(config)
    assert changed(max_position_embeddings=9999) == same
    assert changed(use_cache=False, dtype="bfloat16", _name_or_path="elsewhere") == same
    assert changed(num_hidden_layers=3) != same
    assert changed(rms_norm_eps=1e-3) != same
    assert changed(rope_parameters={**config.rope_parameters, "rope_theta": 77.0}) != same


def test_tokenizers_differ_by_entries_and_by_splitting_but_not_by_template(tiny_tokenizer):
    same = tokenizer_hash(tiny_tokenizer)
    other = copy.deepcopy(tiny_tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_hash(other) == same
    other.add_tokens(["<|new|>"])
    assert tokenizer_hash(other) != same
    from tokenizers import pre_tokenizers

    resplit = copy.deepcopy(tiny_tokenizer)
    resplit.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    assert resplit.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer_hash(resplit) != same


def test_the_same_fingerprint_is_accepted():
    equal = Fingerprint(**SAME.to_dict())
    assert equal is not SAME and equal == SAME
    SAME.require(equal, "x")
    with pytest.raises(UserError):
        SAME.require(Fingerprint(**{**SAME.to_dict(), "weights": "other"}), "x")


@pytest.mark.parametrize("part", ["tokenizer", "architecture"])
def test_another_tokenizer_or_architecture_is_always_refused(part):
    other = Fingerprint(**{**SAME.to_dict(), part: "other", "weights": "other"})
    with pytest.raises(UserError, match=f"{part}, weights differ") as error:
        SAME.require(other, "the head in h was trained for the drafter in d", accept_new_weights=True)
    assert "--accept-new-target" not in str(error.value)


def test_other_weights_are_refused_unless_accepted():
    other = Fingerprint("t", "a", "other")
    with pytest.raises(UserError) as error:
        SAME.require(other, "the head in h was trained for the drafter in d", remedy="train a head for it")
    assert str(error.value) == (
        f"the head in h was trained for the drafter in d, but that was {SAME.short} and this is {other.short} "
        "(weights differ); train a head for it or pass --accept-new-target."
    )
    SAME.require(other, "x", accept_new_weights=True)
