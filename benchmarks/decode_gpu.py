"""The decoder on a GPU at the shape of an 8B target and a 1B drafter, random weights: bandwidth, loop, v, speed-up.

    python benchmarks/decode_gpu.py                                 at most ten minutes on one GPU of 80 GB or more
    python benchmarks/decode_gpu.py --plan                          what would run, and what it needs; needs no GPU
    python benchmarks/decode_gpu.py --quick                         a tiny pair, on the CPU where there is no GPU
    python benchmarks/decode_gpu.py --device cpu --shape tiny       the whole programme on a CPU

Needs Python 3.11, torch and transformers, no network and no files: weights are random, contexts are filled with random
keys and values, and acceptance is synthetic (decoding/synthetic.py). Measured for contexts of 1k, 8k and 32k tokens at
batch 1 and for batches of 4 and 16, eagerly and in compiled graphs, in turn within every repeat:

* a step of autoregressive decoding, its loop included. `roofline_share_*`: the bytes that it has to read (weights once,
  keys and values of every row) / its time / the bandwidth of this device, the faster of a large copy (bytes read and
  written) and a large sum (bytes read), measured in the same run; `bandwidth_share_*` the same of the data sheet's
  bandwidth, where it is known; `gigabytes_per_second_*` what was achieved.
* a target forward of width w, back to back. `v_<w>`: its time over that of width 1.
* a draft step, and rounds of drafting K tokens, wall clock over many rounds of a batch that stays full; nothing waits
  for the device but the loop's own read. `overhead_o`: (round - K draft steps - forward of width K + 1) / step, for
  K = 5; in it are the drafter's catch-up after a full acceptance and the few operations of synthetic acceptance.
* `speedup_k<K>`: tokens a second of these rounds over those of autoregressive decoding; `predicted_speedup_k<K>` by the
  cost model from the rounds' own counts, with the o of the *other* K; `tau_k<K>` what the rates came to.

Figures without a suffix are of a context of 1k, batch 1 and compiled graphs (eager where there are none); `_8k`,
`_b16` and `_eager` mark the others. `_low` and `_high` end the 95 % interval over repeats.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from benchmarks.shapes import (  # noqa: E402
    SHAPES,
    Case,
    Pair,
    Rounds,
    config_of,
    draft_seconds,
    forward_seconds,
    kv_bytes,
    make_models,
    pair_of,
    parameters,
    seconds_of,
    speculative_rounds,
    step_seconds,
)
from drafttrain.decoding.counts import Counts  # noqa: E402
from drafttrain.decoding.synthetic import SyntheticAcceptance  # noqa: E402
from drafttrain.errors import UserError, run_program  # noqa: E402
from drafttrain.evaluation.cost import CostModel  # noqa: E402
from drafttrain.evaluation.environment import fast_dtype, free_bytes  # noqa: E402
from drafttrain.evaluation.runner import steady  # noqa: E402
from drafttrain.evaluation.statistics import Interval, bootstrap, rate_ratio  # noqa: E402
from drafttrain.models.loading import DTYPES  # noqa: E402

CASES = (Case(1024, 1), Case(8192, 1), Case(32768, 1), Case(1024, 4), Case(1024, 16), Case(8192, 16))
RATES = (0.8, 0.75, 0.7, 0.65, 0.6)
"""Synthetic acceptance, each given that all before it were accepted; the last one holds on."""

LENGTHS = (3, 5, 8)
OVERHEAD_LENGTH = 5
WIDTHS = range(1, 17)
FEW_WIDTHS = (1, *(length + 1 for length in LENGTHS), 16)
"""Beyond a context of 1k."""

FULL = {"repeats": 5, "steps": 24, "forwards": 10, "rounds": 16}
QUICK = {"repeats": 2, "steps": 6, "forwards": 2, "rounds": 4}
LAST_CASE, LAST_REPEAT = 420.0, 540.0
"""Seconds after which no case, and of a case no repeat beyond the second, is begun: graphs of a case take a while."""

EAGER, COMPILED = "eager", "compiled"
NOMINAL = {"H200": 4.8e12, "H100 NVL": 3.9e12, "H100 PCIe": 2.0e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.039e12}
"""Bytes per second of memory by the data sheets; the first name that fits."""

_STORED = 2.75
"""What the keys and values of a case take at most, in their own bytes: eagerly, and in storages made for graphs."""

SPARE = 2 << 30
"""Bytes for activations, logits and graphs, and of each of the two buffers that bandwidth is measured on."""

_COPIES = 20

SLACK = 3.0
"""What --plan multiplies the time by that memory traffic alone would take: eager launches, captures, warm-up."""


@dataclass
class Row:
    """One repeat of one case in one mode; seconds.

    Attributes:
        context, batch, mode, repeat: which one.
        bytes: that an autoregressive step has to read.
        step: autoregressive, the loop included.
        forwards: of the target, by width.
        draft: a draft step.
        rounds: of every length.
    """

    context: int
    batch: int
    mode: str
    repeat: int
    bytes: int
    step: float
    forwards: dict[int, float]
    draft: float
    rounds: list[Rounds]


@run_program
def main() -> None:
    """Measure, and print the figures.

    Raises:
        UserError: there is no GPU, and no other device was asked for.
    """
    options = _options()
    if options.plan:
        print("\n".join(plan(options.shape, options.modes, FULL)))
        return
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this benchmark needs an NVIDIA GPU and torch with CUDA, and here is none; run it on a machine that has "
            "one (or try it out with --quick, or with --device cpu --shape tiny)."
        )
    run = Run(options)
    run.measure()
    for note in run.notes:
        print(note, flush=True)
    finish("decode_gpu", flat(run.figures()), run.raw(), options.output)


class Run:
    """A run in progress: what was measured so far is written after every case."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.began = time.monotonic()
        self.options = options
        self.counts = QUICK if options.quick else FULL
        self.dtype = DTYPES[fast_dtype(options.device)]
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.bandwidth = bandwidths(options.device, SPARE if options.device.type == "cuda" else 1 << 24)
        self.nominal = nominal(options.device)

    def measure(self) -> None:
        """All cases, as far as time and memory reach."""
        options = self.options
        told = ", ".join(f"{kind} {1e-9 * value:.0f} GB/s" for kind, value in self.bandwidth.items())
        sheet = f"{1e-9 * self.nominal:.0f} GB/s" if self.nominal else "unknown"
        print(f"bandwidth: {told}; by the data sheet {sheet}", flush=True)
        models = make_models(options.shape, self.dtype, options.device)
        pairs = self._pairs(models)
        for case in CASES:
            if self._seconds() > LAST_CASE:
                self.notes.append(f"{_title(case)}: not measured, the time is up")
                continue
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
            if memory(options.shape, case, self.dtype) > free_bytes(options.device):
                self.notes.append(f"{_title(case)}: not measured, memory has no room")
                continue
            try:
                self._measure(case, pairs)
            except torch.OutOfMemoryError:
                self.notes.append(f"{_title(case)}: not measured whole, memory ran out")
            self._tell(case)
            self._save()

    def _pairs(self, models: tuple[torch.nn.Module, torch.nn.Module]) -> dict[str, Pair]:
        pairs = {}
        for mode in self.options.modes:
            try:
                pairs[mode] = pair_of(models, mode == COMPILED)
            except UserError as error:
                self.notes.append(f"{mode}: not measured ({error})")
        if not pairs:
            raise UserError(self.notes[-1])
        return pairs

    def _measure(self, case: Case, pairs: dict[str, Pair]) -> None:
        """Warm up, where graphs are captured; then all modes in turn, repeat by repeat."""
        for mode, pair in list(pairs.items()):
            try:
                self._row(case, mode, pair, -1)
            except UserError as error:
                self.notes.append(f"{mode}: not measured ({error})")
                del pairs[mode]
                continue
            if pair.refused:
                self.notes.append(f"{mode}: not measured, a model could not be captured (the log says why)")
                del pairs[mode]
        modes = list(pairs)
        with steady():
            for repeat in range(self.counts["repeats"]):
                if repeat > 1 and self._seconds() > LAST_REPEAT:
                    break
                turn = repeat % max(1, len(modes))
                for mode in modes[turn:] + modes[:turn]:
                    self.rows.append(self._row(case, mode, pairs[mode], repeat))

    def _row(self, case: Case, mode: str, pair: Pair, repeat: int) -> Row:
        synthetic, seed, counts = SyntheticAcceptance(RATES), repeat + 1, self.counts
        widths = WIDTHS if case.context == CASES[0].context else FEW_WIDTHS
        return Row(
            *(case.context, case.batch, mode, repeat, pair.bytes_of_step(case)),
            step=step_seconds(pair, case, counts["steps"]),
            forwards=forward_seconds(pair.target, case, widths, counts["forwards"]),
            draft=draft_seconds(pair.drafter, case, counts["forwards"]),
            rounds=[speculative_rounds(pair, case, k, synthetic, counts["rounds"], seed) for k in LENGTHS],
        )

    def figures(self) -> dict[str, Interval | float]:
        """Of everything measured so far."""
        found: dict[str, Interval | float] = {
            f"bandwidth_{kind}_gigabytes": 1e-9 * value for kind, value in self.bandwidth.items()
        }
        best = max(self.bandwidth.values())
        primary = COMPILED if any(row.mode == COMPILED for row in self.rows) else EAGER
        for context, batch, mode in dict.fromkeys((row.context, row.batch, row.mode) for row in self.rows):
            own = [row for row in self.rows if (row.context, row.batch, row.mode) == (context, batch, mode)]
            suffix = (f"_b{batch}" if batch > 1 else "") + ("" if mode == primary else f"_{mode}")
            at = f"_{context // 1024}k"
            found |= {f"{name}{at}{suffix}": value for name, value in shares(own, best, self.nominal).items()}
            at = "" if context == CASES[0].context else at
            found |= {f"{name}{at}{suffix}": value for name, value in costs_of(own).items()}
        return found

    def raw(self) -> dict[str, Any]:
        """All rows, and what is needed to read them."""
        return {
            "shape": self.options.shape,
            "dtype": str(self.dtype),
            "rates": RATES,
            "bandwidth": self.bandwidth,
            "nominal": self.nominal,
            "notes": self.notes,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _tell(self, case: Case) -> None:
        for mode in self.options.modes:
            own = [row for row in self.rows if (row.context, row.batch, row.mode) == (case.context, case.batch, mode)]
            if own:
                found = shares(own, max(self.bandwidth.values()), self.nominal) | costs_of(own)
                speeds = ", ".join(
                    f"K={k} {found[f'speedup_k{k}']:.2f} (predicted {found[f'predicted_speedup_k{k}']:.2f})"
                    for k in LENGTHS
                )
                print(
                    f"{_title(case)}, {mode}: step {found['step_ms']:.2f} ms, {found['roofline_share']:.2f} of the "
                    f"roofline; o {found['overhead_o']:.3f}, c {found['c']:.3f}, v(6) {found['v_6']:.2f}, v(16) "
                    f"{found['v_16']:.2f}; speed-up {speeds}  [{self._seconds():.0f} s]",
                    flush=True,
                )

    def _save(self) -> None:
        if self.options.output is not None:
            self.options.output.parent.mkdir(parents=True, exist_ok=True)
            so_far = {"figures": flat(self.figures()), "rows": self.raw()}
            text = json.dumps({"benchmark": "decode_gpu", "unfinished": True, **so_far}, indent=1)
            self.options.output.write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def interval(rows: Sequence[Sequence[float]], figure: Callable[[np.ndarray], np.ndarray]) -> Interval:
    """A figure of sums over repeats, with its interval over repeats."""
    return bootstrap(np.array(rows, dtype=float), figure, ["all"] * len(rows))


def shares(rows: Sequence[Row], bandwidth: float, sheet: float | None) -> dict[str, Interval | float]:
    """Achieved bandwidth of one case in one mode, and its share of the measured and of the nominal one."""
    step = [(row.bytes, row.step) for row in rows]
    forward = [(row.bytes, row.forwards[1]) for row in rows]
    found = {
        "roofline_share": interval(step, lambda s: s[..., 0] / s[..., 1] / bandwidth),
        "roofline_share_forward": interval(forward, lambda s: s[..., 0] / s[..., 1] / bandwidth),
        "gigabytes_per_second": interval(step, lambda s: 1e-9 * s[..., 0] / s[..., 1]),
        "step_ms": interval([(1, row.step) for row in rows], lambda s: 1e3 * s[..., 1] / s[..., 0]),
    }
    if sheet is not None:
        found["bandwidth_share"] = interval(step, lambda s: s[..., 0] / s[..., 1] / sheet)
    return found


def costs_of(rows: Sequence[Row]) -> dict[str, Interval | float]:
    """c, v, o and speed-ups of one case in one mode."""

    def ratio(pairs: Sequence[tuple[float, float]]) -> Interval:
        return interval(pairs, lambda s: s[..., 0] / s[..., 1])

    found: dict[str, Interval | float] = {"c": ratio([(row.draft, row.step) for row in rows])}
    for width in rows[0].forwards:
        if width > 1:
            found[f"v_{width}"] = ratio([(row.forwards[width], row.forwards[1]) for row in rows])
    overheads = {}
    for at, length in enumerate(LENGTHS):
        own = [(row, row.rounds[at]) for row in rows]
        overheads[length] = ratio([(overhead(row, rounds), row.step) for row, rounds in own])
        sums = [(each.tokens, each.seconds, row.batch, row.step) for row, each in own]
        found[f"speedup_k{length}"] = interval(sums, rate_ratio)
        found[f"tau_k{length}"] = ratio([(each.tokens, each.rounds * row.batch) for row, each in own])
    found["overhead_o"] = overheads[OVERHEAD_LENGTH]
    for at, length in enumerate(LENGTHS):
        others = [own.value for other, own in overheads.items() if other != length]
        found[f"predicted_speedup_k{length}"] = predicted(rows, at, sum(others) / len(others))
    return found


def overhead(row: Row, rounds: Rounds) -> float:
    """Seconds of a round beside its forwards."""
    return rounds.seconds / rounds.rounds - rounds.length * row.draft - row.forwards[rounds.length + 1]


def predicted(rows: Sequence[Row], at: int, o: float) -> float:
    """Speed-up by the cost model from the counts of the rounds of a length, as if o were given."""
    step = sum(row.step for row in rows)
    costs = CostModel(
        {"drafter": sum(row.draft for row in rows) / step},
        {width: sum(row.forwards[width] for row in rows) / step for width in rows[0].forwards},
        o,
    )
    total = Counts()
    for row in rows:
        each = row.rounds[at]
        rounds = each.rounds * row.batch
        total += Counts(
            tokens=each.tokens,
            rounds=rounds,
            draft_forwards={"drafter": rounds * each.length},
            drafted_at=[rounds] * each.length,
        )
    return costs.predicted_speedup(total)


def flat(figures: dict[str, Interval | float]) -> dict[str, float]:
    """Figures with the ends of their intervals as figures of their own."""
    found = {}
    for name, own in figures.items():
        if isinstance(own, Interval):
            found |= {name: own.value, f"{name}_low": own.low, f"{name}_high": own.high}
        else:
            found[name] = own
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The device, and what would run


def bandwidths(device: torch.device, size: int) -> dict[str, float]:
    """Bytes per second of a copy (read and written) and of a sum (read) of so many bytes."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    copied = seconds_of(device, lambda: target.copy_(source), _COPIES)
    summed = seconds_of(device, source.sum, _COPIES)
    return {"copy": 2 * size / copied, "read": size / summed}


def nominal(device: torch.device) -> float | None:
    """Bytes per second of the device's memory by its data sheet, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for known, value in NOMINAL.items() if known in name), None)


def memory(shape: str, case: Case, dtype: torch.dtype) -> int:
    """Bytes that a case takes beside the weights: keys and values of both models, and what forwards need."""
    token = sum(kv_bytes(config_of(sizes), dtype) for sizes in SHAPES[shape])
    return int(_STORED * token * sum(case.lengths)) + (SPARE if shape != "tiny" else 0)


def plan(shape: str, modes: Sequence[str], counts: dict[str, int], dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """What would run, with the memory and time that it needs, estimated at the bandwidth of an H100."""
    target, drafter = (config_of(sizes) for sizes in SHAPES[shape])
    weights = [parameters(config) * dtype.itemsize for config in (target, drafter)]
    read = [parameters(config, embedding=False) * dtype.itemsize for config in (target, drafter)]
    lines = [f"weights: target {weights[0] / 2**30:.1f} GiB, drafter {weights[1] / 2**30:.1f} GiB, random, {dtype}"]
    total = 180.0 if COMPILED in modes else 30.0  # importing, making weights, measuring bandwidth, compiling
    for case in CASES:
        tokens = sum(case.lengths)
        step, draft = (
            (size + kv_bytes(config, dtype) * tokens) / NOMINAL["H100"]
            for size, config in zip(read, (target, drafter), strict=True)
        )
        widths = WIDTHS if case.context == CASES[0].context else FEW_WIDTHS
        steps = counts["steps"] + len(widths) * (counts["forwards"] + 1) + len(LENGTHS) * (counts["rounds"] + 2)
        drafts = counts["forwards"] + 1 + sum(LENGTHS) * (counts["rounds"] + 2)
        seconds = SLACK * (counts["repeats"] + 1) * len(modes) * (steps * step + drafts * draft)
        total += seconds
        needed = (sum(weights) + memory(shape, case, dtype)) / 2**30
        lines.append(
            f"{_title(case)}: {' and '.join(modes)}, {counts['repeats']} repeats of {steps} target forwards and "
            f"{drafts} draft steps; {needed:.0f} GiB, about {seconds:.0f} s"
        )
    return [*lines, f"in all about {total:.0f} s; what {LAST_CASE:.0f} s or memory have no room for is left out"]


def _title(case: Case) -> str:
    return f"context {case.context // 1024}k, batch {case.batch}"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, help="cuda, unless --quick finds none")
    parser.add_argument("--shape", choices=SHAPES, help="8b; tiny with --quick")
    parser.add_argument("--modes", choices=(EAGER, COMPILED), nargs="+", help="both on a GPU, eager on a CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny pair, few repeats")
    parser.add_argument("--plan", action="store_true", help="print what would run and exit")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    if options.device is None:
        options.device = torch.device("cpu" if options.quick and not torch.cuda.is_available() else "cuda")
    options.shape = options.shape or ("tiny" if options.quick else "8b")
    options.modes = options.modes or ([EAGER, COMPILED] if options.device.type == "cuda" else [EAGER])
    return options


if __name__ == "__main__":
    main()
