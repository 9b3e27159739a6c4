"""What a LongSpec drafter keeps of a long text, and what it costs to start on one: neither may grow with the text.

    python benchmarks/longspec_memory.py --output results.json
    python benchmarks/longspec_memory.py --quick     a small model, fewer repeats, under a minute

A random target and drafter (the figures depend on shapes alone) take up prompts of 1k and 32k tokens. Bytes are those
of the tensors that are really allocated for the drafter's keys and values, compared after decoding; seconds are of one
processor (other work on the machine does not count) in the drafter's start alone, the two lengths in turn.

kv_bytes_ratio_32k_1k     drafter's key-value bytes at 32k over those at 1k; asserted to be 1
startup_ratio_32k_1k      median seconds of a start at 32k over those at 1k; `_low`, `_high`: quartiles of the ratios
causal_*                  the same of an ordinary drafter of equal width and depth (not with --quick)
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import finish  # noqa: E402
from drafttrain.config import BlockConfig  # noqa: E402
from drafttrain.decoding.draft import Committed  # noqa: E402
from drafttrain.decoding.drafters import Drafter, ModelDrafter, Setting  # noqa: E402
from drafttrain.decoding.engine import Engine  # noqa: E402
from drafttrain.decoding.longspec import LongSpec  # noqa: E402
from drafttrain.decoding.loop import Decoder  # noqa: E402
from drafttrain.decoding.target_view import TargetView  # noqa: E402
from drafttrain.models.longspec_new import new_block  # noqa: E402
from drafttrain.ops.sampling import Sampling  # noqa: E402

SHORT, LONG = 1024, 32768
"""Tokens of the prompts."""

GREEDY = Sampling(0.0)
VOCABULARY = 4096
LENGTH = 5


def main() -> None:
    """Measure, assert, print."""
    options = _options()
    figures, rows = {}, {}
    for name in ("longspec", "causal")[: 1 if options.quick else 2]:  # reading 32k tokens takes the other a while
        engine, make = pair(name, options.hidden, options.window)
        # what is kept is counted behind real decoding, whose cost is the target's prompt: by a small pair when quick
        decoding, drafter = pair(name, 64, options.window) if options.quick else (engine, make)
        memory = {length: kept_bytes(decoding, drafter(), length) for length in (SHORT, LONG)}
        seconds = starts(engine, make, options.repeats if name == "longspec" else max(2, options.repeats // 40))
        ratios = [long / short for short, long in zip(seconds[SHORT], seconds[LONG], strict=True)]
        middle = {length: statistics.median(found) for length, found in seconds.items()}
        prefix = "" if name == "longspec" else "causal_"
        low, _, high = statistics.quantiles(ratios, n=4)
        start = middle[LONG] / middle[SHORT]
        figures |= interval(f"{prefix}kv_bytes_ratio_32k_1k", *[memory[LONG] / memory[SHORT]] * 3)
        figures |= interval(f"{prefix}startup_ratio_32k_1k", start, min(low, start), max(high, start))
        rows[name] = {"bytes": memory, "seconds": seconds}
        print(f"{name}: {memory} bytes, {middle} seconds to start", flush=True)
    if figures["kv_bytes_ratio_32k_1k"] != 1:
        raise SystemExit(f"the drafter keeps {rows['longspec']['bytes']} bytes: its memory grows with the text")
    finish("longspec_memory", figures, rows, options.output)


def interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """A figure and the ends of its spread."""
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def pair(name: str, hidden: int, window: int) -> tuple[Engine, Callable[[], Drafter]]:
    """A target's engine, and what makes new drafters for it."""
    target = llama(hidden)
    if name == "causal":
        own = Engine(llama(hidden, seed=1))
        return Engine(target), lambda: ModelDrafter(own, LENGTH)
    block = new_block(target, BlockConfig(window=window), torch.bfloat16, 0).requires_grad_(False)
    return Engine(target), lambda: LongSpec(block, LENGTH)


def llama(hidden: int, seed: int = 0) -> torch.nn.Module:
    """A random Llama of one layer with grouped queries and room for the long prompt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=max(2, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=2 * LONG,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)


def prompt_of(length: int) -> list[int]:
    """Random tokens."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def kept_bytes(engine: Engine, drafter: Drafter, length: int) -> int:
    """Bytes allocated for the drafter's keys and values when some tokens have been decoded behind a prompt."""
    Decoder(engine, drafter, GREEDY).generate([prompt_of(length)], 4 * LENGTH)
    return drafter.cache.memory_bytes()


@torch.inference_mode()
def starts(engine: Engine, make: Callable[[], Drafter], repeats: int) -> dict[int, list[float]]:
    """Processor seconds of each start on one thread, by length; new drafters every time, the lengths in turn."""
    torch.set_num_threads(1)
    found: dict[int, list[float]] = {SHORT: [], LONG: []}
    prompts = {length: prompt_of(length) for length in found}
    for repeat in range(-1, repeats):
        for length, prompt in prompts.items():
            drafter, view = make(), TargetView(engine)
            setting = Setting(GREEDY, frozenset(), VOCABULARY, length + 64, engine.dtype, engine.device, view)
            committed = Committed([prompt], [0])
            began = time.process_time()
            drafter.start(committed, setting)
            if repeat >= 0:
                found[length].append(time.process_time() - began)
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of both models")
    parser.add_argument("--window", type=int, default=512, help="the drafter's window")
    parser.add_argument("--repeats", type=int, default=200, help="starts at each length")
    parser.add_argument("--quick", action="store_true", help="fewer starts, and bytes by a small pair")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 80
    return options


if __name__ == "__main__":
    main()
