"""Drafting with LongSpec: a block whose memory does not grow with the text, reading the target's cache in place.

A round: the target has read the text but its last token. The block reads that token, and then its own drafts one by
one; each looks at its own last tokens in a ring and at the target's keys as they lie in the target's cache. So the k-th
drafted token is chosen k tokens behind the last one that the target has read, as trained (flash noisy training).
"""

# B batch, Q query width, K kept positions, R ring slots, S the target's slots, N heads, M key heads, D head size,
# H hidden, V vocabulary

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drafttrain.decoding.compiled import CompiledForward
from drafttrain.decoding.compiled_block import CompiledBlock, Seen
from drafttrain.decoding.draft import Committed, Draft
from drafttrain.decoding.drafters import ModelDrafter, Setting
from drafttrain.decoding.engine import Engine, Output, pad
from drafttrain.decoding.stopping import StoppingRule
from drafttrain.decoding.target_view import TargetView
from drafttrain.decoding.tree_drafter import TreeDrafter
from drafttrain.errors import UserError
from drafttrain.models.longspec import LongSpecConfig, LongSpecDrafter
from drafttrain.models.shared_target import RotaryOf
from drafttrain.ops.attention import folded_attention
from drafttrain.ops.narrow_attention import graph_attention
from drafttrain.ops.random import Draws
from drafttrain.ops.ring import Ring, Slots
from drafttrain.ops.tree import TreeBlock
from drafttrain.ops.upload import upload

MARGIN = 64
"""Drafted tokens that can be taken back without reading the window again."""


class BlockEngine:
    """The block of a LongSpec drafter beside its target; to a `ModelDrafter` it is an engine like any other.

    Args:
        model: the block, in the target's dtype and on its device.
        target: the engine of its target.

    Raises:
        UserError: it was made for a target of another shape, or this one has no rotary embedding.
    """

    chunk = MARGIN

    def __init__(self, model: LongSpecDrafter, target: Engine) -> None:
        self.model = model.eval()
        self.config: LongSpecConfig = model.config
        self.target = target
        self.entries, self.vocabulary = target.entries, target.vocabulary
        self.max_positions = self.config.max_position_embeddings
        _check_shape(self.config, target)
        self._rotary = RotaryOf(target.model)
        self._seen: Seen | None = None
        self.compiled = CompiledBlock(self) if isinstance(target.compiled, CompiledForward) else None
        self._nodes: tuple[Tensor, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Of the block."""
        return self.model.self_norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the block."""
        return self.model.self_norm.weight.dtype

    def checked(self) -> BlockEngine:
        """This engine; its target has been."""
        return self

    def new_cache(self, rows: int, capacity: int = 0) -> Ring:
        """An empty ring; the capacity of the text does not matter."""
        config = self.config
        shape = config.num_key_value_heads, config.head_dim
        return Ring(rows, config.window, MARGIN, *shape, self.dtype, self.device)

    def look(self, view: TargetView) -> None:
        """Take up what the target has read by now: storage of its cache, and which of its slots a row has.

        All steps of a round see the same.
        """
        lengths = view.lengths
        self._seen = None
        if not max(lengths):
            return
        mask_B11S = blind_B = None
        if min(lengths) < max(lengths):
            lengths_B = upload(lengths, self.device)
            slots_S = torch.arange(max(lengths), device=self.device)
            hidden_BS = slots_S >= lengths_B.clamp(min=1).unsqueeze(1)
            mask_BS = torch.zeros(hidden_BS.shape, dtype=self.dtype, device=self.device)
            mask_B11S = mask_BS.masked_fill_(hidden_BS, -torch.inf)[:, None, None]
            blind_B = lengths_B == 0 if not min(lengths) else None
        self._seen = Seen(*view.keys_values(self.config.kv_layer), max(lengths), mask_B11S, blind_B)

    def forward(
        self,
        ring: Ring,
        tokens_BQ: Tensor,
        counts: Sequence[int] | None = None,
        keep: str | None = "all",
        tree: TreeBlock | None = None,
    ) -> Output:
        """Read tokens behind what the ring holds. As `Engine.forward`; what is not kept costs two projections.

        The tokens of a tree are not put into the ring: those that are accepted are read again.
        """
        if tree is not None:
            return self._read_tree(ring, tokens_BQ, tree)
        positions_BQ = ring.next_positions(tokens_BQ.shape[1])
        if self.compiled is not None and keep == "last" and counts is None and self.compiled.fits(self._seen):
            hidden_B1H, logits_B1V = self.compiled(ring, tokens_BQ, positions_BQ, self._seen)
            ring.advance(tokens_BQ.shape[1])
            return Output(logits_B1V, hidden_B1H)
        states_BKH = self.states(ring, tokens_BQ, positions_BQ, self._seen, counts, keep)
        ring.advance(tokens_BQ.shape[1], counts)
        return Output(None if keep is None else self.target.logits(states_BKH), states_BKH)

    def states(
        self,
        slots: Slots,
        tokens_BQ: Tensor,
        positions_BQ: Tensor,
        seen: Seen | None,
        counts: Sequence[int] | None = None,
        keep: str | None = "last",
    ) -> Tensor:
        """The block's states at tokens that are put into a ring, [B, K, H]; of a graph's slots, too.

        Args:
            slots: written to.
            tokens_BQ, counts, keep: as of `forward`; where nothing is kept the states mean nothing.
            positions_BQ: of the tokens.
            seen: of the target; None if it has read nothing.
        """
        embedded_BQH = self.target.embeddings(tokens_BQ)
        rotary = self._rotary(embedded_BQH, positions_BQ)
        normed_BQH = self.model.self_norm(embedded_BQH)
        slots.put(*self.model.self_attn.keys_values(normed_BQH, rotary), positions_BQ, counts)
        if keep is None:
            return normed_BQH
        if keep == "last" and tokens_BQ.shape[1] > 1:
            embedded_BQH, normed_BQH, positions_BQ, *rotary = _last(
                counts, embedded_BQH, normed_BQH, positions_BQ, *rotary
            )
        mask = self._additive(slots.visible(positions_BQ))
        return self.model.rest(
            embedded_BQH,
            normed_BQH,
            tuple(rotary),
            lambda q_BNQD: self._attend(q_BNQD, slots.keys, slots.values, mask),
            lambda q_BNQD: self._reading(q_BNQD, seen),
        )

    def read(self, ring: Ring, rows: Sequence[Sequence[int]]) -> None:
        """Read many tokens a row: of each only the last window of tokens, for nothing older can be seen."""
        beyond = [max(0, len(row) - self.config.window) for row in rows]
        ring.skip(beyond)
        rows = [row[more:] for row, more in zip(rows, beyond, strict=True)]
        if any(rows):
            self.forward(ring, *pad(rows, self.device), keep=None)

    def _read_tree(self, ring: Ring, tokens_BQ: Tensor, tree: TreeBlock) -> Output:
        first_B1 = ring.next_positions(1)
        positions_BQ = first_B1 + tree.depth_BT[:, tree.before :]
        embedded_BQH = self.target.embeddings(tokens_BQ)
        rotary = self._rotary(embedded_BQH, positions_BQ)
        normed_BQH = self.model.self_norm(embedded_BQH)
        nodes = self.model.self_attn.keys_values(normed_BQH, rotary)
        if tree.before:
            nodes = tuple(torch.cat(pair, 2) for pair in zip(self._nodes, nodes, strict=True))
        self._nodes = nodes
        text_BQR = ring.visible(positions_BQ) & (ring.positions_BR < first_B1).unsqueeze(1)
        above_BQT = tree.depth_BT[:, tree.before :].unsqueeze(2) - tree.depth_BT.unsqueeze(1)
        mask = self._additive(torch.cat((text_BQR, tree.seen_BQT & (above_BQT < self.config.window)), 2))
        keys, values = (torch.cat(pair, 2) for pair in zip((ring.keys, ring.values), nodes, strict=True))
        states_BQH = self.model.rest(
            embedded_BQH,
            normed_BQH,
            tuple(rotary),
            lambda q_BNQD: self._attend(q_BNQD, keys, values, mask),
            lambda q_BNQD: self._reading(q_BNQD, self._seen),
        )
        return Output(self.target.logits(states_BQH), states_BQH)

    def _additive(self, visible_BQR: Tensor) -> Tensor:
        """A mask for folded queries."""
        mask_BQR = torch.zeros(visible_BQR.shape, dtype=self.dtype, device=self.device)
        mask_B1QR = mask_BQR.masked_fill_(~visible_BQR, -torch.inf).unsqueeze(1)
        if visible_BQR.shape[1] == 1:
            return mask_B1QR
        return mask_B1QR.repeat(1, 1, self.config.num_attention_heads // self.config.num_key_value_heads, 1)

    def _reading(self, q_BNQD: Tensor, seen: Seen | None) -> Tensor:
        if seen is None:
            return torch.zeros_like(q_BNQD)
        keys, values = seen.keys[:, :, : seen.bound], seen.values[:, :, : seen.bound]
        found = self._attend(q_BNQD, keys, values, seen.mask_B11S)
        if seen.blind_B is not None:
            found = found.masked_fill(seen.blind_B[:, None, None, None], 0.0)
        return found

    def _attend(self, q_BNQD: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        attend = graph_attention if torch.compiler.is_compiling() else folded_attention
        found_BQND, _ = attend(self.model, q_BNQD, keys, values, mask, self.config.scaling)
        return found_BQND.transpose(1, 2)


class LongSpec(ModelDrafter):
    """Drafts a chain with a LongSpec drafter.

    Args:
        model: the drafter, or its engine beside the target that it will draft for.
        length, stop, name, check_every: as of `ModelDrafter`; the state that a rule sees is that behind the block.
    """

    def __init__(
        self,
        model: LongSpecDrafter | BlockEngine,
        length: int | None = None,
        stop: StoppingRule | None = None,
        name: str = "drafter",
        check_every: int = 1,
    ) -> None:
        super().__init__(model if isinstance(model, BlockEngine) else None, length, stop, name, check_every)
        self.model = model.model if isinstance(model, BlockEngine) else model
        self._view: TargetView | None = None

    def start(self, committed: Committed, setting: Setting, resume: bool = False) -> None:
        """Read the last window of each prompt, without its last token.

        Raises:
            UserError: as `ModelDrafter.start`, or the drafter was made for a target of another shape.
        """
        if setting.target_view is None:
            raise UserError(f"{self.name} reads its target while it drafts, and here is none; decode with a target.")
        if self.engine is None or self.engine.target is not setting.target_view.engine:
            self.engine, self._committed = BlockEngine(self.model, setting.target_view.engine), None
        self._view = setting.target_view
        self._check(setting)
        kept = committed.shared_with(self._committed) if resume else None
        self._setting, self._committed, self._base = setting, committed, committed.lengths
        if kept is None:
            self.cache = None  # its memory can serve again
            self.cache = self.engine.new_cache(len(committed.tokens))
        else:
            self.cache.rollback([min(pair) for pair in zip(self.cache.lengths, kept, strict=True)])
        # Nothing before the window is looked at, not even to be copied: a start costs the same on any prompt.
        window = self.engine.config.window
        firsts = [max(kept, length - 1 - window) for kept, length in zip(self.cache.lengths, self._base, strict=True)]
        self.cache.skip([first - kept for first, kept in zip(firsts, self.cache.lengths, strict=True)])
        self.engine.read(self.cache, [text[first:-1] for text, first in zip(committed.tokens, firsts, strict=True)])

    def propose(
        self,
        committed: Committed,
        prefix: Draft | None,
        budget: Sequence[int],
        random: Draws,
        target_view: TargetView | None = None,
    ) -> Draft:
        """Draft a chain behind committed ++ prefix."""
        self.engine.look(target_view)
        return super().propose(committed, prefix, budget, random, target_view)

    def score(self, committed: Committed, prefix: Draft | None, draft: Draft) -> Tensor:
        """Logits for another's tokens."""
        self.engine.look(self._view)
        return super().score(committed, prefix, draft)

    def _readable(self, tokens: Sequence[int]) -> Sequence[int]:
        """What the target can read it can read, for the embeddings are the target's."""
        return tokens


class LongSpecTree(LongSpec, TreeDrafter):
    """Drafts trees with a LongSpec drafter.

    Args:
        model: the drafter.
        widths, stop, name, drawn: as of `TreeDrafter`.
    """

    def __init__(
        self,
        model: LongSpecDrafter | BlockEngine,
        widths: Sequence[int],
        stop: StoppingRule | None = None,
        name: str = "drafter",
        drawn: bool = True,
    ) -> None:
        engine = model if isinstance(model, BlockEngine) else None
        TreeDrafter.__init__(self, engine, widths, stop, name, drawn)
        self.model = model if engine is None else engine.model
        self._view = None


def _check_shape(config: LongSpecConfig, engine: Engine) -> None:
    target = engine.config
    size = getattr(target, "head_dim", None) or target.hidden_size // target.num_attention_heads
    heads = getattr(target, "num_key_value_heads", None) or target.num_attention_heads
    pairs = {
        "hidden size": (config.hidden_size, target.hidden_size),
        "vocabulary": (config.vocab_size, target.vocab_size),
        "head size": (config.head_dim, size),
        "key heads": (config.num_attention_heads % heads, 0),
    }
    wrong = [name for name, (own, theirs) in pairs.items() if own != theirs]
    if wrong or config.kv_layer >= target.num_hidden_layers:
        raise UserError(
            f"the LongSpec drafter was made for a target of another shape ({wrong[0] if wrong else 'layers'}); train "
            "one for this target."
        )


def _last(counts: Sequence[int] | None, *values: Tensor) -> list[Tensor]:
    """The last real position of each row, in tensors [B or 1, Q, ...]."""
    if counts is None:
        return [value[:, -1:] for value in values]
    last_B = upload([max(count - 1, 0) for count in counts], values[0].device)
    rows_B = torch.arange(len(counts), device=last_B.device)
    return [value.expand(len(counts), *value.shape[1:])[rows_B, last_B].unsqueeze(1) for value in values]
