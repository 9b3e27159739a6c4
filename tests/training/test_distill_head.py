"""The chunked loss is the naive loss: same values, same gradients, for every loss, shape and architecture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from drafttrain.errors import UserError
from drafttrain.models.logits import LogitShape
from drafttrain.training.distill_head import (
    DistillHead,
    Lesson,
    OutputHead,
    attach,
    check_head,
    output_head,
)
from drafttrain.training.losses import expected_acceptance, mixed
from tests.conftest import with_other_logits

LOSSES = ["forward_kl", "reverse_kl", "jensen_shannon", "jensen_shannon(0.1)", "total_variation", "cross_entropy"]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
ARCHITECTURES = [
    (LlamaForCausalLM, LlamaConfig),
    (MistralForCausalLM, MistralConfig),
    (Qwen2ForCausalLM, Qwen2Config),
    (Qwen3ForCausalLM, Qwen3Config),
    (GemmaForCausalLM, GemmaConfig),
    (Gemma2ForCausalLM, Gemma2Config),
]


class Case:
    """One random batch of hidden states under two heads, in float64."""

    def __init__(self, seed=0, tokens=7, p_vocabulary=19, q_vocabulary=19, bias=False, shape=None) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*size):
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.hidden, self.target_hidden = draw(tokens, 6).requires_grad_(), draw(tokens, 10)
        self.linear = torch.nn.Linear(6, q_vocabulary, bias=bias, dtype=torch.float64)
        self.linear.weight.data = draw(q_vocabulary, 6)
        if bias:
            self.linear.bias.data = draw(q_vocabulary)
        self.shape = shape or LogitShape()
        self.head = OutputHead(draw(p_vocabulary, 10), draw(p_vocabulary) if bias else None, self.shape)
        self.vocabulary = min(p_vocabulary, q_vocabulary)
        self.labels = torch.randint(-1, self.vocabulary, (tokens,), generator=generator)
        self.weights = torch.rand(tokens, generator=generator, dtype=torch.float64)

    def chunked(self, loss, chunk_tokens, temperature=1.0):
        selected = torch.ones(1, len(self.labels), dtype=torch.bool)
        lesson = Lesson(
            selected, self.target_hidden, self.head, self.labels, self.weights, loss, None, temperature, chunk_tokens
        )
        return DistillHead(self.linear, self.shape)(self.hidden, lesson)

    def naive(self, loss, temperature=1.0):
        rows = slice(self.vocabulary)
        log_p = (self.shape.apply(self.head.raw(self.target_hidden))[:, rows] / temperature).log_softmax(-1)
        log_q = (self.shape.apply(self.linear(self.hidden))[:, rows] / temperature).log_softmax(-1)
        value = (loss(log_p, log_q, self.labels) * self.weights).sum()
        return value, (expected_acceptance(log_p, log_q) * self.weights).sum()

    def gradients(self, value):
        parameters = [self.hidden, *self.linear.parameters()]
        return torch.autograd.grad(value * 0.3, parameters)


@given(
    name=st.sampled_from(LOSSES),
    seed=st.integers(0, 1000),
    tokens=st.integers(0, 9),
    chunk_tokens=st.integers(1, 10),
    p_vocabulary=st.integers(3, 12),
    q_vocabulary=st.integers(3, 12),
    bias=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    shape=st.sampled_from([LogitShape(), LogitShape(0.25), LogitShape(1.0, 3.0)]),
)
@settings(max_examples=120, deadline=None)
def test_chunked_loss_equals_naive_autograd(
    name, seed, tokens, chunk_tokens, p_vocabulary, q_vocabulary, bias, temperature, shape
):
    case = Case(seed, tokens, p_vocabulary, q_vocabulary, bias, shape)
    loss = mixed({name: 1.5})
    value, acceptance = case.chunked(loss, chunk_tokens, temperature)
    expected_value, expected_acceptance_sum = case.naive(loss, temperature)
    assert torch.allclose(value, expected_value, atol=1e-10)
    assert torch.allclose(acceptance, expected_acceptance_sum, atol=1e-10)
    for grad, expected in zip(case.gradients(value), case.gradients(expected_value), strict=True):
        assert torch.allclose(grad, expected, atol=1e-9)


def test_padded_rows_get_no_gradient():
    case = Case(p_vocabulary=10, q_vocabulary=16, bias=True)
    value, _ = case.chunked(mixed({"forward_kl": 1.0}), 3)
    _, weight, bias = case.gradients(value)
    assert weight[:10].abs().min() > 0 and not weight[10:].any() and not bias[10:].any()


def test_a_rank_without_tokens_still_has_a_gradient_of_zero():
    case = Case(tokens=0)
    value, acceptance = case.chunked(mixed({"forward_kl": 1.0}), 4)
    hidden, weight = case.gradients(value)
    assert value == 0 and acceptance == 0 and hidden.shape == (0, 6) and not weight.any()


def test_nothing_is_differentiated_where_nothing_is_asked():
    case = Case()
    case.linear.weight.requires_grad_(False)
    value, _ = case.chunked(mixed({"forward_kl": 1.0}), 4)
    value.backward()
    assert case.hidden.grad is not None and case.linear.weight.grad is None
    with torch.no_grad():
        assert not case.chunked(mixed({"forward_kl": 1.0}), 4)[0].requires_grad


def test_a_second_backward_is_refused():
    value, _ = Case().chunked(mixed({"forward_kl": 1.0}), 4)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already differentiated"):
        value.backward()


def test_bfloat16_autocast_keeps_sums_and_gradients_in_float32():
    case = Case()
    case.linear, case.hidden = case.linear.float(), case.hidden.detach().float().requires_grad_()
    exact, _ = case.chunked(mixed({"forward_kl": 1.0}), 4)
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = case.chunked(mixed({"forward_kl": 1.0}), 4)
    assert value.dtype == torch.float32 and torch.allclose(value, exact, rtol=0.05) and value != exact
    assert {grad.dtype for grad in case.gradients(value)} == {torch.float32}


def tiny(model, config, **changes):
    torch.manual_seed(0)
    return model(config(**SMALL | changes)).double().eval()


@pytest.mark.parametrize(("model", "config"), ARCHITECTURES)
def test_every_architecture_learns_through_the_head_as_through_its_logits(model, config):
    drafter, target = tiny(model, config), tiny(model, config, hidden_size=40)
    check_head(drafter)
    ids, mask = torch.randint(1, 64, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    selected = torch.rand(2, 6) > 0.3
    labels, loss = torch.randint(0, 64, (int(selected.sum()),)), mixed({"forward_kl": 1.0})
    log_p = target(ids, mask).logits[selected].log_softmax(-1).detach()
    expected = loss(log_p, drafter(ids, mask).logits[selected].log_softmax(-1), labels).sum()
    expected.backward()
    expected_grads = {name: parameter.grad.clone() for name, parameter in drafter.named_parameters()}
    names = list(drafter.state_dict())

    drafter.zero_grad()
    hidden = target.base_model(ids, mask).last_hidden_state[selected].detach()
    weights = torch.ones(len(labels), dtype=torch.float64)
    lesson = Lesson(selected, hidden, output_head(target), labels, weights, loss, chunk_tokens=4)
    out = attach(drafter)(input_ids=ids, attention_mask=mask, lesson=lesson)
    out["loss"].backward()
    assert torch.allclose(out["loss"], expected)
    for name, parameter in drafter.named_parameters():
        assert torch.allclose(parameter.grad, expected_grads[name], atol=1e-9), name
    assert list(drafter.state_dict()) == names


def test_a_taught_model_still_gives_logits():
    drafter = tiny(LlamaForCausalLM, LlamaConfig)
    ids = torch.randint(1, 64, (1, 5))
    expected = drafter(ids).logits
    assert torch.equal(attach(drafter)(ids).logits, expected)


def test_an_architecture_with_unknown_logits_is_refused():
    with pytest.raises(UserError, match="does not compute its logits"):
        check_head(with_other_logits(tiny(LlamaForCausalLM, LlamaConfig)))


def test_a_head_that_is_no_linear_layer_is_refused():
    drafter = tiny(LlamaForCausalLM, LlamaConfig)
    drafter.set_output_embeddings(torch.nn.Sequential(drafter.lm_head))
    with pytest.raises(UserError, match="plain linear"):
        attach(drafter)
