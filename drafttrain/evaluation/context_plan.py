"""`drafttrain evaluate --plan` for long prompts: what would run, how long about, and what would fail later."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from drafttrain.config import Parsed
from drafttrain.context.budgets import Budget
from drafttrain.evaluation.context_methods import METHODS, Methods, lookaheads, prompts_of
from drafttrain.evaluation.long_prompts import LongPrompt
from drafttrain.evaluation.pair import speed_dtype
from drafttrain.models.drafters import without_storage
from drafttrain.models.loading import DTYPES, default_device, load_model_config, load_tokenizer
from drafttrain.run_folder import RunFolder

LAYER_SECONDS = 3e-4
"""Of one layer in a step of decoding, roughly: a small model's on a CPU, a large one's on a GPU."""


def context_plan(parsed: Parsed, drafter: str, context: int) -> list[str]:
    """Lines to print. Loads no weights.

    Args:
        parsed: the recipe.
        drafter: its path.
        context: tokens that the pair can read and write together.

    Raises:
        UserError: whatever would stop the run, budgets that do not hold what is protected among it.
    """
    recipe, config = parsed.recipe, parsed.recipe.context
    source = recipe.target
    tokenizer = load_tokenizer(source.path, source.revision, source.trust_remote_code)
    models = [
        load_model_config(source.path, source.revision, source.trust_remote_code).get_text_config(),
        load_model_config(drafter, None, source.trust_remote_code).get_text_config(),
    ]
    methods = Methods(config, tokenizer)
    groups = list(prompts_of(config, tokenizer, context))
    for _, prompts in groups:
        methods.check(prompts, models[0].num_hidden_layers)
    swept = lookaheads(config)
    stops = [f"{name} {value:g}" for name in ("min_confidence", "settled") if (value := getattr(config, name))]
    runs = 1 + len(config.methods) * len(config.budgets) + len(swept)
    lines = [f"pair: {source.path} with {drafter}; {speed_dtype(recipe)}; decoding on by {config.decoding}"]
    for length, prompts in groups:
        sizes = [len(prompt.ids) for prompt in prompts]
        tasks = ", ".join(f"{task} {count}" for task, count in Counter(each.task for each in prompts).items())
        kept = max(methods.protected(prompt) for prompt in prompts)
        shares = ", ".join(f"{budget:.0%} = {ceil(budget * length)}" for budget in config.budgets)
        lines += [
            f"{len(prompts)} prompts of about {length} tokens ({min(sizes)} to {max(sizes)}): {tasks}",
            f"  budgets: {shares} tokens, at most {kept} of them kept in any case (window, sinks, markup, question)",
        ]
    lines += [f"method {name}: {_scorers(name, methods)}" for name in config.methods]
    lines.append(f"lookahead: at most {', '.join([f'{config.lookahead} tokens', *stops])}, to an end token at most")
    if swept:
        lines.append(f"lookaheads compared at {min(config.budgets):.0%}: {'; '.join(swept)}")
    count = sum(len(prompts) for _, prompts in groups)
    minutes = _seconds(models, source.trust_remote_code, groups, runs, speed_dtype(recipe)) / 60
    return [
        *lines,
        f"approximate decoding: {runs} runs of {count} prompts, one of them dense; answers of at most "
        f"{config.max_new_tokens} tokens, where a file does not say it",
        f"time: about {max(1, round(minutes))} min on {default_device()}",
        f"report: {RunFolder(parsed.run).path / 'context.html'}",
    ]


def _scorers(name: str, methods: Methods) -> str:
    """Of a method: what scores keys, and what scores tokens."""
    dropping, compression = METHODS[name](Budget(1.0, methods.config.shape), methods.config)
    parts = []
    if compression is not None:
        parts.append(f"tokens of the prompt by {compression.scorer}, {compression.positions} positions")
    if dropping is not None:
        parts.append(f"keys by {dropping.scorer}, {dropping.budget.shape} budget")
    return "; ".join(parts)


def _seconds(
    models: list[Any], trust: bool, groups: list[tuple[int, list[LongPrompt]]], runs: int, dtype: str
) -> float:
    """A rough estimate: every run reads its prompt with both models and decodes."""
    products, scores = _speeds(DTYPES[dtype])
    found = 0.0
    for config in models:
        size = sum(weight.numel() for weight in without_storage(config, trust).parameters())
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        for _, prompts in groups:
            for prompt in prompts:
                n = len(prompt.ids)
                found += runs * (2 * size * n / products + 2 * layers * width * n**2 / scores)
                found += runs * prompt.limit * layers * LAYER_SECONDS
    return found


def _speeds(dtype: torch.dtype) -> tuple[float, float]:
    """Operations a second of products of matrices and of causal attention here."""
    device = default_device()
    left, right = (torch.randn(1024, 1024, dtype=dtype, device=device) for _ in range(2))
    query = torch.randn(1, 1, 2048, 64, dtype=dtype, device=device)
    products = _rate(lambda: left @ right, 2 * 1024**3)
    return products, _rate(lambda: scaled_dot_product_attention(query, query, query, is_causal=True), 2 * 64 * 2048**2)


def _rate(run: Callable[[], torch.Tensor], operations: int, repeats: int = 4) -> float:
    run().sum().item()
    started = time.perf_counter()
    for _ in range(repeats):
        out = run()
    out.sum().item()
    return repeats * operations / (time.perf_counter() - started)
