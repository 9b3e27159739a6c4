"""Is a method's output the target's? Three tiers, by what can be asked of each (DESIGN: honest measurement).

* float64, greedy: the tokens are those of autoregressive decoding, all of them.
* The dtype of the measurement, greedy: the target reads k + 1 tokens at once where autoregressive decoding reads one,
  and other kernels round otherwise. So the first token that differs is held against the noise measured at that very
  place: how far the logits move when the same text is read in blocks. A gap between the two tokens of more than a few
  times the noise is no rounding.
* Sampled: tokens differ by chance, their distribution must not. Every emitted token is held against the target's
  distribution at its place, see `SurpriseSum`; `drafttrain lossless` tests the joint distribution as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from drafttrain.decoding.counts import Completion
from drafttrain.decoding.engine import Engine
from drafttrain.evaluation.questions import Question
from drafttrain.evaluation.schema import Divergence, Exactness, Sample
from drafttrain.evaluation.statistics import SurpriseSum
from drafttrain.ops.sampling import Sampling, seen_along, seen_tokens

Z_LIMIT = 5.0
"""A standard score beyond which tokens were not drawn from the target: one false alarm in 1.7 million checks."""

LEAST_TOKENS = 200
"""Fewer sampled tokens than these are not judged by their standard score."""

EDGE = {torch.float64: 1 - 1e-6, torch.float32: 0.999}
"""A token just outside a nucleus or top-k counts as inside when rounding can have moved it: when its probability is at
least this share of the least one kept. Low precision moves more."""
_LOW_PRECISION_EDGE = 0.8

CHUNK = 32
"""Sampled tokens whose distributions exist at one time: ten float64 copies of [tokens, vocabulary] do."""

_TIERS = {torch.float64: "float64", torch.float32: "float32"}


def greedy_check(
    engine: Engine,
    sampling: Sampling,
    questions: Sequence[Question],
    own: Sequence[Sample | Completion],
    baseline: Sequence[Sample | Completion],
    widths: Sequence[int],
    tolerance: float,
) -> Exactness:
    """Compare greedy answers token by token with the autoregressive ones.

    Args:
        engine: of the target, in the dtype of the answers.
        sampling: greedy, maybe with a penalty.
        questions: what was asked, in the order of the answers.
        own: the method's answers.
        baseline: the autoregressive answers.
        widths: how many tokens the method lets the target read at once, for the noise.
        tolerance: how many times the noise a gap may be.
    """
    check = Exactness(_TIERS.get(engine.dtype, "low precision"), True, answers=len(own))
    for question, mine, base in zip(questions, own, baseline, strict=True):
        check.tokens += len(base.token_ids)
        at = first_difference(mine.token_ids, base.token_ids)
        if at is None:
            check.identical += 1
            continue
        check.divergences.append(
            _divergence(engine, sampling, question, mine.token_ids, base.token_ids, at, widths, tolerance)
        )
    worst = [d for d in check.divergences if not d.passed]
    if worst:
        check.passed = False
        first, why = worst[0], "ends where the other goes on"
        if first.gap is not None:
            why = f"departs by {first.gap:.3g}, where the noise is {first.noise:.3g}"
        check.reason = f"{first.prompt_id}, token {first.position}: {why}"
    return check


def not_checked(dtype: str, error: Exception) -> Exactness:
    """A check that this machine or model cannot make: quantized weights have no copy in another dtype, say."""
    return Exactness("not checked", True, reason=f"{dtype}: {str(error).splitlines()[0]}")


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first place where two answers differ, None if they are equal; an early end differs there."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _divergence(
    engine: Engine,
    sampling: Sampling,
    question: Question,
    mine: Sequence[int],
    base: Sequence[int],
    at: int,
    widths: Sequence[int],
    tolerance: float,
) -> Divergence:
    if at >= min(len(mine), len(base)):  # one answer ends where the other goes on: no rounding does that
        return Divergence(question.prompt_id, at, None, 0.0, False)
    text = [*question.ids, *base[:at]]
    one = _scores(sampling, logits_at(engine, question.ids, base[:at], 1), text)
    many = [_scores(sampling, logits_at(engine, question.ids, base[:at], width), text) for width in widths]
    noise = max(float((other - one).abs()[torch.isfinite(one)].max()) for other in many)
    gap = float(one[base[at]] - one[mine[at]])
    # Float64 leaves no room for rounding: its noise is far below any gap, and identity is what is asked.
    passed = engine.dtype != torch.float64 and gap <= tolerance * noise
    return Divergence(question.prompt_id, at, gap, noise, passed)


def _scores(sampling: Sampling, logits_V: Tensor, text: Sequence[int]) -> Tensor:
    """What greedy decoding takes the largest of: the logits, or with a penalty the log-probabilities after it."""
    if not sampling.penalised:
        return logits_V.double().cpu()
    seen_V = seen_tokens([list(text)], len(logits_V), logits_V.device)[0]
    plain = Sampling(repetition_penalty=sampling.repetition_penalty)
    return plain.probabilities(logits_V, seen_V).double().log().cpu()


@torch.inference_mode()
def logits_at(engine: Engine, prompt: Sequence[int], answer: Sequence[int], width: int) -> Tensor:
    """The target's logits [V] behind prompt ++ answer, the answer read `width` tokens at a time.

    The last block is filled up with repeats of its last token, which the logits asked for cannot see: what matters is
    that the forward is as wide as a verification.
    """
    cache = engine.new_cache(1, len(prompt) + len(answer) + width)
    engine.read(cache, [list(prompt[:-1])])
    tokens = [prompt[-1], *answer]
    logits_KV = None
    for start in range(0, len(tokens), width):
        block = tokens[start : start + width]
        filled = block + [block[-1]] * (width - len(block))
        logits_KV = engine.forward(cache, torch.tensor([filled], device=engine.device)).logits[0, : len(block)]
        cache.rollback([len(prompt) - 1 + start + len(block)])
    return logits_KV[-1]


@torch.inference_mode()
def sampled_check(
    engine: Engine, sampling: Sampling, questions: Sequence[Question], samples: Sequence[Sample]
) -> Exactness:
    """Hold every sampled token against the target's distribution at its place; no answer is left out.

    Args:
        engine: of the target.
        sampling: how the tokens were drawn.
        questions: what was asked, in the order of the answers.
        samples: the answers.
    """
    total = SurpriseSum()
    for question, sample in zip(questions, samples, strict=True):
        for p_TV, ids_T in _probabilities(engine, sampling, question.ids, sample.token_ids):
            total.add(p_TV, ids_T)
    check = Exactness("sampled", True, answers=len(samples), tokens=total.tokens, z=total.z)
    if total.impossible:
        check.passed = False
        check.reason = f"{total.impossible} tokens were emitted that the target cannot draw"
    elif total.tokens < LEAST_TOKENS:
        check.reason = f"only {total.tokens} tokens: judged by their possibility alone"
    elif abs(total.z) > Z_LIMIT:
        check.passed = False
        check.reason = f"the tokens are not drawn from the target's distribution (z = {total.z:+.1f})"
    return check


def _probabilities(
    engine: Engine, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The target's distribution at every token of an answer, float64 [T, V], tokens at an edge let in, and the tokens
    [T]; `CHUNK` of them at a time."""
    cache = engine.new_cache(1, len(prompt) + len(answer))
    engine.read(cache, [list(prompt[:-1])])
    tokens = [*prompt, *answer]
    for start in range(len(prompt), len(tokens), CHUNK):
        end = min(start + CHUNK, len(tokens))
        block_BQ = torch.tensor([tokens[start - 1 : end - 1]], device=engine.device)
        logits_TV = engine.forward(cache, block_BQ).logits[0].double()
        seen_TV = None
        if sampling.penalised:
            seen_BV = seen_tokens([tokens[:start]], engine.vocabulary, engine.device)
            seen_TV = seen_along(seen_BV, block_BQ[:, 1:])[0]
        p_TV, whole_TV = (each.probabilities(logits_TV, seen_TV) for each in (sampling, _untruncated(sampling)))
        ids_T = torch.tensor(tokens[start:end], device=engine.device)
        yield _with_edge(p_TV, whole_TV, engine.dtype, ids_T), ids_T


def _untruncated(sampling: Sampling) -> Sampling:
    return Sampling(sampling.temperature, repetition_penalty=sampling.repetition_penalty)


def _with_edge(p_TV: Tensor, whole_TV: Tensor, dtype: torch.dtype, ids_T: Tensor) -> Tensor:
    """Let an emitted token in that truncation leaves out by a hair, with the probability of the least one kept."""
    share = EDGE.get(dtype, _LOW_PRECISION_EDGE)
    chosen_T1 = ids_T.unsqueeze(1)
    least_T1 = whole_TV.masked_fill(p_TV <= 0, torch.inf).amin(1, keepdim=True)
    near_T1 = (p_TV.gather(1, chosen_T1) <= 0) & (whole_TV.gather(1, chosen_T1) >= share * least_T1)
    if not near_T1.any():
        return p_TV
    least_kept_T1 = p_TV.masked_fill(p_TV <= 0, torch.inf).amin(1, keepdim=True)
    p_TV = torch.where(near_T1, p_TV.scatter(1, chosen_T1, least_kept_T1), p_TV)
    return p_TV / p_TV.sum(1, keepdim=True)


def identity_check(answers: Mapping[str, list[list[int]]], baseline: list[list[int]]) -> dict[str, Exactness]:
    """Float64: whether every method gives the very tokens of the baseline.

    Args:
        answers: token ids by method.
        baseline: of the same questions.
    """
    checks = {}
    for method, found in answers.items():
        places = [first_difference(own, base) for own, base in zip(found, baseline, strict=True)]
        different = [(number, at) for number, at in enumerate(places) if at is not None]
        reason = f"answer {different[0][0]} differs at token {different[0][1]}" if different else ""
        tokens = sum(map(len, baseline))
        checks[method] = Exactness(
            "float64", not different, len(places), len(places) - len(different), tokens, reason=reason
        )
    return checks
