"""How the keys of a sequence are split between programs, and how their results become one.

The host knows shapes only (splits.py): how many splits a sequence of mean length should have, so
that the programs of the batch fill the multiprocessors (`Splits.even`), and how many it may have
at most (`Splits.most`, which sizes grid and scratch). Programs read the lengths of the batch and
derive from them the keys of a split, the same for all sequences, and from their own length which
splits are live. So a captured graph serves all lengths.

Short names: see rotation.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LN2, first_key_of, wide
from .rotation import narrow

# Lengths that a program reads at once.
_LENGTHS = tl.constexpr(128)


@triton.jit
def keys_of_sequence(i_b, cache_lens, kv_start, queries, window, WINDOW: tl.constexpr):
    """The keys that the queries of a sequence see, from low to high, and kv_start, at most high:
    three int32.

    cache_lens, kv_start: (pointer, stride) of (batch,); kv_start (None, 0): 0.
    """
    high = tl.load(cache_lens[0] + i_b * cache_lens[1]).to(tl.int32)
    start = first_key_of(i_b, kv_start, high)
    low = start
    if WINDOW:
        low = tl.maximum(low, high - queries - window + 1)
    return tl.minimum(low, high), high, start


@triton.jit
def tiles_of_split(
    cache_lens, batch, even, least, queries, window, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Tiles of a split, were tiles divisible: those of the batch, by ``batch * even``."""
    o_b = tl.arange(0, _LENGTHS)
    tiles = 0
    for b0 in range(0, batch, _LENGTHS):
        i_b = b0 + o_b
        n = tl.load(cache_lens[0] + i_b * cache_lens[1], mask=i_b < batch, other=0)
        if WINDOW:
            n = tl.minimum(n, window + queries - 1)
        tiles += tl.sum(tl.cdiv(n, BLOCK_N).to(tl.int32))
    return tl.maximum(tl.cdiv(tiles, batch * even), least)


@triton.jit
def split_keys(low, high, share, most, BLOCK_N: tl.constexpr):
    """How many splits the keys from low to high have, one at least, and the keys of each.

    Returns splits, the first key, a multiple of BLOCK_N, and keys of a split, another one.
    share: of `tiles_of_split`.
    """
    first = low // BLOCK_N
    tiles = tl.cdiv(high, BLOCK_N) - first
    splits = tl.minimum(tl.maximum((tiles + share // 2) // share, 1), most)
    each = tl.maximum(tl.cdiv(tiles, splits), 1)
    return tl.maximum(tl.cdiv(tiles, each), 1), first * BLOCK_N, each * BLOCK_N


@triton.jit
def _combine_row(
    out,
    lse,
    partial_out,
    partial_lse,
    i_b,
    i_t,
    i_h,
    row,
    rows,
    splits,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row of the result, of query i_t and head i_h, from those of its live splits.

    row, rows: its place among those of all sequences, int64. The rest: as in `decode_kernel`.
    """
    BLOCK_S: tl.constexpr = 2048 // BLOCK_D
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    top = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    for s0 in range(0, splits, BLOCK_S):
        live = s0 + o_s < splits
        offset = (s0 + o_s) * rows + row
        x = tl.load(partial_lse + offset, mask=live, other=float("-inf"))
        p_y = partial_out + offset[:, None] * DIM + o_d[None, :]
        y = tl.load(p_y, mask=live[:, None] & (o_d < DIM)[None, :], other=0.0)
        new_top = tl.maximum(top, tl.max(x, 0))
        # Splits that see nothing must not subtract infinities.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(x - base)
        alpha = tl.exp2(top - base)
        total = total * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * y, 0)
        top = new_top
    total_or_1 = tl.where(total == 0.0, 1.0, total)
    p_out = out[0] + i_b * out[1] + wide(i_t) * out[2] + i_h * out[3] + o_d
    tl.store(p_out, narrow(acc / total_or_1, out[0].dtype.element_ty), mask=o_d < DIM)
    tl.store(lse + row + tl.arange(0, 1), (top + tl.log2(total_or_1)) * LN2)


@triton.jit
def combine_if_last(
    p_count,
    out,
    lse,
    partial_out,
    partial_lse,
    i_b,
    i_hk,
    m0,
    m1,
    takers,
    rows,
    splits,
    queries,
    heads,
    groups,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows m0 to m1 of a KV head, by the last program of those that have their splits.

    p_count: how many of these have stored what they found; 0 again after the last one. takers:
    a bit for each query from that of row m0 on, 0 where the row is not one of these programs'.
    rows: of all sequences, int64. The rest: as in `decode_kernel`.
    """
    # All threads have stored before one says so, and none loads before it has the answer.
    tl.debug_barrier()
    if tl.atomic_add(p_count, 1, sem="acq_rel") == splits - 1:
        tl.store(p_count, 0)
        for r in range(m0, m1):
            i_t = r // groups
            i_h = i_hk * groups + r % groups
            if (takers >> (i_t - m0 // groups)) & 1 != 0:
                row = (i_b * heads + i_h) * queries + i_t
                of_row = (partial_out, partial_lse, i_b, i_t, i_h, row, rows, splits)
                _combine_row(out, lse, *of_row, DIM, BLOCK_D)
