"""When to stop drafting. A rule decides only whether to draw ANOTHER token; a token once drawn is verified.

All rules are siblings: they look at what the drafter just did and say, per row, whether to stop. None of them can
change the emitted distribution, since none can drop a drawn token. Conventions shared with the replay of traces:

* steps count from 1; the rule is asked after Y_k has been drawn and answers whether drafting ends with Y_k;
* it is not listened to before ``min_length``, and drafting ends at ``max_length`` or at the row's budget anyway;
* confidences are measured in `Sampling.scoring`, which for greedy decoding is the softmax at temperature 1.
"""

# B batch, H hidden

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from drafttrain.errors import UserError


class Step:
    """What a rule may look at after the k-th token was drawn; what it does not look at is not computed.

    Attributes:
        number: k, from 1.
        tokens_B: the token drawn.
        hidden_BH: the drafter's last hidden state (post-norm) that produced the token; it is also the state that
            consumed the token before it.
    """

    def __init__(self, number: int, tokens_B: Tensor, hidden_BH: Tensor, probs: Callable[[], Tensor]) -> None:
        self.number = number
        self.tokens_B = tokens_B
        self.hidden_BH = hidden_BH
        self._probs = probs

    @cached_property
    def probs_BV(self) -> Tensor:
        """The distribution in which confidence is measured (`Sampling.scoring`)."""
        return self._probs()

    @cached_property
    def q_B(self) -> Tensor:
        """Probability of the token drawn."""
        return self.probs_BV.gather(1, self.tokens_B.unsqueeze(1)).squeeze(1)

    @cached_property
    def entropy_B(self) -> Tensor:
        """Entropy of the distribution in nats."""
        return torch.special.entr(self.probs_BV).sum(1)


class StoppingRule(Protocol):
    """The interface of a stopping rule. What it says may depend on the steps and the places of the round alone.

    Attributes:
        min_length: the rule is not listened to before this many tokens.
        max_length: drafting ends here at the latest.
        adaptive: whether ``stop`` must be asked at all.
    """

    min_length: int
    max_length: int
    adaptive: bool

    @abstractmethod
    def limits(self, sample_ids: Sequence[int], starts: Sequence[int]) -> list[int]:
        """The most tokens to draft this round in each row, known before drafting.

        Args:
            sample_ids: of the rows.
            starts: position of the first token to be drafted, counted from the start of the prompt.
        """
        ...

    def begin(self, rows: int) -> None:
        """A round begins."""
        ...

    def stop(self, step: Step) -> Tensor | None:
        """bool [B], whether drafting ends with this token; None if no row can have an answer yet."""
        ...


class _Rule:
    """What rules have in common."""

    adaptive = True

    def __init__(self, min_length: int, max_length: int) -> None:
        if not 1 <= min_length <= max_length:
            raise UserError(f"a draft of {min_length} to {max_length} tokens is impossible: need 1 <= min <= max")
        self.min_length = min_length
        self.max_length = max_length

    def limits(self, sample_ids: Sequence[int], starts: Sequence[int]) -> list[int]:
        return [self.max_length] * len(starts)

    def begin(self, rows: int) -> None:
        pass


class FixedLength(_Rule):
    """Always the same number of tokens; the round needs no read from the device until verification."""

    adaptive = False

    def __init__(self, length: int) -> None:
        super().__init__(length, length)

    def stop(self, step: Step) -> Tensor | None:
        """Never asked."""
        return None


class _Product(_Rule):
    """Stop when 1 - prod_{i <= k} P_i > threshold: the probability that some drafted token is rejected (SpecDec++)."""

    def __init__(self, threshold: float, min_length: int, max_length: int) -> None:
        super().__init__(min_length, max_length)
        if not 0 <= threshold <= 1:
            raise UserError(f"a stopping threshold of {threshold} is not a probability")
        self.threshold = threshold
        self._product_B: Tensor | None = None

    def begin(self, rows: int) -> None:
        self._product_B = None

    def _exceeds(self, p_B: Tensor) -> Tensor:
        self._product_B = p_B if self._product_B is None else self._product_B * p_B
        return 1 - self._product_B > self.threshold


class Confidence(_Product):
    """The drafter's own probability of its tokens in place of a trained head.

    Args:
        threshold: stop when 1 - q(Y_1) ... q(Y_k) exceeds it, or, per token, when 1 - q(Y_k) does.
        per_token: look at the last token alone (transformers' assistant_confidence_threshold c is threshold 1 - c).
    """

    def __init__(self, threshold: float, per_token: bool = False, min_length: int = 1, max_length: int = 12) -> None:
        super().__init__(threshold, min_length, max_length)
        self.per_token = per_token

    def stop(self, step: Step) -> Tensor | None:
        """Too little confidence in the block, or in its last token."""
        return 1 - step.q_B > self.threshold if self.per_token else self._exceeds(step.q_B)


class EntropyBound(_Rule):
    """Stop when the distribution that produced Y_k has more than ``bound`` nats of entropy.

    One bound on the entropy is the same as AdaEDL's bound on the acceptance, 1 - sqrt(gamma * H) < lambda
    (Agrawal et al. 2024), at H = (1 - lambda)^2 / gamma.
    """

    def __init__(self, bound: float, min_length: int = 1, max_length: int = 12) -> None:
        super().__init__(min_length, max_length)
        self.bound = bound

    def stop(self, step: Step) -> Tensor | None:
        """The drafter was too uncertain."""
        return step.entropy_B > self.bound


class Head(Protocol):
    """What an acceptance head must offer.

    Attributes:
        state: "producing" (scored with the hidden state that produced the token, known at once) or "consumed" (the
            state after reading the token, the published form, known one draft forward later).
        features: which of "log_q", "entropy", "step" it reads besides the hidden state, as q(Y), the entropy of q, and
            the token's number in its round; the others are passed as None.
            With "token" it is passed the tokens, too, as `tokens_B`.
    """

    state: str
    features: Collection[str]

    def score(self, hidden_BH: Tensor, q_B: Tensor | None, entropy_B: Tensor | None, step_B: Tensor | None) -> Tensor:
        """P(the token is accepted | those before it are): [B]."""
        ...


class AcceptanceHeadRule(_Product):
    """SpecDec++ (Huang et al. 2024): stop when 1 - prod P_i exceeds the threshold, P_i from a trained head.

    With a head on the *producing* state Y_k itself is scored right after it was drawn. With the published *consumed*
    state the score of Y_{k-1} comes with the forward that draws Y_k, so the last token of every draft is unscored.
    """

    def __init__(self, head: Head, threshold: float, min_length: int = 1, max_length: int = 12) -> None:
        super().__init__(threshold, min_length, max_length)
        self.head = head
        self._previous: Step | None = None

    def begin(self, rows: int) -> None:
        """Forget the last block's product and step."""
        super().begin(rows)
        self._previous = None

    def stop(self, step: Step) -> Tensor | None:
        """Score the token that this step's hidden state belongs to."""
        scored = step if self.head.state == "producing" else self._previous
        self._previous = step
        if scored is None:
            return None
        reads = self.head.features
        p_B = self.head.score(
            step.hidden_BH,
            scored.q_B if "log_q" in reads else None,
            scored.entropy_B if "entropy" in reads else None,
            torch.full_like(scored.tokens_B, scored.number) if "step" in reads else None,
            **({"tokens_B": scored.tokens_B} if "token" in reads else {}),
        )
        return self._exceeds(p_B)


class Oracle(_Rule):
    """Perfect stopping for greedy decoding: draft exactly the tokens that will be accepted, none that is not.

    Args:
        matches: by sample id, whether the drafter's greedy token at each place of the text is the target's.
        max_length: drafts are cut here.
    """

    adaptive = False

    def __init__(self, matches: Mapping[int, Sequence[bool]], max_length: int = 12) -> None:
        super().__init__(1, max_length)
        self.matches = matches

    def limits(self, sample_ids: Sequence[int], starts: Sequence[int]) -> list[int]:
        """The length of the run of matches that begins at each start."""
        return [self._run(self.matches[sample], start) for sample, start in zip(sample_ids, starts, strict=True)]

    def stop(self, step: Step) -> Tensor | None:
        """Never asked."""
        return None

    def _run(self, matches: Sequence[bool], start: int) -> int:
        end = start
        while end < len(matches) and end - start < self.max_length and matches[end]:
            end += 1
        return end - start
