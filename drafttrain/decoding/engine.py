"""A Hugging Face causal language model read through our cache and attention: weights and one forward, nothing else.

The engine holds no sequences: a caller asks for a cache and passes it along, so one engine can serve as target and
drafter at once. The output head runs only where logits are wanted.
"""

# B batch, Q query width, K kept positions, H hidden, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import NamedTuple

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from drafttrain.decoding.compiled import CompiledForward, Given
from drafttrain.decoding.graphs import GraphForward
from drafttrain.errors import UserError
from drafttrain.models.logits import LogitShape
from drafttrain.ops.attention import (
    HYBRID_SLOTS,
    SEE_ALL,
    Attend,
    attending,
    attending_by,
    attention,
    layer_windows,
    prepare_mask,
    prepare_tree_mask,
    stand_in,
)
from drafttrain.ops.cache import DenseCache
from drafttrain.ops.ragged import RaggedCache
from drafttrain.ops.tree import TreeBlock
from drafttrain.ops.upload import upload


class Output(NamedTuple):
    """What a forward pass gives at the kept positions.

    Attributes:
        logits: [B, K, V], or None where none were asked for.
        hidden: [B, K, H] the last hidden state, after the final norm (what transformers calls hidden_states[-1]); None
            where nothing was kept but the cache.
    """

    logits: Tensor | None
    hidden: Tensor | None


class _Cached(Exception):
    """All that was wanted of a forward is in the cache: raised in the last layer, behind its keys and values."""


class Engine:
    """Runs a decoder-only transformers model over ragged batches.

    Args:
        model: a causal language model whose layers are full or sliding-window attention.
        vocabulary: logits beyond it are padding rows of the embedding and are cut off; None keeps all.
        chunk: prompts are read in pieces of this many tokens.
        compiled: run short forwards as graphs: compiled on a CPU (the weights must not change any more), captured on a
            CUDA device.

    Attributes:
        entries: token ids below this can be read.
        watch: a function of a cache with an open span, and of the attention to be used, that gives one to use in its
            place (`drafttrain.context` looks at queries with it); None for none. Graphs are not used then.

    Raises:
        UserError: the model has layers that cannot be rolled back (recurrent, chunked) or no such vocabulary, or its
            parts are of unlike dtypes or lie on several devices without a device map.
    """

    def __init__(
        self, model: PreTrainedModel, vocabulary: int | None = None, chunk: int = 1024, compiled: bool = False
    ) -> None:
        config = model.config.get_text_config()
        if model._is_stateful:  # families that say it in no list of layers, too
            raise UserError(
                f"{config.model_type} keeps a recurrent state, which cannot be rolled back after a rejected draft; "
                "use a model whose layers are full or sliding-window attention"
            )
        self.model = model
        self.config = config
        self.chunk = chunk
        self.windows = layer_windows(config)
        self.layers: int = config.num_hidden_layers
        heads: int = config.num_attention_heads
        self.groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        self.softcap = getattr(config, "attn_logit_softcapping", None) is not None
        devices = {weight.device for weight in model.parameters()}
        self._hybrid = not self.softcap and len(devices) == 1  # between devices masks are copied as plain tensors
        self._embedding = model.get_input_embeddings()
        self._offloaded = has_offloaded_params(self._embedding)  # its weight is on no device until it is needed
        self._hooked = any(hasattr(part, "_hf_hook") for part in model.modules())  # a layer begun is to end
        self.entries: int = self._embedding.weight.shape[0]
        self._head = model.get_output_embeddings()
        _check_parts(model, self._embedding, self._head)
        self._shape = LogitShape.of(config)
        rows = self._head.weight.shape[0]
        self.vocabulary = rows if vocabulary is None else vocabulary
        if not 0 < self.vocabulary <= rows:
            raise UserError(f"a vocabulary of {self.vocabulary} tokens does not fit a model with {rows} output rows")
        self.body = model.get_decoder()
        self.watch: Callable[[DenseCache, Attend], Attend] | None = None
        self.compiled: CompiledForward | GraphForward | None = None
        if compiled:
            self.compiled = GraphForward(self) if self.device.type == "cuda" else CompiledForward(self)

    @torch.inference_mode()
    def checked(self) -> Engine:
        """This engine, once it has read a few tokens in two steps as the model reads them in one.

        Families differ in ways that no configuration tells: other attention, other positions, other logits.

        Raises:
            UserError: it fails at that or gives other logits.
        """
        name = type(self.model).__name__
        tokens_1Q = torch.arange(8, device=self.device).unsqueeze(0) % self.entries
        cache = self.new_cache(1)
        try:
            with attending(self.config, "eager"):  # others may lack what a family needs, like capped scores
                own_QV = self.model(input_ids=tokens_1Q, use_cache=False).logits[0, 4:, : self.vocabulary]
            self.forward(cache, tokens_1Q[:, :4], keep="cache")
            logits_QV = self.forward(cache, tokens_1Q[:, 4:]).logits[0]
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            dtypes = sorted({str(weight.dtype) for weight in self.model.parameters() if weight.is_floating_point()})
            remedy = "take another family" if len(dtypes) == 1 else f"load it in one dtype, not {' and '.join(dtypes)}"
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{name} cannot be read by the bundled decoder ({reason}); {remedy}.") from error
        own_QV = own_QV.to(logits_QV.device).double()
        apart = (logits_QV.double() - own_QV).norm()
        spread = (own_QV - own_QV.mean(1, keepdim=True)).norm()
        rounding = torch.bfloat16 if getattr(self.model, "is_quantized", False) else self.dtype
        eps = max(torch.finfo(kind).eps for kind in (rounding, torch.float32))  # eager takes softmax in float32
        if not apart <= 4 * eps**0.5 * spread:
            raise UserError(
                f"{name} gives other logits in the bundled decoder than by itself ({apart / spread:.2g} of their "
                "spread apart); take another family."
            )
        return self

    @cached_property
    def device(self) -> torch.device:
        """Where tokens enter the model; it is asked for several times a round and looked up once."""
        if self._offloaded:
            return torch.device(self._embedding._hf_hook.execution_device)
        return self._embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's activations."""
        return self._embedding.weight.dtype

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model's positions allow, if it says so."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":  # beyond, a token turns otherwise, and those read before with it
            return rope["original_max_position_embeddings"]
        return getattr(self.config, "max_position_embeddings", None)

    def new_cache(self, rows: int, capacity: int = 0) -> DenseCache:
        """An empty cache for a batch, with room for ``capacity`` tokens a row before it grows."""
        if self.model.training:
            self.model.eval()
        if isinstance(self.compiled, GraphForward):
            return self.compiled.new_cache(rows, capacity)
        return DenseCache(self.layers, rows, self.device, capacity)

    def forward(
        self,
        cache: DenseCache | RaggedCache,
        tokens_BQ: Tensor,
        counts: Sequence[int] | None = None,
        keep: str | None = "all",
        tree: TreeBlock | None = None,
    ) -> Output:
        """Read tokens behind what the cache holds.

        Args:
            cache: from `new_cache`, or a ragged one; its rows grow by their counts.
            tokens_BQ: int64 [B, Q], padded on the right.
            counts: real tokens of each row; None means Q for all.
            keep: "all" positions, the "last" real one of each row, None for no logits, or "cache" for nothing but
                what the cache holds then.
            tree: what the tokens see of each other, where they are no chain; what precedes the tree they see all.

        Returns:
            logits [B, K, V] and hidden [B, K, H] with K = Q ("all") or 1 ("last").
        """
        cache.open(tokens_BQ.shape[1])
        watched = isinstance(cache, RaggedCache) or self.watch is not None or keep == "cache"
        if self.compiled is not None and not watched and self.compiled.fits(cache, keep, tree is not None):
            given = () if tree is None else (self._given(cache, tree),)
            found = self.compiled(cache, tokens_BQ, keep == "last" and counts is None, *given)
            if found is not None:
                cache.advance(counts)
                hidden_BKH, logits_BKV = found
                if keep == "last" and counts is not None:
                    hidden_BKH, logits_BKV = _last_real(hidden_BKH, counts), _last_real(logits_BKV, counts)
                return Output(logits_BKV, hidden_BKH)
        positions_BQ = cache.query_positions() if tree is None else _positions(cache, tree)
        with suppress(_Cached), self._attending(cache, positions_BQ, tree, keep != "cache") as mask:
            hidden_BQH = self.body(
                input_ids=tokens_BQ,
                attention_mask=mask,
                position_ids=positions_BQ,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        cache.advance(counts)
        if keep == "cache":
            return Output(None, None)
        if keep is None:
            return Output(None, hidden_BQH)
        if keep == "last" and tokens_BQ.shape[1] > 1:
            hidden_BQH = _last_real(hidden_BQH, counts)
        device = tokens_BQ.device  # the last layers of a model spread over devices lie elsewhere
        return Output(self.logits(hidden_BQH).to(device), hidden_BQH.to(device))

    def _given(self, cache: DenseCache, tree: TreeBlock) -> Given:
        windows = self.windows.values()
        masks = [prepare_tree_mask(cache, tree, self.dtype, self.groups, window, False) for window in windows]
        return Given(_positions(cache, tree), masks)

    @contextmanager
    def _attending(
        self, cache: DenseCache | RaggedCache, positions_BQ: Tensor, tree: TreeBlock | None, whole: bool
    ) -> Iterator[Tensor | dict[str, Tensor]]:
        """Inside, the model attends as this cache wants it to; what is given is the mask for it.

        ``whole``: the last layer attends too, which only its output needs, not the cache.
        """
        if isinstance(cache, RaggedCache):
            with attending_by(self.config, partial(cache.attend, tree=tree)):
                yield self.masks(lambda window: stand_in(SEE_ALL, positions_BQ.device))
            return
        mask = self.masks(lambda window: self._mask(cache, positions_BQ, window, tree))
        way = attending(self.config)
        attend = attention if whole else self._attend_but_last
        if self.watch is not None:
            way = attending_by(self.config, self.watch(cache, attend))
        elif not whole:
            way = attending_by(self.config, attend)
        with way:
            yield mask

    def _attend_but_last(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, None]:
        """`attention`, and an end in the last layer: a two-layer drafter reads a long prompt in half the time."""
        if module.layer_idx < self.layers - 1:
            return attention(module, query, key, value, *args, **kwargs)
        if not self._hooked:
            raise _Cached
        return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def masks(self, make: Callable[[int | None], Tensor]) -> Tensor | dict[str, Tensor]:
        """One mask a kind of layer, made from its window, as the model takes them."""
        masks = {kind: make(window) for kind, window in self.windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, cache: DenseCache, positions_BQ: Tensor, window: int | None, tree: TreeBlock | None) -> Tensor:
        if tree is None:
            return prepare_mask(cache, positions_BQ, self.dtype, self.groups, window, self.softcap)
        hybrid = self._hybrid and cache.span.bound >= HYBRID_SLOTS
        return prepare_tree_mask(cache, tree, self.dtype, self.groups, window, hybrid)

    def embeddings(self, tokens_BQ: Tensor) -> Tensor:
        """[B, Q, H]."""
        return self._embedding(tokens_BQ)

    def logits(self, hidden_BKH: Tensor) -> Tensor:
        """The output head over hidden states: [B, K, V] without padding rows."""
        logits_BKV = self._shape.apply(self._head(hidden_BKH))
        return logits_BKV if logits_BKV.shape[-1] == self.vocabulary else logits_BKV[..., : self.vocabulary]

    def read(self, cache: DenseCache, rows: Sequence[Sequence[int]]) -> None:
        """Read many tokens a row, unequal numbers of them, without logits (a prompt)."""
        longest = max(map(len, rows), default=0)
        for start in range(0, longest, self.chunk):
            pieces = [list(row[start : start + self.chunk]) for row in rows]
            tokens_BQ, counts = pad(pieces, self.device)
            self.forward(cache, tokens_BQ, counts, keep="cache")


def _positions(cache: DenseCache, tree: TreeBlock) -> Tensor:
    """Of the nodes in the open span, int64 [B, Q]."""
    return cache.query_positions()[:, :1] - tree.before + tree.depth_BT[:, tree.before :]


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[int] | None]:
    """Stack rows of tokens, padded on the right with token 0.

    Returns:
        int64 [B, Q] and the rows' lengths, None where all are equal.
    """
    counts = [len(row) for row in rows]
    width = max(counts)
    if min(counts) == width:
        return upload(rows, device), None
    return upload([[*row, *[0] * (width - len(row))] for row in rows], device), counts


def _check_parts(model: PreTrainedModel, embedding: nn.Module, head: nn.Module) -> None:
    """Refuse a model that stops at its first forward because its parts do not fit together."""
    name = type(model).__name__
    devices = sorted({str(weight.device) for weight in model.parameters()})
    if len(devices) > 1 and not hasattr(model, "hf_device_map"):
        raise UserError(
            f"the weights of {name} lie on {' and '.join(devices)} without a device map; "
            "move them to one device or load the model with a device_map."
        )
    first, last = embedding.weight.dtype, head.weight.dtype
    if first != last and last in _WHOLE:  # else it is quantized
        raise UserError(f"{name} has an embedding in {first} and a head in {last}; load it in one dtype.")


_WHOLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _last_real(hidden_BQH: Tensor, counts: Sequence[int] | None) -> Tensor:
    if counts is None:
        return hidden_BQH[:, -1:]
    index_B = upload([max(count - 1, 0) for count in counts], hidden_BQH.device)
    return hidden_BQH[torch.arange(len(counts), device=hidden_BQH.device), index_B].unsqueeze(1)
