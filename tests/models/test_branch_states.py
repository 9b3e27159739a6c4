"""States along branches equal those of forward passes over every branch alone."""

from __future__ import annotations

import pytest
import torch

from drafttrain.models.branch_states import batch_branch_states
from tests.conftest import build_llama

PROMPT, RESPONSE = [3, 17, 42, 8, 9], [7, 11, 250, 33, 60, 5]
DRAFT = [7, 99, 250, 34, 61, 5]
RUNS = [1, 2, 3, 4, 5, 6]


def alone(model, tokens):
    """Last hidden states of a plain forward pass."""
    return model.get_decoder()(torch.tensor([tokens])).last_hidden_state[0]


@pytest.mark.parametrize("kind", ["llama", "sliding", "gpt2"])
def test_states_are_those_of_separate_passes(kind):
    model = {"llama": _llama, "sliding": _mistral_with_window, "gpt2": _gpt2}[kind]().double()
    states = batch_branch_states(model, [(PROMPT, RESPONSE, DRAFT, RUNS)])[0]
    for i, token in enumerate(DRAFT):
        seen = [*PROMPT, *RESPONSE[:i]]
        torch.testing.assert_close(states.producing_TH[i], alone(model, seen)[-1])
        torch.testing.assert_close(states.consumed_TH[i], alone(model, [*seen, token])[-1])
    for m, i in enumerate((1, 3, 4)):
        run = RUNS[2 * m : 2 * m + 2]
        whole = alone(model, [*PROMPT, *RESPONSE[:i], DRAFT[i], *run])
        torch.testing.assert_close(states.run_producing_MRH[m], whole[-3:-1])
        torch.testing.assert_close(states.run_consumed_MRH[m], whole[-2:])


def test_rows_of_a_batch_do_not_see_each_other():
    model = build_llama(seed=3).double()
    rows = [(PROMPT, RESPONSE, DRAFT, RUNS), ([3], [9, 9], [9, 9], []), ([4, 4, 4], [8], [7], [2, 2])]
    for row, together in zip(rows, batch_branch_states(model, rows), strict=True):
        single = batch_branch_states(model, [row])[0]
        for name, value in vars(single).items():
            torch.testing.assert_close(getattr(together, name), value)


def test_the_models_attention_is_left_as_it_was(tiny_target):
    usual = tiny_target.config._attn_implementation
    batch_branch_states(tiny_target, [(PROMPT, RESPONSE, DRAFT, [])])
    assert tiny_target.config._attn_implementation == usual


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (([], RESPONSE, DRAFT, []), "prompt is empty"),
        ((PROMPT, RESPONSE, DRAFT[:-1], []), "shorter"),
        ((PROMPT, RESPONSE, DRAFT, [1]), "1 run tokens do not divide among 3"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(tiny_target, row, told):
    with pytest.raises(ValueError, match=told):
        batch_branch_states(tiny_target, [row])


def _llama():
    return build_llama(seed=3)


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def _mistral_with_window():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
        initializer_range=0.2,
    )
    return MistralForCausalLM(config).eval()
