"""KV dropping by draft lookahead beside SnapKV, StreamingLLM and random choice, on the reference pair.

    python benchmarks/kv_dropping.py --run runs/kv_dropping --output benchmarks/results/DATE-kv_dropping.json
    python benchmarks/kv_dropping.py --quick      short prompts, a few of them, under a minute; its figures say nothing

Quality: recall and facts at 2k to 8k tokens, greedy answers, exact or not. Each document is read once, densely; every
method and budget then chooses among the same keys and reads the answer in one batch (`drafttrain.context.study`). Only
groups that the dense target answers to 80 % count. `snapkv_gap_closed` is the share of the way from SnapKV to the dense
target that KV dropping goes at the largest budget where SnapKV loses 5 points or more; `points_from_dense` is what is
left there; `over_streaming`, `over_random` and so on are the least advantage at any budget. As in the decoder, what the
target accepts of the lookahead is emitted as it is; `..._unverified` leaves that out. `snapkv_wide` smooths its scores
over 13 tokens instead of 7. `free_tokens_L` is what is accepted of L.

Cost, 8k prompt, in processor time: `prefill_overhead` is draft pass and scoring over the dense prefill,
`draft_prefill_floor` the reading of the drafter alone; `kv_memory_ratio` is allocated bytes at a budget of 10 % over
those of the dense cache; `scoring_bytes_64k` is the most memory that scoring one layer of an 8B model over 64k tokens
held at once. `_low` and `_high` are 95 % intervals over documents, or the range of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from benchmarks.context import (  # noqa: E402
    PLAN,
    QUICK,
    Asked,
    asked,
    at_hand,
    compact,
    counted,
    figure_of,
    part_of,
    points,
    processor_time,
    recorded,
    share,
    spread,
)
from benchmarks.pair import reference_models  # noqa: E402
from drafttrain.context.ahead import DraftAhead  # noqa: E402
from drafttrain.context.budgets import Budget, Protected  # noqa: E402
from drafttrain.context.decoder import ApproximateDecoder  # noqa: E402
from drafttrain.context.dropping import KVDropping  # noqa: E402
from drafttrain.context.scorers import LastWindow, LookaheadAttention, Random, Recency, Scorer  # noqa: E402
from drafttrain.context.scoring import Looked  # noqa: E402
from drafttrain.context.study import Candidate, DensePass, Reader, draft_pass  # noqa: E402
from drafttrain.decoding.loop import Decoder  # noqa: E402
from drafttrain.evaluation.pair import Models  # noqa: E402
from drafttrain.evaluation.statistics import Interval  # noqa: E402
from drafttrain.ops.random import sample_id  # noqa: E402
from drafttrain.ops.sampling import Sampling  # noqa: E402

BUDGETS = (0.1, 0.4, 0.8)
LOOKAHEAD = 32
"""Most tokens; it ends at an end token. Chosen, as the mean over rows was, on prompts of other seeds."""

TIMED_LOOKAHEAD = 16
FREE = (4, 8, 16, 32)
WIDE = 13
"""A second width of smoothing for SnapKV: about a sentence, which suits these tasks."""

METHOD = "kv_dropping"
LEAST_LOSS = 5.0
"""Points that SnapKV loses at the budget that counts."""

TIMED = 8192
REPEATS = 3


class Way(NamedTuple):
    """How a method chooses, and whether what is accepted of its lookahead is emitted as it is."""

    scorer: Scorer
    ahead: int = 0
    verified: bool = False
    window: int = 0


METHODS = {
    METHOD: Way(LookaheadAttention(), LOOKAHEAD, verified=True),
    f"{METHOD}_unverified": Way(LookaheadAttention(), LOOKAHEAD),
    "snapkv": Way(LastWindow()),
    "snapkv_wide": Way(LastWindow(pool=WIDE)),
    "streaming": Way(Recency()),
    "random": Way(Random(), window=32),
}


def candidates() -> list[Candidate]:
    """Every method at every budget; all protect the same first tokens."""
    return [
        Candidate(name, way.scorer, Budget(kept), Protected(4, way.window), way.ahead, way.verified)
        for name, way in METHODS.items()
        for kept in BUDGETS
    ]


def column(name: str, budget: float) -> str:
    """Of a method at a budget in the rows."""
    return f"{name}@{budget:g}"


@torch.inference_mode()
def measure(readers: tuple[Reader, Reader], ends: frozenset[int], each: Asked) -> dict:
    """One prompt, all methods and budgets."""
    target, drafter = readers
    prompt = each.prompt.ids
    _, drafted = draft_pass(drafter, prompt, LOOKAHEAD, ends)
    dense = DensePass(target, prompt, drafted, each.answer, sample_id=sample_id(each.prompt.prompt_id, 0))
    tried = candidates()
    outcomes = {}
    for candidate, outcome in zip(tried, dense.compare(tried), strict=True):
        name = column(candidate.name, candidate.budget.amount)
        outcomes[name] = int(outcome.exact)
        outcomes |= {
            f"{kind}:{name}": round(value, 5)
            for kind, value in (("kl", outcome.kl), ("recall", outcome.recall), ("mass", outcome.mass))
        }
    outcomes |= {f"free_{length}": dense.accepted(length) for length in FREE}
    return {"dense": int(dense.outcome.exact), "outcomes": outcomes}


def quality(rows: list[dict]) -> dict[str, float]:
    """Figures over the rows of groups that the dense target can do."""
    rows = counted(rows)
    losing = [b for b in BUDGETS if points(rows, "dense", column("snapkv", b)).value >= LEAST_LOSS]
    budget = max(losing, default=min(BUDGETS))
    found = {"prompts": len(rows), "dense_exact": share(rows, "dense"), "budget": budget}
    for name, ending in ((METHOD, ""), (f"{METHOD}_unverified", "_unverified")):
        columns = ("dense", column("snapkv", budget), column(name, budget))
        found |= spread(f"snapkv_gap_closed{ending}", figure_of(rows, columns, gap_closed))
        found |= spread(f"points_from_dense{ending}", points(rows, "dense", column(name, budget)))
    for rival in ("snapkv", "snapkv_wide", "streaming", "random"):
        least = min((points(rows, column(METHOD, b), column(rival, b)) for b in BUDGETS), key=lambda own: own.value)
        found |= spread(f"over_{rival}", least)
    for length in FREE:
        own = figure_of(rows, (f"free_{length}",), lambda sums: sums[..., 0] / sums[..., 1])
        found |= spread(f"free_tokens_{length}", own)
    for name in METHODS:
        for b in BUDGETS:
            found[f"exact_{column(name, b)}"] = share(rows, column(name, b))
            for kind in ("kl", "recall", "mass"):
                found[f"{kind}_{column(name, b)}"] = share(rows, f"{kind}:{column(name, b)}")
    return found


def gap_closed(sums: np.ndarray) -> np.ndarray:
    """(method - SnapKV) / (dense - SnapKV)."""
    dense, snapkv, method = sums[..., 0], sums[..., 1], sums[..., 2]
    return (method - snapkv) / np.maximum(dense - snapkv, 1e-9)


# ---- cost ----


def cost(models: Models, length: int, repeats: int) -> dict[str, float]:
    """Overhead, split of the time to the first token, decoding speed, allocated memory; dense and dropped in turn."""
    target, drafter = models.engines()
    prompt = torch.randint(5, target.vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    greedy = Sampling(0.0)
    dense = Decoder(target, None, greedy)
    dropped = ApproximateDecoder(
        target, KVDropping(Budget(0.1)), ahead=DraftAhead(drafter, TIMED_LOOKAHEAD), sampling=greedy
    )
    overhead, floor, speed, parts = [], [], [], []
    for _ in range(repeats):
        [whole] = dense.generate([prompt], 33)
        [part] = dropped.generate([prompt], 33)
        split = dropped.split
        base = whole.counts.prefill_seconds
        overhead.append((split.draft_prefill + split.draft_decode + split.scoring) / base)
        floor.append(split.draft_prefill / base)
        speed.append(rate(part) / rate(whole))
        parts.append({**vars(split), "dense_prefill": base, "dense_tokens_per_second": rate(whole)})
    found = spread("prefill_overhead", middle(overhead)) | spread("draft_prefill_floor", middle(floor))
    found |= spread("decode_speed_ratio", middle(speed))
    found |= {f"seconds_{name}": statistics.median(own[name] for own in parts) for name in parts[0]}
    found["kv_memory_ratio"] = dropped._cache.memory_bytes() / dense._cache.memory_bytes()
    return found


def rate(completion) -> float:
    """Tokens a second after the prompt."""
    return completion.counts.tokens / completion.counts.decode_seconds


def middle(values: list[float]) -> Interval:
    """Median and range of repeats."""
    return Interval(statistics.median(values), min(values), max(values))


@torch.inference_mode()
def scoring_bytes(text: int, heads: int = 32, key_heads: int = 8, size: int = 128) -> int:
    """Most bytes that scoring one layer held at once beyond its queries and keys, in bfloat16."""
    scorer = LookaheadAttention()
    rows = scorer.window + TIMED_LOOKAHEAD
    query = torch.randn(heads, rows, size, dtype=torch.bfloat16)
    key = torch.randn(key_heads, text + TIMED_LOOKAHEAD, size, dtype=torch.bfloat16)
    positions = torch.arange(text + TIMED_LOOKAHEAD)
    looked = Looked(query, key, positions[-rows:], positions)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        scorer.score(0, looked, text, 0)
    live = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/kv_dropping"), help="folder of the rows; a run goes on")
    parser.add_argument("--quick", action="store_true", help="few short prompts, nothing kept")
    parser.add_argument("--part", default="0/1", help="of several processes that share the run, e.g. 0/2 and 1/2")
    parser.add_argument("--rows-at-hand", action="store_true", help="measure no further prompts")
    parser.add_argument("--rows-only", action="store_true", help="stop before the timed part")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    models = reference_models()
    readers = tuple(Reader(engine) for engine in models.engines())
    wanted = asked(models, QUICK if options.quick else PLAN)
    folder = None if options.quick else options.run
    wanted = part_of(wanted, options.part)
    if options.rows_at_hand:
        wanted = at_hand(folder, wanted)
    rows = recorded(folder, wanted, lambda each: measure(readers, models.ends, each))
    if options.rows_only:
        return
    with processor_time():
        spent = cost(models, 512 if options.quick else TIMED, 1 if options.quick else REPEATS)
    figures = quality(rows) | spent
    figures["scoring_bytes_64k"] = scoring_bytes(2048 if options.quick else 65536)
    finish("kv_dropping", figures, compact(rows), options.output)


if __name__ == "__main__":
    main()
