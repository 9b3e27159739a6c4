"""Ranks, barriers and progress, the same under python, accelerate, torchrun and deepspeed.

torch is imported inside the functions: programs that only print their help do not wait for it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

LINE_SECONDS = 30.0
"""How often a line tells the progress where there is no terminal."""

BARRIER_TIMEOUT = timedelta(hours=6)
"""Processes that make data wait for the slowest one, which may have hours more to do than the first."""


def _initialized() -> bool:
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group when a launcher started several processes, and leave it at the end of the program.

    CUDA processes take their own device and NCCL, others gloo. A group made by accelerate or DeepSpeed is used as it
    is, and left as well.
    """
    _join()
    try:
        yield
    finally:
        if _initialized():
            import torch.distributed as dist

            dist.destroy_process_group()


def _join() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or _initialized():
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=BARRIER_TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=BARRIER_TIMEOUT)


def rank() -> int:
    """Number of this process, 0 when there is one."""
    if _initialized():
        import torch.distributed as dist

        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its machine, which is also the number of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes work together."""
    if _initialized():
        import torch.distributed as dist

        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process speaks and writes for all."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if _initialized():
        import torch.distributed as dist

        dist.barrier()


def say(message: str) -> None:
    """Print once, whatever the number of processes."""
    if is_main():
        print(message, flush=True)


def progress(iterable: Iterable[T], total: int | None = None, description: str = "") -> Iterator[T]:
    """Iterate with a progress bar on the first process, silently on the others.

    Where the output is no terminal (a log file, a pipe) a plain line is printed every half minute instead.
    """
    if not is_main():
        yield from iterable
    elif sys.stderr.isatty():
        yield from _bar(iterable, total, description)
    else:
        yield from _lines(iterable, total, description)


def _bar(iterable: Iterable[T], total: int | None, description: str) -> Iterator[T]:
    from rich import progress as parts
    from rich.console import Console

    columns = (parts.TextColumn("{task.description}"), parts.BarColumn(), parts.MofNCompleteColumn())
    times = (parts.TimeElapsedColumn(), parts.TimeRemainingColumn())
    with parts.Progress(*columns, *times, console=Console(stderr=True), refresh_per_second=2) as bar:
        yield from bar.track(iterable, total=total, description=description)


def _lines(iterable: Iterable[T], total: int | None, description: str) -> Iterator[T]:
    start = told = time.monotonic()
    count = 0
    for item in iterable:
        yield item
        count += 1
        if time.monotonic() - told >= LINE_SECONDS:
            told = time.monotonic()
            print(_line(description, count, total, told - start), file=sys.stderr, flush=True)
    print(_line(description, count, total, time.monotonic() - start), file=sys.stderr, flush=True)


def _line(description: str, count: int, total: int | None, seconds: float) -> str:
    of = f"/{total}" if total else ""
    left = f", about {seconds / count * (total - count):.0f} s left" if total and 0 < count < total else ""
    return f"{description} {count}{of} in {seconds:.0f} s{left}"
