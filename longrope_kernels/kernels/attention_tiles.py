"""What the attention kernels share: grids, the tiles of a sequence, masks and scores.

The grid is in the order "longest first": tiles from the last, which sees most keys when causal, to
the first, so that the short ones fill the gaps at the end. Heads run fastest, in sections whose k
and v fit the L2 cache together.

Short names: see rotation.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..calls.records import AttentionCall, Scores, Selection
from ..rope.tables import Tables
from .launch import vector_args
from .rotation import clamp_set, set_of_length

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# k and v of the heads that run together: about what the L2 of an A100 (40 MB) or H100 (50 MB) holds
# beside everything else.
_SECTION_BYTES = 32 * 2**20
# In tables of tiles: for every head_dim that is no multiple of 16. Its halves are not whole pieces
# of 16 bytes, and what loads and masks them takes registers.
UNEVEN = 0

# ----------------------------------------------------------------------------------------- launch


class Config(NamedTuple):
    """Rows of q and of k in a tile, warps of a program, and stages of the loop's pipeline.

    joined: both dimensions of pairs are in one operand (`pieces.JOINED`), where k is rotated
    before.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    joined: bool = False


class Sizes(NamedTuple):
    """What follows from the shapes of a call, for all kernels."""

    queries: int
    keys: int
    heads: int
    groups: int
    sequences: int
    packed: bool

    def args(self) -> tuple[int, ...]:
        """queries, keys, heads, groups, sequences and search_step of the kernels."""
        search_step = (1 << max(0, self.sequences - 1).bit_length()) // 2
        return (*self[:5], search_step)


def sizes_of(call: AttentionCall) -> Sizes:
    batch, queries, heads, _ = call.q.shape
    packed = call.selection.borders is not None
    sequences = call.selection.sequences(batch)
    return Sizes(queries, call.keys.k.shape[1], heads, call.groups, sequences, packed)


def rope_args(tables: Tables, selection: Selection) -> tuple[Any, ...]:
    """The tables, lengths and sets of the kernels."""
    return tables[:4], vector_args(selection.lengths), vector_args(selection.sets)


def mask_args(call: AttentionCall) -> tuple[Any, ...]:
    """The borders of packed sequences of q and k, and where keys start, of the kernels."""
    borders = vector_args(call.selection.borders), vector_args(call.keys.borders)
    return *borders, vector_args(call.keys.start)


def table_of(configs: dict[int, Any], arch: int) -> Any:
    """The entries of the newest architecture not above ``arch``.

    Those of 8.0 need no more than the 99 KB of shared memory of 8.6, 8.9 and 12.x.
    """
    if 0 < arch < 80:
        raise ValueError(
            "backend: 'triton' needs compute capability 8.0 or more for attention and decoding, "
            f"got a device of {arch // 10}.{arch % 10}; expected 'composed' (attention) or "
            "'reference'"
        )
    older = (known for known in configs if known <= arch and not 80 < known < 120 <= arch)
    return configs[max(older)]


def nearest(configs: dict[int, Any], arch: int, dim: int) -> Any:
    """The entry of `table_of` for the least head_dim that fits, or for those that are `UNEVEN`."""
    table = table_of(configs, arch)
    if dim % 16 and dim not in table and UNEVEN in table:
        return table[UNEVEN]
    return table[min(d for d in table if d >= dim)]


def score_args(scores: Scores) -> tuple[float, float]:
    """(scale, cap) of `cap_scores`, whose scores are in units of log 2."""
    if scores.cap > 0:
        return 2 * LOG2E.value * scores.scale / scores.cap, LOG2E.value * scores.cap
    return LOG2E.value * scores.scale, 0.0


def grid_of(
    tokens: int, heads: int, sizes: Sizes, block: int, bytes_read: int, sharing: int
) -> tuple[int, int, int]:
    """The programs of a call, the tiles of one head, and the heads of one section.

    Tiles of ``tokens`` begin where a packed sequence begins, so there can be one more for each
    sequence. bytes_read: what all tiles of ``sharing`` heads read.
    """
    tiles = tokens // block + sizes.sequences if sizes.packed else -(-tokens // block)
    heads *= 1 if sizes.packed else sizes.sequences
    section = max(1, _SECTION_BYTES // bytes_read) * sharing
    return tiles * heads, tiles, min(section, heads)


# ----------------------------------------------------------------------------------------- device


@triton.jit
def tile_of_program(tiles, section, heads_of_all):
    """The tile and the head (of all batch rows) of a program. Grid: (tiles * heads_of_all,).

    The order of programs: sections, tiles from the last, heads.
    """
    i_program = tl.program_id(0)
    i_section = i_program // (tiles * section)
    in_section = i_program % (tiles * section)
    width = tl.minimum(section, heads_of_all - i_section * section)
    return tiles - 1 - in_section // width, i_section * section + in_section % width


@triton.jit
def sequence_of_tile(i_tile, cu, sequences, search_step, BLOCK: tl.constexpr):
    """The packed sequence that a tile belongs to, and its place among the tiles of that sequence.

    cu: (pointer, stride) of (sequences + 1,). Sequence b has the tiles from cu[b] // BLOCK + b on,
    which is at least as many as it needs and asks no scan over the lengths.
    """
    i_sequence = 0
    while search_step > 0:
        candidate = i_sequence + search_step
        if candidate < sequences:
            begin = tl.load(cu[0] + candidate * cu[1]).to(tl.int32)
            if begin // BLOCK + candidate <= i_tile:
                i_sequence = candidate
        search_step = search_step >> 1
    begin = tl.load(cu[0] + i_sequence * cu[1]).to(tl.int32)
    return i_sequence, i_tile - begin // BLOCK - i_sequence


@triton.jit
def span(i_sequence, cu, tokens):
    """Where a sequence begins (int64) and how many tokens it has (int32); dense: 0 and all."""
    begin = tl.zeros((), tl.int64)
    count = tokens
    if cu[0] is not None:
        begin = tl.load(cu[0] + i_sequence * cu[1]).to(tl.int64)
        end = tl.load(cu[0] + (i_sequence + 1) * cu[1]).to(tl.int64)
        count = (end - begin).to(tl.int32)
    return begin, count


@triton.jit
def set_of_sequence(i_sequence, lengths, sets, p_max_length, SETS: tl.constexpr):
    """The factor set of a sequence; lengths, sets: (pointer or None, stride)."""
    i_set = 0
    if sets[0] is not None:
        i_set = clamp_set(tl.load(sets[0] + i_sequence * sets[1]), SETS)
    elif lengths[0] is not None:
        i_set = set_of_length(tl.load(lengths[0] + i_sequence * lengths[1]), p_max_length, SETS)
    return i_set


@triton.jit
def first_key_of(i_sequence, kv_start, keys):
    """The first key of a sequence that is seen, from 0 to ``keys``, int32.

    kv_start: (pointer, stride) of (sequences,), (None, 0): 0. Larger ones may not fit 32 bits.
    """
    first = 0
    if kv_start[0] is not None:
        first = tl.maximum(tl.load(kv_start[0] + i_sequence * kv_start[1]), 0)
        first = tl.minimum(first, keys).to(tl.int32)
    return first


@triton.jit
def visible(slot, j, keys, first_key, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether the query at ``slot`` sees key j; the shapes broadcast."""
    seen = (j >= first_key) & (j < keys)
    if CAUSAL:
        seen = seen & (j <= slot)
    if WINDOW:
        seen = seen & (slot - j < window)
        if not CAUSAL:
            seen = seen & (j - slot < window)
    return seen


@triton.jit
def cap_scores(s, scale, cap, SOFTCAP: tl.constexpr):
    """Products of q and k to scores in units of log 2.

    SOFTCAP: cap * tanh(x), where s * scale is 2 x in those units. The exponential has an absolute
    error of 1e-7 there, where tanh.approx has one of 5e-4.
    """
    if SOFTCAP:
        return cap - 2.0 * cap / (tl.exp2(s * scale) + 1.0)
    return s * scale


@triton.jit
def wide(offset):
    """int32 to int64; a plain number in the interpreter, where loops count in those."""
    return tl.zeros((), tl.int64) + offset


@triton.jit
def _split_range(low, all_low, all_high, high, BLOCK: tl.constexpr):
    """low <= all_low <= all_high <= about high, the first three multiples of BLOCK.

    Tiles from all_low to all_high need no mask.
    """
    low = tl.maximum(low, 0) // BLOCK * BLOCK
    high = tl.maximum(high, low)
    all_low = tl.minimum(tl.cdiv(tl.maximum(all_low, low), BLOCK) * BLOCK, high)
    all_low = tl.cdiv(all_low, BLOCK) * BLOCK
    all_high = tl.maximum(tl.maximum(all_high, 0) // BLOCK * BLOCK, all_low)
    return low, all_low, all_high, high


@triton.jit
def keys_of_queries(
    m0,
    queries,
    keys,
    first_key,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The keys that some query of the tile at m0 sees, from low to high, and among them those that
    all of them see, in whole tiles: low, all_low, all_high, high. No key where m0 >= queries.
    """
    first = m0 + keys - queries
    last = tl.minimum(m0 + BLOCK_M, queries) - 1 + keys - queries
    low = first_key
    all_low = first_key
    high = tl.where(m0 < queries, keys, 0)
    all_high = high
    if CAUSAL:
        high = tl.minimum(high, last + 1)
        all_high = tl.minimum(all_high, first + 1)
    if WINDOW:
        low = tl.maximum(low, first - window + 1)
        all_low = tl.maximum(all_low, last - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, last + window)
            all_high = tl.minimum(all_high, first + window)
    return _split_range(low, all_low, all_high, high, BLOCK_N)


@triton.jit
def queries_of_keys(
    n0,
    queries,
    keys,
    first_key,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The queries that see some key of the tile at n0, from low to high, and among them those that
    see all of them, in whole tiles: low, all_low, all_high, high. No query where n0 >= keys.
    """
    first = n0 - keys + queries
    last = tl.minimum(n0 + BLOCK_N, keys) - 1 - keys + queries
    low = 0
    all_low = 0
    high = tl.where((n0 < keys) & (n0 + BLOCK_N > first_key), queries, 0)
    all_high = tl.where(n0 < first_key, 0, high)
    if CAUSAL:
        low = tl.maximum(low, first)
        all_low = tl.maximum(all_low, last)
    if WINDOW:
        high = tl.minimum(high, last + window)
        all_high = tl.minimum(all_high, first + window)
        if not CAUSAL:
            low = tl.maximum(low, first - window + 1)
            all_low = tl.maximum(all_low, last - window + 1)
    return _split_range(low, all_low, all_high, high, BLOCK_M)


@triton.jit
def start_of_rows(i_h, sinks, joins, BLOCK_M: tl.constexpr):
    """The largest score so far (in units of log 2), and the sum of the weights relative to it.

    Before any key it is the sink of head i_h, one or (BLOCK_M,), where ``joins``, which has weight
    and no value, or nothing. sinks: pointer or None.
    """
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + i_h).to(tl.float32) * LOG2E
        top = tl.where(joins, sink, top)
        total = tl.where(joins, 1.0, total)
    return top, total
