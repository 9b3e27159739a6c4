"""The attention of one layer over a drafted tree: in two parts against a dense mask and against repeated keys.

    python benchmarks/tree_attention.py            about two minutes on one core
    python benchmarks/tree_attention.py --quick    the shortest context, fewer repeats

LongSpec's tree, levels of 4, 16, 16, 16, 16 below the root's children: 68 nodes, each seeing its ancestors and the
whole context. 32 query heads over 8 key heads of size 128; 8,192 and 32,768 keys in a cache with room for more.

* hybrid: `prepare_tree_mask` and `attention`, as the engine does: the context by a fused kernel without a mask, the
  tree masked, merged by their log-sum-exps;
* folded: a dense mask over context and tree, keys not repeated; the faster of heads folded into rows and of torch's own
  grouped queries;
* repeated: the same mask, keys and values repeated for every query head, as transformers' SDPA path does with a mask.

Masks are made beforehand, since a forward makes one for all its layers. `max_error` is the largest difference of hybrid
in float32 from a dense softmax in float64 over all lengths, and is checked against one of a mask with a wrong ancestor.
`speedup_over_...` are ratios of time, the smallest over lengths of float32 (that of bfloat16 beside it, with `_bf16`).
Timed is what one thread spends of a processor, which on a shared machine others do not lengthen. A repeat times all
sides in turn; `_low` and `_high` end the 95 % interval over repeats. `extra_mib_...` is what hybrid
allocates in a call, by length, and `folded_extra_mib_...` the same with the mask that it needs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from drafttrain.evaluation.runner import steady  # noqa: E402
from drafttrain.evaluation.statistics import Interval, bootstrap  # noqa: E402
from drafttrain.ops.attention import attention, prepare_tree_mask  # noqa: E402
from drafttrain.ops.cache import DenseCache  # noqa: E402
from drafttrain.ops.tree import ROOT as TOP  # noqa: E402
from drafttrain.ops.tree import TreeBlock, ancestry  # noqa: E402

HEADS, KEY_HEADS, SIZE = 32, 8, 128
GROUPS = HEADS // KEY_HEADS
WIDTHS = (4, 16, 16, 16, 16)
NODES = sum(WIDTHS)
LENGTHS = (8192, 32768)
SPARE = 512
DTYPES = {"": torch.float32, "_bf16": torch.bfloat16}
FULL = {"lengths": LENGTHS, "repeats": 5, "calls": 1}
QUICK = {"lengths": LENGTHS[:1], "repeats": 3, "calls": 1}
_MIB = 1 << 20

Side = Callable[[], Tensor]


def parents() -> list[int]:
    """A tree of the given widths, its nodes' parents drawn at random from the level above."""
    generator = torch.Generator().manual_seed(0)
    found, first = [TOP] * WIDTHS[0], 0
    for above, width in itertools.pairwise(WIDTHS):
        found += sorted((first + torch.randint(0, above, (width,), generator=generator)).tolist())
        first += above
    return found


class Layer:
    """Keys, values and queries of a layer in one dtype, with a context of some length.

    Attributes:
        query: [1, N, Q, D].
        key, value: [1, M, S + Q, D], views of a larger cache.
    """

    def __init__(self, dtype: torch.dtype, length: int) -> None:
        generator = torch.Generator().manual_seed(length)

        def states(heads: int, tokens: int) -> Tensor:
            return torch.randn(1, tokens, heads, SIZE, generator=generator).to(dtype).transpose(1, 2)

        self.dtype, self.length = dtype, length
        self.query = states(HEADS, NODES)
        self.cache = DenseCache(1, 1, torch.device("cpu"), capacity=length + SPARE)
        self.cache.open(length)
        self.cache.layers[0].update(states(KEY_HEADS, length), states(KEY_HEADS, length))
        self.cache.advance()
        self.cache.open(NODES)
        self.key, self.value = self.cache.layers[0].update(states(KEY_HEADS, NODES), states(KEY_HEADS, NODES))

    def hybrid(self, seen_BQT: Tensor) -> Side:
        """Ours."""
        tree = TreeBlock(seen_BQT, seen_BQT.sum(2) - 1)
        mask = prepare_tree_mask(self.cache, tree, self.dtype, GROUPS, None, hybrid=True)
        return lambda: attention(torch.nn.Module(), self.query, self.key, self.value, mask)[0]

    def mask(self, seen_BQT: Tensor) -> Tensor:
        """Additive and dense, [1, 1, Q, S + Q]."""
        visible = torch.cat([torch.ones(1, NODES, self.length, dtype=torch.bool), seen_BQT], 2)
        return torch.zeros(visible.shape, dtype=self.dtype).masked_fill(~visible, -torch.inf).unsqueeze(1)

    def dense(self, seen_BQT: Tensor) -> dict[str, Side]:
        """The other sides."""
        mask = self.mask(seen_BQT)
        tiled = mask.repeat(1, 1, GROUPS, 1)
        rows = self.query.reshape(1, KEY_HEADS, GROUPS * NODES, SIZE)

        def folded() -> Tensor:
            found = scaled_dot_product_attention(rows, self.key, self.value, attn_mask=tiled)
            return found.reshape(1, HEADS, NODES, SIZE).transpose(1, 2)

        def grouped() -> Tensor:
            found = scaled_dot_product_attention(self.query, self.key, self.value, attn_mask=mask, enable_gqa=True)
            return found.transpose(1, 2)

        def repeated() -> Tensor:
            key, value = (states.repeat_interleave(GROUPS, 1) for states in (self.key, self.value))
            return scaled_dot_product_attention(self.query, key, value, attn_mask=mask).transpose(1, 2)

        return {"folded": folded, "grouped": grouped, "repeated": repeated}

    def exact(self, seen_BQT: Tensor) -> Tensor:
        """In float64, head by head: [1, Q, N, D]."""
        mask = self.mask(seen_BQT)[0].double()
        found = []
        for head in range(HEADS):
            key, value = (states[0, head // GROUPS].double() for states in (self.key, self.value))
            found.append((self.query[0, head].double() @ key.T * SIZE**-0.5 + mask[0]).softmax(-1) @ value)
        return torch.stack(found, 1).unsqueeze(0)


class _Allocations(TorchDispatchMode):
    """Bytes of all storages that operators make, whether they are freed before the end or not."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self._alive.append(each)  # so that no two have one address
                self.sizes[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        return result


def allocated(side: Side) -> float:
    """MiB that a call allocates."""
    with _Allocations() as found:
        side()
    return sum(found.sizes.values()) / _MIB


def main() -> None:
    """Compare, time, and print the figures."""
    torch.set_num_threads(1)
    options = _options()
    case = QUICK if options.quick else FULL
    seen = ancestry(torch.tensor([parents()]))
    error, caught, rows, found = 0.0, 1.0, {}, {}
    figures: dict[str, float] = {}
    for short, dtype in DTYPES.items():
        for length in case["lengths"]:
            layer = Layer(dtype, length)
            sides = {"hybrid": layer.hybrid(seen), **layer.dense(seen)}
            if dtype is torch.float32:
                apart, wrong = errors(layer, seen, sides["hybrid"])
                error, caught = max(error, apart), min(caught, wrong)
                figures |= memory(layer, sides, length)
            seconds = timed(sides, case["repeats"], case["calls"])
            rows[f"{length}{short}"] = {name: column.tolist() for name, column in zip(sides, seconds.T, strict=True)}
            middle = {name: 1e3 * statistics.median(column) for name, column in zip(sides, seconds.T, strict=True)}
            print(f"{length} keys {dtype}: " + ", ".join(f"{k} {v:.0f} ms" for k, v in middle.items()), flush=True)
            fastest = middle["folded"] <= middle["grouped"]
            found[f"folded{short}", length] = ratio(seconds[:, [0, 1 if fastest else 2]])
            found[f"repeated{short}", length] = ratio(seconds[:, [0, 3]])
    if not 0 < error < caught / 10:
        raise SystemExit(f"an error of {error:.2g} says nothing beside {caught:.2g} with a wrong ancestor")
    figures |= {"max_error": error, "error_of_a_wrong_ancestor": caught}
    for name in dict.fromkeys(name for name, _ in found):
        own = min((value for (other, _), value in found.items() if other == name), key=lambda value: value.value)
        label = f"speedup_over_{name}"
        figures |= {label: own.value, f"{label}_low": own.low, f"{label}_high": own.high}
    finish("tree_attention", figures, {"case": case, "seconds": rows}, options.output)


@torch.inference_mode()
def errors(layer: Layer, seen_BQT: Tensor, hybrid: Side) -> tuple[float, float]:
    """Largest difference from the exact attention, and that of a tree in which one node misses its parent."""
    exact = layer.exact(seen_BQT)
    wrong = seen_BQT.clone()
    wrong[0, -1, parents()[-1]] = False
    return tuple(float((side() - exact).abs().max()) for side in (hybrid, layer.hybrid(wrong)))


@torch.inference_mode()
def memory(layer: Layer, sides: dict[str, Side], length: int) -> dict[str, float]:
    """MiB allocated by a call of hybrid, and by one of folded with its mask."""
    mask = GROUPS * NODES * layer.key.shape[2] * layer.key.element_size() / _MIB
    short = f"{length // 1024}k"
    return {
        f"extra_mib_{short}": allocated(sides["hybrid"]),
        f"folded_extra_mib_{short}": allocated(sides["folded"]) + mask,
    }


@torch.inference_mode()
def timed(sides: dict[str, Side], repeats: int, calls: int) -> np.ndarray:
    """Seconds of a call of each side, [repeats, sides]; each the fastest of some calls."""
    for side in sides.values():
        side()
    with steady():
        return np.array([[_fastest(side, calls) for side in sides.values()] for _ in range(repeats)])


def ratio(seconds: np.ndarray) -> Interval:
    """The second column over the first, with its interval over repeats."""
    return bootstrap(seconds, lambda sums: sums[..., 1] / sums[..., 0], ["all"] * len(seconds))


def _fastest(side: Side, calls: int) -> float:
    seconds: list[float] = []
    for _ in range(calls):
        started = time.process_time()
        side()
        seconds.append(time.process_time() - started)
    return min(seconds)


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shortest context, fewer repeats")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
