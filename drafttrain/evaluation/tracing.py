"""Trace rows: what a drafter would have proposed along recorded responses of its target.

At every position of a response X the drafter's token Y is drawn *coupled* to X: Y = X with probability
min(1, q(X) / p(X)), else Y comes from the normalised (q - p)+. This is the maximal coupling read from the target's
side: X is distributed as p, so Y is distributed as q, is accepted (Y = X) with probability sum min(p, q), and the path
that speculative decoding emits *is* the recorded response, whatever rule decides when drafting stops. So one record
replays every rule exactly (drafttrain/evaluation/replay.py). Greedy decoding is the special case Y = argmax q with X as
recorded.

Every draw is a function of (seed, prompt and turn, position): rows do not depend on the batch they were made in.
"""

# B rows, L tokens, T response tokens, N response tokens of the batch, M rejected positions, R tokens of a run,
# W branches, V vocabulary, H hidden, k stored tokens

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad as pad_last

from drafttrain.decoding.engine import Engine, pad
from drafttrain.errors import UserError
from drafttrain.evaluation.trace_scores import Scores, flat_scores, score_rows
from drafttrain.models.acceptance_head import AcceptanceHead
from drafttrain.models.branch_states import Branches
from drafttrain.ops.random import sample, sample_id, uniform
from drafttrain.ops.sampling import Sampling, log_probability_and_entropy, seen_tokens

PIECE = 2**24
"""Logits of one model that exist at one time, in entries: 64 MB in float32."""

COPIED = ("prompt_id", "split", "task", "source", "turn", "prompt_ids", "response_ids")
"""Fields that a trace takes over from its response."""


@dataclass(frozen=True)
class TraceSettings:
    """What decides the rows, beside the models and the responses.

    Attributes:
        sampling: how both models' tokens are drawn when decoding.
        seed: of all draws.
        top_k: most likely tokens of both models that are stored.
        temperatures: at which log Z is stored.
        run_length: tokens R that the drafter is followed for beyond every rejection.
    """

    sampling: Sampling
    seed: int = 0
    top_k: int = 16
    temperatures: tuple[float, ...] = (0.5, 0.7, 1.0)
    run_length: int = 0


@dataclass(frozen=True)
class Tracer:
    """Makes trace rows of responses, a batch at a time.

    Args:
        target: cut to the tokens that it can emit.
        drafter: of as many logits or not; those it lacks have no probability, those beyond the target's do not count.
        settings: of the traces.
        heads: acceptance heads whose scores are stored, by name.
    """

    target: Engine
    drafter: Engine
    settings: TraceSettings
    heads: Mapping[str, AcceptanceHead] = field(default_factory=dict)

    @torch.inference_mode()
    def trace(self, responses: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Trace rows (records.SCHEMAS["traces"]) of a batch of response rows, in their order.

        Raises:
            UserError: an empty prompt, a row longer than a model's context, or a model whose output is not finite.
        """
        for response in responses:
            self._check(response)
        batch = _Batch(responses)
        tokens_BL, _ = pad(batch.sequences, self.target.device)
        cache = self.target.new_cache(len(responses), tokens_BL.shape[1])
        hidden_p_NH = batch.before(self.target.forward(cache, tokens_BL, keep=None).hidden)
        branches = Branches(self.drafter.model, batch.sequences)
        columns = self._columns(batch, hidden_p_NH, batch.before(branches.hidden_BLH))
        runs = self._runs(batch, branches, columns["draft_ids"].numpy())
        rows = [
            {name: response[name] for name in COPIED} | drafts | drafted_on
            for response, drafts, drafted_on in zip(
                responses, _split(columns, batch.lengths), _split(runs, batch.rejections(columns)), strict=True
            )
        ]
        self._add_scores(rows)
        return rows

    def _check(self, response: Mapping[str, Any]) -> None:
        name = f"prompt {response['prompt_id']} (turn {response['turn']})"
        if not len(response["prompt_ids"]):
            raise UserError(f"{name} is empty; a prompt needs at least one token (a start token will do).")
        length = len(response["prompt_ids"]) + len(response["response_ids"])
        for model, engine in (("target", self.target), ("drafter", self.drafter)):
            if engine.max_positions is not None and length > engine.max_positions:
                raise UserError(
                    f"{name} and its response have {length} tokens, more than the {engine.max_positions} positions of "
                    f"the {model}; make the responses again with shorter prompts or a lower responses.max_new_tokens."
                )

    def _columns(self, batch: _Batch, hidden_p_NH: Tensor, hidden_q_NH: Tensor) -> dict[str, Tensor]:
        """The columns of every response position [N, ...], on the CPU."""
        step = max(1, PIECE // self.target.vocabulary)
        pieces = [
            self._piece(batch, slice(start, start + step), hidden_p_NH, hidden_q_NH)
            for start in range(0, max(1, len(batch.row_N)), step)
        ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _piece(self, batch: _Batch, part: slice, hidden_p_NH: Tensor, hidden_q_NH: Tensor) -> dict[str, Tensor]:
        settings, sampling = self.settings, self.settings.sampling
        p_logits_NV = _finite(self.target.logits(hidden_p_NH[part]), "target")
        device = p_logits_NV.device
        q_logits_NV = self._drafter_logits(hidden_q_NH[part]).to(device)
        x_N = batch.response_N[part].to(device)
        seen_NV = batch.seen(part, self.target.vocabulary, device) if sampling.penalised else None
        if sampling.greedy:
            y_N = sampling.choose(q_logits_NV, seen_NV)
            same_N = y_N == x_N
            facts = {"overlap": same_N.float(), "log_p": same_N.float().log()}
            leaves_N = torch.zeros_like(same_N)
            scoring_NV = sampling.scoring.probabilities(q_logits_NV)
        else:
            p_NV = sampling.probabilities(p_logits_NV, seen_NV)
            scoring_NV = q_NV = sampling.probabilities(q_logits_NV, seen_NV)
            keys = (batch.id_N[part].to(device), batch.place_N[part].to(device))
            u_N = uniform(settings.seed, "trace couple", *keys)
            y_N = couple(p_NV, q_NV, x_N, u_N, uniform(settings.seed, "trace residual", *keys))
            log_p_N = p_NV.gather(1, y_N[:, None])[:, 0].log()
            facts = {"overlap": torch.minimum(p_NV, q_NV).sum(1), "log_p": log_p_N}
            kept_N = torch.maximum((p_NV > 0).sum(1), (q_NV > 0).sum(1))
            leaves_N = (kept_N > settings.top_k) & (sampling.top_p < 1)
        log_q_N, entropy_N = log_probability_and_entropy(scoring_NV, y_N)
        facts |= {"draft_ids": y_N, "log_q": log_q_N, "entropy": entropy_N, "max_q": scoring_NV.amax(1)}
        facts |= {"top_p_leaves_k": leaves_N}
        facts |= self._summary("p", p_logits_NV) | self._summary("q", q_logits_NV)
        return {name: value.cpu() for name, value in facts.items()}

    def _drafter_logits(self, hidden_NH: Tensor) -> Tensor:
        """The drafter's logits over the target's vocabulary [N, V]: as in decoding, cut or without what it lacks."""
        logits_NV = self.drafter.logits(hidden_NH)
        missing = self.target.vocabulary - self.drafter.vocabulary
        return _finite(logits_NV if missing == 0 else pad_last(logits_NV, (0, missing), value=-torch.inf), "drafter")

    def _summary(self, name: str, logits_NV: Tensor) -> dict[str, Tensor]:
        """What is kept of a model's logits, before any sampling setting: the largest, and log Z of logits / t."""
        logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
        top = logits_NV.topk(self.settings.top_k, dim=1)
        log_z = [(logits_NV / temperature).logsumexp(1) for temperature in self.settings.temperatures]
        return {
            f"{name}_top_ids": top.indices,
            f"{name}_top_logits": top.values,
            f"log_z_{name}": torch.stack(log_z, 1) if log_z else logits_NV[:, :0],
        }

    def _runs(self, batch: _Batch, branches: Branches, draft_N: np.ndarray) -> dict[str, Tensor]:
        """What the drafter goes on to say behind every rejected token, [M, R] each, on the CPU."""
        length = self.settings.run_length
        rejected = np.flatnonzero(draft_N != batch.response_N.numpy())
        row_M, place_M = batch.row_N[rejected], batch.place_N[rejected]
        found = {name: torch.zeros(len(rejected), length) for name in ("run_log_q", "run_entropy", "run_max_q")}
        found["run_ids"] = torch.zeros(len(rejected), length, dtype=torch.long)
        if length == 0 or len(rejected) == 0:
            return found
        roots: list[list[int]] = [[] for _ in batch.sequences]
        branch_M = []
        for row, place in zip(row_M.tolist(), place_M.tolist(), strict=True):
            branch_M.append(len(roots[row]))
            roots[row].append(len(batch.prompts[row]) + place)
        branches.root(roots)
        where = (row_M, torch.tensor(branch_M))
        texts = batch.texts(rejected)
        token_M = torch.from_numpy(draft_N[rejected])
        for step in range(length):
            tokens_BW = torch.zeros(len(roots), max(map(len, roots)), dtype=torch.long)
            tokens_BW[where] = token_M
            hidden_MH = branches.extend(tokens_BW.to(self.drafter.device))[where]
            texts = [[*text, token] for text, token in zip(texts, token_M.tolist(), strict=True)]
            u_M = uniform(self.settings.seed, f"trace run {step}", batch.id_N[rejected], place_M)
            token_M, *facts = self._draw(hidden_MH, texts, u_M)
            found["run_ids"][:, step] = token_M
            for name, value in zip(("run_log_q", "run_entropy", "run_max_q"), facts, strict=True):
                found[name][:, step] = value
        return found

    def _draw(self, hidden_MH: Tensor, texts: list[list[int]], u_M: Tensor) -> tuple[Tensor, ...]:
        """The drafter's next token behind its states, its log q, the entropy and the maximum of q; [M], on the CPU."""
        sampling, drawn = self.settings.sampling, []
        step = max(1, PIECE // self.target.vocabulary)
        for start in range(0, len(texts), step):
            part = slice(start, start + step)
            logits_MV = self._drafter_logits(hidden_MH[part])
            seen_MV = None
            if sampling.penalised:
                seen_MV = seen_tokens(texts[part], self.target.vocabulary, logits_MV.device)
            if sampling.greedy:
                token_M = sampling.choose(logits_MV, seen_MV)
                scoring_MV = sampling.scoring.probabilities(logits_MV)
            else:
                scoring_MV = sampling.probabilities(logits_MV, seen_MV)
                token_M = sample(scoring_MV, u_M[part].to(logits_MV.device))
            facts = (*log_probability_and_entropy(scoring_MV, token_M), scoring_MV.amax(1))
            drawn.append([value.cpu() for value in (token_M, *facts)])
        return tuple(torch.cat(values) for values in zip(*drawn, strict=True))

    def _add_scores(self, rows: list[dict[str, Any]]) -> None:
        """Fill in the scores of the built-in rules and of the heads."""
        by_head = [score_rows(self.drafter.model, head, rows) for head in self.heads.values()]
        for index, row in enumerate(rows):
            confidence = Scores(np.exp(row["log_q"])[:, None], np.exp(row["run_log_q"])[..., None])
            entropy = Scores(row["entropy"][:, None], row.pop("run_entropy")[..., None])
            largest = Scores(row.pop("max_q")[:, None], row.pop("run_max_q")[..., None])
            scores = [confidence, entropy, largest, *(scored[index] for scored in by_head)]
            row["scores"], row["run_scores"] = flat_scores(scores)
            for name, value in row.items():
                if isinstance(value, np.ndarray):
                    row[name] = value.ravel()


def couple(p_NV: Tensor, q_NV: Tensor, x_N: Tensor, u_couple_N: Tensor, u_residual_N: Tensor) -> Tensor:
    """Draw Y distributed as q and equal to X as often as possible, given X distributed as p.

    Args:
        p_NV: the target's distribution at every position.
        q_NV: the drafter's.
        x_N: the recorded tokens. Where p gives X no mass (rounding at the edge of a nucleus), Y = X if q gives it any;
            Y never leaves q's support.
        u_couple_N: uniforms that decide whether Y = X.
        u_residual_N: uniforms that pick Y otherwise.

    Returns:
        int64 [N].
    """
    x_N1 = x_N[:, None]
    same_N = u_couple_N * p_NV.gather(1, x_N1)[:, 0] < q_NV.gather(1, x_N1)[:, 0]
    residual_NV = (q_NV - p_NV).clamp_(min=0)
    # Nothing is left where q = p up to rounding: a rejection has probability zero, unless X lies outside of both.
    empty_N, known_N = residual_NV.sum(1) == 0, q_NV.gather(1, x_N1)[:, 0] > 0
    rest_NV = torch.where((empty_N & ~known_N)[:, None], q_NV, residual_NV)
    return torch.where(same_N | empty_N & known_N, x_N, sample(rest_NV, u_residual_N))


class _Batch:
    """Response rows as flat tensors over their N response positions."""

    def __init__(self, responses: Sequence[Mapping[str, Any]]) -> None:
        self.prompts = [list(response["prompt_ids"]) for response in responses]
        self.responses = [list(response["response_ids"]) for response in responses]
        self.sequences = [[*prompt, *answer] for prompt, answer in zip(self.prompts, self.responses, strict=True)]
        self.lengths = [len(answer) for answer in self.responses]
        counts = torch.tensor(self.lengths)
        self.row_N = torch.arange(len(responses)).repeat_interleave(counts)
        self.place_N = torch.cat([torch.arange(count) for count in self.lengths])
        self.response_N = torch.tensor([token for answer in self.responses for token in answer], dtype=torch.long)
        ids = torch.tensor([sample_id(response["prompt_id"], response["turn"]) for response in responses])
        self.id_N = ids[self.row_N]

    def before(self, hidden_BLH: Tensor) -> Tensor:
        """The states [N, H] that predict every response token."""
        prompt_N = torch.tensor([len(prompt) for prompt in self.prompts])[self.row_N]
        device = hidden_BLH.device
        return hidden_BLH[self.row_N.to(device), (prompt_N - 1 + self.place_N).to(device)]

    def texts(self, index: np.ndarray) -> list[list[int]]:
        """The text before each of these positions."""
        rows, places = self.row_N[index].tolist(), self.place_N[index].tolist()
        return [self.prompts[row] + self.responses[row][:place] for row, place in zip(rows, places, strict=True)]

    def seen(self, part: slice, vocabulary: int, device: torch.device) -> Tensor:
        """Which tokens occur before each position of a part, bool [n, V]."""
        return seen_tokens(self.texts(np.arange(len(self.row_N))[part]), vocabulary, device)

    def rejections(self, columns: Mapping[str, Tensor]) -> list[int]:
        """Rejected positions of every row."""
        rejected_N = columns["draft_ids"] != self.response_N
        return torch.bincount(self.row_N[rejected_N], minlength=len(self.lengths)).tolist()


def _split(columns: Mapping[str, Tensor], lengths: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
    """Flat columns as one dictionary of arrays a row."""
    parts = {name: torch.split(value, list(lengths)) for name, value in columns.items()}
    for row in range(len(lengths)):
        yield {name: part[row].numpy() for name, part in parts.items()}


def _finite(logits_NV: Tensor, model: str) -> Tensor:
    if not bool(logits_NV.amax(-1).isfinite().all()):
        raise UserError(
            f"the {model} gives logits that are not finite; its weights are damaged or its dtype is too small."
        )
    return logits_NV
