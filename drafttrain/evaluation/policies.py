"""Policies: how long to draft in a round, as replay sees them.

A policy turns what is known of the drafted tokens Y_1, Y_2, ... of a round into the number of tokens that go to the
target. Every adaptive rule here has one shape, a running value that only falls (or only rises) along the draft and a
bound that it must not cross; m is the first token at which the rule is listened to:

    product  1 - score_1 * ... * score_k      stop when it exceeds the threshold   (SpecDec++, cumulative confidence)
    token    1 - min(score_m, ..., score_k)   stop when it exceeds the threshold   (confidence of each token)
    bound    max(score_m, ..., score_k)       stop when it exceeds the threshold   (entropy)

That shape is what lets one pass over the record serve a thousand thresholds (replay.py). The conventions are those of
decoding/stopping.py; `policy_of` reads a policy off a rule of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from drafttrain.decoding.stopping import (
    AcceptanceHeadRule,
    Confidence,
    EntropyBound,
    FixedLength,
    Oracle,
    StoppingRule,
)
from drafttrain.evaluation.trace_record import LONGEST

Kind = Literal["product", "token", "bound"]


@dataclass(frozen=True)
class FixedPolicy:
    """Draft `length` tokens every round; 0 never drafts, which is autoregressive decoding."""

    length: int

    @property
    def maximum(self) -> int:
        """Tokens drafted at most."""
        return self.length


@dataclass(frozen=True)
class OraclePolicy:
    """Perfect stopping: draft the tokens that will be accepted, at most `maximum`; nothing is ever discarded."""

    maximum: int = 12


@dataclass(frozen=True)
class ThresholdPolicy:
    """Stop by a recorded score of the drafted tokens.

    Args:
        score: name of the score in the record.
        threshold: see the module's docstring.
        kind: how scores combine, likewise.
        minimum: tokens drafted before the rule is listened to.
        maximum: tokens drafted at most.
        lag: 1 if the score of Y_k comes with the forward that draws Y_k+1 (heads on the consumed state), else 0.
    """

    score: str
    threshold: float
    kind: Kind = "product"
    minimum: int = 1
    maximum: int = 12
    lag: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(f"minimum {self.minimum} must lie between 1 and maximum {self.maximum}")

    @property
    def floor(self) -> float:
        """Drafting goes on while the running product, the least score, or minus the largest score is at least this."""
        return -self.threshold if self.kind == "bound" else 1.0 - self.threshold

    @property
    def first_judged(self) -> int:
        """The first drafted token (from 1) whose score counts: a product remembers them all."""
        return 1 if self.kind == "product" else max(1, self.minimum - self.lag)


Policy = FixedPolicy | OraclePolicy | ThresholdPolicy


def policy_of(rule: StoppingRule, head: str = "head", longest: int = LONGEST) -> Policy:
    """The policy that replays a stopping rule of the decoder.

    Args:
        rule: from decoding/stopping.py.
        head: name in the record of the scores of an acceptance head's rule.
        longest: most tokens that the drafter under the rule proposes.

    Raises:
        TypeError: a rule that traces say nothing about.
    """
    longest = min(longest, rule.max_length)
    limits = {"minimum": min(rule.min_length, longest), "maximum": longest}
    match rule:
        case FixedLength():
            return FixedPolicy(longest)
        case Oracle():
            return OraclePolicy(longest)
        case Confidence():
            kind = "token" if rule.per_token else "product"
            return ThresholdPolicy("confidence", rule.threshold, kind, **limits)
        case EntropyBound():
            return ThresholdPolicy("entropy", rule.bound, "bound", **limits)
        case AcceptanceHeadRule():
            lag = 1 if rule.head.state == "consumed" else 0
            return ThresholdPolicy(head, rule.threshold, **limits, lag=lag)
    raise TypeError(f"{type(rule).__name__} cannot be replayed from traces")
