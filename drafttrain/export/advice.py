"""How many tokens to draft a round, from the report of the run."""

from __future__ import annotations

from dataclasses import dataclass

from drafttrain.models.fingerprint import Fingerprint
from drafttrain.run_folder import RunFolder

DEFAULT_TOKENS = 4
"""Where nothing was measured: the best fixed length at 70 % acceptance and a tenth of the target's cost."""


@dataclass(frozen=True)
class Advice:
    """A number of drafted tokens, and where it comes from.

    Attributes:
        tokens: to draft a round.
        reason: in words, one sentence.
        verdict: the report's headline; None without a report of this drafter.
    """

    tokens: int
    reason: str
    verdict: str | None = None


def advise(run: RunFolder, drafter: Fingerprint) -> Advice:
    """The fastest fixed length of the run's report; of those really run, else of those replayed.

    Engines draft a fixed number of tokens, so adaptive rules of the report do not count here.

    Args:
        run: whose report is read, if it has one.
        drafter: the report must speak of this one.

    Raises:
        UserError: there is a report, but it cannot be read.
    """
    from drafttrain.evaluation.methods import parameter_of
    from drafttrain.evaluation.schema import read_report

    path = run.report / "report.json"
    guess = f"a guess: {DEFAULT_TOKENS} tokens; `drafttrain evaluate --run {run.path}` measures the best number"
    if not path.exists():
        return Advice(DEFAULT_TOKENS, guess)
    report = read_report(path)
    if Fingerprint.from_dict(report.pair.drafter_fingerprint) != drafter:
        return Advice(DEFAULT_TOKENS, f"{guess}, for {path} is about another drafter")
    sampling = report.methods[0].sampling
    measured = [row for row in report.of(sampling, "fixed") if row.overall.speedup is not None]
    if measured:
        row = max(measured, key=lambda row: row.overall.speedup.value)
        tokens, speed = int(parameter_of(row.method)), f"measured {row.overall.speedup.value:.2f} times as fast"
        return Advice(tokens, f"the best fixed length of {path}, {speed} ({sampling})", report.verdict.headline)
    swept = [point for point in report.sweep if point.kind == "fixed" and point.sampling == sampling]
    if swept:
        point = max(swept, key=lambda point: point.predicted_speedup)
        speed = f"predicted {point.predicted_speedup:.2f} times as fast"
        reason = f"the best fixed length of {path} by replay, {speed} ({sampling})"
        return Advice(int(point.parameter), reason, report.verdict.headline)
    return Advice(DEFAULT_TOKENS, f"{guess}, for {path} has no fixed length", report.verdict.headline)
