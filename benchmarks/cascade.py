"""The cascade that `drafttrain tune` finds, beside the best single drafter and the best copy with a drafter.

    python benchmarks/cascade.py --output benchmarks/results/cascade.json
    python benchmarks/cascade.py --quick     few questions, greedy, under a minute

All methods are tuned by one search on questions of their own (drafttrain/evaluation/tune.py: counted by the cost model,
the best few run) and measured on others, interleaved, on *revise*, its second turn, *self-correct*, *recall* and
*facts*; greedy, and again at T = 1, where names end in `_sampled`. `gain_over_best_speculation`, `gain_over_specdecpp`
(checkpoints/reference-head) and `gain_over_copy_and_drafter` are ratios of tokens per second, less one, of the best
method with a review or a horizontal cascade in it; `tuned_gain_over_best_speculation` and `tuned_worst_task`
are of the method that the search chose, whatever it is: the simplest that cannot be told from the fastest.
`prediction_error` is the median of |predicted / measured - 1| of the methods that the search ran, `_max` the largest.
SWI, the standardized walltime improvement, charges every forward with its model's parameters (`swi_gain`) or measured
cost at width 1 (`swi_gain_measured`) and nothing else. `index_microseconds` is what the index costs a token at a
context of 32k, reading and looking up.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import redundant as world  # noqa: E402
from benchmarks.pair import reference_models  # noqa: E402
from data_prep.corpus import held_out_modules, train_modules  # noqa: E402
from drafttrain.decoding.copy_index import CopyIndex  # noqa: E402
from drafttrain.decoding.suffixes import Suffixes  # noqa: E402
from drafttrain.evaluation.pair import Models  # noqa: E402
from drafttrain.evaluation.tune import Tuned, Tuner  # noqa: E402
from drafttrain.ops.sampling import Sampling  # noqa: E402

BASE = "Autoregressive()"
OTHERS = {"recall": 512, "facts": 512}
CONTEXT = 32768


def main() -> None:
    """Search, measure and print the figures."""
    options = world.options(__doc__, 16)
    models = reference_models(head=True)
    parts = world.redundant(models, options.questions, options.tuning)
    others = world.plain(models, OTHERS, options.questions, options.tuning)
    split = world.Split([*parts.tune, *others.tune], [*parts.test, *others.test])
    figures: dict[str, float] = index_microseconds(models, 8192 if options.quick else CONTEXT)
    rows: dict[str, Any] = {}
    for temperature in options.temperatures[:1] if options.quick else options.temperatures:
        found = Tuner(models, Sampling(temperature), split.tune, repeats=options.repeats).run()
        more, kept = _measured(models, found, split, Sampling(temperature), options.repeats)
        figures |= more
        rows |= kept
    world.finish_part("cascade", figures, rows, options)


def _measured(
    models: Models, found: Tuned, split: world.Split, sampling: Sampling, repeats: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and rows of what a search found, on questions that it has not seen."""
    end = world.suffix_of(not sampling.greedy)
    chosen = {
        "chosen": found.chosen.method,
        "fastest": found.fastest.method,
        "speculation": found.best_speculation.method,
        "specdecpp": next(each.method for each in found.tried if "AcceptanceHead(" in each.method),
        "both": found.best_pair.method,
        "cascade": found.best_cascade.method,
    }
    runs = world.run(models, list(dict.fromkeys([BASE, *chosen.values()])), split.test, sampling, repeats)
    named = {
        "gain_over_best_speculation": ("cascade", "speculation"),
        "gain_over_specdecpp": ("cascade", "specdecpp"),
        "gain_over_copy_and_drafter": ("cascade", "both"),
        "tuned_gain_over_best_speculation": ("chosen", "speculation"),
    }
    ratios = {name: (chosen[one], chosen[other], (), 1) for name, (one, other) in named.items()}
    figures = world.ratios(runs, ratios | {"speedup": (chosen["chosen"], BASE, (), 0)}, end)
    tasks = list(dict.fromkeys(each.question.task for each in runs[BASE]))
    for name, method in (("worst_task", chosen["cascade"]), ("tuned_worst_task", chosen["chosen"])):
        by_task = world.ratios(runs, {task: (method, chosen["speculation"], (task,), 1) for task in tasks})
        figures[name + end] = min(by_task[task] for task in tasks if task in by_task)
    errors = [abs(each.error) for each in found.confirmed]
    more = _swi(models, found, runs, chosen["cascade"], chosen["speculation"])
    more |= {"prediction_error": statistics.median(errors), "prediction_error_max": max(errors)}
    more["prediction_error_chosen"] = abs(found.chosen.error)
    figures |= {f"{name}{end}": value for name, value in more.items()}
    tried = [asdict(each) for each in {each.method: each for each in [*found.confirmed, *found.tried[:30]]}.values()]
    kept = {"chosen": chosen, "dropped": found.dropped, "tried": tried, "costs": asdict(found.costs)}
    kept["runs"] = world.rows(runs, BASE)
    return figures, {f"{name}{end}": value for name, value in kept.items()}


def _swi(models: Models, found: Tuned, runs: world.Runs, cascade: str, speculation: str) -> dict[str, float]:
    """The standardized walltime improvement of the cascade over the best single drafter, less one."""
    sizes = [sum(weight.numel() for weight in each.model.parameters()) for each in (models.target, models.drafter)]
    by_size = {"drafter": sizes[1] / sizes[0]}
    measured = {name: costs[1] for name, costs in found.costs.models.items()}
    gains = {}
    for name, costs in (("swi_gain", by_size), ("swi_gain_measured", measured)):
        own, base = (_standardized(runs, method, costs) for method in (cascade, speculation))
        gains[name] = own / base - 1
    return gains


def _standardized(runs: world.Runs, method: str, costs: Mapping[str, float]) -> float:
    total = sum(each.counts for each in runs[method] if each.counted)
    draft = sum(count * costs[name] for name, count in total.draft_forwards.items())
    return total.tokens / (total.target_forwards + draft)


def index_microseconds(models: Models, context: int) -> dict[str, float]:
    """Microseconds a token to keep the indices of library code up, looked at after every token; the best of three."""
    text = "".join(module.text for module in [*held_out_modules(), *train_modules()[:40]])
    ids = models.tokenizer(text[: 12 * context], add_special_tokens=False)["input_ids"][:context]

    def copying(source: str) -> float:
        index = CopyIndex(3, source, follow=True, backoff=0, cooldown=0)
        started = time.perf_counter()
        for token in ids:
            index.extend((token,))
            if index.place is not None:
                index.matched(index.place, 40)
        return time.perf_counter() - started

    def matching() -> float:
        suffixes = Suffixes()
        started = time.perf_counter()
        for token in ids:
            suffixes.extend((token,))
            suffixes.match()
        return time.perf_counter() - started

    gc.collect()
    seconds = {
        "index_microseconds": min(copying("longest") for _ in range(3)),
        "index_microseconds_earliest": min(copying("earliest") for _ in range(3)),
        "index_microseconds_max_gram": min(matching() for _ in range(3)),
    }
    return {name: 1e6 * value / len(ids) for name, value in seconds.items()}


if __name__ == "__main__":
    main()
