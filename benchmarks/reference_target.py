"""What the reference target can do: held-out tasks by length, and held-out code loss.

    python benchmarks/reference_target.py                       the committed target, about ten minutes on two cores
    python benchmarks/reference_target.py --quick               under a minute
    python benchmarks/reference_target.py --target DIR          another folder

Answers are judged by greedy decoding (evaluation/answers.py), in the dtype the target is served in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LENGTHS = {8192: 16, 4096: 24, 2048: 40, 512: 40}
"""Length in tokens -> answers asked of every kind."""

QUICK = {512: 4}

PASSAGE = 165
"""Tokens of instruction, passage and answer of *revise*, at which a passage has 50 to 80."""


def main() -> None:
    """Measure every kind at every length and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(ROOT / "checkpoints" / "reference-target"))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="write figures and rows here, e.g. in benchmarks/results")
    arguments = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.common import finish

    model = AutoModelForCausalLM.from_pretrained(arguments.target, dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.target)
    lengths = QUICK if arguments.quick else LENGTHS
    rows = []
    for length, answers in lengths.items():
        for row in task_rows(model, tokenizer, length, answers):
            print("{kind:32s} {length:5d}  exact {exact:6.1%}  tokens {tokens:6.1%}".format(**row), flush=True)
            rows.append(row)
    losses = code_losses(model, tokenizer, list(lengths))
    print("  ".join(f"code@{length}: {loss:.3f} nats" for length, loss in losses.items()))
    figures = summary(rows) | {f"code_loss_{length}": loss for length, loss in losses.items()}
    finish("reference_target", figures, rows, arguments.output)


def task_rows(model, tokenizer, length: int, answers: int) -> Iterator[dict]:
    """Exact and token shares of every kind at one length; *revise* is measured on passages up to 80 tokens, at 512."""
    from drafttrain.evaluation.answers import answer_examples, held_out_examples
    from drafttrain.evaluation.tasks import KINDS

    for kind in KINDS:
        size = PASSAGE if kind.startswith("revise") else length
        if size != length and length != min(LENGTHS):
            continue  # a passage is short whatever the context
        result = answer_examples(model, tokenizer, held_out_examples(kind, size, answers, tokenizer))
        yield {"kind": kind, "length": size, "exact": result.exact_share, "tokens": result.token_share}


def code_losses(model, tokenizer, lengths: list[int]) -> dict[int, float]:
    """Held-out code loss in nats a token, by context length, over the same 32k tokens."""
    import torch

    from data_prep.corpus import held_out_modules
    from drafttrain.evaluation.answers import code_loss

    texts = [module.text for module in held_out_modules()]
    ids = [token for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in row]
    tokens = torch.tensor(ids)
    return {length: code_loss(model, tokens, length, max(1, 32768 // length)) for length in lengths}


def summary(rows: list[dict]) -> dict[str, float]:
    """Mean exact share of each task by length; for *revise* the share of tokens too."""
    figures: dict[str, float] = {}
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["kind"].split("/")[0], row["length"]), []).append(row)
    for (task, length), members in groups.items():
        figures[f"{task}_exact_{length}"] = sum(row["exact"] for row in members) / len(members)
        if task == "revise":
            figures[f"{task}_tokens_{length}"] = sum(row["tokens"] for row in members) / len(members)
    return figures


if __name__ == "__main__":
    main()
