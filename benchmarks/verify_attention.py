"""The attention of one layer at verification: ours against transformers' SDPA path, a large cache little used.

    python benchmarks/verify_attention.py            under a minute on two cores
    python benchmarks/verify_attention.py --quick    fewer repeats

32 query heads over 8 key heads of size 128, six query rows (k = 5), a cache of 4,096 slots of which 1,024 are live, the
six included. Both sides write the new keys and values into their cache and attend: ours through `DenseCache` and
`attention`, as the engine does; transformers' through its `StaticCache` and `sdpa_attention_forward` with the mask that
it makes for such a cache. Masks are made beforehand, since a forward makes one for all its layers.

`speedup` is theirs / ours in time, the smaller of both dtypes. A repeat times both sides in turn, each by the fastest
of a few calls; `_low` and `_high` end the 95 % interval over repeats. `difference` is the largest between the two
outputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaConfig, StaticCache  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from drafttrain.evaluation.runner import steady  # noqa: E402
from drafttrain.evaluation.statistics import Interval, bootstrap  # noqa: E402
from drafttrain.ops.attention import attention, prepare_mask  # noqa: E402
from drafttrain.ops.cache import DenseCache  # noqa: E402

HEADS, KEY_HEADS, SIZE, ROWS = 32, 8, 128, 6
SLOTS, LIVE = 4096, 1024
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
FULL = {"repeats": 30, "calls": 10}
QUICK = {"repeats": 6, "calls": 5}
_WARMUP = 3

Side = Callable[[], Tensor]


class Layer:
    """One layer's keys, values and queries, the same for both sides.

    Attributes:
        past: keys and values already read, each [1, M, LIVE - ROWS, D].
        new: keys and values of the tokens to be verified, each [1, M, ROWS, D].
        query: [1, N, ROWS, D], laid out as a projection leaves it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def states(heads: int, tokens: int) -> Tensor:
            return torch.randn(1, tokens, heads, SIZE, generator=generator).to(dtype).transpose(1, 2)

        self.dtype = dtype
        self.past = states(KEY_HEADS, LIVE - ROWS), states(KEY_HEADS, LIVE - ROWS)
        self.new = states(KEY_HEADS, ROWS), states(KEY_HEADS, ROWS)
        self.query = states(HEADS, ROWS)
        self.module = torch.nn.Module()
        self.module.num_key_value_groups, self.module.is_causal = HEADS // KEY_HEADS, True

    def ours(self) -> Side:
        """Our cache and attention."""
        cache = DenseCache(1, 1, torch.device("cpu"), capacity=SLOTS)
        cache.open(LIVE - ROWS)
        cache.layers[0].update(*self.past)
        cache.advance()
        cache.open(ROWS)
        mask = prepare_mask(cache, cache.query_positions(), self.dtype, HEADS // KEY_HEADS, None)
        return lambda: attention(self.module, self.query, *cache.layers[0].update(*self.new), mask)[0]

    def theirs(self) -> Side:
        """Transformers' static cache and SDPA; the cache's count is set back before each call, which takes no time."""
        config = LlamaConfig(
            hidden_size=HEADS * SIZE,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            attn_implementation="sdpa",
        )
        cache = StaticCache(config, max_cache_len=SLOTS)
        cache.update(*self.past, 0)
        layer = cache.layers[0]
        tokens = torch.empty(1, ROWS, 1, dtype=self.dtype)
        positions = torch.arange(LIVE - ROWS, LIVE).unsqueeze(0)
        mask = create_causal_mask(config, tokens, None, past_key_values=cache, position_ids=positions)

        def run() -> Tensor:
            layer.cumulative_length.fill_(LIVE - ROWS)
            return sdpa_attention_forward(self.module, self.query, *layer.update(*self.new), mask)[0]

        return run


def main() -> None:
    """Compare, time, and print the figures."""
    options = _options()
    case = QUICK if options.quick else FULL
    found: dict[str, Interval] = {}
    differences, rows = {}, {}
    for short, dtype in DTYPES.items():
        layer = Layer(dtype)
        ours, theirs = layer.ours(), layer.theirs()
        differences[short] = float((ours() - theirs()).abs().max())
        if not differences[short] <= TOLERANCE[short]:
            raise SystemExit(f"{short}: outputs differ by {differences[short]:.2g}: they are not of the same attention")
        rows[short] = timed(ours, theirs, case["repeats"], case["calls"])
        found[short] = speedup(rows[short])
        mine, other = (1e3 * statistics.median(column) for column in zip(*rows[short], strict=True))
        print(f"{short}: ours {mine:.3f} ms, transformers {other:.3f} ms, {found[short]:.1f} times", flush=True)
    figures: dict[str, float] = {}
    named = {f"speedup_{short}": own for short, own in found.items()}
    named["speedup"] = min(found.values(), key=lambda own: own.value)
    for name, own in named.items():
        figures |= {name: own.value, f"{name}_low": own.low, f"{name}_high": own.high}
    figures |= {f"difference_{short}": value for short, value in differences.items()}
    finish("verify_attention", figures, {"case": case, "seconds": rows}, options.output)


@torch.inference_mode()
def timed(ours: Side, theirs: Side, repeats: int, calls: int) -> list[tuple[float, float]]:
    """Seconds of a call of ours and of theirs, one pair a repeat."""
    for side in (ours, theirs):
        for _ in range(_WARMUP):
            side()
    with steady():
        return [(_fastest(ours, calls), _fastest(theirs, calls)) for _ in range(repeats)]


def speedup(seconds: list[tuple[float, float]]) -> Interval:
    """Theirs over ours, with its interval over repeats."""
    return bootstrap(np.array(seconds), lambda sums: sums[..., 1] / sums[..., 0], ["all"] * len(seconds))


def _fastest(side: Side, calls: int) -> float:
    seconds = []
    for _ in range(calls):
        started = time.perf_counter()
        side()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
