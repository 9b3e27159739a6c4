"""The picture of the committed results can be drawn."""

import json
from pathlib import Path

from benchmarks.copying_plot import draw

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_committed_results_are_drawn(tmp_path):
    [found] = sorted(RESULTS.glob("*-copying.json"))[-1:]
    draw(json.loads(found.read_text(encoding="utf-8"))["rows"], tmp_path / "copying.png")
    assert (tmp_path / "copying.png").read_bytes().startswith(b"\x89PNG")
