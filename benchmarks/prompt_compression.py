"""Prompt compression by draft attention beside whole chunks (SpecPrefill's way) and the last window, reference pair.

    python benchmarks/prompt_compression.py --run runs/prompt_compression --output benchmarks/results/DATE-....json
    python benchmarks/prompt_compression.py --quick      short prompts, a few of them; its figures say nothing

Quality: the prompts of `kv_dropping.py`, greedy answers, exact or not; each is drafted over once, and every method has
the target read its own 25 % of the tokens. All protect the same first and last tokens. `points_over_chunked_25` and
`points_over_window_25` are differences in points over the groups that the dense target answers to 80 %, as the rows of
kv_dropping.py (`--dense`) say, else over all prompts. Cost, 8k prompt, in turn, in processor time: `ttft_ratio_25` is
the time to the first token with compression over the dense one, `break_even_tokens_25` the length from which on it is
shorter, by measured costs of reading, drafting ahead and scores (-1: none). `_low` and `_high` are 95 % intervals over
documents, or the range of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from benchmarks.context import (  # noqa: E402
    LONG_TASKS,
    QUICK,
    Asked,
    Size,
    asked,
    at_hand,
    compact,
    counted,
    points,
    processor_time,
    recorded,
    share,
    spread,
)
from benchmarks.kv_dropping import middle  # noqa: E402
from benchmarks.pair import reference_models  # noqa: E402
from drafttrain.context.ahead import DraftAhead  # noqa: E402
from drafttrain.context.budgets import Budget, Protected  # noqa: E402
from drafttrain.context.compression import (  # noqa: E402
    ChunkAttention,
    DraftAttention,
    PromptCompression,
    WindowAttention,
)
from drafttrain.context.decoder import ApproximateDecoder  # noqa: E402
from drafttrain.context.study import Reader, choices, compressed_outcome, draft_pass  # noqa: E402
from drafttrain.context.timing import compression_cost  # noqa: E402
from drafttrain.decoding.engine import Engine  # noqa: E402
from drafttrain.decoding.loop import Decoder  # noqa: E402
from drafttrain.evaluation.pair import Models  # noqa: E402
from drafttrain.ops.sampling import Sampling  # noqa: E402

SHARE = 0.25
METHOD = "draft_attention"
PUBLISHED = "draft_attention_published"
"""With the published widths, 32 tokens; ours were chosen on prompts of other seeds."""

LOOKAHEAD = 8
"""Draft steps of the chunked rival, SpecPrefill's most; draft attention looks at the prompt alone, as published."""

PLAN = {4096: Size(1, 8), 8192: Size(1, 8, LONG_TASKS), 2048: Size(4, 8)}
"""A part of the documents of kv_dropping.py."""

TIMED = 8192
REPEATS = 3


def methods(budget: float = SHARE) -> dict[str, PromptCompression]:
    """By name; SpecPrefill keeps original positions."""
    kept, protect = Budget(budget), Protected(4, 64)
    return {
        METHOD: PromptCompression(kept, DraftAttention(), "compact", protect),
        PUBLISHED: PromptCompression(kept, DraftAttention(pool=32, neighbours=32), "compact", protect),
        "chunked": PromptCompression(kept, ChunkAttention(), "original", protect),
        "window": PromptCompression(kept, WindowAttention(), "compact", protect),
    }


@torch.inference_mode()
def measure(target: Engine, drafter: Reader, ends: frozenset[int], each: Asked) -> dict:
    """One prompt, all methods."""
    prompt, tried = each.prompt.ids, methods()
    watch, _ = draft_pass(drafter, prompt, LOOKAHEAD, ends)
    chosen = choices(watch, tried, prompt, {"chunked": LOOKAHEAD - 1})
    outcomes: dict[str, int] = {}
    for name, method in tried.items():
        outcome = compressed_outcome(target, prompt, chosen[name], each.answer, method.positions)
        outcomes[name] = int(outcome.exact)
    return {"outcomes": outcomes}


def quality(rows: list[dict], dense: dict[str, int]) -> dict[str, float]:
    """Figures over prompts whose group the dense target can do."""
    if dense:
        rows = counted([{**row, "dense": dense[row["id"]]} for row in rows if row["id"] in dense])
    found: dict[str, float] = {"prompts": len(rows)}
    if dense:
        found |= {"dense_exact": share(rows, "dense")} | spread("points_from_dense_25", points(rows, "dense", METHOD))
    for rival in ("chunked", "window"):
        found |= spread(f"points_over_{rival}_25", points(rows, METHOD, rival))
        found |= spread(f"published_points_over_{rival}_25", points(rows, PUBLISHED, rival))
    return found | {f"exact_{name}_25": share(rows, name) for name in methods()}


def cost(models: Models, length: int, repeats: int) -> dict[str, float]:
    """Time to the first token, dense and compressed in turn, and the break-even length."""
    target, drafter = models.engines()
    prompt = torch.randint(5, target.vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    greedy = Sampling(0.0)
    dense = Decoder(target, None, greedy)
    method, ahead = methods()[METHOD], DraftAhead(drafter, 1)
    cut = ApproximateDecoder(target, compression=method, ahead=ahead, sampling=greedy)
    ratios, parts = [], []
    for _ in range(repeats):
        whole, part = (first_token(decoder, prompt) for decoder in (dense, cut))
        ratios.append(part / whole)
        parts.append({**vars(cut.split), "dense": whole, "compressed": part})
    found = spread("ttft_ratio_25", middle(ratios))
    found |= {f"seconds_{name}": statistics.median(own[name] for own in parts) for name in parts[0]}
    costs = compression_cost(target, method, ahead, [length // 16, length // 8, length // 2], repeats)
    shortest = costs.break_even(SHARE, int(method.protected(prompt).sum()))
    return found | {"break_even_tokens_25": -1 if shortest is None else shortest}


def first_token(decoder: Decoder, prompt: list[int]) -> float:
    """Seconds until it is there."""
    [completion] = decoder.generate([prompt], 1)
    return completion.counts.prefill_seconds + completion.counts.decode_seconds


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/prompt_compression"), help="folder of the rows")
    parser.add_argument("--dense", type=Path, default=Path("runs/kv_dropping/rows.jsonl"), help="what dense answers")
    parser.add_argument("--quick", action="store_true", help="few short prompts, nothing kept")
    parser.add_argument("--rows-at-hand", action="store_true", help="measure no further prompts")
    parser.add_argument("--rows-only", action="store_true", help="stop before the timed part")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    models = reference_models()
    target, drafter = models.engines()
    reader = Reader(drafter)
    wanted = asked(models, QUICK if options.quick else PLAN)
    folder = None if options.quick else options.run
    if options.rows_at_hand:
        wanted = at_hand(folder, wanted)
    rows = recorded(folder, wanted, lambda each: measure(target, reader, models.ends, each))
    if options.rows_only:
        return
    dense = {}
    if options.dense.exists() and not options.quick:
        lines = options.dense.read_text(encoding="utf-8").splitlines()
        dense = {row["id"]: row["dense"] for row in map(json.loads, lines)}
    with processor_time():
        spent = cost(models, *((512, 1) if options.quick else (TIMED, REPEATS)))
    figures = quality(rows, dense) | spent
    finish("prompt_compression", figures, compact(rows), options.output)


if __name__ == "__main__":
    main()
