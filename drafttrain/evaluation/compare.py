"""Compare two reports: the same prompts, paired; differences with intervals; unlike things not compared unasked.

Speed is compared as speed-up over each report's own baseline, which takes out most of what two runs of one machine
differ in. Tokens per second are compared where hardware and workload are the same. Counts (tau, acceptance, discard
and verification rates) do not depend on the machine and stay comparable when it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drafttrain.errors import UserError
from drafttrain.evaluation.figures import figure_interval, pair, rates
from drafttrain.evaluation.schema import MethodResult, Report, Sample, read_report, read_samples
from drafttrain.evaluation.statistics import Interval, rate_ratio
from drafttrain.evaluation.tables import table
from drafttrain.run_folder import write_atomically

RESAMPLES = 2000


@dataclass(frozen=True)
class Figure:
    """A figure to compare: a function of summed counts.

    Attributes:
        name: for people.
        counts: of one answer and its baseline's answer.
        value: of sums [..., C] of those.
        is_speed: whether it depends on the machine.
    """

    name: str
    counts: Callable[[Sample, Sample], list[float]]
    value: Callable[[np.ndarray], np.ndarray]
    is_speed: bool


def _tau(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _per_token(*names: str) -> Callable[[Sample, Sample], list[float]]:
    return lambda own, base: [own.counts[name] for name in names]


FIGURES = (
    Figure("speed-up", rates, rate_ratio, True),
    Figure("tokens/s", rates, lambda s: s[..., 0] / s[..., 1], True),
    Figure("tau", _per_token("tokens", "rounds"), _tau, False),
    Figure(
        "accepted / drafted", _per_token("accepted", "drafted"), lambda s: s[..., 0] / np.maximum(s[..., 1], 1), False
    ),
    Figure("discard rate", _per_token("discarded", "tokens"), _tau, False),
    Figure("verification rate", _per_token("target_forwards", "tokens"), _tau, False),
)


@dataclass(frozen=True)
class Row:
    """One figure of one method in both reports, and B over A with its interval."""

    method_a: str
    method_b: str
    sampling: str
    figure: str
    a: float
    b: float
    ratio: Interval
    prompts: int


def compare(a: Path, b: Path, allow_unlike: Collection[str] = frozenset(), output: Path | None = None) -> list[Row]:
    """Print how B differs from A, method by method and best against best.

    Args:
        a: run folder or report.json, the baseline.
        b: what is compared with it.
        allow_unlike: what may differ: target, prompts, sampling, hardware.
        output: a Markdown file to write the comparison to as well.

    Raises:
        UserError: a report is missing or damaged, or they are unlike in something that was not allowed.
    """
    reports = [read_report(path) for path in (a, b)]
    found = unlike(*reports)
    refused = [name for name in found if name not in allow_unlike]
    if refused:
        told = "; ".join(f"{name}: {found[name]}" for name in refused)
        raise UserError(
            f"{a} and {b} cannot be compared as they are ({told}); measure them alike, or pass --allow-unlike "
            f"{' '.join(refused)}."
        )
    rows = [
        row
        for own, other in _matched(*reports)
        for row in _rows(own, other, _answers(reports[0], own, a), _answers(reports[1], other, b), found)
    ]
    text = "\n".join(markdown(a, b, rows, found))
    print(text)
    if output is not None:
        write_atomically(output, text + "\n")
    return rows


def unlike(a: Report, b: Report) -> dict[str, str]:
    """What two reports differ in that matters, by the name that allows it, in words."""
    found = {}
    if a.pair.target_fingerprint != b.pair.target_fingerprint:
        parts = [
            name for name, value in a.pair.target_fingerprint.items() if b.pair.target_fingerprint.get(name) != value
        ]
        found["target"] = f"{a.pair.target} and {b.pair.target} differ in {', '.join(parts)}"
    if a.workload.prompts_hash != b.workload.prompts_hash:
        found["prompts"] = f"{_prompts(a)} and {_prompts(b)}"
    left, right = ({s.name for s in report.workload.samplings} for report in (a, b))
    if left != right:
        found["sampling"] = f"{', '.join(sorted(left))} and {', '.join(sorted(right))}"
    machines = [_machine(report) for report in (a, b)]
    different = [
        (name, machines[0][name], machines[1][name]) for name in machines[0] if machines[0][name] != machines[1][name]
    ]
    if different:
        found["hardware"] = ", ".join(f"{name} {one} and {other}" for name, one, other in different)
    return found


def _prompts(report: Report) -> str:
    return f"{sum(count for task, count in report.workload.prompts.items() if task != 'all')} prompts " + (
        f"({report.workload.prompts_hash})"
    )


def _machine(report: Report) -> dict[str, object]:
    machine, work = report.environment, report.workload
    return {
        "device": machine.device,
        "cpu": machine.cpu,
        "cores": machine.cores,
        "threads": machine.threads,
        "dtype": work.dtype,
        "batch size": work.batch_size,
        "compiled": work.compiled,
    }


def _matched(a: Report, b: Report) -> list[tuple[MethodResult, MethodResult]]:
    """The fastest method of each report by setting, then methods of the same name, without repeating a pair."""
    by_name = {(row.sampling, row.method): row for row in b.methods}
    settings = _paired_settings(a, b)
    matched = [(_fastest(a.of(name)), _fastest(b.of(settings[name]))) for name in settings]
    matched = [(own, other) for own, other in matched if own is not None and other is not None]
    leading = {(own.sampling, own.method) for own, other in matched if own.method == other.method}
    for row in [row for name in settings for row in a.of(name)]:
        other = by_name.get((settings[row.sampling], row.method))
        if other is not None and (row.sampling, row.method) not in leading:
            matched.append((row, other))
    if not matched:
        raise UserError("one of the two reports has no answer that counts; there is nothing to pair.")
    return matched


def _paired_settings(a: Report, b: Report) -> dict[str, str]:
    """Settings of A and those of B that they are held against: the same ones, the others in their order."""
    left, right = ([setting.name for setting in report.workload.samplings] for report in (a, b))
    unlike_left, unlike_right = [n for n in left if n not in right], [n for n in right if n not in left]
    paired = dict(zip(unlike_left, unlike_right, strict=False)) | {name: name for name in left if name in right}
    return {name: paired[name] for name in left if name in paired}


def _fastest(rows: list[MethodResult]) -> MethodResult | None:
    rows = [row for row in rows if row.overall.speedup is not None]
    return max(rows, key=lambda row: row.overall.speedup.value, default=None)


def _answers(report: Report, row: MethodResult, path: Path) -> list[tuple[Sample, Sample]]:
    folder = path if path.is_dir() else path.parent
    own = read_samples(folder / row.samples)
    base = read_samples(folder / report.baseline(row.sampling).samples)
    return pair(own, base).counted


def _rows(
    own: MethodResult,
    other: MethodResult,
    answers_a: list[tuple[Sample, Sample]],
    answers_b: list[tuple[Sample, Sample]],
    found: dict[str, str],
) -> list[Row]:
    """Figures of two methods on the turns that count in both reports."""
    by_turn = {(mine.prompt_id, mine.turn): (mine, base) for mine, base in answers_b}
    common = [(each, by_turn[each[0].prompt_id, each[0].turn]) for each in answers_a if _key(each) in by_turn]
    if not common:
        raise UserError(f"no prompt of {own.method} counts in both reports; there is nothing to pair.")
    rows = []
    for figure in FIGURES:
        if figure.is_speed and "hardware" in found:
            continue
        rows.append(_row(figure, own, other, common))
    return rows


def _key(pair_of: tuple[Sample, Sample]) -> tuple[str, int]:
    return pair_of[0].prompt_id, pair_of[0].turn


def _row(
    figure: Figure,
    own: MethodResult,
    other: MethodResult,
    common: list[tuple[tuple[Sample, Sample], tuple[Sample, Sample]]],
) -> Row:
    by_turn = {_key(first): (first, second) for first, second in common}

    def counts(mine: Sample, base: Sample) -> list[float]:
        first, second = by_turn[mine.prompt_id, mine.turn]
        return [*figure.counts(*first), *figure.counts(*second)]

    def ratio(sums: np.ndarray) -> np.ndarray:
        half = sums.shape[-1] // 2
        a, b = figure.value(sums[..., :half]), figure.value(sums[..., half:])
        return np.divide(b, a, out=np.where(b == 0, 1.0, np.inf), where=np.asarray(a) != 0)

    firsts = [first for first, _ in common]
    interval = figure_interval(firsts, counts, ratio, RESAMPLES, 0)
    sums = np.sum([counts(*first) for first in firsts], axis=0)
    half = len(sums) // 2
    a, b = float(figure.value(sums[:half])), float(figure.value(sums[half:]))
    prompts = len({first[0].prompt_id for first in firsts})
    sampling = own.sampling if own.sampling == other.sampling else f"{other.sampling} against {own.sampling}"
    return Row(own.method, other.method, sampling, figure.name, a, b, interval, prompts)


def markdown(a: Path, b: Path, rows: list[Row], found: dict[str, str]) -> list[str]:
    """The comparison, its main difference first."""
    lines = [f"# {b} against {a}", "", f"**{_headline(rows)}**", ""]
    lines += [f"- Unlike, as allowed: {name} ({told})." for name, told in found.items()]
    if "hardware" in found:
        lines.append("- Speeds are not compared across hardware; counts do not depend on it.")
    columns = ("figure", "A", "B", "B / A [95 %]", "")
    for method_a, method_b, sampling in dict.fromkeys((row.method_a, row.method_b, row.sampling) for row in rows):
        mine = [row for row in rows if (row.method_a, row.method_b, row.sampling) == (method_a, method_b, sampling)]
        name = f"`{method_a}`" if method_a == method_b else f"`{method_b}` against `{method_a}`"
        lines += ["", f"## {name}, {sampling}, {mine[0].prompts} prompts in common", ""]
        cells = [[row.figure, f"{row.a:.3g}", f"{row.b:.3g}", f"{row.ratio:.3f}", _word(row.ratio)] for row in mine]
        lines += table(columns, cells)
    return lines


def _word(ratio: Interval) -> str:
    if ratio.low > 1:
        return "more"
    return "less" if ratio.high < 1 else "no difference shown"


def _headline(rows: list[Row]) -> str:
    """The first rows compare the fastest methods of the first setting: by speed, or where that is unlike by tau."""
    leading = next((row for row in rows if row.figure == "speed-up"), None)
    leading = leading or next(row for row in rows if row.figure == "tau")
    ratio, what = leading.ratio, leading.figure
    share = f"{100 * (ratio.value - 1):+.1f} % [{100 * (ratio.low - 1):+.1f}, {100 * (ratio.high - 1):+.1f}]"
    method = leading.method_b if leading.method_a == leading.method_b else f"{leading.method_b} over {leading.method_a}"
    if ratio.low > 1 or ratio.high < 1:
        return f"B {'gains' if ratio.low > 1 else 'loses'}: {what} {share} ({method}, {leading.sampling})."
    return f"No difference shown: {what} {share} ({method}, {leading.sampling})."
