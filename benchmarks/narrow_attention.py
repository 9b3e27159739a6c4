"""Attention of few query rows over many keys on a CPU: the kernel of our graphs against torch's, keys folded for both.

    python benchmarks/narrow_attention.py            a minute on two cores
    python benchmarks/narrow_attention.py --quick    fewer repeats

Two key heads of size 64 (the reference target's), two query heads each; LAYERS layers of their own keys and values one
behind another, so that they come from memory as in a model. One, five and nine tokens at a time; the mask of the tokens
among themselves for ours, of all keys for torch's kernel, which takes no other.

`speedup_TYPE_KEYS_TOKENS` is torch's time over ours; a repeat times both sides in turn, and `_low` and `_high` end the
95 % interval over repeats. `cost_TYPE_KEYS` is the time of five tokens over that of one, by ours, and `_torch` by
torch's. `error_TYPE` is the largest of ours to the same in float64, and `_torch` of torch's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from benchmarks.verify_attention import Side, speedup, timed  # noqa: E402
from drafttrain.ops.narrow_attention import load, narrow_attention  # noqa: E402

LAYERS, HEADS, GROUPS, SIZE = 12, 2, 2, 64
KEYS, TOKENS = (512, 4096, 16384), (1, 5, 9)
SPARE = 256
"""Slots of the storage behind the keys."""


class Case:
    """Queries, and keys and values of all layers."""

    def __init__(self, dtype: torch.dtype, keys: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def states(count: int) -> Tensor:
            return torch.randn(1, HEADS, count, SIZE, generator=generator).to(dtype)

        self.layers = [[states(keys + SPARE)[:, :, :keys] for _ in range(2)] for _ in range(LAYERS)]
        self.query = states(GROUPS * tokens)
        mask = torch.full((tokens, tokens), -torch.inf, dtype=dtype).triu_(1).repeat(GROUPS, 1)[None, None]
        self.mask = mask if tokens > 1 else None
        self.full = torch.nn.functional.pad(mask, (keys - tokens, 0)) if tokens > 1 else None

    def ours(self) -> Side:
        """All layers by our kernel; the last's outputs."""
        return lambda: [narrow_attention(self.query, *layer, self.mask) for layer in self.layers][-1]

    def theirs(self) -> Side:
        """By torch's."""
        return lambda: [scaled_dot_product_attention(self.query, *layer, attn_mask=self.full) for layer in self.layers][
            -1
        ]

    def exact(self) -> Tensor:
        """In float64."""
        query, key, value = (each.double() for each in (self.query, *self.layers[-1]))
        mask = None if self.full is None else self.full.double()
        return scaled_dot_product_attention(query, key, value, attn_mask=mask)


def main() -> None:
    """Compare, time, and print the figures."""
    options = _options()
    if not load():
        raise SystemExit("there is nothing to measure: the kernel cannot be compiled here")
    figures: dict[str, float] = {}
    for short, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        errors, theirs_errors = [], []
        for keys in KEYS:
            medians = {}
            for tokens in TOKENS:
                case = Case(dtype, keys, tokens)
                ours, theirs, exact = case.ours(), case.theirs(), case.exact()
                errors.append(float((ours() - exact).abs().max()))
                theirs_errors.append(float((theirs() - exact).abs().max()))
                seconds = timed(ours, theirs, options.repeats, 1)
                found, name = speedup(seconds), f"speedup_{short}_{keys}_{tokens}"
                figures |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
                medians[tokens] = [statistics.median(column) for column in zip(*seconds, strict=True)]
                print(f"{short}, {keys} keys, {tokens} tokens: {found} times", flush=True)
            for side, end in enumerate(("", "_torch")):
                figures[f"cost_{short}_{keys}{end}"] = medians[5][side] / medians[1][side]
        figures |= {f"error_{short}": max(errors), f"error_{short}_torch": max(theirs_errors)}
    finish("narrow_attention", figures, {}, options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60, help="of both sides in turn")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--output", type=Path, help="write figures here, e.g. in benchmarks/results")
    options = parser.parse_args()
    if options.quick:
        options.repeats = 5
    return options


if __name__ == "__main__":
    main()
