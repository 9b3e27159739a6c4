"""What every benchmark ends with: its rows in a file, and one JSON line `{"benchmark", "figures", "environment"}`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

LOAD = os.getloadavg()[0]
"""Of the machine, when the benchmark began."""


def finish(benchmark: str, figures: dict[str, float], rows: Any = None, output: Path | None = None) -> None:
    """Print the last line; write it with the raw rows to `output`, where one is named."""
    result = {
        "benchmark": benchmark,
        "figures": {name: _rounded(float(value)) for name, value in figures.items()},
        "environment": environment(),
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def _rounded(value: float) -> float:
    """To six decimals, or three digits where that is less: an error of 1e-7 is not zero."""
    return round(value, 6) if abs(value) >= 1e-3 else float(f"{value:.3g}")


def environment() -> dict[str, Any]:
    """Hardware, load and versions: what a figure depends on beside the code."""
    import torch

    from drafttrain.evaluation.environment import describe

    return dataclasses.asdict(describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"), LOAD))
