"""Many ways of cutting a prompt down, compared at the price of one dense prefill.

A prompt is read once, with everything kept: keys, values, the queries of its end, of a lookahead and of the answer.
What a method would keep at a budget is then a choice of slots, and all choices are rows of one batch that reads the
answer: greedy decoding writes exactly this answer if and only if the argmax is right at each of its places.
"""

# N query heads, M key heads, S tokens of a prompt, L tokens of the lookahead, T tokens of the answer, V vocabulary

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drafttrain.context.budgets import Budget, Protected, keep_top
from drafttrain.context.compression import PromptCompression
from drafttrain.context.dropping import KVDropping, Protect
from drafttrain.context.prefill import Prefill, Reading
from drafttrain.context.scorers import Oracle, Scorer, rows_from
from drafttrain.context.scoring import Looked, attention_mass
from drafttrain.context.watching import QueryWatch
from drafttrain.decoding.engine import Engine, pad
from drafttrain.ops.attention import windows_by_layer
from drafttrain.ops.cache import DenseCache
from drafttrain.ops.ragged import RaggedCache

WINDOW = 64
"""Last prompt tokens whose queries are recorded."""


@dataclass(frozen=True)
class Candidate:
    """A way to choose keys, at a budget.

    Attributes:
        name: of the method.
        scorer: says what matters.
        budget: tokens kept.
        protect: kept in any case.
        ahead: tokens of the lookahead that the scorer sees.
        verified: whether what the target accepts of the lookahead is emitted at once, as the decoder does.
    """

    name: str
    scorer: Scorer
    budget: Budget
    protect: Protect = field(default_factory=lambda: Protected(sinks=4, window=0))
    ahead: int = 0
    verified: bool = False


@dataclass
class Outcome:
    """What became of one prompt.

    Attributes:
        exact: whether greedy decoding would write the answer, its end token included.
        right: leading tokens of the answer that it would write.
        kl: KL divergence of the next-token distributions from the dense ones in nats, mean over the answer.
        recall: share of the oracle's choice that was kept, mean over layers and heads; None where no keys were dropped.
        mass: share of the answer's attention to the prompt that falls on kept tokens; likewise.
    """

    exact: bool
    right: int
    kl: float | None = None
    recall: float | None = None
    mass: float | None = None


class Reader:
    """Reads prompts one after the other and keeps all keys; what a prompt shares with the one before is read once.

    Args:
        engine: of a target or a drafter.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache: DenseCache | None = None
        self.tokens: list[int] = []

    def begin(self, prompt: Sequence[int], behind: int, window: int) -> None:
        """Have read all of a prompt but what lies in its last ``window`` tokens.

        Args:
            prompt: token ids.
            behind: tokens that will be read behind it.
            window: at least 1.
        """
        if self.cache is None:
            self.cache = self.engine.new_cache(1, len(prompt) + behind)
        end = max(0, len(prompt) - window)
        start = min(end, _agreeing(self.tokens, prompt))
        self.tokens = []  # until what follows is read, in case it fails
        self.cache.rollback([start])
        self.engine.read(self.cache, [prompt[start:end]])
        self.tokens = list(prompt)

    def forward(self, tokens: Sequence[int]) -> tuple[Tensor, list[Tensor], list[tuple]]:
        """Read on.

        Returns:
            logits [T, V], queries of each layer [N, T, D], and their scaling and softcap.
        """
        queries, how = [], []

        def watch(cache, usual):
            def attend(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
                queries.append(query[0])
                how.append((scaling, softcap))
                return usual(module, query, key, value, mask, scaling, softcap, **kwargs)

            return attend

        engine = self.engine
        before, engine.watch = engine.watch, watch
        try:
            logits = engine.forward(self.cache, torch.tensor([list(tokens)], device=engine.device)).logits
        finally:
            engine.watch = before
        return logits[0], queries, how

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of all that was read: [M, S, D], views."""
        held, size = self.cache.layers[layer], self.cache.lengths[0]
        return held.keys[0, :, :size], held.values[0, :, :size]


class DensePass:
    """A prompt read by the target, with a lookahead behind it, and its answer.

    Valid until its reader reads another prompt.

    Args:
        reader: of the target.
        prompt: token ids.
        ahead: the lookahead, may be empty.
        answer: token ids of the reference answer, end token included.
        sample_id: keys random choices.

    Attributes:
        outcome: of the dense target itself.
        logits_TV: of the dense target at each token of the answer.
    """

    def __init__(
        self, reader: Reader, prompt: Sequence[int], ahead: Sequence[int], answer: Sequence[int], sample_id: int = 0
    ) -> None:
        self.engine, self.prompt, self.ahead, self.answer = reader.engine, list(prompt), list(ahead), list(answer)
        self.sample_id = sample_id
        self._windows = windows_by_layer(reader.engine.config)
        text, behind = len(prompt), max(len(ahead), len(answer))
        window = min(WINDOW, text)
        reader.begin(prompt, behind, window)
        logits, queries, how = reader.forward([*prompt[text - window :], *answer[:-1]])
        self.logits_TV = logits[window - 1 :]
        self.outcome = _outcome(self.logits_TV, self.answer)
        self._oracle = [
            self._mass(query[:, window - 1 :], reader.keys_values(layer)[0], layer, how[layer], "mean")[:, :text]
            for layer, query in enumerate(queries)
        ]
        reader.cache.rollback([text - window])
        logits, queries, how = reader.forward([*prompt[text - window :], *ahead])
        self._choice = logits[window - 1 :].argmax(-1).tolist()
        layers = range(len(queries))
        self._states = [(queries[layer], *reader.keys_values(layer), how[layer]) for layer in layers]

    def _mass(self, query: Tensor, key: Tensor, layer: int, how: tuple, reduction: str) -> Tensor:
        positions = torch.arange(key.shape[1], device=key.device)
        rows = positions[len(positions) - query.shape[1] :]
        return attention_mass(Looked(query, key, rows, positions, self._windows[layer], *how), reduction)

    def accepted(self, ahead: int) -> int:
        """Tokens that the target accepts of the first ``ahead`` ones of the lookahead."""
        pairs = zip(self.ahead[:ahead], self._choice, strict=False)
        return next((at for at, (token, own) in enumerate(pairs) if token != own), min(ahead, len(self.ahead)))

    def emitted(self, ahead: int) -> list[int]:
        """What is emitted with a lookahead of so many tokens: those accepted, and the target's own behind them."""
        accepted = self.accepted(ahead)
        return [*self.ahead[:accepted], self._choice[accepted]]

    def scores(self, candidate: Candidate) -> list[Tensor]:
        """Importance in each layer: [M, S]."""
        return [self._scores(layer, candidate.scorer, candidate.ahead) for layer in range(len(self._states))]

    def _scores(self, layer: int, scorer: Scorer, ahead: int) -> Tensor:
        text = len(self.prompt)
        if isinstance(scorer, Oracle):
            return self._oracle[layer]
        query, key, _, how = self._states[layer]
        end = text + (min(ahead, len(self.ahead)) if scorer.ahead else 0)
        first, held = max(0, text - max(1, scorer.window)), max(0, text - WINDOW)
        positions = torch.arange(end, device=key.device)
        looked = Looked(
            query[:, first - held : end - held], key[:, :end], positions[first:], positions, self._windows[layer], *how
        )
        return scorer.score(layer, looked, text, self.sample_id)

    def kept(self, candidate: Candidate, scores: Sequence[Tensor]) -> list[Tensor]:
        """Slots that each layer's heads keep: [M, count]."""
        method = KVDropping(candidate.budget, candidate.scorer, candidate.protect)
        protected, counts = method.protected(self.prompt), method.counts(self.prompt, len(scores))
        return [keep_top(own, count, protected) for own, count in zip(scores, counts, strict=True)]

    def compare(self, candidates: Sequence[Candidate]) -> list[Outcome]:
        """What would become of the answer by each candidate: one forward over the answer for all of them."""
        scored = {}
        for each in candidates:
            key = (each.scorer, each.ahead)
            if key not in scored:
                scored[key] = self.scores(each)
        chosen = [self.kept(each, scored[each.scorer, each.ahead]) for each in candidates]
        logits = self._reread(candidates, chosen)
        found = []
        for each, slots, own in zip(candidates, chosen, logits, strict=True):
            outcome = _outcome(own, self.answer, self.logits_TV)
            emitted = self.emitted(each.ahead) if each.verified else []
            if emitted[: len(self.answer)] != self.answer[: len(emitted)]:
                outcome.exact, outcome.right = False, _agreeing(emitted, self.answer)
            outcome.recall, outcome.mass = _shares(slots, self._oracle)
            found.append(outcome)
        return found

    def _reread(self, candidates: Sequence[Candidate], chosen: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Logits behind the prompt and each token of the answer but the last, by candidate: [T, V]."""
        tails = [self._tail(each) for each in candidates]
        cache = self._cache(chosen, tails, len(self.answer) + max(tails))
        logits, counts = self._forward(cache, [self.answer[tail:-1] for tail in tails])
        return [
            torch.cat([self.logits_TV[: 1 + tail], own[:count]])
            for tail, own, count in zip(tails, logits, counts, strict=True)
        ]

    def _tail(self, candidate: Candidate) -> int:
        """Tokens of the lookahead whose keys stay as the dense target made them."""
        if not candidate.verified:
            return 0
        accepted = self.accepted(candidate.ahead)
        return min(accepted, len(self.answer) - 1, _agreeing(self.ahead[:accepted], self.answer))

    def _cache(self, chosen: Sequence[Sequence[Tensor]], tails: Sequence[int], room: int) -> RaggedCache:
        """Rows of slots by layer, each with some of the lookahead behind it."""
        text, rows = len(self.prompt), len(chosen)
        kept = [[[slots[layer].shape[1]] * len(slots[layer]) for slots in chosen] for layer in range(len(chosen[0]))]
        device = self._states[0][1].device
        cache = RaggedCache(kept, [text] * rows, [text] * rows, self._windows, device, room)
        positions = torch.arange(text, device=device)
        for layer, (_, key, value, _) in enumerate(self._states):
            for row, (slots, tail) in enumerate(zip(chosen, tails, strict=True)):
                states = (each[:, : text + tail] for each in (key, value))
                cache.fill(layer, row, *states, list(slots[layer]), positions)
        cache.rollback([text + tail for tail in tails])
        return cache

    def _forward(self, cache: RaggedCache, rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        counts = [len(row) for row in rows]
        if max(counts) == 0:
            return self.logits_TV.new_zeros(len(rows), 0, self.engine.vocabulary), counts
        tokens, _ = pad(rows, self.engine.device)
        return self.engine.forward(cache, tokens, counts).logits, counts


def compressed_outcome(
    target: Engine, prompt: Sequence[int], kept: Sequence[int], answer: Sequence[int], positions: str = "compact"
) -> Outcome:
    """What becomes of an answer behind the kept tokens of a prompt.

    Args:
        target: engine.
        prompt: token ids.
        kept: indices of the tokens read, ascending.
        answer: token ids, end token included.
        positions: "compact" or "original".
    """
    tokens = [prompt[at] for at in kept]
    places = list(range(len(kept))) if positions == "compact" else [*kept[:-1], len(prompt) - 1]
    everything = torch.ones(len(kept), dtype=torch.bool)
    reading = Reading(tokens, places, answer[:-1], [len(kept)] * target.layers, everything)
    [logits] = Prefill(target, [reading], [len(prompt)], None, len(answer)).run()
    return _outcome(logits, answer)


def draft_pass(
    reader: Reader, prompt: Sequence[int], ahead: int, ends: Collection[int] = (), window: int = WINDOW
) -> tuple[QueryWatch, list[int]]:
    """A drafter's greedy lookahead behind one prompt, up to an end token, and its watched queries.

    Valid until the reader reads another prompt.
    """
    engine = reader.engine
    watch = QueryWatch(engine, [len(prompt)], window, ahead)
    drafted: list[int] = []
    reader.begin(prompt, ahead, min(len(prompt), window))
    tokens = list(prompt[reader.cache.lengths[0] :])
    with watch.watching():
        for _ in range(max(1, ahead)):
            block = torch.tensor([tokens], device=engine.device)
            tokens = [int(engine.forward(reader.cache, block, keep="last").logits.argmax(-1))]
            drafted += tokens
            if tokens[0] in ends:
                break
    return watch, drafted[:ahead]


def choices(
    watch: QueryWatch, methods: Mapping[str, PromptCompression], prompt: Sequence[int], drafted: Mapping[str, int]
) -> dict[str, list[int]]:
    """Which tokens each method of prompt compression has the target read.

    Args:
        watch: of the draft pass.
        methods: by name.
        prompt: token ids.
        drafted: by name, drafted tokens whose queries a method sees; 0 where none is named.
    """
    found = {}
    for name, method in methods.items():
        window = min(method.scorer.window, len(prompt))
        layers = []
        for layer in range(watch.engine.layers):
            looked = watch.looked(layer, 0, drafted.get(name, 0))
            extra = min(watch.window, len(prompt)) - window
            layers.append(rows_from(looked, extra))
        found[name] = method.choose(layers, prompt, method.count(prompt)).tolist()
    return found


def _outcome(logits_TV: Tensor, answer: Sequence[int], dense_TV: Tensor | None = None) -> Outcome:
    choice = logits_TV.argmax(-1).tolist()
    right = _agreeing(choice, answer)
    kl = None
    if dense_TV is not None:
        p, q = (each.double().log_softmax(-1) for each in (dense_TV, logits_TV))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
    return Outcome(right == len(answer), right, kl)


def _agreeing(some: Sequence[int], others: Sequence[int]) -> int:
    """Leading items that both have."""
    pairs = zip(some, others, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(some), len(others)))


def _shares(slots: Sequence[Tensor], oracle: Sequence[Tensor]) -> tuple[float, float]:
    """Share of the oracle's choice that was kept, and of its attention, mean over layers and heads."""
    recall, mass = [], []
    for own, scores in zip(slots, oracle, strict=True):
        best = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(own.shape[1]).indices, True)
        recall.append(best.gather(1, own).float().mean())
        mass.append((scores.gather(1, own).sum(1) / scores.sum(1)).mean())
    return float(torch.stack(recall).mean()), float(torch.stack(mass).mean())
