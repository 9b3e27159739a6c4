"""Every setting, by replay: fixed lengths, thresholds of adaptive rules, the oracle; then the few worth running.

A setting is judged on the tuning split, in the mixture of tasks that the test split will have: each task's counts are
weighted by its test prompts over its tuning prompts. The test split itself is not looked at, unless there is no other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from drafttrain.config import EvaluateConfig
from drafttrain.decoding.counts import Counts
from drafttrain.decoding.expression import build, parse_method
from drafttrain.evaluation.cost import predict
from drafttrain.evaluation.methods import KNOWN, ORACLE, USUAL, family_of, head_of
from drafttrain.evaluation.pair import Models
from drafttrain.evaluation.policies import OraclePolicy, ThresholdPolicy, policy_of
from drafttrain.evaluation.replay import Tally, replay
from drafttrain.evaluation.schema import Costs, Kind, SweepPoint
from drafttrain.evaluation.trace_record import Record
from drafttrain.models.acceptance_head import AcceptanceHeadConfig

RUN_KINDS: tuple[Kind, ...] = ("fixed", "head", "confidence", "entropy")
"""Kinds that can really be run, in the order in which they are run."""


STRICT = (0.97, 0.98, 0.99, 0.995, 0.999)
"""Thresholds swept beside those of the recipe: at high temperature the product of a few probabilities is small."""


_KNOWN_THRESHOLDS = tuple(round(0.02 * step, 2) for step in range(1, 50))
"""Only the fastest of them is kept."""


@dataclass(frozen=True)
class Setting:
    """One setting of a sweep: the expression that runs it, its kind, the number that is swept."""

    method: str
    kind: Kind
    parameter: float | None


def settings(config: EvaluateConfig, heads: Mapping[str, AcceptanceHeadConfig]) -> list[Setting]:
    """What is swept: K = 1 .. max_length, and every threshold of every adaptive rule.

    Confidence is swept in both forms, over the block and per token: a head has to beat the better one. A head's own
    recommended threshold is among its thresholds, and its least length is kept; its own setting is swept too, whatever
    its greatest length.
    """
    longest = config.max_length
    limit = _limits(1, longest)
    found = [Setting(f"Model(drafter, length={k})", "fixed", float(k)) for k in range(1, longest + 1)]
    for form in ("", ", per_token=True"):
        for h in sorted({*config.thresholds, *STRICT}):
            found.append(Setting(f"Model(drafter, stop=Confidence({h}{form}{limit}))", "confidence", h))
    for name, head in heads.items():
        forms = [(h, min(head.min_length, longest), longest) for h in {*config.thresholds, *STRICT, head.threshold}]
        for h, least, most in sorted({*forms, (head.threshold, head.min_length, head.max_length)}):
            method = f"Model(drafter, stop=AcceptanceHead({name}, {h}{_limits(least, most)}))"
            found.append(Setting(method, "head", h))
    return [Setting(str(parse_method(each.method)), each.kind, each.parameter) for each in found]


def _limits(least: int, most: int) -> str:
    return ("" if least == 1 else f", min={least}") + ("" if most == USUAL else f", max={most}")


def sweep(
    record: Record,
    swept: Sequence[Setting],
    models: Models,
    costs: Mapping[str, Costs],
    weights: Mapping[str, float],
    sampling: str,
) -> list[SweepPoint]:
    """Replay settings over the tuning split's traces, with them the oracle and the best that probabilities allow.

    Args:
        record: the traces, grouped by task.
        swept: the settings.
        models: to build their rules.
        costs: by family; what nothing can run has those of fixed lengths, whose rule costs nothing.
        weights: of tasks; ignored where no task that has a weight has an answer.
        sampling: name of the decoding setting that the traces were made for.
    """
    longest = int(max((each.parameter or 0 for each in swept if each.kind == "fixed"), default=12))
    members = models.members()
    drafters = [build(each.method, members) for each in swept]
    policies = [
        policy_of(drafter.stop, head_of(each.method) or "head", drafter.max_length)
        for each, drafter in zip(swept, drafters, strict=True)
    ]
    everything = [*swept, Setting(ORACLE, "oracle", None)]
    policies.append(OraclePolicy(longest))
    if KNOWN in record.scores:
        everything += [Setting(KNOWN, "known", h) for h in _KNOWN_THRESHOLDS]
        policies += [ThresholdPolicy(KNOWN, h, maximum=longest) for h in _KNOWN_THRESHOLDS]
    if not any(tokens * weights.get(task, 1.0) for task, tokens in zip(record.groups, record.tokens_G, strict=True)):
        weights = {}

    def family(setting: Setting) -> str:
        return "fixed" if setting.kind in ("oracle", "known") else family_of(setting.method)

    points = [
        _point(setting, tally, costs.get(family(setting), costs["fixed"]), weights, sampling)
        for setting, tally in zip(everything, replay(record, policies), strict=True)
    ]
    known = sorted((point for point in points if point.kind == "known"), key=lambda point: -point.predicted_speedup)
    return [point for point in points if point not in known[1:]]


def _point(setting: Setting, tally: Tally, costs: Costs, weights: Mapping[str, float], sampling: str) -> SweepPoint:
    by_task = {task: tally.of(task).counts() for task in tally.groups}
    total = weighted(by_task, weights)
    return SweepPoint(
        method=setting.method,
        kind=setting.kind,
        sampling=sampling,
        parameter=setting.parameter,
        tau=total.tokens / total.rounds,
        discard_rate=total.discarded / total.tokens,
        verification_rate=total.target_forwards / total.tokens,
        predicted_speedup=predict(total, costs),
        task_speedups={task: predict(counts, costs) for task, counts in by_task.items() if counts.tokens},
        unobserved=tally.unobserved / tally.rounds,
    )


def weighted(by_task: Mapping[str, Counts], weights: Mapping[str, float]) -> Counts:
    """Sum of tasks' counts, each times its weight (1 where none is given); the sums are no whole numbers then."""
    total = Counts()
    for task, counts in by_task.items():
        weight = weights.get(task, 1.0)
        total += Counts(
            tokens=weight * counts.tokens,
            rounds=weight * counts.rounds,
            target_forwards=weight * counts.target_forwards,
            draft_forwards={name: weight * forwards for name, forwards in counts.draft_forwards.items()},
            drafted=weight * counts.drafted,
            accepted=weight * counts.accepted,
            discarded=weight * counts.discarded,
            drafted_at=[weight * count for count in counts.drafted_at],
        )
    return total


def pick(points: Sequence[SweepPoint], top: int) -> list[str]:
    """The `top` settings of each kind, and of each head, that replay predicts to be fastest."""
    runnable = [point for point in points if point.kind in RUN_KINDS]
    families = dict.fromkeys((RUN_KINDS.index(point.kind), family_of(point.method)) for point in runnable)
    picked = []
    for _, family in sorted(families):
        mine = [point for point in runnable if family_of(point.method) == family]
        best = sorted(mine, key=lambda point: -point.predicted_speedup)[:top]
        picked += [point.method for point in sorted(best, key=lambda point: point.parameter or 0.0)]
    return picked
