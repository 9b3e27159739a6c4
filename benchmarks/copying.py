"""What copying from prompt and answer brings: alone, with a tuned drafter behind it, by policy, and sampled.

    python benchmarks/copying.py --output benchmarks/results/copying.json
    python benchmarks/copying.py --quick     few questions, under a minute; at T = 1 code alone

Every method is tuned on questions of its own, task by task, and measured on others, all in one run, interleaved:
speculative decoding (fixed lengths, confidence thresholds), SpecDec++ (checkpoints/reference-head, its threshold),
copying alone (gamma, block, policy), copying with the drafter behind it, and Max-Gram, which is an n-gram look-up with
the longest match. Besides, transformers' own prompt look-up over its own decoding. All of it greedy and again at T = 1,
where names end in `_sampled`. Only right answers count where a right answer is known (see benchmarks/redundant.py).

`gain_over_speculation_revise` is copying with the drafter over the tuned drafter alone on the second turn of *revise*,
less one (`gain_over_specdecpp_revise`: over SpecDec++); `speedup_revise`, `speedup_self_correct_turn3` are of copying
alone over autoregressive decoding, `speedup_both_*` of copying with the drafter;
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
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import redundant as world  # noqa: E402
from benchmarks.pair import reference_models  # noqa: E402
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
SPECDECPP = [f"Model(drafter, stop=AcceptanceHead(head, {h}, min=2, max=20))" for h in (0.3, 0.5, 0.7, 0.9)]
COPIES = [PUBLISHED, *(f"Copy(gamma={g})" for g in (1, 2, 4, 6, 8))]
COPIES += [
    f"Copy(gamma=3, source='{source}'{more})" for source in ("latest", "longest") for more in ("", ", follow=True")
]
COPIES += [f"Copy(gamma={g}, longest={l}, source='longest', follow=True)" for g in (2, 3) for l in (24, 40)]
COPIES += ["Copy(gamma=3, longest=40, source='longest', follow=True, cooldown=2)"]
NGRAM = "MaxGram(length=10, least=2)"


def main() -> None:
    """Tune, measure and print the figures."""
    options = world.options(__doc__, 20)
    models = reference_models(head=True)
    split = world.redundant(models, options.questions, options.tuning)
    families = {"speculation": SPECULATION, "specdecpp": SPECDECPP, "copy": COPIES}
    if options.quick:
        families = {name: family[::4] for name, family in families.items()}
    figures: dict[str, float] = {}
    rows: dict[str, Any] = {}
    for temperature in options.temperatures:
        sampling, end = Sampling(temperature), world.suffix_of(temperature)
        if not (options.quick and temperature):
            chosen, tuned = _tune(models, split, sampling, families)
            print(f"chosen at temperature {temperature}: {chosen}", flush=True)
            methods = dict.fromkeys([BASE, PUBLISHED, NGRAM, *(m for each in chosen.values() for m in each.values())])
            runs = world.run(models, list(methods), split.test, sampling, options.repeats)
            figures |= _figures(runs, chosen, end)
            rows |= {f"chosen{end}": chosen, f"tuning{end}": world.rows(tuned, BASE)}
            rows["sampled" if temperature else "greedy"] = world.rows(runs, BASE)
        if temperature:
            code = world.plain(models, {world.CODE: 192}, options.questions, options.tuning)
            runs, more = _without_redundancy(models, code, options.repeats)
            figures |= more | _acceptance(models, [*split.test, *code.test])
            rows["code_sampled"] = world.rows(runs, BASE)
        elif not options.quick:
            figures["prompt_lookup_revise"] = _prompt_lookup(models, split.of(world.REVISE).test)
    world.finish_part("copying", figures, rows, options)


Chosen = dict[str, dict[str, str]]
"""By task, the method of every family."""


def _tune(
    models: Models, split: world.Split, sampling: Sampling, families: dict[str, list[str]]
) -> tuple[Chosen, world.Runs]:
    """The fastest method of every family by task, on the tuning questions; then the drafter behind the best copies."""
    alone = [method for family in families.values() for method in family]
    runs = world.run(models, [BASE, *alone], split.tune, sampling, 1)
    chosen: Chosen = {}
    for task in world.REDUNDANT:
        chosen[task] = {
            name: world.fastest({method: runs[method] for method in family}, task) for name, family in families.items()
        }
    models_behind = dict.fromkeys(["Model(drafter, length=4)", *(each["speculation"] for each in chosen.values())])
    copies = dict.fromkeys([PUBLISHED, *(each["copy"] for each in chosen.values())])
    both = [f"FirstOf({copy}, {model})" for copy in copies for model in models_behind]
    more = world.run(models, both, split.tune, sampling, 1)
    for task in world.REDUNDANT:
        chosen[task]["both"] = world.fastest(more, task)
    return chosen, runs | more


NAMES = {world.REVISE: "revise", world.AGAIN_2: "revise_turn2", world.CORRECT_3: "self_correct_turn3"}
"""Of tasks in figures."""


def _figures(runs: world.Runs, chosen: Chosen, end: str) -> dict[str, float]:
    first, second, third = (chosen[task] for task in world.REDUNDANT)
    again, correct = (world.AGAIN_2,), (world.CORRECT_3,)
    named = {
        "gain_over_speculation_revise": (second["both"], second["speculation"], again, 1),
        "gain_over_speculation_revise_turn1": (first["both"], first["speculation"], (world.REVISE,), 1),
        "gain_over_specdecpp_revise": (second["both"], second["specdecpp"], again, 1),
        "policy_gain": (second["copy"], PUBLISHED, again, 1),
        "policy_gain_self_correct": (third["copy"], PUBLISHED, correct, 1),
        "published_copy_revise": (PUBLISHED, BASE, (world.REVISE,), 0),
        "longest_ngram_revise": (NGRAM, BASE, (world.REVISE,), 0),
    }
    for task, name in NAMES.items():
        own = chosen[task]
        named[f"speedup_{name}"] = (own["copy"], BASE, (task,), 0)
        for family in ("both", "speculation", "specdecpp"):
            named[f"speedup_{family}_{name}"] = (own[family], BASE, (task,), 0)
    figures = world.ratios(runs, named, end)
    for task, name in NAMES.items():
        figures[f"answers_{name}{end}"] = sum(each.question.task == task and each.counted for each in runs[BASE])
        figures[f"copied_{name}{end}"] = _share(runs[chosen[task]["copy"]], task)
    return figures


def _share(answers: Sequence[world.Answer], task: str) -> float:
    """Share of tokens that were copied."""
    sources = [
        source for each in answers if each.counted and each.question.task == task for source in each.completion.sources
    ]
    return sum(source == "copy" for source in sources) / max(1, len(sources))


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


def _without_redundancy(models: Models, code: world.Split, repeats: int) -> tuple[world.Runs, dict[str, float]]:
    """Copying beside no drafter at T = 1 on code."""
    best = "Copy(gamma=3, longest=40, source='longest', follow=True)"
    careful = "Copy(gamma=3, longest=40, source='longest', follow=True, backoff=1, cooldown=2)"
    tuned = world.run(models, [PUBLISHED, best, careful, "Copy(gamma=5)"], code.tune, Sampling(), repeats)
    chosen = world.fastest(tuned, world.CODE)
    runs = world.run(models, list(dict.fromkeys([BASE, PUBLISHED, best, chosen])), code.test, Sampling(), repeats)
    named = {"no_redundancy_ratio": (chosen, BASE, (world.CODE,), 0)}
    named["no_redundancy_ratio_published"] = (PUBLISHED, BASE, (world.CODE,), 0)
    return runs, world.ratios(runs, named)


def _acceptance(models: Models, questions: Sequence[Question]) -> dict[str, float]:
    """How many copied tokens the target accepts at T = 1, beside its probabilities of them."""
    accepted, judged, expected, variance, copied, tokens = 0, 0, 0.0, 0.0, 0, 0
    for question in questions:
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
    return {
        "sampled_acceptance": accepted / judged,
        "sampled_acceptance_error": (accepted - expected) / judged,
        "sampled_acceptance_error_low": (accepted - expected - 1.96 * sigma) / judged,
        "sampled_acceptance_error_high": (accepted - expected + 1.96 * sigma) / judged,
        "sampled_judged_tokens": judged,
        "sampled_copied": copied / tokens,
    }


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
