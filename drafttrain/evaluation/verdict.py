"""One verdict: deploy or not, with which setting, what holds the speed back, what to do next.

What holds it back is found by asking of each term of

    speed-up = N / (sum_m F_m c_m + sum_rounds v(w) + R o)

what the speed-up would be if half of what that term costs were gone: half of the rejections (tau), half the price of a
draft step (c), half of what a wide forward costs above a narrow one (v), half the loop (o). The term whose halving
gains most is the limit. "Half" puts the four on one scale; "all" would always name tau.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from drafttrain.evaluation.cost import halved, predict
from drafttrain.evaluation.load import Load, told
from drafttrain.evaluation.schema import (
    Decision,
    Figures,
    MethodResult,
    SettingVerdict,
    SweepPoint,
    Verdict,
)
from drafttrain.evaluation.statistics import Interval

_LIMITS = {
    "tau": "tau, the tokens gained per round: too many drafted tokens are rejected",
    "c": "c, the price of drafting beside that of the target",
    "v": "v, the price of checking several tokens in one forward of the target",
    "o": "o, the decode loop itself, which weighs much beside a target this fast",
}

_REMEDIES = {
    "tau": [
        "distil further: more prompts like the traffic to be served, more passes, or training.on_policy_fraction",
        "compare training.losses (reverse_kl, total_variation), or keep more layers in the drafter",
    ],
    "c": ["use a smaller drafter: fewer layers in drafter.layers or a narrower drafter.config"],
    "v": ["serve in bfloat16 on hardware that computes in it, with a smaller batch, or draft fewer tokens a round"],
    "o": ["serve with an engine that captures or compiles its loop: `drafttrain export`"],
}

LEAST_PROMPTS = 5
"""Fewer conversations prove nothing, however narrow the interval over them."""

_ADAPTIVE = {"head": "acceptance head", "confidence": "confidence rule", "entropy": "entropy bound"}


def decide(
    rows: Sequence[MethodResult],
    sweep: Sequence[SweepPoint],
    tau_history: Sequence[dict[str, Any]],
    least: float,
    load: Sequence[Load] = (),
) -> Verdict:
    """The verdict over all methods and decoding settings.

    A setting is judged by the method that replay chose, not by the fastest one: the best of several on the prompts that
    the interval is of would have luck in it. A method from outside, which replay knows nothing of, takes its place
    where its interval lies above the other's value.

    Args:
        rows: methods of the report, the baseline among them, in the order of their settings.
        sweep: every setting as replay predicts it; may be empty.
        tau_history: tau over training, to say whether more data would pay; may be empty.
        least: lower bound of the speed-up's interval from which to deploy (evaluate.min_speedup).
        load: larger batches, by setting; may be empty.
    """
    broken = [row for row in rows if any(not check.passed for check in row.lossless)]
    if broken:
        return _not_exact(broken)
    names = list(dict.fromkeys(row.sampling for row in rows))
    settings = [_setting(name, [row for row in rows if row.sampling == name], least) for name in names]
    first = settings[0]
    prompts = {row.sampling: row.overall.prompts for row in rows if row.method == first.method}
    details = [_also(setting, least) for setting in settings[1:]]
    lines = (_adaptive(rows, first), _outside(rows, first), _gap(sweep, first), _limit(first), _under_load(load, first))
    details += [line for line in lines if line]
    return Verdict(
        first.decision,
        _headline(first, prompts.get(first.sampling, 0), least),
        details,
        _next_steps(first, tau_history),
        settings,
    )


def _setting(name: str, rows: Sequence[MethodResult], least: float) -> SettingVerdict:
    measured = [row for row in rows if row.kind != "autoregressive" and row.overall.speedup is not None]
    if not measured:
        return SettingVerdict(name, "not proven")
    best = max(measured, key=lambda row: (_replayed(row), row.overall.speedup.value))
    ahead = [row for row in measured if row.kind == "other" and row.overall.speedup.low > best.overall.speedup.value]
    best = max(ahead, key=lambda row: row.overall.speedup.value, default=best)
    verdict = SettingVerdict(name, _decision(best.overall, least), best.method, best.overall.speedup)
    if best.costs is not None:
        verdict.predicted = predict(best.overall, best.costs)
        verdict.halved = halved(best.overall, best.costs)
        verdict.limit = max(verdict.halved, key=verdict.halved.get)
    return verdict


def _decision(figures: Figures, least: float) -> Decision:
    if figures.speedup.value < least:
        return "no gain"
    return "deploy" if figures.speedup.low >= least and figures.prompts >= LEAST_PROMPTS else "not proven"


def _headline(verdict: SettingVerdict, prompts: int, least: float) -> str:
    if verdict.speedup is None:
        return (
            f"Not proven: do not deploy. No answer was left to measure ({verdict.sampling}): all of them loop or "
            "are wrong."
        )
    over = f"{verdict.sampling}, {prompts} prompts"
    if verdict.decision == "deploy":
        return f"Deploy `{verdict.method}`: {verdict.speedup:.2f} times as fast as without a drafter ({over})."
    if verdict.decision == "not proven":
        few = f"the interval reaches below {least:.2f}" if prompts >= LEAST_PROMPTS else "so few prompts prove nothing"
        return (
            f"Not proven: do not deploy yet. `{verdict.method}` is {verdict.speedup:.2f} times as fast as without a "
            f"drafter ({over}), and {few}."
        )
    return (
        f"No gain: do not deploy. The best setting, `{verdict.method}`, is {verdict.speedup:.2f} times as fast as "
        f"without a drafter ({over})."
    )


def _also(setting: SettingVerdict, least: float) -> str:
    if setting.speedup is None:
        return f"{_capital(setting.sampling)}: no answer was left to measure."
    closing = {
        "deploy": "",
        "not proven": f"; not proven to reach {least:.2f}",
        "no gain": "; no gain, do not deploy there",
    }[setting.decision]
    return f"{_capital(setting.sampling)}: {setting.speedup:.2f} times as fast, with `{setting.method}`{closing}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _adaptive(rows: Sequence[MethodResult], first: SettingVerdict) -> str | None:
    """What an adaptive rule adds to the best fixed length, and a head to confidence, in the first setting.

    Of several rules the one that replay chose is judged.
    """
    here = [row for row in rows if row.sampling == first.sampling]
    compared = [row for row in here if row.kind in _ADAPTIVE and "fixed" in row.versus]
    if not compared:
        return None
    chosen = max(compared, key=_replayed)
    gain, name = chosen.versus["fixed"], _ADAPTIVE[chosen.kind]
    enough = chosen.overall.prompts >= LEAST_PROMPTS
    if enough and gain.low > 1:
        line = f"The {name} earns its place: {_change(gain)} over the best fixed length measured"
    elif enough and gain.high < 1:
        line = f"The {name} costs more than it saves: {_change(gain)} against the best fixed length; use that"
    else:
        line = f"The {name} adds nothing that this many prompts could prove: {_change(gain)} over the best fixed length"
    heads = [row for row in here if row.kind == "head" and "confidence" in row.versus]
    if heads:
        ratio = max(heads, key=_replayed).versus["confidence"]
        line += f"; the head is {_change(ratio)} against the best confidence threshold"
    return f"{line}."


def _outside(rows: Sequence[MethodResult], first: SettingVerdict) -> str | None:
    """The fastest method from outside in the first setting, unless it is the chosen one; replay cannot choose it."""
    here = [row for row in rows if row.sampling == first.sampling and row.kind == "other"]
    measured = [row for row in here if row.overall.speedup is not None and row.method != first.method]
    if not measured:
        return None
    best = max(measured, key=lambda row: row.overall.speedup.value)
    return f"Replay cannot judge `{best.method}`: measured, it is {best.overall.speedup:.2f} times as fast."


def _replayed(row: MethodResult) -> float:
    return row.replayed_speedup or 0.0


def _change(ratio: Interval) -> str:
    return f"{100 * (ratio.value - 1):+.0f} % [{100 * (ratio.low - 1):+.0f}, {100 * (ratio.high - 1):+.0f}]"


def _gap(sweep: Sequence[SweepPoint], first: SettingVerdict) -> str | None:
    """How far perfect stopping would go, and how much of the way there the best adaptive rule gets, by replay."""
    best = {
        kind: max((p.predicted_speedup for p in sweep if p.sampling == first.sampling and p.kind == kind), default=None)
        for kind in ("fixed", "oracle", "known", *_ADAPTIVE)
    }
    fixed, oracle = best["fixed"], best["oracle"]
    adaptive = {kind: best[kind] for kind in _ADAPTIVE if best[kind] is not None}
    if fixed is None or oracle is None or not adaptive or oracle <= fixed:
        return None
    kind = max(adaptive, key=adaptive.get)
    closed = max(0.0, (adaptive[kind] - fixed) / (oracle - fixed))
    line = (
        f"By replay, perfect stopping would reach {oracle:.2f} where the best fixed length reaches {fixed:.2f}; the "
        f"{_ADAPTIVE[kind]} reaches {adaptive[kind]:.2f}, {100 * closed:.0f} % of the way"
    )
    if best["known"] is None:
        return f"{line}."
    share = max(0.0, (best["known"] - fixed) / (oracle - fixed))
    return (
        f"{line}; a head that knew every acceptance probability would reach {best['known']:.2f}, {100 * share:.0f} %."
    )


def _limit(setting: SettingVerdict) -> str | None:
    if setting.limit is None:
        return None
    return (
        f"What limits the speed most is {_LIMITS[setting.limit]}. With half of that gone, the "
        f"{setting.predicted:.2f} that the costs predict would be {setting.halved[setting.limit]:.2f}."
    )


def _under_load(load: Sequence[Load], first: SettingVerdict) -> str | None:
    """Where the method of the verdict stops paying, if it was run in larger batches on enough prompts."""
    for each in load:
        for found in each.break_even:
            if (each.sampling, found.method) == (first.sampling, first.method) and each.prompts >= LEAST_PROMPTS:
                return f"Under load, {told(each, found)}"
    return None


def _next_steps(first: SettingVerdict, tau_history: Sequence[dict[str, Any]]) -> list[str]:
    steps = []
    if first.speedup is None:
        return ["give prompts whose answers end (prompts.path, evaluate.max_new_tokens), or sample"]
    if first.decision == "deploy":
        steps.append(f"serve with `{first.method}`; `drafttrain export` writes the drafter for other engines")
    elif first.decision == "not proven":
        steps.append("measure more prompts (evaluate.prompts_per_task) on an idle machine")
    if rising(tau_history):
        steps.append("tau was still rising when training ended: train on more data before anything else")
    return steps + _REMEDIES.get(first.limit, [])


def _not_exact(broken: Sequence[MethodResult]) -> Verdict:
    failed = broken[0]
    reason = next(check.reason for check in failed.lossless if not check.passed)
    names = ", ".join(dict.fromkeys(f"`{row.method}`" for row in broken))
    return Verdict(
        "not exact",
        f"Not exact: do not deploy. The output of {names} is not the target's ({failed.sampling}: {reason}).",
        next_steps=[f'run `drafttrain lossless` with this pair and --method "{failed.method}" and report it as a bug'],
        settings=[SettingVerdict(failed.sampling, "not exact", failed.method)],
    )


def rising(tau_history: Sequence[dict[str, Any]], share: float = 0.02) -> bool:
    """Whether tau grew by more than `share` over the last third of the training."""
    taus = [point["tau"] for point in tau_history if point.get("tau") is not None]
    if len(taus) < 4:
        return False
    return taus[-1] > (1 + share) * taus[-1 - max(1, len(taus) // 3)]


def verdict_lines(verdict: Verdict) -> list[str]:
    """The verdict as it stands on the screen and at the top of the report."""
    return [verdict.headline, *verdict.details, *[f"Next: {step}." for step in verdict.next_steps]]
