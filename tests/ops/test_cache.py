from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.ops.cache import DenseCache

CPU = torch.device("cpu")


def write(cache: DenseCache, values: list[list[int]], counts: list[int] | None = None) -> torch.Tensor:
    """Append one number a token, in both layers; returns what layer 1 may read, [B, S]."""
    states = torch.tensor(values, dtype=torch.float32)[:, None, :, None].expand(-1, 2, -1, 3)
    cache.open(states.shape[2])
    for layer in (0, 1):
        keys, held = cache.update(states + layer, -states - layer, layer)
        assert torch.equal(keys, -held)
    cache.advance(counts)
    return keys[:, 0, :, 0] - 1


def content(cache: DenseCache) -> list[list[int]]:
    stored = cache.layers[0].keys[:, 0, :, 0].tolist()
    return [[int(x) for x in stored[row][: cache.lengths[row]]] for row in range(cache.rows)]


def test_rows_of_unequal_length_are_written_behind_their_own_ends():
    cache = DenseCache(2, 3, CPU, block=4)
    write(cache, [[1, 2, 3], [4, 0, 0], [5, 6, 0]], [3, 1, 2])
    write(cache, [[7, 8], [9, 10], [11, 12]])
    assert content(cache) == [[1, 2, 3, 7, 8], [4, 9, 10], [5, 6, 11, 12]]


def test_rollback_moves_nothing():
    cache = DenseCache(2, 2, CPU)
    write(cache, [[1, 2, 3, 4], [5, 6, 7, 8]])
    before = cache.layers[0].keys
    stored = before.clone()
    cache.rollback([1, 3])
    assert cache.layers[0].keys is before
    assert torch.equal(before, stored)
    write(cache, [[9], [10]])
    assert content(cache) == [[1, 9], [5, 6, 7, 10]]


def test_growth_keeps_the_content_and_goes_by_blocks():
    cache = DenseCache(2, 1, CPU, block=4)
    for start in range(0, 30, 3):
        write(cache, [[start, start + 1, start + 2]])
    assert content(cache) == [list(range(30))]
    assert cache.slots % 4 == 0
    assert torch.equal(cache.positions_BS[0], torch.arange(cache.slots))


def test_only_the_live_range_is_read():
    cache = DenseCache(2, 2, CPU, capacity=512)
    write(cache, [[1, 2, 3], [4, 5, 0]], [3, 2])
    assert write(cache, [[6], [7]]).shape == (2, 4)


def test_positions_follow_the_rows():
    cache = DenseCache(2, 2, CPU)
    write(cache, [[1, 2, 3], [4, 0, 0]], [3, 1])
    cache.open(2)
    assert cache.query_positions().tolist() == [[3, 4], [1, 2]]


def test_rows_that_stay_move_only_forward():
    cache = DenseCache(2, 4, CPU)
    write(cache, [[1, 1], [2, 2], [3, 3], [4, 4]], [2, 1, 2, 1])
    cache.keep([0, 3, 2])
    assert content(cache) == [[1, 1], [4], [3, 3]]
    write(cache, [[5], [6], [7]])
    assert content(cache) == [[1, 1, 5], [4, 6], [3, 3, 7]]
    with pytest.raises(ValueError, match="forward"):
        cache.keep([1, 0])


def test_dropped_slots_leave_the_others_their_positions():
    cache = DenseCache(2, 2, CPU, block=8)
    write(cache, [[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    cache.keep_slots(0, torch.tensor([0, 3, 4]))
    assert content(cache) == [[10, 13, 14], [20, 21, 22, 23, 24]]
    cache.open(2)
    positions = cache.query_positions()
    assert positions.tolist() == [[5, 6], [5, 6]]
    visible = cache.visible(positions, window=3)
    assert visible.shape == (2, 2, 7)
    # Row 0 holds positions 0, 3, 4, 5, 6, then slots of the future; a window of three sees two tokens back.
    assert visible[0].int().tolist() == [[0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]]
    assert visible[1].int().tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1]]


def test_slots_dropped_before_growth_and_departure_stay_consistent():
    cache = DenseCache(2, 3, CPU, block=4)
    write(cache, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    cache.keep_slots(2, torch.tensor([1, 3]))
    cache.keep([0, 2])
    write(cache, [[13, 14, 15], [16, 17, 18]])
    assert content(cache) == [[1, 2, 3, 4, 13, 14, 15], [10, 12, 16, 17, 18]]
    assert cache.positions_BS[1, :5].tolist() == [1, 3, 4, 5, 6]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(1, 5), st.integers(0, 2**30)),
        st.tuples(st.just("rollback"), st.integers(0, 2**30)),
        st.tuples(st.just("leave"), st.integers(0, 2**30)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), OPERATIONS)
def test_the_cache_holds_what_lists_would_hold(rows, operations):
    cache = DenseCache(2, rows, CPU, block=2)
    texts: list[list[int]] = [[] for _ in range(rows)]
    fresh = iter(range(1, 10_000))
    write(cache, [[next(fresh)] for _ in texts])
    texts = [[place + 1] for place in range(rows)]
    for name, *numbers in operations:
        if name == "write":
            width, seed = numbers
            block = [[next(fresh) for _ in range(width)] for _ in texts]
            counts = [(seed >> 3 * row) % (width + 1) for row in range(len(texts))]
            write(cache, block, counts)
            texts = [text + new[:count] for text, new, count in zip(texts, block, counts, strict=True)]
        elif name == "rollback":
            lengths = [(numbers[0] >> 3 * row) % (len(text) + 1) for row, text in enumerate(texts)]
            cache.rollback(lengths)
            texts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        elif len(texts) > 1:
            gone = numbers[0] % len(texts)
            kept = list(range(len(texts) - 1))
            if gone < len(texts) - 1:
                kept[gone] = len(texts) - 1
            cache.keep(kept)
            texts = [texts[row] for row in kept]
        assert content(cache) == texts
        assert cache.lengths == [len(text) for text in texts]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_one_path_of_a_tree_is_kept_as_a_chain(data):
    """Whatever path, in rows of unlike lengths: text ++ path, and nothing before the tree has moved."""
    rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 7))
    starts = [data.draw(st.integers(0, 4)) for _ in range(rows)]
    cache = DenseCache(2, rows, CPU, block=4)
    write(cache, [[10 * row + place for place in range(4)] for row in range(rows)], starts)
    texts = [line[:start] for line, start in zip(content(cache), starts, strict=True)] if any(starts) else [[]] * rows
    nodes = [[100 * (row + 1) + node for node in range(width)] for row in range(rows)]
    write(cache, nodes)
    paths = [sorted(data.draw(st.sets(st.integers(0, width - 1)))) for _ in range(rows)]
    cache.keep_path(starts, paths)
    kept = [[nodes[row][node] for node in path] for row, path in enumerate(paths)]
    assert content(cache) == [text + more for text, more in zip(texts, kept, strict=True)]
    assert cache.in_order
    assert torch.equal(cache.layers[1].keys[..., 0], -cache.layers[1].values[..., 0])
    write(cache, [[7]] * rows)
    assert content(cache) == [text + more + [7] for text, more in zip(texts, kept, strict=True)]


def test_a_path_that_lies_where_it_belongs_is_not_copied():
    cache = DenseCache(2, 1, CPU)
    write(cache, [[1, 2, 3, 4, 5]])
    for layer in cache.layers:
        layer.move_slots = None
    cache.keep_path([1], [[0, 1, 2]])
    assert content(cache) == [[1, 2, 3, 4]]
