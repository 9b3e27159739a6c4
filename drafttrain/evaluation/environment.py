"""The machine that figures were measured on: what it is, how busy it was, what it could do at best."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from drafttrain.evaluation.schema import Environment
from drafttrain.models.checkpoint import git_commit, versions


def describe(device: torch.device, load_start: float) -> Environment:
    """The environment block of a report.

    Args:
        device: where the target runs.
        load_start: `load()` before anything ran.
    """
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return Environment(
        created=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        device=properties.name if properties else device.type,
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        load_start=load_start,
        load_end=load(),
        memory=properties.total_memory if properties else _memory(),
        system=f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        versions=versions(),
        commit=git_commit(),
        bandwidth=_bandwidth(device) if on_gpu else None,
    )


def load() -> float:
    """Run queue of the machine over the last minute, 0 where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def cpu_name() -> str:
    """The processor's name."""
    return _cpu_field("model name") or platform.processor() or platform.machine()


def fast_dtype(device: torch.device) -> str:
    """bfloat16 where the hardware computes in it, else float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    flags = (_cpu_field("flags") or _cpu_field("Features") or "").split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "float32"


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int | None:
    """Most memory of a GPU in use while something runs; None on a CPU, which knows its process's whole life only."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def free_bytes(device: torch.device) -> int:
    """Memory that can still be used."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return _memory() // 2


def streamed_bytes(model: nn.Module) -> int:
    """Weight bytes that one decoding step reads: all but an input embedding that is no output head too."""
    total = sum(weight.nbytes for weight in {id(p): p for p in model.parameters()}.values())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if embedding is head else total - embedding.nbytes


def _bandwidth(device: torch.device, size: int = 1 << 30, repeats: int = 10) -> float:
    """Bytes per second of a device copy, reads and writes together."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(source)
    start.record()
    for _ in range(repeats):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize(device)
    return 2 * size * repeats / (1e-3 * start.elapsed_time(end))


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_field(name: str) -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        pass
    return None
