"""The drafter's output head while it is distilled: from hidden states of both models straight to loss and gradients.

Logits of 4,096 tokens over 128k words are 2 GB in float32, and a naive loss holds half a dozen of them. `DistillHead`
is the drafter's own `lm_head` (the same parameter, the same name in every checkpoint) which, given a `Lesson`, walks
over a few tokens at a time: both models' logits, loss, gradient, next. Nothing of size tokens x vocabulary exists, and
since gradients are made on the way forward, no logits are computed twice.

Being a module of its own matters under sharding: ZeRO-3 and FSDP gather its weight when it is called, once a step,
whatever the number of tokens or chunks on this rank, none at all included.
"""

# N tokens, V vocabulary (shared rows of both heads), H hidden, B batch, T time

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drafttrain.errors import UserError
from drafttrain.models.logits import LogitShape
from drafttrain.training.losses import Loss, expected_acceptance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class OutputHead:
    """An output head as plain tensors: weight [V, H], bias [V] or None, and what happens to the logits."""

    weight_VH: Tensor
    bias_V: Tensor | None
    shape: LogitShape

    def rows(self, count: int, dtype: torch.dtype | None = None) -> OutputHead:
        """The first `count` rows, in another dtype if asked; views where possible."""
        weight_VH = self.weight_VH[:count].to(dtype or self.weight_VH.dtype)
        bias_V = None if self.bias_V is None else self.bias_V[:count].to(weight_VH.dtype)
        return OutputHead(weight_VH, bias_V, self.shape)

    def raw(self, hidden_NH: Tensor) -> Tensor:
        """Logits [N, V] before `shape`, at least float32: softmax over a large vocabulary needs it."""
        logits_NV = F.linear(hidden_NH, self.weight_VH, self.bias_V)
        return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


@dataclass(frozen=True)
class Lesson:
    """What the target says about the trained tokens of a batch.

    Attributes:
        selected_BT: bool, the positions whose next token is trained; N of them are true.
        hidden_NH: the target's last hidden states there.
        head: the target's output head, whole on this rank.
        labels_N: recorded next tokens, -100 where the drafter wrote them itself.
        weights_N: weights of the tokens in the sum.
        loss: the loss, see `losses.mixed`.
        vocabulary: leading rows of both heads that stand for text; the rest is padding, of which families have
            different amounts. None takes all that both have.
        temperature: divides both models' logits.
        chunk_tokens: tokens whose logits exist at one time.
    """

    selected_BT: Tensor
    hidden_NH: Tensor
    head: OutputHead
    labels_N: Tensor
    weights_N: Tensor
    loss: Loss
    vocabulary: int | None = None
    temperature: float = 1.0
    chunk_tokens: int = 256


class _ChunkedDistillation(torch.autograd.Function):
    """(drafter hidden, weight, bias) -> (sum of weighted losses, sum of weighted expected acceptance).

    Gradients are made during forward, unscaled (so that float16 does not lose them), and multiplied by the incoming
    scalar in backward, once: a second backward through the same graph is refused.
    """

    @staticmethod
    def forward(
        ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, shape: LogitShape, lesson: Lesson, grad: bool
    ) -> tuple[Tensor, Tensor]:
        vocabulary = lesson.vocabulary or min(len(weight_VH), len(lesson.head.weight_VH))
        dtype = _compute_dtype(hidden_NH, weight_VH)
        q_head = OutputHead(weight_VH, bias_V, shape).rows(vocabulary, dtype)
        p_head = lesson.head.rows(vocabulary)
        needed = [grad and needs for needs in ctx.needs_input_grad]
        grads = _Gradients(needed, hidden_NH, weight_VH, bias_V)
        sums = torch.zeros(2, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=weight_VH.device)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            chunk = _chunk_tokens(lesson.chunk_tokens, vocabulary, hidden_NH.device)
            for start in range(0, len(hidden_NH), chunk):
                rows = slice(start, start + chunk)
                hidden_nH = hidden_NH[rows].to(dtype)
                sums += _chunk(hidden_nH, q_head, p_head, lesson, rows, grads)
        ctx.grads = grads
        loss, acceptance = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(acceptance)
        return loss, acceptance

    @staticmethod
    def backward(ctx, grad_loss: Tensor, grad_acceptance: Tensor):
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the distillation loss was already differentiated; compute it again")
        return *grads.scaled(grad_loss), None, None, None


class _Gradients:
    """Sums of gradients, in float32 at least; absent where nothing needs them."""

    def __init__(self, needed: list[bool], hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        self.dtypes = [tensor.dtype if tensor is not None else None for tensor in (hidden_NH, weight_VH, bias_V)]
        self.hidden_NH = _zeros(hidden_NH) if needed[0] else None
        self.weight_VH = _zeros(weight_VH) if needed[1] else None
        self.bias_V = _zeros(bias_V) if bias_V is not None and needed[2] else None

    @property
    def needed(self) -> bool:
        return not (self.hidden_NH is None and self.weight_VH is None and self.bias_V is None)

    def add(self, grad_nV: Tensor, hidden_nH: Tensor, weight_VH: Tensor, rows: slice) -> None:
        vocabulary = grad_nV.shape[1]
        if self.bias_V is not None:
            self.bias_V[:vocabulary] += grad_nV.sum(0)
        grad_nV = grad_nV.to(hidden_nH.dtype)
        if self.hidden_NH is not None:
            self.hidden_NH[rows] = grad_nV @ weight_VH
        if self.weight_VH is not None:
            total_VH = self.weight_VH[:vocabulary]
            if total_VH.dtype == grad_nV.dtype:
                total_VH.addmm_(grad_nV.t(), hidden_nH)
            else:
                total_VH += grad_nV.t() @ hidden_nH

    def scaled(self, factor: Tensor) -> list[Tensor | None]:
        grads = (self.hidden_NH, self.weight_VH, self.bias_V)
        return [
            None if grad is None else grad.mul_(factor).to(dtype)
            for grad, dtype in zip(grads, self.dtypes, strict=True)
        ]


def _zeros(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros(tensor.shape, dtype=dtype, device=tensor.device)


def _compute_dtype(hidden_NH: Tensor, weight_VH: Tensor) -> torch.dtype:
    device = hidden_NH.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VH.dtype


def _chunk_tokens(asked: int, vocabulary: int, device: torch.device) -> int:
    # 12 MiB a tensor on a CPU: glibc maps blocks above 32 MiB anew each time, and the page faults then cost three times
    # the arithmetic; below, matrix products slow down little.
    return max(1, min(asked, 3 * 2**20 // vocabulary)) if device.type == "cpu" else asked


def _chunk(
    hidden_nH: Tensor, q_head: OutputHead, p_head: OutputHead, lesson: Lesson, rows: slice, grads: _Gradients
) -> Tensor:
    """Sums of loss and acceptance over one chunk; its gradients are added to `grads`."""
    target_nH = lesson.hidden_NH[rows].to(p_head.weight_VH.dtype)
    weights_n = lesson.weights_N[rows]
    log_p_nV = p_head.shape.log_probs(p_head.raw(target_nH), lesson.temperature)
    logits_nV = q_head.raw(hidden_nH).requires_grad_(grads.needed)
    with torch.enable_grad():
        log_q_nV = q_head.shape.log_probs(logits_nV, lesson.temperature)
        log_p_nV = log_p_nV.to(log_q_nV.dtype)
        loss = (lesson.loss(log_p_nV, log_q_nV, lesson.labels_N[rows]) * weights_n).sum()
    if grads.needed:
        (grad_nV,) = torch.autograd.grad(loss, logits_nV)
        grads.add(grad_nV, hidden_nH, q_head.weight_VH, rows)
        del grad_nV
    acceptance = (expected_acceptance(log_p_nV, log_q_nV.detach()) * weights_n).sum()
    return torch.stack([loss.detach(), acceptance])


class DistillHead(nn.Linear):
    """An output head that can also be taught: `head(hidden)` gives logits, `head(hidden, lesson)` gives sums.

    Args:
        linear: the head to stand in for; its parameters are shared, not copied, so tied embeddings stay tied.
        shape: what the architecture does to logits.
    """

    def __init__(self, linear: nn.Linear, shape: LogitShape) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.shape = shape

    def forward(self, hidden: Tensor, lesson: Lesson | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., V]; with a lesson, for hidden [N, H], two scalars: the weighted sum of losses (with gradients
        to hidden states and head) and the weighted sum of expected acceptance, sum_x min(p, q)."""
        if lesson is None:
            return F.linear(hidden, self.weight, self.bias)
        return _ChunkedDistillation.apply(hidden, self.weight, self.bias, self.shape, lesson, torch.is_grad_enabled())


def teach_states(hidden_NH: Tensor, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """What `DistillHead` gives with a lesson, for a drafter that has the target's head: nothing of it is trained."""
    head = lesson.head
    return _ChunkedDistillation.apply(
        hidden_NH, head.weight_VH, head.bias_V, head.shape, lesson, torch.is_grad_enabled()
    )


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head of a model whose parameters are whole on this rank."""
    linear = model.get_output_embeddings()
    return OutputHead(linear.weight.detach(), None if linear.bias is None else linear.bias.detach(), _shape(model))


def attach(drafter: PreTrainedModel) -> PreTrainedModel:
    """Teach a causal LM to answer `model(input_ids, attention_mask, lesson=...)` with sums instead of logits.

    The model stays what it was for everyone else (class, parameter names, saving, decoding): its head is replaced by a
    `DistillHead` over the same parameters, and a forward call without a lesson goes the usual way.

    Raises:
        UserError: the head is no plain linear layer.
    """
    linear = drafter.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise UserError(
            f"the output head of {type(drafter).__name__} is a {type(linear).__name__}; only plain linear heads can be "
            "distilled."
        )
    drafter.set_output_embeddings(DistillHead(linear, _shape(drafter)))
    plain_forward = drafter.forward

    def forward(self: PreTrainedModel, *args, lesson: Lesson | None = None, **kwargs):
        if lesson is None:
            return plain_forward(*args, **kwargs)
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask")}
        hidden_BTH = self.get_decoder()(**inputs, use_cache=False).last_hidden_state
        loss, acceptance = self.get_output_embeddings()(hidden_BTH[lesson.selected_BT], lesson)
        return {"loss": loss, "acceptance": acceptance}

    drafter.forward = types.MethodType(forward, drafter)
    return drafter


def _shape(model: PreTrainedModel) -> LogitShape:
    return LogitShape.of(model.config.get_text_config())


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Make sure that hidden states and head give the model's own logits.

    Raises:
        UserError: the architecture does something else to them; distilling it would teach or learn wrong logits.
    """
    ids_BT = torch.arange(1, 9, device=model.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    expected_TV = model(input_ids=ids_BT, use_cache=False).logits[0].double()
    head = output_head(model)
    hidden_TH = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state[0]
    logits_TV = head.shape.apply(head.raw(hidden_TH.to(head.weight_VH.dtype))).double()
    unit = torch.finfo(head.weight_VH.dtype).eps
    if not torch.allclose(logits_TV, expected_TV, rtol=16 * unit, atol=64 * unit * float(expected_TV.abs().max())):
        raise UserError(
            f"{type(model).__name__} does not compute its logits as head times last hidden state; this architecture "
            "cannot be distilled from or into."
        )
