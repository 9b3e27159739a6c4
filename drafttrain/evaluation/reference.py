"""An independent reference for sampled decoding: exact probabilities of what the target alone would emit.

Nothing of the decoder is used here: the library's own forward without a cache, and another implementation of the
repetition penalty, temperature, top-k, top-p and min-p, in NumPy and float64. The outcome of a few tokens behind a
prompt is a leaf of a tree: at every node the likeliest tokens are children, and all others share a few bins, which are
leaves. So the probabilities of the leaves sum to one whatever the vocabulary, and nothing is left out of the test. Bins
are made by p, where a wrong temperature shows, and within by p / q: a wrong decoder emits too much of what the drafter
over-rates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from drafttrain.ops.sampling import Sampling

# V vocabulary

BINS = (4, 4)
"""Bins of a node by p, and within each by p / q; all about equally likely."""

_LOGITS = 1 << 24  # that exist at one time

IMPOSSIBLE = -1
"""Code of a token without probability: the leaf that it leads to is not in the tree."""

Leaf = tuple[int, ...]


@dataclass(frozen=True)
class Tree:
    """Probabilities of the leaves, and what every token leads to at each inner node (by the tokens that lead there).

    A code is the token itself for a child, below `IMPOSSIBLE` for a bin.
    """

    leaves: dict[Leaf, float]
    codes: dict[Leaf, np.ndarray]

    def leaf(self, tokens: Sequence[int]) -> Leaf:
        """The leaf that an answer falls into."""
        path: Leaf = ()
        for token in tokens:
            if path not in self.codes:
                break
            path = (*path, int(self.codes[path][token]))
        return path

    def count(self, answers: Iterable[Sequence[int]]) -> Counter[Leaf]:
        """How many answers fall into each leaf."""
        return Counter(self.leaf(answer) for answer in answers)


def tree(
    model: Any,
    prompt: Sequence[int],
    sampling: Sampling,
    eos_ids: frozenset[int],
    vocabulary: int,
    depth: int,
    wide: int,
    drafter: Any = None,
) -> Tree:
    """Exact probabilities of the first `depth` tokens behind a prompt.

    Args:
        model: the target in float64.
        prompt: token ids.
        sampling: not greedy.
        eos_ids: tokens after which nothing follows.
        vocabulary: logits beyond it are padding.
        depth: tokens.
        wide: children of every node.
        drafter: in float64, for q; without one bins are made by p alone.
    """
    leaves: dict[Leaf, float] = {}
    codes: dict[Leaf, np.ndarray] = {}
    front: dict[Leaf, float] = {(): 1.0}
    for _ in range(depth):
        following: dict[Leaf, float] = {}
        p_NV = _next(model, prompt, list(front), sampling, vocabulary)
        q_NV = p_NV if drafter is None else _next(drafter, prompt, list(front), sampling, vocabulary)
        for path, p_V, q_V in zip(front, p_NV, q_NV, strict=True):
            codes[path] = code_V = _codes(p_V, p_V / (q_V + 1e-12), wide)
            for code in np.unique(code_V[p_V > 0]).tolist():
                inner = code >= 0 and code not in eos_ids
                (following if inner else leaves)[*path, code] = front[path] * float(p_V[code_V == code].sum())
        front = following
    return Tree(leaves | front, codes)


def _codes(p_V: np.ndarray, ratio_V: np.ndarray, wide: int) -> np.ndarray:
    """What each token leads to: the likeliest to themselves, the rest to bins."""
    order = np.argsort(-p_V, kind="stable")
    order = order[p_V[order] > 0]
    code_V = np.full(len(p_V), IMPOSSIBLE, dtype=np.int64)
    code_V[order[:wide]] = order[:wide]
    outer, inner = BINS
    for number, group in enumerate(_shares(p_V, order[wide:], outer)):
        sorted_group = group[np.argsort(-ratio_V[group], kind="stable")]
        for place, tokens in enumerate(_shares(p_V, sorted_group, inner)):
            code_V[tokens] = IMPOSSIBLE - 1 - (number * inner + place)
    return code_V


def _shares(p_V: np.ndarray, tokens: np.ndarray, parts: int) -> list[np.ndarray]:
    """Tokens in their order, cut into parts of about one probability each; some may be empty."""
    if not len(tokens):
        return []
    before = np.cumsum(p_V[tokens]) - p_V[tokens]
    part = (parts * before / p_V[tokens].sum()).astype(np.int64)
    return [tokens[part == number] for number in range(parts)]


def next_token(model: Any, prompt: Sequence[int], sampling: Sampling, vocabulary: int) -> np.ndarray:
    """The distribution [V] of the token behind a prompt."""
    return _next(model, prompt, [()], sampling, vocabulary)[0]


def _next(
    model: Any, prompt: Sequence[int], paths: list[Leaf], sampling: Sampling, vocabulary: int
) -> list[np.ndarray]:
    """Distribution [V] behind every path; all paths have one length."""
    texts = [[*prompt, *path] for path in paths]
    return [p_TV[0] for p_TV in after_prefixes(model, texts, len(texts[0]), sampling, vocabulary)]


@torch.inference_mode()
def after_prefixes(
    model: Any, texts: Sequence[Sequence[int]], shortest: int, sampling: Sampling, vocabulary: int
) -> Iterator[np.ndarray]:
    """The distribution behind every prefix of each text: [T, V] for its first `shortest`, `shortest` + 1, ... tokens.

    Args:
        model: in float64.
        texts: token ids, each at least `shortest` long; causal models do not see the padding of shorter ones.
        shortest: tokens of the shortest prefix.
        sampling: not greedy.
        vocabulary: logits beyond it are padding; a model with fewer never proposes the others.
    """
    weight = model.get_input_embeddings().weight
    longest = max(map(len, texts))
    batch = max(1, _LOGITS // (vocabulary * longest))
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        tokens = torch.tensor([[*text, *[0] * (longest - len(text))] for text in part], device=weight.device)
        output = model(input_ids=tokens.clamp(max=len(weight) - 1), use_cache=False)
        logits_BTV = output.logits[:, shortest - 1 :, :vocabulary].double().cpu().numpy()
        for text, logits_TV in zip(part, logits_BTV, strict=True):
            places = range(len(text) - shortest + 1)
            p_TV = np.zeros((len(places), vocabulary))
            for place in places:
                p_TV[place, : logits_TV.shape[1]] = distribution(logits_TV[place], sampling, text[: shortest + place])
            yield p_TV


def distribution(logits_V: np.ndarray, sampling: Sampling, text: Iterable[int] = ()) -> np.ndarray:
    """Penalty for the tokens of the text, temperature, top-k and top-p (ties with the last stay), min-p; in float64."""
    scaled_V = logits_V.copy()
    for token in {token for token in text if token < len(scaled_V)}:
        penalty = sampling.repetition_penalty
        scaled_V[token] *= 1 / penalty if scaled_V[token] > 0 else penalty
    scaled_V /= sampling.temperature
    keep_V = np.ones(len(scaled_V), dtype=bool)
    if 0 < sampling.top_k < len(scaled_V):
        keep_V &= scaled_V >= np.sort(scaled_V)[-sampling.top_k]
    if sampling.top_p < 1:
        p_V = _softmax(scaled_V, keep_V)
        order = np.argsort(-p_V, kind="stable")
        before = np.cumsum(p_V[order]) - p_V[order]
        keep_V &= p_V >= p_V[order[before < sampling.top_p]].min()
    if sampling.min_p > 0:
        p_V = _softmax(scaled_V, keep_V)
        keep_V &= p_V >= sampling.min_p * p_V.max()
    return _softmax(scaled_V, keep_V)


def _softmax(scaled_V: np.ndarray, keep_V: np.ndarray) -> np.ndarray:
    weights_V = np.where(keep_V, np.exp(scaled_V - scaled_V[keep_V].max()), 0.0)
    return weights_V / weights_V.sum()
