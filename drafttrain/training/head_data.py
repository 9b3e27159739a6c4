"""Training examples of the acceptance head, from traces.

An example is one drafted token: a drafter state, the scalar features of the token, and the label
P = min(1, p(Y) / q(Y)), the probability that the target accepts it (SpecDec++, section 3), with p and q as they are at
the decoding setting that was traced; greedy decoding accepts Y if it is the target's own token. There are four ways:

exact
    every response position: the drafter reads the response up to X_<i and proposes Y_i, as it does while decoding
    whenever all tokens drafted before were accepted, which is the event that P is conditioned on.
expected
    as exact, but with every token that could have been drafted there in place of the one that was: a token v that the
    traces hold of both models weighs q(v), and Y counts where it is none of them. The expectation over Y is the same;
    its variance, most of a label's when sampling, is gone. The producing state serves them all.
mixed
    published: prompt ++ Z, where Z keeps X with probability r and takes Y elsewhere; trained where Z = Y (mixing.py).
rounds
    whole drafting rounds of random length, up to the rejected token: of the positions of a response, those that are
    drafted while decoding, at the steps at which they are.

Traces of a LongSpec drafter are of one step each (step_tracing.py): their examples are drafted at that step, where it
can be reached.

`Examples.index` says which response position's state an example reads; head_states.py looks it up.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from drafttrain.errors import UserError
from drafttrain.models.acceptance_head import AcceptanceHeadConfig
from drafttrain.ops.random import sample_id, uniform
from drafttrain.ops.sampling import Sampling
from drafttrain.training.mixing import mix_tokens

# T response positions, N examples, k stored tokens, E likely ones

COLUMNS = (
    *("prompt_id", "split", "turn", "prompt_ids", "response_ids", "draft_ids"),
    *("log_p", "log_q", "entropy"),
    *("p_top_ids", "p_top_logits", "q_top_ids", "q_top_logits", "log_z_p", "log_z_q"),
)
"""What is read of a trace record."""

STEP_COLUMNS = (*COLUMNS, "step", "reached")
"""What is read of a step trace."""

_LIKELY = 0.01
"""Data expected: tokens of smaller q are left to chance, as there are many and they weigh little."""

_KEPT = 4096
"""Traces that a data set keeps in memory, some tens of kilobytes each: reading them costs more than using them."""


@dataclass(frozen=True)
class Likely:
    """Tokens that both models hold likely, at all positions of a response one after the other: [E] each.

    Attributes:
        position_E: response position, ascending.
        token_E, log_q_E, label_E: the token, its log q, its P.
        drawn_T: whether Y is one of its position's, bool [T].
    """

    position_E: Tensor
    token_E: Tensor
    log_q_E: Tensor
    label_E: Tensor
    drawn_T: Tensor


@dataclass(frozen=True)
class Trace:
    """What a head learns from one response.

    Attributes:
        sample: sample id of its draws.
        prompt: token ids.
        response_T, draft_T: X and Y, int64.
        label_T: P of each Y, float32; log_q_T and entropy_T of the q that drew it.
        likely: for data expected; None for greedy decoding, whose Y is the only one possible.
        step: of the round at which all tokens were drafted; None where that changes nothing.
        reached_T: bool, the positions that can be drafted at this step; None for all.
    """

    sample: int
    prompt: list[int]
    response_T: Tensor
    draft_T: Tensor
    label_T: Tensor
    log_q_T: Tensor
    entropy_T: Tensor
    likely: Likely | None = None
    step: int | None = None
    reached_T: Tensor | None = None

    def reached(self, column_T: Tensor) -> Tensor:
        """The part of a column that can be drafted at this step."""
        return column_T if self.reached_T is None else column_T[self.reached_T]

    @property
    def accepted_before_T(self) -> Tensor:
        """How many drafted tokens in a row were accepted directly before each position, int64 [T]."""
        positions = torch.arange(len(self.draft_T))
        after_rejection = torch.where(self.draft_T != self.response_T, positions + 1, 0)
        start = torch.cat([after_rejection.new_zeros(1), after_rejection])[:-1].cummax(0).values
        return positions - start


@dataclass(frozen=True)
class Layout:
    """How to read the traces of one data set.

    Attributes:
        greedy: whether they were made for greedy decoding.
        top_k, temperatures: stored tokens of both models and stored log Z, a position.
        temperature, log_z: of the decoding setting, and its place among the stored log Z; None unless the setting is a
            temperature and nothing else, so that stored logits tell p and q.
    """

    greedy: bool
    top_k: int = 0
    temperatures: int = 0
    temperature: float = 0.0
    log_z: int | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Layout:
        """From the manifest of the traces."""
        sampling = Sampling(**manifest["sampling"])
        temperatures = list(manifest.get("temperatures") or ())
        plain = sampling == Sampling(sampling.temperature) and sampling.temperature in temperatures
        return cls(
            greedy=sampling.greedy,
            top_k=int(manifest.get("top_k") or 0),
            temperatures=len(temperatures),
            temperature=sampling.temperature,
            log_z=temperatures.index(sampling.temperature) if plain and not sampling.greedy else None,
        )

    def trace(self, record: Mapping[str, Any], likely: bool = False) -> Trace:
        """Tensors of one record, on demand with the likely tokens of a plain temperature.

        Raises:
            UserError: its lists do not fit together.
        """
        response_T = torch.tensor(record["response_ids"], dtype=torch.long)
        draft_T = torch.tensor(record["draft_ids"], dtype=torch.long)
        log_p_T, log_q_T, entropy_T = (_floats(record[name]) for name in ("log_p", "log_q", "entropy"))
        if not len(response_T) == len(draft_T) == len(log_p_T) == len(log_q_T) == len(entropy_T):
            raise UserError(f"the trace of prompt {record['prompt_id']} has columns of unequal length; make it again.")
        equal_T = response_T == draft_T
        return Trace(
            sample=sample_id(record["prompt_id"], record["turn"]),
            prompt=list(record["prompt_ids"]),
            response_T=response_T,
            draft_T=draft_T,
            label_T=equal_T.float() if self.greedy else (log_p_T - log_q_T).clamp_max(0.0).exp(),
            log_q_T=log_q_T,
            entropy_T=entropy_T,
            likely=self._likely(record, draft_T) if likely and self.log_z is not None else None,
            step=record.get("step"),
            reached_T=torch.tensor(record["reached"], dtype=torch.bool) if "reached" in record else None,
        )

    def _likely(self, record: Mapping[str, Any], draft_T: Tensor) -> Likely:
        """The tokens among the stored ones of both models that q holds likely."""

        def stored(model: str) -> tuple[Tensor, Tensor]:
            ids_Tk = torch.tensor(record[f"{model}_top_ids"], dtype=torch.long).reshape(len(draft_T), self.top_k)
            logits_Tk = _floats(record[f"{model}_top_logits"]).reshape(ids_Tk.shape)
            log_z_T = _floats(record[f"log_z_{model}"])[self.log_z :: self.temperatures]
            return ids_Tk, logits_Tk / self.temperature - log_z_T[:, None]

        (p_ids_Tk, log_p_Tk), (q_ids_Tk, log_q_Tk) = stored("p"), stored("q")
        same_Tkk = q_ids_Tk[:, :, None] == p_ids_Tk[:, None, :]
        known_Tk = same_Tkk.any(-1) & (log_q_Tk > math.log(_LIKELY))
        matched_Tk = torch.where(same_Tkk, log_p_Tk[:, None, :], 0.0).sum(-1)
        position_E, _ = known_Tk.nonzero(as_tuple=True)
        return Likely(
            position_E=position_E,
            token_E=q_ids_Tk[known_Tk],
            log_q_E=log_q_Tk[known_Tk],
            label_E=(matched_Tk - log_q_Tk)[known_Tk].clamp_max(0.0).exp(),
            drawn_T=(known_Tk & (q_ids_Tk == draft_T[:, None])).any(-1),
        )

    def check(self, config: AcceptanceHeadConfig) -> None:
        """Refuse a head that these traces cannot train.

        Raises:
            UserError: expected labels of traces that do not tell them.
        """
        if config.data == "expected" and self.log_z is None and not self.greedy:
            raise UserError(
                "head.data expected needs traces of a plain temperature (no top-k, top-p, min-p or penalty) with log Z "
                "at it; take head.data exact."
            )


@dataclass(frozen=True)
class Examples:
    """The training examples of one response in one epoch.

    Attributes:
        tokens_T: what the drafter reads after the prompt: X, or Z when mixed.
        index_N: where each example's state lies in the flat layout.
        drafted_N: the drafted tokens, int64.
        log_q_N, entropy_N, step_N, label_N: features and labels, float32.
        weight_N: what each counts, float32: 1 unless the data is expected.
    """

    tokens_T: Tensor
    index_N: Tensor
    drafted_N: Tensor
    log_q_N: Tensor
    entropy_N: Tensor
    step_N: Tensor
    label_N: Tensor
    weight_N: Tensor


def make_examples(trace: Trace, config: AcceptanceHeadConfig, seed: int, epoch: int) -> Examples:
    """Examples of one response in one epoch, as `config.data` says."""
    tokens_T, index_N = trace.response_T, torch.arange(len(trace.draft_T))
    if config.data == "mixed":
        draws = {"seed": seed, "epoch": epoch, "sample": trace.sample}
        tokens_T, trained_T = mix_tokens(trace.response_T, trace.draft_T, config.mixing, **draws)
        index_N = index_N[trained_T]
    if config.data == "rounds":
        index_N, step_N = _rounds(trace, config, seed, epoch)
    else:
        step_T = _random_steps(trace, config.max_length, seed, epoch)
        step_N = step_T[index_N] if trace.step is None else torch.full_like(step_T, trace.step)[index_N]
    drafted = Examples(
        tokens_T=tokens_T,
        index_N=index_N,
        drafted_N=trace.draft_T[index_N],
        log_q_N=trace.log_q_T[index_N],
        entropy_N=trace.entropy_T[index_N],
        step_N=step_N,
        label_N=trace.label_T[index_N],
        weight_N=torch.ones(len(index_N)),
    )
    examples = _expected(drafted, trace.likely) if config.data == "expected" and trace.likely else drafted
    return examples if trace.reached_T is None else _only(examples, trace.reached_T[examples.index_N])


def _only(examples: Examples, kept_N: Tensor) -> Examples:
    """Some of the examples."""
    names = [item.name for item in dataclasses.fields(Examples) if item.name != "tokens_T"]
    return dataclasses.replace(examples, **{name: getattr(examples, name)[kept_N] for name in names})


def _expected(drafted: Examples, likely: Likely) -> Examples:
    """The likely tokens, weighing q, in place of the drawn one where that is among them."""
    rest_N, at_E = ~likely.drawn_T, likely.position_E
    return Examples(
        tokens_T=drafted.tokens_T,
        index_N=torch.cat([drafted.index_N[rest_N], at_E]),
        drafted_N=torch.cat([drafted.drafted_N[rest_N], likely.token_E]),
        log_q_N=torch.cat([drafted.log_q_N[rest_N], likely.log_q_E]),
        entropy_N=torch.cat([drafted.entropy_N[rest_N], drafted.entropy_N[at_E]]),
        step_N=torch.cat([drafted.step_N[rest_N], drafted.step_N[at_E]]),
        label_N=torch.cat([drafted.label_N[rest_N], likely.label_E]),
        weight_N=torch.cat([drafted.weight_N[rest_N], likely.log_q_E.exp()]),
    )


def _random_steps(trace: Trace, max_length: int, seed: int, epoch: int) -> Tensor:
    """A step at which a round could have drafted each position: it began as far back as all was accepted, or later."""
    positions = torch.arange(len(trace.draft_T))
    u_T = uniform(seed, f"head step, epoch {epoch}", torch.full_like(positions, trace.sample), positions)
    possible_T = trace.accepted_before_T.clamp_max(max_length - 1) + 1
    return 1.0 + (u_T * possible_T).floor().float()


def _rounds(trace: Trace, config: AcceptanceHeadConfig, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Rounds through the whole response, of lengths drawn between the head's limits: positions and steps [N]."""
    total = len(trace.draft_T)
    positions = torch.arange(total)
    u_T = uniform(seed, f"head rounds, epoch {epoch}", torch.full_like(positions, trace.sample), positions)
    low, high = config.min_length, config.max_length
    length_T = (low + (u_T * (high - low + 1)).floor().long()).tolist()
    rejected_T = (trace.draft_T != trace.response_T).tolist()
    index: list[int] = []
    step: list[int] = []
    start = 0
    while start < total:
        end = min(start + length_T[start], total)
        rejection = next((i for i in range(start, end) if rejected_T[i]), None)
        drafted = end - start if rejection is None else rejection - start + 1
        index += range(start, start + drafted)
        step += range(1, drafted + 1)
        # the target writes one token more: the one in place of the rejected, or that after the last
        start += drafted + (rejection is None)
    return torch.tensor(index, dtype=torch.long), torch.tensor(step, dtype=torch.float32)


class HeadDataset(Dataset):
    """Responses as lists of examples, in an order of their own in every epoch.

    The order and every other draw depend on (seed, epoch) alone, and the length is rounded up to whole global batches
    with empty items, so that any number of processes sees the same global batches and a resumed run goes on exactly.

    Args:
        records: trace records (anything indexable that gives dicts).
        layout: how to read them.
        config: of the head.
        seed: of all draws.
        global_batch: responses per optimizer step over all processes; 1 keeps the plain length.
        shuffle: False keeps the order of the records.
    """

    def __init__(
        self,
        records: Sequence[Mapping[str, Any]],
        layout: Layout,
        config: AcceptanceHeadConfig,
        seed: int,
        global_batch: int = 1,
        shuffle: bool = True,
    ) -> None:
        self.records, self.layout, self.config, self.seed = records, layout, config, seed
        self.global_batch, self.shuffle = global_batch, shuffle
        self._read: dict[int, Trace] = {}
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self.epoch = epoch
        rows = torch.arange(len(self.records))
        if self.shuffle:
            rows = uniform(self.seed, f"head order, epoch {epoch}", torch.zeros_like(rows), rows).argsort()
        self._order = rows.tolist()

    def __len__(self) -> int:
        return -(-len(self.records) // self.global_batch) * self.global_batch

    def __getitem__(self, position: int) -> tuple[int, Trace, Examples] | None:
        """(row, trace, examples), or None for an empty item."""
        if position >= len(self.records):
            return None
        row = self._order[position]
        trace = self.trace(row)
        return row, trace, make_examples(trace, self.config, self.seed, self.epoch)

    def trace(self, row: int) -> Trace:
        """The trace of a record, whatever the order; the first that were read are kept."""
        trace = self._read.get(row)
        if trace is None:
            trace = self.layout.trace(self.records[row], likely=self.config.data == "expected")
            if len(self._read) < _KEPT:
                self._read[row] = trace
        return trace


def collate(items: Sequence[tuple[int, Trace, Examples] | None]) -> dict[str, Any]:
    """A batch: examples of all responses one after the other, nothing padded.

    Returns:
        log_q, entropy, step, labels, weights: float32 [N]; drafted: int64 [N]; wanted: (row, trace, examples) of each
        response, from which the states are looked up or computed.
    """
    present = [item for item in items if item is not None]
    columns = {"log_q": "log_q_N", "entropy": "entropy_N", "step": "step_N", "labels": "label_N", "weights": "weight_N"}
    empty = torch.zeros(0)
    batch = {
        name: torch.cat([empty, *(getattr(examples, attribute) for _, _, examples in present)])
        for name, attribute in columns.items()
    }
    drafted_N = torch.cat([empty.long(), *(examples.drafted_N for _, _, examples in present)])
    return {**batch, "drafted": drafted_N, "wanted": present}


def features_and_labels(dataset: HeadDataset, most: int = 1_000_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log q, entropy and label of drafted tokens, for baselines: float64 [N] each, evenly thinned to about `most`."""
    traces = [dataset.trace(row) for row in range(len(dataset.records))]
    names = ("log_q_T", "entropy_T", "label_T")
    columns = [torch.cat([trace.reached(getattr(trace, name)) for trace in traces]).double().numpy() for name in names]
    every = -(-len(columns[0]) // most)
    return tuple(column[:: max(every, 1)] for column in columns)


def _floats(values: Any) -> Tensor:
    return torch.tensor(values if values is not None else [], dtype=torch.float32)
