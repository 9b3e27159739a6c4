"""A small causal language model that drafts a tree, one level a forward."""

# B batch

from __future__ import annotations

from collections.abc import Sequence

from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import ModelDrafter, Setting, seen_with
from drafttrain.decoding.engine import Engine
from drafttrain.decoding.stopping import StoppingRule
from drafttrain.decoding.target_view import TargetView
from drafttrain.decoding.trees import TreeGrowth, check_shape, level_draws
from drafttrain.ops.random import Draws


class TreeDrafter(ModelDrafter):
    """Drafts trees of a given shape; a chain is the shape [1, 1, ...].

    Args:
        engine: the model.
        widths: tokens of each level.
        stop: asked after every level, by its likeliest token; None drafts all levels.
        name: label of its tokens and forwards.
        drawn: where text is sampled, draw children without replacement; else they are the likeliest, as they are where
            text is greedy.

    Raises:
        UserError: a shape that no tree has.
    """

    def __init__(
        self,
        engine: Engine,
        widths: Sequence[int],
        stop: StoppingRule | None = None,
        name: str = "drafter",
        drawn: bool = True,
    ) -> None:
        check_shape(widths)
        super().__init__(engine, len(widths), stop, name)
        self.widths = list(widths)[: self.max_length]
        self.drawn = drawn
        self.max_length = sum(self.widths)
        self._spare = self.max_length + 1
        self._trees: list[int] = []  # slots before each row's last tree

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: TargetView | None = None,
    ) -> Draft:
        """Draft a tree behind committed ++ prefix; its paths keep to the budget."""
        texts = self._join(committed, prefix)
        starts = [len(text) for text in texts]
        limits = [min(pair) for pair in zip(self.stop.limits(committed.sample_ids, starts), budget, strict=True)]
        if max(limits) <= 0:
            return Draft.empty(len(texts), self.engine.device)
        sampling = self._setting.sampling
        u_BDN = None
        if self.drawn and not sampling.greedy:
            u_BDN = level_draws(random, starts, self.widths, self.engine.device)
        growth = TreeGrowth(
            self.widths,
            limits,
            sampling,
            min(self._setting.vocabulary, self.engine.vocabulary),
            self._setting.eos_ids,
            self.name,
            self.stop,
            seen_with(committed, prefix).to(self.engine.device) if sampling.penalised else None,
            u_BDN,
        )
        first = self.engine.forward(self.cache, *self._pending(committed, texts), keep="last")
        self._trees = list(self.cache.lengths)
        return growth.run(first, lambda tokens_BN, tree: self.engine.forward(self.cache, tokens_BN, tree=tree))

    def commit(self, agreed: Sequence[int], paths: Sequence[Sequence[int]] | None = None) -> None:
        """Keep the accepted path of the tree, as far as the cache holds it."""
        if paths is not None:
            read = [length - tree for length, tree in zip(self.cache.lengths, self._trees, strict=True)]
            if any(read):
                kept = [[node for node in path if node < most] for path, most in zip(paths, read, strict=True)]
                self.cache.keep_path(self._trees, kept)
        super().commit(agreed)

    def _check(self, setting: Setting) -> None:
        check_shape(self.widths, min(setting.vocabulary, self.engine.vocabulary))
        super()._check(setting)
