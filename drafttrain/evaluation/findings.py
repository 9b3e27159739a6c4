"""What a test of `drafttrain lossless` found, in one form for all: a row on the screen, an entry of lossless.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from drafttrain.evaluation.schema import Exactness

Result = Literal["passed", "FAILED", "caught", "NOT CAUGHT", "not applicable", "not checked"]

COLUMNS = ("method", "test", "result", "number")


@dataclass
class Finding:
    """The outcome of one test.

    Attributes:
        method: the expression.
        test: what was asked of it.
        result: of a method passed or FAILED, of a negative control caught or NOT CAUGHT.
        number: the figure that decided, for people.
        figures: all of them, for lossless.json.
    """

    method: str
    test: str
    result: Result
    number: str
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the method or the test."""
        return self.result not in ("FAILED", "NOT CAUGHT")


def judged(check: Exactness, control: bool = False) -> tuple[Result, str, dict[str, Any]]:
    """Result, number and figures of a greedy comparison."""
    result: Result = ("NOT CAUGHT" if check.passed else "caught") if control else "passed" if check.passed else "FAILED"
    figures = {
        "answers": check.answers,
        "tokens": check.tokens,
        "identical": check.identical,
        "match_rate": check.identical / max(1, check.answers),
        "divergences": [vars(each) for each in check.divergences],
    }
    return result, _differences(check), figures


def _differences(check: Exactness) -> str:
    found = f"{check.identical} of {check.answers} answers identical ({check.tokens:,} tokens)"
    if not check.divergences:
        return found
    first = check.divergences[0]
    found += f"; first difference: {first.prompt_id}, token {first.position}, "
    if first.gap is None:
        return found + "where one answer ends and the other goes on"
    found += f"gap {first.gap:.2g}, noise {first.noise:.2g}"
    ratios = [each.gap / each.noise for each in check.divergences if each.gap is not None and each.noise > 0]
    return found + (f"; largest gap {max(ratios):.2g} times the noise" if len(ratios) > 1 else "")


def aligned(findings: Sequence[Finding]) -> list[str]:
    """The findings as a table for the screen; a method's name stands in its first row only."""
    rows, before = [], None
    for each in findings:
        rows.append(("" if each.method == before else each.method, each.test, each.result, each.number))
        before = each.method
    return list(_columns([COLUMNS, *rows]))


def _columns(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
