"""Do short rows train long contexts, and what else helps? Short trainings of LongSpec drafters, unlike in one thing.

    python benchmarks/longspec_positions.py --seeds 2 --output results.json      half an hour on a core
    python benchmarks/longspec_positions.py --variants multi_gap first_step --seeds 4     some of the trainings
    python benchmarks/longspec_positions.py --quick     a few steps, under a minute; its figures say nothing

New drafters of the reference target, all with the same steps on the same rows of the reference world's stream: each
scheme of positions, without flash noisy training (depth 1), with the stream's own tokens for labels in place of the
target's distribution, reading another layer, and not started as a block that copies. Then held-out prompts are
continued, as they are and behind filler that makes them eight times as long as the rows of the training; the same
prompts for all, greedy. Filler leads the target elsewhere now and then, to texts that are easier or harder to draft: so
each prompt is continued as far as both continuations are the same text, and left out where they part at once.

tau_ratio_plain, _anchor_offset, _multi_gap   tau behind filler / tau as they are; mean over seeds
tau_NAME, tau_longer_NAME   tokens a round as they are, and behind filler
target_loss_delta      nats by which anchor-offset positions raise the target's own loss on what is learnt of the rows,
                       weighted as in the training; `_TASK` by task, _settling_0 with what follows a jump, _anchors_4
                       with the paper's four anchors
noisy_gain             tau of multi_gap / tau of first_step, drafting DEPTH tokens
gain_NAME              tau of multi_gap / tau of NAME, which differs from it in one thing
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import finish  # noqa: E402
from benchmarks.pair import HELD_OUT, stream  # noqa: E402
from drafttrain.config import BlockConfig, PositionsConfig, TargetConfig  # noqa: E402
from drafttrain.decoding.counts import Counts  # noqa: E402
from drafttrain.decoding.engine import Engine  # noqa: E402
from drafttrain.decoding.longspec import LongSpec  # noqa: E402
from drafttrain.decoding.loop import Decoder  # noqa: E402
from drafttrain.dialogue import end_tokens  # noqa: E402
from drafttrain.errors import UserError, run_program  # noqa: E402
from drafttrain.models.loading import Loaded, load_target, max_context  # noqa: E402
from drafttrain.models.longspec import LongSpecDrafter  # noqa: E402
from drafttrain.models.longspec_copying import rows_for, start_copying  # noqa: E402
from drafttrain.models.longspec_new import new_block  # noqa: E402
from drafttrain.models.longspec_states import Reading, block_states, read_target  # noqa: E402
from drafttrain.ops.sampling import Sampling  # noqa: E402
from drafttrain.training.muon import MuonAdamW  # noqa: E402
from drafttrain.training.positions import Placing  # noqa: E402
from drafttrain.training.pretrain import label_loss, teacher_loss, warmup_stable_decay  # noqa: E402
from drafttrain.training.pretrain_data import Blocks  # noqa: E402

DEPTH = 5
MIXTURE = {"code": 0.3, "recall": 0.3, "revise": 0.4}
LONGER = 8
MOST = 48
"""Tokens of a continuation."""


@dataclass(frozen=True)
class Variant:
    """One training.

    Attributes:
        kind: of positions.
        depth: deepest lag; 1 is without flash noisy training.
        labels: the stream's tokens are learnt, not the target's distribution.
        layer: of the target, whose keys and values are read.
        copying: starts as a block that copies.
    """

    kind: str = "multi_gap"
    depth: int = DEPTH
    labels: bool = False
    layer: int = -1
    copying: bool = True


VARIANTS = {
    "plain": Variant("plain"),
    "anchor_offset": Variant("anchor_offset"),
    "multi_gap": Variant(),
    "first_step": Variant(depth=1),
    "labels": Variant(labels=True),
    "layer_before": Variant(layer=-2),
    "not_copying": Variant(copying=False),
}


@run_program
def main() -> None:
    """Train, decode, print."""
    options = _options()
    target = load_target(TargetConfig(path=str(ROOT / "checkpoints" / "reference-target"), dtype="bfloat16"))
    blocks = stream(target, MIXTURE, options.tokens, options.length)
    asked = continued(target, blocks, options)
    rows = []
    for seed in range(options.seeds):
        for name, block in trained(target, blocks, seed, options):
            short, long = (tau(target, block, prompts, asked.limits) for prompts in (asked.short, asked.long))
            rows.append({"variant": name, "seed": seed, "tau": short, "tau_longer": long, "ratio": long / short})
            print(rows[-1], flush=True)
            if options.save is not None and seed == 0:
                block.save_pretrained(options.save / name)
    found = figures(rows) | loss_deltas(target, options) | {"continued_tokens": sum(asked.limits)}
    finish("longspec_positions", found, rows, options.output)


Trained = list[tuple[str, LongSpecDrafter]]


def trained(target: Loaded, blocks: Blocks, seed: int, options: argparse.Namespace) -> Trained:
    """Every variant, in bfloat16; those of the same positions and layer learn side by side from one reading."""
    found = []
    placed = lambda name: (VARIANTS[name].kind, VARIANTS[name].layer)  # noqa: E731
    for _, names in itertools.groupby(sorted(options.variants, key=placed), placed):
        found += side_by_side(target, blocks, list(names), seed, options)
    return found


def side_by_side(
    target: Loaded, blocks: Blocks, names: Sequence[str], seed: int, options: argparse.Namespace
) -> Trained:
    """Drafters that have seen the first rows of the stream, every seed others."""
    first = seed * options.steps
    learners = {name: Learner(target, VARIANTS[name], blocks, first, seed, options) for name in names}
    own = next(iter(learners.values()))
    for step in range(options.steps):
        rows = blocks[first + step]
        positions = own.placing.positions(*_shape(rows["input_ids"]), step)
        with torch.autocast("cpu", torch.bfloat16):
            reading = read_target(target.model, rows["input_ids"], None, own.block.config.kv_layer, positions)
            for learner in learners.values():
                learner.learn(reading, rows, step)
    return [(name, learner.block.requires_grad_(False).bfloat16().eval()) for name, learner in learners.items()]


class Learner:
    """A drafter and its optimizer."""

    def __init__(
        self, target: Loaded, variant: Variant, blocks: Blocks, first: int, seed: int, options: argparse.Namespace
    ) -> None:
        self.head, self.variant, self.options = target.model.lm_head.weight, variant, options
        positions = PositionsConfig(kind=variant.kind, anchors=options.anchors, served=options.served)
        self.placing = Placing.of(positions, max_context(target.model), variant.depth, seed)
        layer = variant.layer + target.model.config.num_hidden_layers
        wishes = BlockConfig(warm_start=-1, kv_layer=layer, depth=variant.depth)
        self.block = new_block(target.model, wishes, torch.float32, seed)
        if variant.copying:
            texts = (row for number in itertools.count(first) for row in blocks[number]["input_ids"].tolist())
            start_copying(self.block, target.model, rows_for(itertools.islice(texts, options.fitted)))
        else:
            torch.nn.init.zeros_(self.block.self_attn.o_proj.weight)
        self.optimizer = MuonAdamW(self.block.requires_grad_(True), options.learning_rate)

    def learn(self, reading: Reading, rows: dict[str, Tensor], step: int) -> None:
        """A step."""
        steps = self.options.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * warmup_stable_decay(step, steps // 20, steps // 2, steps)
        ids_BT = rows["input_ids"]
        lags_B = self.placing.lags(torch.arange(len(ids_BT)), step)
        states = block_states(self.block, reading, lags_B)[:, :-1].flatten(0, 1)
        weights = self.placing.taught(rows["weights"][:, 1:], lags_B, reading.positions_BT[:, :-1]).flatten()
        if self.variant.labels:
            loss = label_loss(self.head, states, weights, ids_BT[:, 1:].flatten())
        else:
            taught = reading.hidden_BTH[:, :-1].flatten(0, 1)
            loss = teacher_loss(self.head, states, weights, self.head, taught)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True)
class Asked:
    """Prompts as they are and behind filler, and how many tokens of their continuations are the same."""

    short: list[list[int]]
    long: list[list[int]]
    limits: list[int]


def continued(target: Loaded, blocks: Blocks, options: argparse.Namespace) -> Asked:
    """The prompts that filler does not lead elsewhere at once."""
    pairs = [prompts_of(blocks, options, filler) for filler in (False, True)]
    alone = decoder(target, None)
    answers = [[alone.generate([prompt], MOST)[0].token_ids for prompt in prompts] for prompts in pairs]
    same = [_alike(*pair) for pair in zip(*answers, strict=True)]
    kept = [place for place, count in enumerate(same) if count >= options.least]
    print(
        f"{len(kept)} of {len(same)} prompts go on alike behind filler, {sum(same[at] for at in kept)} tokens",
        flush=True,
    )
    if not kept:
        raise UserError("no prompt goes on alike behind filler; take more --prompts.")
    return Asked(*([prompts[at] for at in kept] for prompts in pairs), [same[at] for at in kept])


def _alike(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def prompts_of(blocks: Blocks, options: argparse.Namespace, filler: bool) -> list[list[int]]:
    """Beginnings of held-out rows; behind filler, rows of another part of the stream stand before them."""
    found = []
    for number in range(options.prompts):
        text = blocks[HELD_OUT + number]["input_ids"][0, : options.length * 3 // 4].tolist()
        before: list[int] = []
        if filler:
            wanted = (LONGER - 1) * options.length
            places = range(HELD_OUT + 50_000 + 100 * number, HELD_OUT + 50_000 + 100 * (number + 1))
            more = (token for place in places for token in blocks[place]["input_ids"].flatten().tolist())
            before = list(itertools.islice(more, wanted))
        found.append(before + text)
    return found


def tau(target: Loaded, block: LongSpecDrafter, prompts: list[list[int]], limits: list[int]) -> float:
    """Tokens a round behind some prompts, all together."""
    found = decoder(target, LongSpec(block, length=DEPTH))
    answers = (found.generate([prompt], limit)[0] for prompt, limit in zip(prompts, limits, strict=True))
    return sum((each.counts for each in answers), Counts()).tau


def decoder(target: Loaded, drafter: LongSpec | None) -> Decoder:
    """Greedy."""
    vocabulary = 1 + max(target.tokenizer.get_vocab().values())
    ends = end_tokens(target.tokenizer, target.model.generation_config)
    return Decoder(Engine(target.model, vocabulary), drafter, Sampling(0.0), ends)


@torch.no_grad()
def loss_deltas(target: Loaded, options: argparse.Namespace) -> dict[str, float]:
    """The target's loss on held-out rows under anchor-offset positions less that under plain ones."""
    found: dict[str, float] = {}
    mixed = stream(target, MIXTURE, options.tokens, options.length)
    found |= interval("target_loss_delta", _loss_delta(target, mixed, options))
    for name, wish in (("settling_0", {"settling": 0}), ("anchors_4", {"anchors": 4})):
        found[f"target_loss_delta_{name}"] = statistics.mean(_loss_delta(target, mixed, options, **wish))
    for task in MIXTURE:
        alone = stream(target, {task: 1.0}, options.tokens, options.length)
        deltas = _loss_delta(target, alone, options)
        found[f"target_loss_delta_{task}"] = statistics.mean(deltas)
    return found


def _loss_delta(target: Loaded, blocks: Blocks, options: argparse.Namespace, **wishes: int) -> list[float]:
    """Of every block."""
    positions = PositionsConfig(**{"served": options.served, "anchors": options.anchors} | wishes)
    placing = Placing.of(positions, max_context(target.model), 1, 0)
    deltas = []
    for number in range(2 * options.prompts):
        block = blocks[HELD_OUT + 90_000 + number]
        ids = block["input_ids"]
        placed = placing.positions(*_shape(ids), number)
        weights = placing.taught(block["weights"][:, 1:], torch.zeros_like(ids[:, 0]), placed[:, :-1])
        losses = []
        for positions in (None, placed):
            hidden = read_target(target.model, ids, None, 0, positions).hidden_BTH[:, :-1]
            logits = target.model.lm_head(hidden).float().flatten(0, 1)
            each = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
            losses.append(float((each * weights.flatten()).sum() / weights.sum()))
        deltas.append(losses[1] - losses[0])
    return deltas


def _shape(ids_BT: Tensor) -> tuple[Tensor, int, Tensor]:
    """What positions are drawn for: lengths, width, sample ids."""
    rows = torch.arange(len(ids_BT))
    return torch.full_like(rows, ids_BT.shape[1]), ids_BT.shape[1], rows


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds, with the least and greatest."""
    own = {name: [row for row in rows if row["variant"] == name] for name in VARIANTS}
    own = {name: trainings for name, trainings in own.items() if trainings}
    found: dict[str, float] = {}
    for name, trainings in own.items():
        found |= interval(f"tau_{name}", [row["tau"] for row in trainings])
        found |= interval(f"tau_longer_{name}", [row["tau_longer"] for row in trainings])
        found |= interval(f"tau_ratio_{name}", [row["ratio"] for row in trainings])
        if VARIANTS[name].kind == "multi_gap" and name != "multi_gap" and "multi_gap" in own:
            pairs = zip(own["multi_gap"], trainings, strict=True)
            gain = "noisy_gain" if name == "first_step" else f"gain_{name}"
            found |= interval(gain, [row["tau"] / other["tau"] for row, other in pairs])
    return found


def interval(name: str, values: list[float]) -> dict[str, float]:
    """Mean, least and greatest."""
    return {name: statistics.mean(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of every training")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--length", type=int, default=512, help="of a row of the training, in tokens")
    parser.add_argument("--served", type=int, default=8192, help="positions that rows are moved over")
    parser.add_argument("--anchors", type=int, default=1, help="tokens that keep their places")
    parser.add_argument("--learning-rate", type=float, default=0.001, help="at its peak")
    parser.add_argument("--prompts", type=int, default=24, help="continued at each length")
    parser.add_argument("--least", type=int, default=8, help="tokens that a continuation has behind filler, too")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="that are trained")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each variant")
    parser.add_argument("--save", type=Path, help="keep the first seed's drafters here, for longspec_loss.py")
    parser.add_argument("--quick", action="store_true", help="a few steps of short rows")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    options = parser.parse_args()
    options.fitted = None
    if options.quick:
        options.least = 1
        options.steps, options.tokens, options.length, options.prompts, options.seeds = 2, 512, 128, 6, 1
        options.fitted = 8
    return options


if __name__ == "__main__":
    main()
