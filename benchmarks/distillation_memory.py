"""Peak memory and time of one distillation step at the output head: chunked (`DistillHead`) against naive.

    python benchmarks/distillation_memory.py            4,096 tokens, vocabulary 128k, hidden 512, float32; 16 GB
    python benchmarks/distillation_memory.py --quick    a small case, under a minute; its figures say nothing

Each side runs in a process of its own (so that one's peak does not hide the other's), the two in turn: forward KL with
its gradients to hidden states and head, plus expected acceptance. Naive is what one writes with autograd: logits of all
tokens, the same loss functions, backward. On a CPU the peak is the resident set's high-water mark, Python, torch and
weights included; `--device cuda` takes the allocator's peak instead. `working_*` leave out what stands there before the
step. Ratios are of the medians of both sides; `_low` and `_high` are the least and greatest ratio of a turn.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import finish  # noqa: E402

FULL = {"tokens": 4096, "vocabulary": 128_000, "hidden": 512, "repeats": 2, "turns": 3}
QUICK = {"tokens": 512, "vocabulary": 16_000, "hidden": 64, "repeats": 2, "turns": 2}
SIDES = ("naive", "chunked")


def main() -> None:
    """Run both sides in turn and print their ratio."""
    arguments = _arguments()
    if arguments.side:
        print(json.dumps(measure(arguments.side, json.loads(arguments.case), arguments.device)))
        return
    case = QUICK if arguments.quick else FULL
    turns = []
    for _ in range(case["turns"]):
        turns.append({side: _in_process(side, case, arguments.device) for side in SIDES})
        for side, row in turns[-1].items():
            spent = f"peak {row['peak'] / 2**30:6.2f} GiB, step {row['seconds']:6.2f} s"
            print(f"{side:8s} {spent}, loss {row['loss']:.6f}", flush=True)
    drift = abs(turns[0]["naive"]["loss"] / turns[0]["chunked"]["loss"] - 1)
    if drift > 1e-4:
        raise SystemExit(f"the two sides disagree on the loss by {drift:.1e}: they do not do the same work")
    finish(
        "distillation_memory",
        figures(turns),
        {"case": case, "device": arguments.device, "turns": turns},
        arguments.output,
    )


def figures(turns: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Ratios: memory naive / chunked (higher is better), time chunked / naive (1 = as fast, lower is better)."""
    middle = {side: {name: median(turn[side][name] for turn in turns) for name in turns[0][side]} for side in SIDES}
    found: dict[str, float] = {}
    for name, value in ratios(middle).items():
        each = [ratios(turn)[name] for turn in turns]
        found |= {name: value, f"{name}_low": min(each), f"{name}_high": max(each)}
    return found


def ratios(sides: dict[str, dict[str, float]]) -> dict[str, float]:
    """The ratios of one measurement of each side."""
    naive, chunked = (sides[side] for side in SIDES)
    return {
        "peak_memory_ratio": naive["peak"] / chunked["peak"],
        "working_memory_ratio": (naive["peak"] - naive["before"]) / (chunked["peak"] - chunked["before"]),
        "time_ratio": chunked["seconds"] / naive["seconds"],
    }


def measure(side: str, case: dict[str, int], device: str) -> dict[str, float]:
    """One side in this process: bytes at the peak and before the step, seconds of the fastest step."""
    import torch

    from drafttrain.training.distill_head import DistillHead, Lesson, LogitShape, OutputHead
    from drafttrain.training.losses import expected_acceptance, mixed

    torch.manual_seed(0)
    tokens, vocabulary, width = case["tokens"], case["vocabulary"], case["hidden"]
    with torch.device(device):
        linear = torch.nn.Linear(width, vocabulary, bias=False)
        target = OutputHead(torch.empty(vocabulary, width).normal_(std=0.04), None, LogitShape())
        hidden, target_hidden = torch.randn(tokens, width).requires_grad_(), torch.randn(tokens, width)
        labels, weights = torch.randint(vocabulary, (tokens,)), torch.ones(tokens)
        selected = torch.ones(1, tokens, dtype=torch.bool)
    loss = mixed({"forward_kl": 1.0})
    head = DistillHead(linear, LogitShape())
    lesson = Lesson(selected, target_hidden, target, labels, weights, loss)

    def naive() -> tuple[torch.Tensor, torch.Tensor]:
        log_p_NV = target.raw(target_hidden).log_softmax(-1)
        log_q_NV = linear(hidden).log_softmax(-1)
        return loss(log_p_NV, log_q_NV, labels).sum(), expected_acceptance(log_p_NV, log_q_NV.detach()).sum()

    before, seconds = _peak(device), []
    for _ in range(case["repeats"]):
        linear.weight.grad = hidden.grad = None
        started = _now(device)
        value, acceptance = naive() if side == "naive" else head(hidden, lesson)
        value.backward()
        seconds.append(_now(device) - started)
    return {
        "peak": _peak(device),
        "before": before,
        "seconds": min(seconds),
        "loss": value.item() / tokens,
        "expected_acceptance": acceptance.item() / tokens,
    }


def _peak(device: str) -> float:
    if device != "cpu":
        import torch

        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would include what the parent held when it forked
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) * 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _now(device: str) -> float:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _in_process(side: str, case: dict[str, int], device: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--case", json.dumps(case), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed ({done.returncode}; out of memory?):\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small case in under a minute")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="file for the rows of both sides")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
