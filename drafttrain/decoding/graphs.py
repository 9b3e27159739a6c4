"""The captured forward of a model on a GPU: one launch in place of the thousand that a step otherwise takes.

What is captured has been compiled before, which fuses what lies between the matrix products: at batch 1 a step reads
every weight once, and all else should be small beside that.

A CUDA graph replays the same kernels at the same addresses. So tokens, lengths, keys and values live in buffers that
stay: caches lend their storage from a pool and give it back when they are freed, and graphs belong to a storage. How
far each row has come is read on the device (`split_attention`), hence one graph a number of rows and a width serves
sequences of every length. Where those kernels cannot be used the attention is masked, over a range of keys that is a
power of two, with a graph for each.

Batches are filled up to a few sizes, so that rows that leave do not each need another graph. Prompts are read by the
uncaptured path. Where a model cannot be captured it is read that way throughout, and a log line says why.
"""

# B batch (filled up), Q query width, S slots, K kept positions, H hidden, V vocabulary

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drafttrain.decoding.compiled import STAND_IN_BOUND, STAND_IN_ROWS, STAND_IN_WIDTH, compiled, read_block
from drafttrain.ops.attention import FOLD_ROWS, FOLDED, attending
from drafttrain.ops.cache import DenseCache, GraphLayer, Storage
from drafttrain.ops.split_attention import SPLIT, reach_of, serves, split_attention

if TYPE_CHECKING:
    from drafttrain.decoding.engine import Engine

_log = logging.getLogger(__name__)

_LEAST_SLOTS = 256

_MOST_GRAPHS = 64
"""Of one storage; beyond, the one that was not used for longest is given up."""


class Recording(NamedTuple):
    """A captured forward.

    Attributes:
        replay: run it again on what its input buffers then hold.
        outputs: hidden [B, K, H] and logits [B, K, V] of the last replay; the next of any graph overwrites them.
    """

    replay: Callable[[], None]
    outputs: tuple[Tensor, Tensor]


class Recorder(Protocol):
    """What captures."""

    def record(self, run: Callable[[], tuple[Tensor, Tensor]]) -> Recording:
        """Capture a function of no arguments.

        Raises:
            RuntimeError: it cannot be captured.
        """
        ...


class CudaRecorder:
    """Captures CUDA graphs, all into one memory pool: what one needs on the way, the next may use again.

    Args:
        device: of everything captured.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: tuple[int, int] | None = None
        self._alive: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def record(self, run: Callable[[], tuple[Tensor, Tensor]]) -> Recording:
        """Run a function once, which compiles its kernels and allocates their workspaces, then capture it."""
        if not self._alive:  # a pool dies with its last graph and cannot be used again
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        # The outer context restores the stream even where the end of a failed capture raises.
        with torch.cuda.device(self._device), torch.cuda.stream(current):
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                run()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                outputs = run()
        self._alive.add(graph)
        return Recording(graph.replay, outputs)


class Key(NamedTuple):
    """What a graph is captured for, in its storage.

    Attributes:
        rows: B.
        width: Q.
        bound: slots that are read; None where the kernels find out by themselves.
        last: whether the head reads the last position of each row alone.
    """

    rows: int
    width: int
    bound: int | None
    last: bool


class Inputs:
    """The buffers that the graphs of one number of rows and one width read."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.tokens_BQ = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.first_B = torch.zeros(rows, dtype=torch.int64, device=device)

    def load(self, cache: DenseCache, tokens_BQ: Tensor) -> None:
        """Take over a cache's open span; rows beyond those of the cache write to slot 0 of rows that nobody reads."""
        span = cache.span
        if span.rows < len(self.first_B):
            self.first_B.zero_()
        self.tokens_BQ[: span.rows].copy_(tokens_BQ)
        if span.start is None:
            self.first_B[: span.rows].copy_(span.slots_BQ[:, 0])
        else:
            self.first_B[: span.rows].fill_(span.start)


class GraphStorage(Storage):
    """A storage with the graphs that write to it."""

    def __init__(self, layers: int, rows: int, slots: int) -> None:
        super().__init__(layers, rows, slots)
        self.graphs: dict[Key, Recording] = {}

    def grow(self, slots: int) -> None:
        """The tensors move: graphs that know their addresses are of no use any more."""
        self.graphs.clear()
        super().grow(slots)


class StoragePool:
    """Storages that caches lend and give back.

    Args:
        layers: of the model.

    Attributes:
        free: storages that no cache uses.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self.free: list[GraphStorage] = []

    def take(self, rows: int, slots: int) -> GraphStorage:
        """The smallest free storage that is large enough, as empty as a new one, else a new one.

        Storages that a new one could stand in for are released before it is made.
        """
        fitting = [each for each in self.free if each.rows >= rows and each.slots >= slots]
        if fitting:
            storage = min(fitting, key=lambda each: each.rows * each.slots)
            self.free.remove(storage)
            _clear(storage)
            return storage
        self.free = [each for each in self.free if each.rows > rows or each.slots > slots]
        return GraphStorage(self._layers, rows, slots)

    def give(self, storage: GraphStorage) -> None:
        """Take a storage back."""
        self.free.append(storage)


@torch.inference_mode()
def _clear(storage: Storage) -> None:
    """Zero it, which costs less than one step: not even a NaN of an earlier sequence is left."""
    for pair in storage.tensors:
        if pair is not None:
            torch._foreach_zero_(pair)


class GraphForward:
    """Stands in for an engine's forward where that is short.

    Args:
        engine: whose model is captured.
        recorder: captures; by default CUDA graphs.
        fuse: compile the model before it is captured.

    Attributes:
        pool: of the storages of this engine's caches.
        captured: graphs so far.
        refused: whether the model turned out not to be capturable.
    """

    def __init__(self, engine: Engine, recorder: Recorder | None = None, fuse: bool = True) -> None:
        # A cycle would keep the storages until garbage is collected.
        self._engine_of = weakref.ref(engine)
        self._fuse = fuse
        self._split: bool | None = None
        self._compiled: dict[tuple[bool, ...], Callable[..., tuple[Tensor, Tensor]]] = {}
        self._inputs: dict[tuple[int, int], Inputs] = {}
        self.pool = StoragePool(engine.layers)
        self.captured = 0
        self.refused = len({weight.device for weight in engine.model.parameters()}) > 1
        if self.refused:
            self._tell("decodes eagerly, its layers lie on several devices", None)
        else:
            self._recorder = recorder or CudaRecorder(engine.device)

    @property
    def _engine(self) -> Engine:
        return self._engine_of()

    def new_cache(self, rows: int, capacity: int) -> DenseCache:
        """An empty cache whose storage is lent from the pool."""
        engine = self._engine
        storage = self.pool.take(filled(rows), slots_for(capacity))
        cache = DenseCache(engine.layers, rows, engine.device, storage=storage)
        weakref.finalize(cache, self.pool.give, storage).atexit = False
        return cache

    def fits(self, cache: DenseCache, keep: str | None, tree: bool = False) -> bool:
        """Whether the open span of a cache can be read by a graph; trees are read without."""
        if self.refused or keep is None or tree:
            return False
        short = self._engine.groups * cache.span.width <= FOLD_ROWS
        return short and cache.in_order and cache.layers[-1].is_initialized

    @torch.inference_mode()
    def __call__(self, cache: DenseCache, tokens_BQ: Tensor, last: bool) -> tuple[Tensor, Tensor] | None:
        """Read tokens into the open span of a cache.

        Args:
            cache: with an open span that `fits`.
            tokens_BQ: int64 [B, Q].
            last: compute only the last position.

        Returns:
            hidden [B, K, H] and logits [B, K, V], K = 1 or Q; None where the model turns out not to be capturable.
        """
        storage, span = cache.storage, cache.span
        if self._split is None:
            self._split = serves(self._engine.device, storage.tensors) and self._kernels_run(storage)
        bound = None if self._split else min(max(_power(span.bound), _LEAST_SLOTS), storage.slots)
        key = Key(min(filled(span.rows), storage.rows), span.width, bound, last and span.width > 1)
        shape = key.rows, key.width
        if shape not in self._inputs:
            self._inputs[shape] = Inputs(*shape, self._engine.device)
        self._inputs[shape].load(cache, tokens_BQ)
        recording = storage.graphs.pop(key, None)
        if recording is None:
            try:
                recording = self._record(key, storage)
            except Exception as error:  # the model's code, its compiler and CUDA have no common one
                self.refused = True
                self._tell("cannot be captured as CUDA graphs and decodes eagerly, which is slower", error)
                return None
        storage.graphs[key] = recording  # as the one used last
        if len(storage.graphs) > _MOST_GRAPHS:
            del storage.graphs[next(iter(storage.graphs))]
        recording.replay()
        return tuple(output[: span.rows].clone() for output in recording.outputs)

    def _record(self, key: Key, storage: GraphStorage) -> Recording:
        inputs = self._inputs[key.rows, key.width]
        storages = [(keys[: key.rows], values[: key.rows]) for keys, values in storage.tensors]
        engine, split = self._engine, self._split
        attention = SPLIT if split else FOLDED
        with attending(engine.config, attention):
            function = self._function(key, storage)

        def run() -> tuple[Tensor, Tensor]:
            with attending(engine.config, attention):
                return function(engine, inputs.tokens_BQ, inputs.first_B, key.bound, storages, split, key.last)

        recording = self._recorder.record(run)
        self.captured += 1
        return recording

    def _function(self, key: Key, storage: GraphStorage) -> Callable[..., tuple[Tensor, Tensor]]:
        """What is captured: `forward`, compiled once for each combination of single or several rows and tokens."""
        kind = key.rows == 1, key.width == 1, key.last
        if self._fuse and kind not in self._compiled:
            function = compiled(forward)
            try:
                function(self._engine, *self._stand_ins(kind, storage))
                self._compiled[kind] = function
            except Exception as error:  # likewise
                self._fuse = False
                self._tell("cannot be compiled and is captured as it is, which is slower", error)
        return self._compiled[kind] if self._fuse else forward

    def _stand_ins(self, kind: tuple[bool, ...], storage: GraphStorage) -> tuple[object, ...]:
        """Arguments of `forward` of odd sizes: they coincide with nothing and so become symbols."""
        single, narrow, last = kind
        rows, width = 1 if single else STAND_IN_ROWS, 1 if narrow else STAND_IN_WIDTH
        device = self._engine.device
        tokens_BQ = torch.zeros(rows, width, dtype=torch.int64, device=device)
        first_B = torch.zeros(rows, dtype=torch.int64, device=device)
        storages = [
            tuple(tensor.new_zeros(rows, tensor.shape[1], _LEAST_SLOTS, tensor.shape[3]) for tensor in pair)
            for pair in storage.tensors
        ]
        bound = None if self._split else STAND_IN_BOUND
        return tokens_BQ, first_B, bound, storages, self._split, last

    def _kernels_run(self, storage: GraphStorage) -> bool:
        """Whether Triton works here: it needs a C compiler, for one thing."""
        keys, values = (tensor[:1] for tensor in storage.tensors[0])
        query = keys.new_zeros(1, keys.shape[1] * self._engine.groups, 1, keys.shape[3])
        try:
            split_attention(query, keys, values, reach_of(torch.zeros_like(query[:, 0, 0, 0]).long(), None), 1.0, 0.0)
        except Exception as error:  # likewise
            self._tell("is read without drafttrain's attention kernels, which is slower", error)
            return False
        return True

    def _tell(self, what: str, error: Exception | None) -> None:
        """A line in the log; of an error in a capture, whose end then fails too, the first is the reason."""
        reason = "" if error is None else f" ({' '.join(str(error.__context__ or error).split())[:200]})"
        _log.warning("%s %s%s.", type(self._engine.model).__name__, what, reason)


def forward(
    engine: Engine,
    tokens_BQ: Tensor,
    first_B: Tensor,
    bound: int | None,
    storages: list[tuple[Tensor, Tensor]],
    split: bool,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """A forward without choices that depend on values: what a graph is captured from.

    Args:
        engine: whose model reads.
        tokens_BQ: int64 [B, Q].
        first_B: int64, the slot and position of each row's first token.
        bound: slots that are read where attention is masked, else None.
        storages: keys and values of each layer, [B, N, S, D].
        split: whether attention is split, else masked.
        last: keep only the last position.

    Returns:
        hidden [B, K, H] and logits [B, K, V].
    """
    positions_BQ = first_B.unsqueeze(1) + torch.arange(tokens_BQ.shape[1], device=first_B.device)
    cache = Cache(layers=[GraphLayer(keys, values, positions_BQ, bound) for keys, values in storages])
    if split:
        masks = {kind: reach_of(first_B, window) for kind, window in engine.windows.items()}
    else:
        masks = {
            kind: folded_mask(positions_BQ, bound, window, engine.groups, engine.dtype)
            for kind, window in engine.windows.items()
        }
    return read_block(engine, tokens_BQ, positions_BQ, masks, cache, last)


def folded_mask(positions_BQ: Tensor, bound: int, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
    """An additive mask for folded queries over the first slots: [B, 1, G * Q, bound]."""
    query_BQ1 = positions_BQ.repeat(1, groups).unsqueeze(2)
    slots_S = torch.arange(bound, device=positions_BQ.device)
    visible_BQS = slots_S <= query_BQ1
    if window is not None:
        visible_BQS = visible_BQS & (slots_S > query_BQ1 - window)
    mask_BQS = torch.zeros(visible_BQS.shape, dtype=dtype, device=positions_BQ.device)
    return mask_BQS.masked_fill_(~visible_BQS, -torch.inf).unsqueeze(1)


def filled(rows: int) -> int:
    """Rows filled up to the next of 1, 2, 3, 4, 6, 8, 12, 16, ...: two sizes an octave.

    Example:
        >>> filled(5), filled(13)
        (6, 16)
    """
    power = _power(rows)
    between = power * 3 // 4
    return between if rows <= between else power


def slots_for(capacity: int) -> int:
    """Slots of a storage for so many tokens: eight sizes an octave, as long storages fill the memory of a device.

    Example:
        >>> slots_for(20), slots_for(1100), slots_for(33_000)
        (256, 1280, 36864)
    """
    step = max(_LEAST_SLOTS, _power(capacity) // 16)
    return -(-max(capacity, 1) // step) * step


def _power(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(size - 1, 0).bit_length()
