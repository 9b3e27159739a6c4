"""The figures of the benchmarks of approximate inference, from rows whose figures are known, and rows that survive."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import context, kv_dropping, prompt_compression
from benchmarks.kv_dropping import BUDGETS, FREE, METHOD, METHODS, column


def kv_rows(exact: dict[str, list[int]], dense: list[int], group: str = "recall@2048") -> list[dict]:
    """Rows of one group; methods that are not named are always right."""
    rows = []
    for at, own in enumerate(dense):
        outcomes = {}
        for name in METHODS:
            for budget in BUDGETS:
                key = column(name, budget)
                outcomes |= {key: exact.get(key, exact.get(name, [1] * len(dense)))[at]}
                outcomes |= {f"{kind}:{key}": 0.5 for kind in ("kl", "recall", "mass")}
        outcomes |= {f"free_{length}": min(length, 10) for length in FREE}
        rows.append({"id": f"{group}/{at // 2}/{at % 2}", "group": group, "dense": own, "outcomes": outcomes})
    return rows


def test_the_gap_is_closed_at_the_largest_budget_where_snapkv_loses():
    largest, middle = column("snapkv", BUDGETS[-1]), column("snapkv", BUDGETS[-2])
    exact = {"snapkv": [0] * 20, middle: [0] * 8 + [1] * 12, largest: [1] * 20, METHOD: [0] * 2 + [1] * 18}
    figures = kv_dropping.quality(kv_rows(exact, [1] * 20))
    assert figures["budget"] == BUDGETS[-2]
    assert figures["snapkv_gap_closed"] == pytest.approx(6 / 8)
    assert figures["snapkv_gap_closed_low"] <= 6 / 8 <= figures["snapkv_gap_closed_high"]
    assert figures["points_from_dense"] == pytest.approx(10)
    assert figures["over_snapkv"] == pytest.approx(-10)  # at the largest budget
    assert [figures[f"free_tokens_{length}"] for length in FREE] == [4, 8, 10, 10]


def test_groups_that_the_dense_target_cannot_do_do_not_count():
    able, unable = kv_rows({}, [1] * 9 + [0]), kv_rows({}, [1] * 7 + [0] * 3, "facts@2048")
    assert context.counted([*able, *unable]) == able


def test_intervals_are_over_documents():
    """Two questions about a document that always agree are no more evidence than one."""
    doubled = kv_rows({METHOD: [1, 1, 0, 0] * 10}, [1] * 40)
    single = doubled[::2]
    columns, mean = (column(METHOD, BUDGETS[0]),), lambda sums: sums[..., 0] / sums[..., 1]
    one, two = (context.figure_of(rows, columns, mean) for rows in (single, doubled))
    assert (one.value, one.low, one.high) == (two.value, two.low, two.high) and one.low < 0.5 < one.high


def test_compression_is_compared_in_points():
    names = prompt_compression.methods()
    rows = [
        {
            "id": f"recall/{at}/0",
            "group": "recall@2048",
            "outcomes": {name: int(at % 4 > 0) if name == "chunked" else 1 for name in names},
        }
        for at in range(20)
    ]
    figures = prompt_compression.quality(rows, {row["id"]: 1 for row in rows})
    assert figures["points_over_chunked_25"] == pytest.approx(25)
    assert figures["points_over_window_25"] == 0 and figures["prompts"] == 20
    assert prompt_compression.quality(rows, {})["points_over_chunked_25"] == pytest.approx(25)


def test_a_results_file_keeps_a_line_a_prompt():
    kept = context.compact(kv_rows({METHOD: [1, 0]}, [1, 1]))
    assert kept["columns"][:3] == ["id", "dense", column(METHOD, BUDGETS[0])] and len(kept["prompts"]) == 2
    assert kept["prompts"][1].split()[:3] == ["recall@2048/0/1", "1", "0"]
    assert len(kept["prompts"][0].split()) == len(kept["columns"])


class _Prompt:
    def __init__(self, name: str) -> None:
        self.prompt_id, self.ids = name, (1, 2)


class _Asked:
    def __init__(self, name: str) -> None:
        self.prompt, self.group = _Prompt(name), "g"


def test_a_run_that_was_killed_goes_on(tmp_path):
    names, measured = ["a", "b", "c"], []

    def measure(each):
        measured.append(each.prompt.prompt_id)
        return {"dense": 1, "outcomes": {}}

    whole = context.recorded(tmp_path, map(_Asked, names), measure)
    path = tmp_path / "rows.jsonl"
    text = path.read_text()
    path.write_text(text[: text.rindex("\n", 0, -1) + 12])  # killed while it wrote the last row
    assert context.recorded(tmp_path, map(_Asked, names), measure) == whole
    assert measured == ["a", "b", "c", "c"]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == names
    assert context.recorded(None, map(_Asked, names), measure) == whole and len(measured) == 7


def test_scoring_holds_far_less_than_all_weights_at_once():
    """At 16k tokens they would be 32 heads * 48 rows * 16k * 4 bytes = 100 MB in float32 alone."""
    assert kv_dropping.scoring_bytes(16384) < 60e6


def test_a_gap_of_nothing_is_no_division_by_zero():
    assert np.isfinite(kv_dropping.gap_closed(np.array([3.0, 3.0, 3.0])))
