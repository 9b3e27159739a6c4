"""How far a LongSpec drafter is from its target, by the place in the text: do positions beyond the trained ones cost?

    python benchmarks/longspec_loss.py plain=runs/plain/drafter multi_gap=runs/multi_gap/drafter --output results.json
    python benchmarks/longspec_loss.py --quick     the committed drafter on short texts, a minute; it says nothing

Takes drafters of the reference target by name (default: the committed one) and reads held-out texts of the reference
world's stream with all of them, at plain positions, as when decoding. The picture beside the results shows the
divergence KL(target || drafter) in nats against the place in the text, in eight bins, bands being 95 % intervals over
texts; the length that drafters were trained at is a line where it is given (--trained).

loss_NAME           mean over all places, of the first drafted token (--step names another)
loss_end_NAME       in the last bin of places
loss_growth_NAME    last bin over the first one that lies behind the window
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.common import finish  # noqa: E402
from benchmarks.pair import CHECKPOINTS, HELD_OUT, stream  # noqa: E402
from drafttrain.config import TargetConfig  # noqa: E402
from drafttrain.errors import UserError, run_program  # noqa: E402
from drafttrain.evaluation.plots import STYLE, pyplot  # noqa: E402
from drafttrain.models.loading import AutoDrafter, Loaded, load_target, max_context  # noqa: E402
from drafttrain.models.longspec import LongSpecDrafter  # noqa: E402
from drafttrain.models.longspec_states import Reading, block_states, read_target  # noqa: E402

MIXTURE = {"code": 0.3, "recall": 0.4, "revise": 0.3}
BINS = 8
CHUNK = 1024
"""Tokens whose logits exist at one time."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676", "#56B4E9")
RESAMPLES = 1000


@run_program
def main() -> None:
    """Read, average, draw."""
    options = _options()
    target = load_target(TargetConfig(path=str(CHECKPOINTS / "reference-target"), dtype="bfloat16"))
    blocks = {name: AutoDrafter.from_pretrained(path, "bfloat16").eval() for name, path in options.drafters.items()}
    edges = np.linspace(0, options.length, BINS + 1)
    found: dict[str, list[list[float | None]]] = {name: [] for name in blocks}
    for number, (ids_1T, weights_T) in enumerate(texts(target, options)):
        readings: dict[int, Reading] = {}
        for name, block in blocks.items():
            layer = block.config.kv_layer
            if layer not in readings:
                readings[layer] = read_target(target.model, ids_1T, None, layer)
            losses_T = divergences(target, block, readings[layer], options.step)
            found[name].append(binned(losses_T, weights_T, edges))
        print(f"text {number + 1} of {options.texts}", flush=True)
    figures: dict[str, float] = {}
    window = max(block.config.window for block in blocks.values())
    for name, rows in found.items():
        figures |= summary(name, rows, edges, window)
    rows = {"edges": edges.tolist(), "step": options.step, "losses": found}
    finish("longspec_loss", figures, rows, options.output)
    if options.output is not None:
        draw(rows, options.trained, options.output.with_suffix(".png"))


def texts(target: Loaded, options: argparse.Namespace) -> list[tuple[Tensor, Tensor]]:
    """Token ids [1, T] of held-out texts, and the weight [T] of what each token predicts."""
    if options.length > max_context(target.model):
        raise UserError(f"--length {options.length} is beyond the {max_context(target.model)} tokens of the target.")
    blocks = stream(target, MIXTURE, options.length, options.length)
    made = []
    for number in range(options.texts):
        block = blocks[HELD_OUT + number]
        weights_T = torch.cat([block["weights"][0, 1:], torch.zeros(1)])
        made.append((block["input_ids"], weights_T))
    return made


@torch.inference_mode()
def divergences(target: Loaded, block: LongSpecDrafter, reading: Reading, step: int) -> Tensor:
    """KL(target || drafter) of the token behind every place, when it is drafted at a step of a round: [T], nats."""
    states_TH = block_states(block, reading, torch.tensor([step]))[0]
    parts = []
    for own, theirs in zip(states_TH.split(CHUNK), reading.hidden_BTH[0].split(CHUNK), strict=True):
        log_q, log_p = (target.model.lm_head(states).float().log_softmax(-1) for states in (own, theirs))
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)


def binned(losses_T: Tensor, weights_T: Tensor, edges: np.ndarray) -> list[float | None]:
    """Weighted mean of each bin of places; None where nothing counts."""
    found: list[float | None] = []
    for low, high in itertools.pairwise(edges.astype(int).tolist()):
        weights = weights_T[low:high].double()
        total = float(weights.sum())
        found.append(float((losses_T[low:high].double() * weights).sum()) / total if total else None)
    return found


def summary(name: str, rows: list[list[float | None]], edges: np.ndarray, window: int) -> dict[str, float]:
    """Figures of a drafter, with 95 % intervals over texts."""
    first = min(int(np.searchsorted(edges, window)), BINS - 2)
    every = [[value for value in row if value is not None] for row in rows]
    found = interval(f"loss_{name}", [statistics.mean(row) for row in every])
    ends = [(row[first], row[-1]) for row in rows if row[first] is not None and row[-1] is not None]
    if ends:
        found |= interval(f"loss_end_{name}", [end for _, end in ends])
        grown = statistics.mean(end for _, end in ends) / statistics.mean(start for start, _ in ends)
        found[f"loss_growth_{name}"] = grown
    return found


def interval(name: str, values: list[float]) -> dict[str, float]:
    """The mean, and the ends of its 95 % interval."""
    low, high = _interval(values)
    return {name: statistics.mean(values), f"{name}_low": low, f"{name}_high": high}


def _interval(values: list[float]) -> tuple[float, float]:
    draw = random.Random(0)
    means = [statistics.mean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    cuts = statistics.quantiles(means, n=40)
    return cuts[0], cuts[-1]


def draw(rows: dict[str, Any], trained: int | None, path: Path) -> None:
    """Loss against the place in the text.

    Args:
        rows: of the results: `edges`, `step`, `losses` by drafter, text and bin.
        trained: longest row of the training, or None.
        path: of the picture.
    """
    middles = [(low + high) / 2 for low, high in itertools.pairwise(rows["edges"])]
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 4))
        for (name, texts_), colour in zip(rows["losses"].items(), itertools.cycle(COLOURS)):
            columns = [[row[place] for row in texts_ if row[place] is not None] for place in range(len(middles))]
            there = [place for place, column in enumerate(columns) if column]
            at = [middles[place] for place in there]
            bands = [_interval(columns[place]) for place in there]
            axes.plot(at, [statistics.mean(columns[place]) for place in there], "o-", color=colour, label=name)
            axes.fill_between(at, *zip(*bands, strict=True), color=colour, alpha=0.15, linewidth=0)
        if trained is not None:
            axes.axvline(trained, color="#767676", linestyle="--", linewidth=1, label="longest trained row")
        axes.set(title=f"Token {rows['step']} of a round", xlabel="place in the text, tokens")
        axes.set_ylabel("KL(target || drafter), nats")
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(path)
        pyplot.close(figure)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafters", nargs="*", metavar="NAME=FOLDER", help="LongSpec drafters of the reference target")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text")
    parser.add_argument("--texts", type=int, default=24, help="held-out texts")
    parser.add_argument("--step", type=int, default=1, help="of the round at which tokens are drafted")
    parser.add_argument("--trained", type=int, help="longest row of the training, for the picture")
    parser.add_argument("--quick", action="store_true", help="few short texts")
    parser.add_argument("--output", type=Path, help="write figures and rows here, and a picture beside them")
    options = parser.parse_args()
    if options.quick:
        options.length, options.texts = 1024, 2
    named = [each.partition("=") for each in options.drafters]
    if wrong := [name for name, _, folder in named if not name.isidentifier() or not folder]:
        parser.error(f"{wrong[0]}: write NAME=FOLDER")
    options.drafters = {name: folder for name, _, folder in named} or {
        "reference": str(CHECKPOINTS / "reference-longspec")
    }
    return options


if __name__ == "__main__":
    main()
