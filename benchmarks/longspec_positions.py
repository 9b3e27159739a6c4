"""Do short rows train long contexts? LongSpec drafters trained at one length, decoding at eight times that length.

    python benchmarks/longspec_positions.py --seeds 2 --output results.json
    python benchmarks/longspec_positions.py --quick     a few steps, under a minute; its figures say nothing

Trains new drafters of the reference target at equal compute: the same rows of the reference world's stream (echoes,
recall, revise) in the same order, placed by each scheme of positions, and once without flash noisy
training (depth 1). Then the same held-out prompts are continued twice, as they are and behind filler that makes them
eight times as long as the rows of the training; the continuations that are counted are the target's, greedy.

tau_ratio_plain, _anchor_offset, _multi_gap   tau behind filler / tau as they are; mean over seeds
target_loss_delta      nats by which anchor-offset positions raise the target's own loss on the rows (share of 1)
noisy_gain             tau of drafters trained at every lag / tau of those trained at the first alone, as they are
tau_*                  tau as they are, by scheme
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import finish  # noqa: E402
from data_prep.corpus import train_modules  # noqa: E402
from drafttrain.config import BlockConfig, PositionsConfig, TargetConfig  # noqa: E402
from drafttrain.decoding.counts import Counts  # noqa: E402
from drafttrain.decoding.engine import Engine  # noqa: E402
from drafttrain.decoding.longspec import LongSpec  # noqa: E402
from drafttrain.decoding.loop import Decoder  # noqa: E402
from drafttrain.dialogue import end_tokens  # noqa: E402
from drafttrain.models.loading import Loaded, load_target, max_context  # noqa: E402
from drafttrain.models.longspec import LongSpecDrafter  # noqa: E402
from drafttrain.models.longspec_new import new_block  # noqa: E402
from drafttrain.models.longspec_states import read_target  # noqa: E402
from drafttrain.ops.sampling import Sampling  # noqa: E402
from drafttrain.recipe import StageConfig  # noqa: E402
from drafttrain.training.muon import MuonAdamW  # noqa: E402
from drafttrain.training.positions import Placing  # noqa: E402
from drafttrain.training.pretrain import longspec_loss, warmup_stable_decay  # noqa: E402
from drafttrain.training.pretrain_data import Blocks  # noqa: E402

DEPTH = 5
SCHEMES = {
    "plain": ("plain", DEPTH),
    "anchor_offset": ("anchor_offset", DEPTH),
    "multi_gap": ("multi_gap", DEPTH),
    "first_step": ("multi_gap", 1),
}
"""Positions and deepest lag of each training; the last one is multi_gap without flash noisy training."""

MIXTURE = {"echo": 0.5, "recall": 0.2, "revise": 0.3}
LONGER = 8
MODULES = 12
HELD_OUT = 10**6
"""Blocks from here on are for measuring."""


def main() -> None:
    """Train, decode, print."""
    options = _options()
    target = load_target(TargetConfig(path=str(ROOT / "checkpoints" / "reference-target"), dtype="bfloat16"))
    blocks = stream(target, options)
    rows = []
    for seed in range(options.seeds):
        for name, (kind, depth) in SCHEMES.items():
            placing = Placing.of(
                PositionsConfig(kind=kind, served=options.served), max_context(target.model), depth, seed
            )
            block = train(target, blocks, placing, seed, options)
            short, long = (tau(target, block, prompts_of(blocks, options, seed, filler)) for filler in (False, True))
            rows.append({"scheme": name, "seed": seed, "tau": short, "tau_longer": long, "ratio": long / short})
            print(rows[-1], flush=True)
    finish("longspec_positions", figures(rows) | loss_delta(target, blocks, options), rows, options.output)


def stream(target: Loaded, options: argparse.Namespace) -> Blocks:
    """Rows of one length, blocks of `tokens`."""
    stage = StageConfig(2 * HELD_OUT, options.tokens, {options.length: 1.0}, MIXTURE)
    text = "".join(itertools.islice((module.text for module in train_modules()), MODULES))  # where a task has no room
    code = np.array(target.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.uint16)
    return Blocks([stage], code, target.tokenizer, max_context(target.model))


def train(target: Loaded, blocks: Blocks, placing: Placing, seed: int, options: argparse.Namespace) -> LongSpecDrafter:
    """A drafter that has seen the first blocks of the stream (every seed others), in bfloat16."""
    block = new_block(target.model, BlockConfig(warm_start=-1, depth=placing.depth), torch.float32, seed)
    torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    optimizer = MuonAdamW(block.requires_grad_(True), options.learning_rate)
    steps = options.steps
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * warmup_stable_decay(step, steps // 20, steps // 2, steps)
        rows = blocks[seed * steps + step]
        with torch.autocast("cpu", torch.bfloat16):
            loss = longspec_loss(block, rows["input_ids"], rows["weights"], placing, step, target.model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return block.requires_grad_(False).bfloat16().eval()


def prompts_of(blocks: Blocks, options: argparse.Namespace, seed: int, filler: bool) -> list[list[int]]:
    """Beginnings of held-out rows; behind filler, rows of another part of the stream stand before them."""
    found = []
    for number in range(options.prompts):
        ids = blocks[HELD_OUT + seed * options.prompts + number]["input_ids"]
        text = ids[0, : options.length * 3 // 4].tolist()
        before: list[int] = []
        if filler:
            wanted = (LONGER - 1) * options.length
            more = [
                blocks[HELD_OUT + 50_000 + 100 * number + at]["input_ids"].flatten()
                for at in range(wanted // options.tokens + 1)
            ]
            before = torch.cat(more)[:wanted].tolist()
        found.append(before + text)
    return found


def tau(target: Loaded, block: LongSpecDrafter, prompts: list[list[int]]) -> float:
    """Tokens a round behind some prompts, all together."""
    vocabulary = 1 + max(target.tokenizer.get_vocab().values())
    ends = end_tokens(target.tokenizer, target.model.generation_config)
    decoder = Decoder(Engine(target.model, vocabulary), LongSpec(block, length=DEPTH), Sampling(0.0), ends)
    counts = sum((decoder.generate([prompt], 32)[0].counts for prompt in prompts), Counts())
    return counts.tau


@torch.no_grad()
def loss_delta(target: Loaded, blocks: Blocks, options: argparse.Namespace) -> dict[str, float]:
    """The target's loss on held-out rows under anchor-offset positions less that under plain ones."""
    placing = Placing.of(PositionsConfig(served=options.served), max_context(target.model), 1, 0)
    deltas = []
    for number in range(options.prompts):
        block = blocks[HELD_OUT + 90_000 + number]
        ids, weights = block["input_ids"], block["weights"][:, 1:]
        rows = torch.arange(len(ids))
        moved = placing.positions(torch.full_like(rows, ids.shape[1]), ids.shape[1], rows, number)
        losses = []
        for positions in (None, moved):
            hidden = read_target(target.model, ids, None, 0, positions).hidden_BTH[:, :-1]
            logits = target.model.lm_head(hidden).float().flatten(0, 1)
            each = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
            losses.append(float((each * weights.flatten()).sum() / weights.sum()))
        deltas.append(losses[1] - losses[0])
    return interval("target_loss_delta", deltas)


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds, with the least and greatest."""
    by_scheme = {name: [row for row in rows if row["scheme"] == name] for name in SCHEMES}
    found: dict[str, float] = {}
    for name in ("plain", "anchor_offset", "multi_gap"):
        found |= interval(f"tau_ratio_{name}", [row["ratio"] for row in by_scheme[name]])
        found |= interval(f"tau_{name}", [row["tau"] for row in by_scheme[name]])
    pairs = zip(by_scheme["multi_gap"], by_scheme["first_step"], strict=True)
    return found | interval("noisy_gain", [all_lags["tau"] / first["tau"] for all_lags, first in pairs])


def interval(name: str, values: list[float]) -> dict[str, float]:
    """Mean, least and greatest."""
    return {name: statistics.mean(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of every training")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--length", type=int, default=512, help="of a row of the training, in tokens")
    parser.add_argument("--served", type=int, default=8192, help="positions that rows are moved over")
    parser.add_argument("--learning-rate", type=float, default=0.003, help="at its peak")
    parser.add_argument("--prompts", type=int, default=24, help="continued at each length")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each scheme")
    parser.add_argument("--quick", action="store_true", help="a few steps of short rows")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.tokens, options.length, options.prompts, options.seeds = 6, 512, 128, 2, 1
    return options


if __name__ == "__main__":
    main()
