"""context.json: what approximate decoding of long prompts cost in answers and gave in time and memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from drafttrain.context.cost import CompressionCost
from drafttrain.evaluation.schema import Environment, Pair
from drafttrain.evaluation.statistics import Interval

DENSE = "dense"


@dataclass
class ContextRow:
    """One method at one budget on prompts of one length (or of a file); times and bytes are means over its prompts."""

    method: str
    budget: float
    """share of the prompt; 1 is dense"""
    length: int
    prompts: int
    score: float
    """mean score of the task's metric"""
    exact: float
    """share of answers that are the right ones"""
    same: float
    """share of answers that are the dense target's, token by token"""
    points: Interval | None
    """score less the dense target's, in points, paired over prompts; None for the dense target"""
    recall: float | None
    """share of what attention to the dense answer would choose that was kept; where keys were dropped"""
    mass: float | None
    """share of the dense answer's attention to the prompt that fell on what was kept; likewise"""
    kl: float | None
    """KL divergence of next-token distributions from the dense ones over the dense answer, nats; likewise"""
    first_token: float
    """seconds to the first token"""
    draft_prefill: float
    draft_decode: float
    scoring: float
    target_prefill: float
    tokens_per_second: float | None
    """behind what was emitted with the prefill, whatever drafter decodes; None where nothing was left"""
    overhead: float
    """draft pass and scores over the dense target's prefill"""
    drafted: float
    """tokens of the lookahead"""
    free_tokens: float
    """those of them that the target accepted in its prefill"""
    kv_bytes: float
    """allocated for keys and values of the target"""
    peak_bytes: float | None
    """most device memory, where there is a device that counts it"""
    tasks: dict[str, float] = field(default_factory=dict)
    """mean score by task"""


@dataclass
class ContextExample:
    """A prompt with what was kept of it."""

    method: str
    task: str
    budget: float
    reference: str
    answer: str
    dense_answer: str
    html: str


@dataclass
class ContextReport:
    """The whole file."""

    warning: str
    environment: Environment
    pair: Pair
    dtype: str
    decoding: str
    lookahead: int
    rows: list[ContextRow]
    break_even: dict[str, int | None]
    """by budget the shortest prompt whose compression pays by the costs; None for none"""
    costs: CompressionCost
    """of reading a compressed prompt, measured"""
    bypass: bool
    """whether prompts whose compression does not pay were read whole"""
    lookaheads: list[ContextRow] = field(default_factory=list)
    """KV dropping at the smallest budget by its lookahead, which stands in ``method``"""
    examples: list[ContextExample] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
