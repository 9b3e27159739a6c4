"""The two Triton kernels of split attention. Importing this needs Triton; `split_attention` is what to call.

A step reads every live key and value once and computes little, so what counts is that all multiprocessors read at the
same time, however few rows and heads there are: the live keys of a row are divided among several programs (Dao et al.,
Flash-Decoding, 2023), each of which leaves an unfinished softmax, and a second kernel merges these.
"""

# B batch, Q query width, S slots, N query heads, M key heads, G = N / M, R = G * Q folded rows, D head size, P splits

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)

_MOST_ROWS = 64
"""Folded rows of one program; more are divided among programs that read the same keys, from the second-level cache."""


# Shapes that change from graph to graph are ordinary arguments, and not specialised on: nothing is compiled for them.
_SHAPES = ["key_heads", "groups", "width", "splits"]


@triton.jit(do_not_specialize=_SHAPES)
def _attend(
    query,
    keys,
    values,
    reach,
    sums,
    tops,
    masses,
    scale,
    softcap,
    query_row,
    query_head,
    query_token,
    key_row,
    key_head,
    key_slot,
    value_row,
    value_head,
    value_slot,
    key_heads,
    groups,
    width,
    splits,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One split of one key head of one row: unnormalised sum of values [R, D], greatest score and mass [R]."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    row = (head // key_heads).to(tl.int64)  # storages may have more than 2^31 entries
    key_of = (head % key_heads).to(tl.int64)
    first = tl.load(reach + 2 * row)
    window = tl.load(reach + 2 * row + 1)
    end = first + width
    begin = tl.maximum(first - window + 1, 0) // BLOCK_S * BLOCK_S
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_S), splits) * BLOCK_S
    low = begin + split * share
    high = tl.minimum(low + share, end)

    rows = groups * width
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    place = (head * splits + split).to(tl.int64) * rows + r
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_R], tl.float32)
    if low < high:
        at = (key_of * groups + r // width) * query_head + (r % width) * query_token
        held = (r < rows)[:, None] & (d < SIZE)[None, :]
        q_RD = tl.load(query + row * query_row + at[:, None] + d[None, :], mask=held, other=0.0)
        if WIDEN:
            q_RD = q_RD.to(tl.float32)
        position = first + r % width
        keys_SD = keys + row * key_row + key_of * key_head
        values_SD = values + row * value_row + key_of * value_head
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for start in range(low, high, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            # Nothing beyond the live range is read, so what an earlier sequence left there cannot matter.
            inside = s < high
            there = (d < SIZE)[:, None] & inside[None, :]
            k_DS = tl.load(keys_SD + d[:, None] + s[None, :] * key_slot, mask=there, other=0.0)
            if WIDEN:
                k_DS = k_DS.to(tl.float32)
            scores = tl.dot(q_RD, k_DS, input_precision="ieee") * scale
            if CAPPED:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            seen = (s[None, :] <= position[:, None]) & (s[None, :] > position[:, None] - window) & inside[None, :]
            scores = tl.where(seen, scores * _LOG2E, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
            weight = tl.exp2(scores - base[:, None])
            fade = tl.exp2(top - base)
            filled = inside[:, None] & (d < SIZE)[None, :]
            v_SD = tl.load(values_SD + s[:, None] * value_slot + d[None, :], mask=filled, other=0.0)
            mass = mass * fade + tl.sum(weight, 1)
            if WIDEN:
                v_SD = v_SD.to(tl.float32)
            total = total * fade[:, None] + tl.dot(weight.to(v_SD.dtype), v_SD, input_precision="ieee")
            top = higher
        tl.store(sums + place[:, None] * SIZE + d[None, :], total, mask=held)
    tl.store(tops + place, top, mask=r < rows)
    tl.store(masses + place, mass, mask=r < rows)


@triton.jit(do_not_specialize=_SHAPES)
def _merge(
    sums,
    tops,
    masses,
    out,
    key_heads,
    groups,
    width,
    splits,
    SIZE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One folded row of one key head: the softmax over all splits, written to [B, Q, N, D]."""
    head = tl.program_id(0)
    r = tl.program_id(1)
    rows = groups * width
    p = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    place = (head.to(tl.int64) * splits + p) * rows + r
    mass = tl.load(masses + place, mask=p < splits, other=0.0)
    live = mass > 0  # a split without keys, or with none that this row sees, left nothing
    top = tl.load(tops + place, mask=live, other=float("-inf"))
    weight = tl.where(live, tl.exp2(top - tl.max(top, 0)), 0.0)
    sums_PD = tl.load(sums + place[:, None] * SIZE + d[None, :], mask=live[:, None] & (d < SIZE)[None, :], other=0.0)
    merged = tl.sum(weight[:, None] * sums_PD, 0) / tl.sum(weight * mass, 0)
    row = head // key_heads
    query_head = head % key_heads * groups + r // width
    at = ((row * width + r % width).to(tl.int64) * (key_heads * groups) + query_head) * SIZE
    tl.store(out + at + d, merged.to(out.dtype.element_ty), mask=d < SIZE)


def launch(query: Tensor, keys: Tensor, values: Tensor, reach: Tensor, scale: float, softcap: float) -> Tensor:
    """Run both kernels; arguments as of `split_attention`."""
    rows, heads, width, size = query.shape
    key_heads = keys.shape[1]
    groups = heads // key_heads
    if query.stride(3) != 1:
        query = query.contiguous()
    block_d = max(16, triton.next_power_of_2(size))
    block_r = min(_MOST_ROWS, max(16, triton.next_power_of_2(groups * width)))  # a matrix product takes 16 rows
    block_s = max(16, min(64, 16384 // (block_d * keys.element_size())))
    tiles = triton.cdiv(groups * width, block_r)
    splits = choose_splits(rows * key_heads * tiles, triton.cdiv(keys.shape[2], block_s), _processors(query.device))
    shape = (rows * key_heads, splits, groups * width)
    sums = query.new_empty(*shape, size, dtype=torch.float32)
    tops, masses = (query.new_empty(shape, dtype=torch.float32) for _ in range(2))
    out = query.new_empty(rows, width, heads, size)
    with torch.cuda.device_of(query):
        _attend[(rows * key_heads, splits, tiles)](
            query,
            keys,
            values,
            reach,
            sums,
            tops,
            masses,
            scale,
            softcap,
            *query.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            key_heads,
            groups,
            width,
            splits,
            SIZE=size,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            BLOCK_S=block_s,
            CAPPED=softcap > 0,
            WIDEN=query.dtype == torch.bfloat16 and query.device.type == "cpu",  # the interpreter cannot multiply it
            num_warps=4,
            num_stages=3 if block_r <= 32 else 2,  # as many as the shared memory of smaller devices holds
        )
        _merge[(rows * key_heads, groups * width)](
            sums,
            tops,
            masses,
            out,
            key_heads,
            groups,
            width,
            splits,
            SIZE=size,
            BLOCK_P=triton.next_power_of_2(splits),
            BLOCK_D=block_d,
            num_warps=4,
        )
    return out


def choose_splits(programs: int, blocks: int, processors: int) -> int:
    """Among how many programs the keys of one head are divided: two programs for every multiprocessor in all.

    Args:
        programs: rows, key heads and tiles of folded rows together.
        blocks: of keys that a storage holds; a split needs one at least.
        processors: of the device.
    """
    return max(1, min(triton.cdiv(2 * processors, programs), blocks, 128))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
