"""Looking ahead: the drafter writes a few tokens behind the prompt, and stops when more would not help."""

# B batch, M key heads, S tokens of a prompt

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.context.scorers import rows_from
from drafttrain.context.scoring import attention_mass
from drafttrain.context.watching import QueryWatch
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.stopping import Step
from drafttrain.errors import UserError

NO_LONGSPEC = (
    "a LongSpec drafter reads its target's keys, so it cannot look ahead before its target has read the prompt; give a "
    "drafter that is a model of its own (--drafter.path)"
)


@dataclass(frozen=True)
class DraftAhead:
    """The draft pass of KV dropping and prompt compression.

    Attributes:
        engine: the drafter's; of the target's tokenizer.
        length: L, most tokens of the lookahead; it ends at an end token.
        min_confidence: it ends, too, with a token that the drafter gives less probability.
        settled: it ends, too, when the last token changed less than this share of the prompt tokens that the drafter
            attends to most; 0 does not look.
        share: of the prompt, which "most" means.

    Raises:
        UserError: an impossible setting, or a LongSpec drafter.
    """

    engine: Engine
    length: int = 8
    min_confidence: float = 0.0
    settled: float = 0.0
    share: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.engine, Engine):
            raise UserError(NO_LONGSPEC)
        if self.length < 1:
            raise UserError(f"a lookahead of {self.length} tokens is impossible; give at least 1")
        for name in ("min_confidence", "settled", "share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"the lookahead's {name} is {value}, but it must be between 0 and 1")

    def rule(self, watch: QueryWatch) -> Enough:
        """When to stop, for one batch."""
        return Enough(self, watch)


class Enough:
    """The stopping rule of a lookahead: an end token, low confidence, or a kept set that no longer changes.

    Args:
        ahead: its settings.
        watch: of the draft pass; asked only where ``settled`` is set.
    """

    min_length = 1
    adaptive = True

    def __init__(self, ahead: DraftAhead, watch: QueryWatch) -> None:
        self.ahead, self.watch = ahead, watch
        self.max_length = ahead.length
        self._mass: list[Tensor] = []
        self._sets: list[Tensor | None] = []

    def limits(self, sample_ids: Sequence[int], starts: Sequence[int]) -> list[int]:
        """The whole length."""
        return [self.max_length] * len(starts)

    def begin(self, rows: int) -> None:
        """A lookahead begins."""
        self._mass = [torch.zeros(1)] * rows
        self._sets = [None] * rows

    def stop(self, step: Step) -> Tensor:
        """Whether the lookahead ends with this token: bool [B]."""
        stop_B = torch.zeros_like(step.tokens_B, dtype=torch.bool)
        if self.ahead.min_confidence > 0:
            stop_B |= step.q_B < self.ahead.min_confidence
        if self.ahead.settled > 0:
            settled = [self._settled(row, step.number - 1) for row in range(len(stop_B))]
            stop_B |= torch.tensor(settled, device=stop_B.device)
        return stop_B

    def _settled(self, row: int, drafted: int) -> bool:
        """Whether the token just read (the last of the prompt, then drafted ones) changed what is attended to most."""
        watch = self.watch
        count = max(1, int(self.ahead.share * watch.lengths[row]))
        mass = torch.stack([self._attended(layer, row, drafted) for layer in range(watch.engine.layers)]).amax(0)
        self._mass[row] = torch.maximum(self._mass[row].to(mass.device), mass)
        chosen = torch.zeros_like(mass, dtype=torch.bool)
        chosen[self._mass[row].topk(count).indices] = True
        before, self._sets[row] = self._sets[row], chosen
        return before is not None and int((chosen & ~before).sum()) < self.ahead.settled * count

    def _attended(self, layer: int, row: int, drafted: int) -> Tensor:
        """Attention of the newest token to the prompt: [S]."""
        looked = self.watch.looked(layer, row, drafted)
        newest = rows_from(looked, len(looked.rows) - 1)
        return attention_mass(newest)[:, : self.watch.lengths[row]].amax(0)
