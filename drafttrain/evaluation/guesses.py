"""Recorded answers, and what every model would say along them and, for a few tokens, wherever it leaves them.

These are trace rows (tracing.py) of several models: at every place of an answer a model's token is known, and behind
each that is not the answer's how the model would go on; of all of them the scores by which stopping rules judge.
"""

# T answer tokens, M places where a model leaves the answer, R tokens that it is followed for there

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from drafttrain.decoding.engine import Engine
from drafttrain.decoding.joining import common
from drafttrain.evaluation.questions import Question, response_row
from drafttrain.evaluation.trace_scores import RULES, Scores, score_names, unpack
from drafttrain.evaluation.tracing import Tracer, TraceSettings
from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.ops.sampling import Sampling

RUN = 16
"""R."""


@dataclass(frozen=True)
class Guesses:
    """What a model says along an answer.

    Attributes:
        tokens: its token at every place, given what stands before [T]; where it leaves the answer, those behind, place
            by place [M * R].
        left: the places where it leaves the answer [M].
        scores: of all tokens by the name of the score, likewise.
    """

    tokens: Sequence[int]
    left: Sequence[int]
    scores: Mapping[str, Scores]

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {place: number for number, place in enumerate(self.left)}

    def index(self, answer: Sequence[int], place: int, ahead: Sequence[int]) -> int | None:
        """Which of the tokens it says behind others.

        Behind a text that it did not write itself it is taken to say what it says at the same place of the answer.

        Args:
            answer: tokens of it.
            place: where `ahead` begins.
            ahead: tokens behind the answer's first `place`.

        Returns:
            None where that is not known.
        """
        kept = common(ahead, answer[place:])
        number = self._numbers.get(place + kept) if kept < len(ahead) else None
        if number is not None:
            gone, start = len(ahead) - kept - 1, len(answer) + number * RUN
            own = [self.tokens[place + kept], *self.tokens[start : start + gone]]
            if gone < RUN and list(ahead[kept:]) == own:
                return start + gone
        return place + len(ahead) if place + len(ahead) < len(answer) else None

    def score(self, name: str, index: int, step: int) -> float:
        """A score of one of the tokens, drafted `step` tokens into its round (from 0)."""
        return float(self._columns(name, step)[index])

    def _columns(self, name: str, step: int) -> np.ndarray:
        step = min(step, self.scores[name].values_TC.shape[1] - 1)
        if (name, step) not in self._by_step:
            self._by_step[name, step] = self.scores[name].column(step)
        return self._by_step[name, step]

    @cached_property
    def _by_step(self) -> dict[tuple[str, int], np.ndarray]:
        return {}


@dataclass(frozen=True)
class Answer:
    """A recorded answer.

    Attributes:
        task: what it was asked for.
        prompt, tokens: context and answer.
        limit: most tokens that it might have had.
        guesses: by model.
    """

    task: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    limit: int
    guesses: Mapping[str, Guesses] = field(default_factory=dict)


def look_up(
    engines: Mapping[str, Engine],
    target: Engine,
    question: Question,
    tokens: Sequence[int],
    sampling: Sampling,
    heads: Mapping[str, Mapping[str, AcceptanceHead]] | None = None,
) -> Answer:
    """What every model would have proposed along an answer.

    Args:
        engines: by name.
        target: whose answer it is.
        question: that it answers.
        tokens: of the answer.
        sampling: how it was drawn.
        heads: acceptance heads by model and name.
    """
    response = response_row(question, tokens)
    settings = TraceSettings(sampling, top_k=1, temperatures=(), run_length=RUN)
    guesses = {}
    for name, engine in engines.items():
        own = (heads or {}).get(name, {})
        [row] = Tracer(target, engine, settings, own).trace([response])
        names = [*RULES, *(each for head in own for each in score_names(head, own[head]))]
        left = np.flatnonzero(row["draft_ids"] != np.asarray(tokens))
        said = np.concatenate([row["draft_ids"], row["run_ids"]])
        scores = unpack(row, {"scores": names, "run_length": RUN})
        guesses[name] = Guesses(said.tolist(), left.tolist(), scores)
    return Answer(question.task, tuple(question.ids), tuple(tokens), question.limit, guesses)
