"""Losses compared at equal compute: the real tokens per round of the drafters they make.

    python benchmarks/distillation.py --config recipes/reference/pair.yaml --run runs/pair --output results.json
    python benchmarks/distillation.py --quick     a random pair of its own, under a minute; its figures say nothing

Needs the responses of a run. Every loss trains the same drafter on the same batches, once a seed (which orders the
batches and draws new weights), and is measured once at the end on the same held-out prompts. Compute is equal:
cross-entropy on the recorded tokens needs no forward of the target, so it gets as many more steps as that saves
(operations of both models, `equal_steps`). `tau_<loss>` is greedy, `tau_sampled_<loss>` at the responses' own sampling,
`acceptance_<loss>` the expected acceptance sum_x min(p, q), each the mean over seeds; `margin_<loss>` is the greedy tau
over that of cross-entropy with the same seed, averaged; `_low` and `_high` are the least and greatest of a seed. The
rows of single runs are in the file named by --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import finish

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from drafttrain.ops.sampling import Sampling
    from drafttrain.training.drafter_data import ResponseDataset
    from drafttrain.training.held_out import HeldOut

LOSSES: dict[str, dict[str, float]] = {
    "cross_entropy": {"cross_entropy": 1.0},
    "forward_kl": {"forward_kl": 1.0},
    "reverse_kl": {"reverse_kl": 1.0},
    "jensen_shannon": {"jensen_shannon": 1.0},
    "total_variation": {"total_variation": 1.0},
    "forward_kl_and_total_variation": {"forward_kl": 0.5, "total_variation": 1.0},
}


@dataclass
class Pair:
    """What every loss starts from."""

    target: PreTrainedModel
    drafter: Callable[[int], nn.Module]
    train: ResponseDataset
    held_out: HeldOut
    pad: int
    arguments: dict[str, Any]
    sampling: Sampling


def main() -> None:
    """Train every loss with every seed and print the means."""
    options = _options()
    pair = _random_pair() if options.quick else _pair_of_run(options)
    rows = []
    for seed in range(options.seeds):
        for name in options.losses:
            steps = equal_steps(pair, LOSSES[name], options.steps)
            rows.append({"loss": name, "seed": seed, "steps": steps, **run_once(pair, LOSSES[name], seed, steps)})
            print("  ".join(f"{key} {_short(value)}" for key, value in rows[-1].items()), flush=True)
    finish("distillation", figures(rows), rows, options.output)


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds with the least and greatest, and greedy tau against cross-entropy seed by seed."""
    by_seed: dict[str, list[float]] = {}
    base = {row["seed"]: row["tau"] for row in rows if row["loss"] == "cross_entropy"}
    for name in dict.fromkeys(row["loss"] for row in rows):
        mine = [row for row in rows if row["loss"] == name]
        for figure in ("tau", "tau_sampled", "acceptance"):
            by_seed[f"{figure}_{name}"] = [row[figure] for row in mine]
        if base and name != "cross_entropy":
            by_seed[f"margin_{name}"] = [row["tau"] / base[row["seed"]] for row in mine]
    found: dict[str, float] = {}
    for figure, values in by_seed.items():
        found |= {figure: statistics.mean(values), f"{figure}_low": min(values), f"{figure}_high": max(values)}
    return found


def equal_steps(pair: Pair, weights: dict[str, float], steps: int) -> int:
    """Steps that cost as many operations as `steps` of a loss that asks the target.

    A forward is 2 operations a weight and token, forward and backward together 6; the head runs on trained tokens only.
    """
    if set(weights) != {"cross_entropy"}:
        return steps
    share = pair.train.tokens / sum(pair.train.lengths)
    target, drafter = (_operations(model, share) for model in (pair.target, pair.drafter(0)))
    return round(steps * (2 * target + 6 * drafter) / (6 * drafter))


def _operations(model: nn.Module, share: float) -> float:
    """Weights that a token meets: those of the layers, and the head's for the trained share of the tokens."""
    ends = {id(weight): weight.numel() for weight in (_head(model), model.get_input_embeddings().weight)}
    layers = sum(weight.numel() for weight in model.parameters()) - sum(ends.values())
    return layers + share * _head(model).numel()


def _head(model: nn.Module) -> Tensor:
    return model.get_output_embeddings().weight


def run_once(pair: Pair, weights: dict[str, float], seed: int, steps: int) -> dict[str, float]:
    """Train one drafter and measure it."""
    from drafttrain.training.arguments import training_arguments
    from drafttrain.training.drafter_data import Collator, Epochs
    from drafttrain.training.drafter_program import global_batch
    from drafttrain.training.drafter_trainer import DEFAULTS, FIXED, Distillation, DrafterTrainer
    from drafttrain.training.losses import mixed

    with tempfile.TemporaryDirectory() as folder:
        settings = {**pair.arguments, "max_steps": steps, "save_strategy": "no", "disable_tqdm": True}
        settings |= {"logging_steps": max(1, steps)}
        arguments = training_arguments(settings, folder, "training", DEFAULTS, **FIXED, seed=seed)
        trainer = DrafterTrainer(
            pair.drafter(seed),
            pair.target,
            arguments,
            Distillation(mixed(weights), 1.0, 256, pair.held_out.vocabulary, evaluations=0),
            Epochs(pair.train, seed, global_batch(arguments)),
            Collator(pair.pad),
            Path(folder),
            pair.held_out,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        measured = trainer.evaluate()
        sampled = dataclasses.replace(pair.held_out, sampling=pair.sampling).decode(trainer.target, trainer.replica)
    return {
        "tau": measured["eval_tau"],
        "tau_sampled": sampled.tau,
        "acceptance": measured["eval_expected_acceptance"],
        "acceptance_rate": measured["eval_acceptance_rate"],
        "loss_value": measured["eval_loss"],
        "seconds": seconds,
    }


def _pair_of_run(options: argparse.Namespace) -> Pair:
    from drafttrain.config import parse
    from drafttrain.evaluation.names import sampling_of
    from drafttrain.models.drafters import build_drafter
    from drafttrain.training.drafter_program import read_inputs
    from drafttrain.training.held_out import HeldOut

    parsed = parse("", ["target", "drafter", "training"], ["--config", options.config, "--run", options.run])
    inputs, recipe = read_inputs(parsed), parsed.recipe
    return Pair(
        target=inputs.target.model,
        drafter=lambda seed: build_drafter(recipe.drafter, inputs.target, seed),
        train=inputs.train,
        held_out=HeldOut.of(
            inputs.tune, options.prompts, recipe.training.tau_length, inputs.vocabulary, inputs.ends, inputs.context
        ),
        pad=inputs.target.tokenizer.pad_token_id,
        arguments=recipe.training.arguments,
        sampling=sampling_of(recipe.responses.sampling),
    )


def _random_pair() -> Pair:
    """A target of random weights that answers random prompts: real text for a drafter to predict, of no use."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from drafttrain.decoding.engine import Engine
    from drafttrain.decoding.loop import Decoder
    from drafttrain.ops.sampling import Sampling
    from drafttrain.training.drafter_data import ResponseDataset
    from drafttrain.training.held_out import HeldOut

    def llama(layers: int, seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=layers, initializer_range=0.3)).eval()

    target = llama(2, seed=0).requires_grad_(False)
    prompts = torch.randint(3, 64, (96, 6), generator=torch.Generator().manual_seed(0)).tolist()
    answers = Decoder(Engine(target), eos_ids={2}).generate(prompts, 24)
    rows = [{"prompt_ids": p, "response_ids": a.token_ids} for p, a in zip(prompts, answers, strict=True)]
    train, tune = ResponseDataset(rows[:80], 64), ResponseDataset(rows[80:], 64)
    return Pair(
        target=target,
        drafter=lambda seed: llama(1, seed + 1),
        train=train,
        held_out=HeldOut.of(tune, 16, 4, 64, {2}, 64),
        pad=0,
        arguments={"per_device_train_batch_size": 8, "learning_rate": 3e-3},
        sampling=Sampling(),
    )


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="recipe of the pair")
    parser.add_argument("--run", help="run folder with its responses")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of every loss")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts that tau is measured on")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="which losses")
    parser.add_argument("--output", type=Path, help="file for the rows of all trainings")
    parser.add_argument("--quick", action="store_true", help="a random pair in under a minute")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds = 20, 1
    elif not (options.config and options.run):
        parser.error("give --config and --run, or --quick")
    return options


if __name__ == "__main__":
    main()
