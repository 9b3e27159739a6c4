"""Distillation losses between a target p and a drafter q: one function each, one value a token.

Every function takes log-probabilities (``log_softmax`` of logits / temperature), so that a mix of losses and the
expected acceptance share one normalisation. Gradients come from autograd; `distill_head` calls these on a few tokens
at a time, which is why nothing here reduces over tokens.
"""

# N tokens, V vocabulary

import re
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from drafttrain.errors import UserError

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(p || q) = sum_x p(x) (log p(x) - log q(x)): the drafter covers all that the target may say.

    The default. Bounds the expected rejection by Pinsker: TV <= sqrt(KL / 2).

    Args:
        log_p_NV: target log-probabilities.
        log_q_NV: drafter log-probabilities over the same vocabulary.

    Returns:
        [N] nats, >= 0.
    """
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)


def reverse_kl(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """KL(q || p) = sum_x q(x) (log q(x) - log p(x)): the drafter says only what the target may say.

    Mode-seeking: for a drafter too small to cover the target (Gu et al. 2024, MiniLLM). Arguments and result as
    `forward_kl`.
    """
    return (log_q_NV.exp() * (log_q_NV - log_p_NV)).sum(-1)


def jensen_shannon(log_p_NV: Tensor, log_q_NV: Tensor, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Agarwal et al. 2024 (GKD), equation 1. Divided by beta it tends to forward KL as beta -> 0; divided by 1 - beta, to
    reverse KL as beta -> 1. Bounded by the entropy of (beta, 1 - beta), log 2 at most: robust to tokens that the
    drafter finds impossible.

    Args:
        log_p_NV: target log-probabilities.
        log_q_NV: drafter log-probabilities over the same vocabulary.
        beta: weight of the target in the mixture, 0 < beta < 1.

    Returns:
        [N] nats, in [0, log 2].
    """
    weight = log_p_NV.new_tensor(beta)
    log_m_NV = torch.logaddexp(log_p_NV + weight.log(), log_q_NV + (1 - weight).log())
    return beta * forward_kl(log_p_NV, log_m_NV) + (1 - beta) * forward_kl(log_q_NV, log_m_NV)


def total_variation(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """TV(p, q) = 1/2 sum_x |p(x) - q(x)| = 1 - sum_x min(p(x), q(x)).

    Minimising it maximises the expected acceptance of speculative sampling (Leviathan et al. 2023, Theorem 3.5); its
    gradient vanishes where the drafter is far off, so start from a drafter trained with a KL. Arguments as
    `forward_kl`.

    Returns:
        [N] in [0, 1].
    """
    return 0.5 * (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1)


def cross_entropy(log_p_NV: Tensor, log_q_NV: Tensor, labels_N: Tensor) -> Tensor:
    """-log q(x) of the recorded token x: what is left when the target's distribution is not known.

    Where no token was recorded (label < 0: the drafter's own continuations), its expectation over the target's draws:
    -sum_x p(x) log q(x).

    Args:
        log_p_NV: target log-probabilities, read only where a label is missing.
        log_q_NV: drafter log-probabilities.
        labels_N: recorded tokens, int64, -100 where there is none.

    Returns:
        [N] nats, >= 0.
    """
    missing_N = labels_N < 0
    recorded_N = -log_q_NV.gather(-1, labels_N.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    if not bool(missing_N.any()):
        return recorded_N
    return torch.where(missing_N, -(log_p_NV.exp() * log_q_NV).sum(-1), recorded_N)


def expected_acceptance(log_p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """sum_x min(p(x), q(x)): the probability that speculative sampling keeps a drafted token, [N] in [0, 1]."""
    return torch.minimum(log_p_NV, log_q_NV).exp_().sum(-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}
NAMES = (*DIVERGENCES, "cross_entropy")


def mixed(weights: Mapping[str, float]) -> Loss:
    """The weighted sum of named losses as one function of (log_p_NV, log_q_NV, labels_N).

    Args:
        weights: name -> weight >= 0, at least one > 0. Names are those of this file; `jensen_shannon(0.1)` sets beta.

    Raises:
        UserError: an unknown name, a beta outside (0, 1), a negative weight, or no weight at all.
    """
    if not weights or any(weight < 0 for weight in weights.values()) or sum(weights.values()) <= 0:
        raise UserError(f"training.losses is {dict(weights)}: give weights >= 0, at least one of them above 0.")
    terms = [(weight, _named(name)) for name, weight in weights.items() if weight > 0]

    def loss(log_p_NV: Tensor, log_q_NV: Tensor, labels_N: Tensor) -> Tensor:
        return sum(weight * term(log_p_NV, log_q_NV, labels_N) for weight, term in terms)

    return loss


def _named(name: str) -> Loss:
    if name == "cross_entropy":
        return cross_entropy
    match = re.fullmatch(r"(\w+)(?:\(([0-9.eE-]+)\))?", name)
    if match is None or match[1] not in DIVERGENCES or (match[2] and match[1] != "jensen_shannon"):
        raise UserError(f"training.losses names {name!r}: known are {', '.join(NAMES)} and jensen_shannon(BETA).")
    divergence = DIVERGENCES[match[1]]
    if match[2]:
        beta = float(match[2])
        if not 0 < beta < 1:
            raise UserError(f"training.losses names {name!r}: beta must lie strictly between 0 and 1.")
        divergence = partial(divergence, beta=beta)
    return lambda log_p_NV, log_q_NV, labels_N: divergence(log_p_NV, log_q_NV)
