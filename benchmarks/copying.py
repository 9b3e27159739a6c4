"""What copying from prompt and answer brings: alone, with a tuned drafter behind it, by policy, and sampled.

    python benchmarks/copying.py --output benchmarks/results/copying.json
    python benchmarks/copying.py --quick     few questions, under a minute

Every method is tuned on questions of its own, task by task, and measured on others, all in one run, interleaved:
speculative decoding (fixed lengths, confidence thresholds), copying alone (gamma, block, policy), copying with the
drafter behind it, and Max-Gram, which is an n-gram look-up with the longest match. Besides, transformers' own prompt
look-up over its own decoding. Only right answers count where a right answer is known (see benchmarks/redundant.py).

`gain_over_speculation_revise` is copying with the drafter over the tuned drafter alone on the second turn of *revise*,
less one; `speedup_revise`, `speedup_self_correct_turn3` are of copying alone over autoregressive decoding;
`no_redundancy_ratio` is the same on code sampled at T = 1; `sampled_acceptance_error` is the share of judged copied
tokens that the target accepted at T = 1, less the mean of its p(x) over them;
`policy_gain` is the best policy over the published one on answers that revise answers, less one. `_low` and `_high` end
95 % intervals. `prompt_lookup_revise` is transformers' prompt look-up over its own greedy decoding.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import redundant as world  # noqa: E402
from benchmarks.common import finish  # noqa: E402
from benchmarks.pair import GREEDY, reference_models  # noqa: E402
from drafttrain.decoding.copying import Copy  # noqa: E402
from drafttrain.decoding.loop import Decoder  # noqa: E402
from drafttrain.evaluation.pair import Models  # noqa: E402
from drafttrain.evaluation.questions import Question  # noqa: E402
from drafttrain.ops.sampling import Sampling  # noqa: E402

BASE = "Autoregressive()"
PUBLISHED = "Copy(gamma=3)"
LENGTHS = (2, 4, 6, 8, 12, 16)
SPECULATION = [f"Model(drafter, length={k})" for k in LENGTHS]
SPECULATION += [f"Model(drafter, stop=Confidence({c}, max=16))" for c in (0.4, 0.7)]
COPIES = [PUBLISHED, *(f"Copy(gamma={g})" for g in (1, 2, 4, 5, 8))]
COPIES += [
    f"Copy(gamma=3, source='{source}'{more})" for source in ("latest", "longest") for more in ("", ", follow=True")
]
COPIES += [f"Copy(gamma={g}, longest={l}, source='longest', follow=True)" for g in (2, 3) for l in (24, 40)]
COPIES += ["Copy(gamma=3, longest=40, source='longest', follow=True, cooldown=2)"]
NGRAM = "MaxGram(length=10, least=2)"


def main() -> None:
    """Tune, measure and print the figures."""
    options = world.options(__doc__, 20)
    models = reference_models()
    split = world.redundant(models, options.questions, options.tuning)
    code = world.plain(models, {world.CODE: 192}, options.questions, options.tuning)
    chosen, tuned = _tune(models, split, COPIES[::4] if options.quick else COPIES)
    print(f"chosen: {chosen}", flush=True)
    methods = list(dict.fromkeys([BASE, PUBLISHED, NGRAM, *(m for each in chosen.values() for m in each.values())]))
    greedy = world.run(models, methods, split.test, GREEDY, options.repeats)
    figures = _greedy_figures(greedy, chosen)
    sampled, more = _sampled(models, code, split, options.repeats)
    figures |= more
    if not options.quick:
        figures["prompt_lookup_revise"] = _prompt_lookup(models, split.of(world.REVISE).test)
    rows = {"tuning": world.rows(tuned, BASE), "greedy": world.rows(greedy, BASE), "sampled": world.rows(sampled, BASE)}
    finish("copying", figures, {"chosen": chosen, **rows}, options.output)


def _tune(models: Models, split: world.Split, policies: list[str]) -> tuple[dict[str, dict[str, str]], world.Runs]:
    """The fastest method of every family by task, on the tuning questions; then the drafter behind the best copies."""
    runs = world.run(models, [BASE, *SPECULATION, *policies], split.tune, GREEDY, 1)
    chosen: dict[str, dict[str, str]] = {}
    for task in world.REDUNDANT:
        speculation = world.fastest({method: runs[method] for method in SPECULATION}, task)
        copy = world.fastest({method: runs[method] for method in policies}, task)
        chosen[task] = {"speculation": speculation, "copy": copy}
    behind = list(dict.fromkeys(each["speculation"] for each in chosen.values()))
    short = ["Model(drafter, length=4)", *behind]
    copies = list(dict.fromkeys([PUBLISHED, *(each["copy"] for each in chosen.values())]))
    both = [f"FirstOf({copy}, {model})" for copy in copies for model in dict.fromkeys(short)]
    more = world.run(models, both, split.tune, GREEDY, 1)
    for task in world.REDUNDANT:
        chosen[task]["both"] = world.fastest(more, task)
    return chosen, runs | more


def _greedy_figures(runs: world.Runs, chosen: dict[str, dict[str, str]]) -> dict[str, float]:
    second = chosen[world.AGAIN_2]
    named = {
        "gain_over_speculation_revise": (second["both"], second["speculation"], (world.AGAIN_2,), 1),
        "gain_over_speculation_revise_turn1": (
            chosen[world.REVISE]["both"],
            chosen[world.REVISE]["speculation"],
            (world.REVISE,),
            1,
        ),
        "speedup_revise": (chosen[world.REVISE]["copy"], BASE, (world.REVISE,), 0),
        "speedup_revise_turn2": (second["copy"], BASE, (world.AGAIN_2,), 0),
        "speedup_self_correct_turn3": (chosen[world.CORRECT_3]["copy"], BASE, (world.CORRECT_3,), 0),
        "policy_gain": (second["copy"], PUBLISHED, (world.AGAIN_2,), 1),
        "policy_gain_self_correct": (chosen[world.CORRECT_3]["copy"], PUBLISHED, (world.CORRECT_3,), 1),
        "published_copy_revise": (PUBLISHED, BASE, (world.REVISE,), 0),
        "longest_ngram_revise": (NGRAM, BASE, (world.REVISE,), 0),
    }
    figures: dict[str, float] = {}
    for name, (method, base, tasks, less) in named.items():
        found = world.ratio(runs, method, base, *tasks)
        figures |= {name: found.value - less, f"{name}_low": found.low - less, f"{name}_high": found.high - less}
    for task in world.REDUNDANT:
        figures[f"answers_{task.replace(' ', '_').replace('-', '_')}"] = sum(
            each.question.task == task and each.counted for each in runs[BASE]
        )
        figures[f"copied_{task.replace(' ', '_').replace('-', '_')}"] = _share(runs[chosen[task]["copy"]], task)
    return figures


def _share(answers: Sequence[world.Answer], task: str) -> float:
    """Share of tokens that were copied."""
    sources = [
        source for each in answers if each.counted and each.question.task == task for source in each.completion.sources
    ]
    return sum(source == "copy" for source in sources) / len(sources)


# ---- sampled ----


class Recorded(Copy):
    """Keeps what it proposed behind which text, by sample id."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.proposals: list[tuple[int, list[int], list[int]]] = []

    def propose(self, committed, prefix, budget, random, target_view=None):
        """As `Copy.propose`."""
        draft = super().propose(committed, prefix, budget, random, target_view)
        for sample, text, tokens in zip(committed.sample_ids, committed.tokens, draft.rows(), strict=True):
            if tokens:
                self.proposals.append((sample, list(text), tokens))
        return draft


def _sampled(
    models: Models, code: world.Split, split: world.Split, repeats: int
) -> tuple[world.Runs, dict[str, float]]:
    """At T = 1: the ratio on code, and acceptance beside probability on all that is asked."""
    best = "Copy(gamma=3, longest=40, source='longest', follow=True)"
    careful = "Copy(gamma=3, longest=40, source='longest', follow=True, backoff=1, cooldown=2)"
    tuned = world.run(models, [PUBLISHED, best, careful, "Copy(gamma=5)"], code.tune, Sampling(), repeats)
    chosen = world.fastest(tuned, world.CODE)
    runs = world.run(models, list(dict.fromkeys([BASE, PUBLISHED, best, chosen])), code.test, Sampling(), repeats)
    found, published = (world.ratio(runs, method, BASE, world.CODE) for method in (chosen, PUBLISHED))
    figures = {"no_redundancy_ratio": found.value, "no_redundancy_ratio_low": found.low}
    figures |= {"no_redundancy_ratio_high": found.high, "no_redundancy_ratio_published": published.value}
    accepted, judged, expected, variance, copied, tokens = 0, 0, 0.0, 0.0, 0, 0
    for question in [*split.test, *code.test]:
        drafter = Recorded(gamma=3, longest=40, source="longest", follow=True)
        decoder = Decoder(models.engines()[0], drafter, Sampling(), models.ends, seed=1)
        [row] = decoder.generate([question.ids], question.limit, [question.sample_id])
        text = [*question.ids, *row.token_ids]
        p_TV = _probabilities(models, text)
        tokens += len(row.token_ids)
        copied += row.sources.count("copy")
        for _, before, drafted in drafter.proposals:
            for place, token in enumerate(drafted, start=len(before)):
                if place >= len(text):
                    break
                p = p_TV[place - 1, token].item()
                judged, expected, variance = judged + 1, expected + p, variance + p * (1 - p)
                accepted += text[place] == token and row.sources[place - len(question.ids)] == "copy"
                if text[place] != token:
                    break
    sigma = variance**0.5
    figures |= {
        "sampled_acceptance": accepted / judged,
        "sampled_acceptance_error": (accepted - expected) / judged,
        "sampled_acceptance_error_low": (accepted - expected - 1.96 * sigma) / judged,
        "sampled_acceptance_error_high": (accepted - expected + 1.96 * sigma) / judged,
        "sampled_judged_tokens": judged,
        "sampled_copied": copied / tokens,
    }
    return runs, figures


@torch.inference_mode()
def _probabilities(models: Models, text: Sequence[int]) -> torch.Tensor:
    """The target's distribution behind every token of a text: float32 [T, V]."""
    engine = models.engines()[0]
    logits = engine.forward(engine.new_cache(1, len(text)), torch.tensor([text])).logits
    return logits[0].float().softmax(-1)


# ---- transformers ----


@torch.inference_mode()
def _prompt_lookup(models: Models, questions: Sequence[Question]) -> float:
    """transformers' prompt look-up over its own greedy decoding, in tokens a second, in turn."""
    model = models.target.model
    seconds, tokens = {False: 0.0, True: 0.0}, {False: 0, True: 0}
    for number, question in enumerate([questions[0], *questions]):
        for lookup in (False, True):
            more = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3} if lookup else {}
            ids = torch.tensor([question.ids])
            started = time.perf_counter()
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=question.limit,
                do_sample=False,
                eos_token_id=sorted(models.ends),
                pad_token_id=0,
                **more,
            )
            if number:
                seconds[lookup] += time.perf_counter() - started
                tokens[lookup] += found.shape[1] - len(question.ids)
    return (tokens[True] / seconds[True]) / (tokens[False] / seconds[False])


if __name__ == "__main__":
    main()
