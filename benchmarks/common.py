"""What every benchmark ends with: its rows in a file, and one JSON line `{"benchmark", "figures", "environment"}`."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def finish(benchmark: str, figures: dict[str, float], rows: Any = None, output: Path | None = None) -> None:
    """Print the last line; write it with the raw rows to `output`, where one is named."""
    result = {
        "benchmark": benchmark,
        "figures": {name: round(float(value), 6) for name, value in figures.items()},
        "environment": environment(),
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def environment() -> dict[str, Any]:
    """Hardware, load and versions: what a figure depends on beside the code."""
    import torch
    import transformers

    from drafttrain.models.checkpoint import git_commit

    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git_commit(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
