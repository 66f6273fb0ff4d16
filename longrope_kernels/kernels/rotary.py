"""The standalone rotation: q and k in one launch, forward and backward, in place or not.

It is bound by memory: each element is read once and written once. By Little's law an H200
(4.8 TB/s, a latency of about 1 us) wants some 40 KB in flight on each multiprocessor, reads and
writes together. A thread loads 16 bytes at a time and keeps the next group of four heads in flight
while it rotates the present one. Half pairing, 16-bit, 128 dimensions: 8 loads and 127 registers a
thread on sm_90, so 4 programs or 16 warps on a multiprocessor and 64 KB of reads in flight;
interleaved: 4 loads, 80 registers, 24 warps, 48 KB. No shipped variant needs more than 168
registers (tests/test_codegen.py), which is 3 programs and 48 KB at 8 loads. Not measured on a GPU
yet.

Short names: see rotation.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..calls.records import RotaryCall
from .launch import Launch, matrix_args, tensor_args, vector_args
from .rotation import (
    below_threshold,
    clamp_set,
    cos_sin,
    narrow,
    phase,
    rotate,
    sequence_of_token,
    set_of_length,
)

# Programs that fill a GPU: about 130 multiprocessors (A100 108, H100 and H200 132), four
# programs of four warps on each.
_FULL_GRID = 512
# Triton's default; the loop has no product whose loads it would pipeline.
_STAGES = 3


# ----------------------------------------------------------------------------------------- launch


class Tile(NamedTuple):
    """What one program holds: ``tokens`` of one batch row, ``heads`` heads at a time."""

    tokens: int
    heads: int
    warps: int


# What benchmarks/tune.py tries beside that of `choose_tile`.
CANDIDATES = tuple(
    Tile(tokens, heads, warps)
    for tokens in (4, 8, 16, 32)
    for heads in (1, 2, 4, 8)
    for warps in (2, 4, 8)
)


def choose_tile(
    seq: int, heads: int, pairs: int, rest: int, itemsize: int, interleaved: bool
) -> Tile:
    """The tile for batch rows of ``seq`` tokens, and q and k of at most ``heads`` heads.

    A program is 128 threads, and a row of one head takes one for each 16 bytes of its largest part
    (a half, in the half pairing). The others take different tokens, so that a thread holds the
    cosines of one token and uses them for every head. Where there are too few tokens (decode)
    they take different heads instead. ``rest`` counts the dimensions to copy.
    """
    rotated = _power_of_2(pairs) * (2 if interleaved else 1)
    lanes = max(1, max(rotated, _power_of_2(rest)) * itemsize // 16)
    tokens = min(max(1, 128 // lanes), _power_of_2(seq))
    busy = lanes * tokens
    block_h = min(max(1, 128 // busy, min(4, 512 // busy)), _power_of_2(heads))
    return Tile(tokens, block_h, min(max(1, busy * block_h // 32), 4))


def choose_groups(programs: int, groups: int) -> int:
    """How many of the ``groups`` of heads one program takes, where tokens alone make ``programs``.

    All of them where those fill the GPU: then cosine and sine are computed once per token and
    pair. Fewer where they do not: parallelism is worth more than those instructions.
    """
    splits = min(groups, _ceil_div(_FULL_GRID, programs))
    return _ceil_div(groups, splits)


def plan(
    call: RotaryCall, q_out: torch.Tensor, k_out: torch.Tensor, tile: Tile | None = None
) -> Launch | None:
    """The launch that rotates q and k into q_out and k_out, which may be they.

    tile: instead of that of `choose_tile`. None where there is nothing to rotate. Nothing is
    allocated, and no tensor is read.
    """
    q, k, positions, tables, selection, conjugate = call
    shape, k_heads = q.shape, k.shape[2]
    if shape[0] == 0 or shape[1] == 0 or shape[2] + k_heads == 0:
        return None
    in_place = q_out is q and k_out is k
    grid, sizes, constants, warps = _geometry(
        *shape,
        k_heads,
        tables.sets,
        tables.pairs,
        q.element_size(),
        tables.interleaved,
        conjugate,
        in_place,
        selection.sequences(shape[0]),
        tile,
    )
    args = (
        tensor_args(q),
        tensor_args(k),
        tensor_args(q_out),
        tensor_args(k_out),
        matrix_args(positions),
        tables[:4],
        vector_args(selection.lengths),
        vector_args(selection.sets),
        vector_args(selection.borders),
        *sizes,
    )
    return Launch(rotary_kernel, grid, args, constants, warps, _STAGES)


@lru_cache(maxsize=1024)
def _geometry(
    batch: int,
    seq: int,
    q_heads: int,
    dim: int,
    k_heads: int,
    n_sets: int,
    pairs: int,
    itemsize: int,
    interleaved: bool,
    conjugate: bool,
    in_place: bool,
    sequences: int,
    tile: Tile | None,
) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int], int]:
    """What follows from shapes: the grid, the kernel's sizes and its constants, and the warps."""
    rest = 0 if in_place else dim - 2 * pairs
    if tile is None:
        tile = choose_tile(seq, max(q_heads, k_heads), pairs, rest, itemsize, interleaved)
    tiles = _ceil_div(seq, tile.tokens)
    groups = _ceil_div(q_heads, tile.heads) + _ceil_div(k_heads, tile.heads)
    of_program = choose_groups(batch * tiles, groups)
    constants = {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "PAIRS": pairs,
        "REST": rest,
        "SETS": n_sets,
        "INTERLEAVED": interleaved,
        "CONJUGATE": conjugate,
        "BLOCK_T": tile.tokens,
        "BLOCK_H": tile.heads,
        "BLOCK_P": _power_of_2(pairs),
        "BLOCK_REST": _power_of_2(rest),
    }
    sizes = (seq, tiles, of_program, sequences, _power_of_2(sequences) // 2)
    return (batch * tiles, _ceil_div(groups, of_program)), sizes, constants, tile.warps


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


# ----------------------------------------------------------------------------------------- kernel


@triton.jit
def _token_cos_sin(
    i_b,
    o_s,
    in_seq,
    positions,
    rope,
    lengths,
    sets,
    borders,
    sequences,
    search_step,
    PAIRS: tl.constexpr,
    SETS: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``a cos`` and ``a sin`` of tokens ``o_s`` of row ``i_b``: two (BLOCK_T, BLOCK_P) float32."""
    p_n = positions[0] + i_b * positions[1] + o_s * positions[2]
    n = tl.load(p_n, mask=in_seq, other=0).to(tl.int64)

    i_set = 0
    if sets[0] is not None or lengths[0] is not None:
        i_sequence = i_b
        if borders[0] is not None:
            i_sequence = sequence_of_token(o_s, borders[0], borders[1], sequences, search_step)
        if sets[0] is not None:
            i_set = clamp_set(tl.load(sets[0] + i_sequence * sets[1]), SETS)
        else:
            length = tl.load(lengths[0] + i_sequence * lengths[1])
            i_set = set_of_length(length, rope[3], SETS)

    original = below_threshold(n, tl.load(rope[1] + i_set))
    a = tl.where(original, 1.0, tl.load(rope[2] + i_set).to(tl.float32))
    row = i_set * 2 + tl.where(original, 0, 1)
    o_p = tl.arange(0, BLOCK_P)
    step = tl.load(
        rope[0] + row[:, None] * PAIRS + o_p[None, :], mask=(o_p < PAIRS)[None, :], other=0
    )
    cos, sin = cos_sin(phase(n[:, None], step))
    return cos * a[:, None], sin * (-a if CONJUGATE else a)[:, None]


@triton.jit
def _rows(
    i_group,
    i_b,
    o_s,
    q,
    k,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Where the rows of a group of heads begin; the groups of q come before those of k.

    o_s: the token of each row, (BLOCK_H * BLOCK_T,): all tokens of one head, then of the next. Two
    axes and no third leave Triton one order for the threads, whatever its version: neighbouring
    ones take neighbouring tokens, and a thread the heads of one token, whose cosines it holds.
    Returns pointers (BLOCK_H * BLOCK_T, 1), and which heads exist.
    """
    Q_GROUPS: tl.constexpr = (Q_HEADS + BLOCK_H - 1) // BLOCK_H
    # A branch for each keeps what the compiler knows of alignment where one of them is absent.
    if K_HEADS == 0:
        p, stride_b, stride_s, stride_h = q[0], q[1], q[2], q[3]
        heads = Q_HEADS
        begin = 0
    elif Q_HEADS == 0:
        p, stride_b, stride_s, stride_h = k[0], k[1], k[2], k[3]
        heads = K_HEADS
        begin = 0
    else:
        of_q = i_group < Q_GROUPS
        p = tl.where(of_q, q[0], k[0])
        stride_b = tl.where(of_q, q[1], k[1])
        stride_s = tl.where(of_q, q[2], k[2])
        stride_h = tl.where(of_q, q[3], k[3])
        heads = tl.where(of_q, Q_HEADS, K_HEADS)
        begin = tl.where(of_q, 0, Q_GROUPS)
    h0 = (i_group - begin) * BLOCK_H
    o_h = h0 + tl.arange(0, BLOCK_H * BLOCK_T) // BLOCK_T
    if Q_HEADS % BLOCK_H == 0 and K_HEADS % BLOCK_H == 0:
        exist = tl.zeros_like(o_h) + h0 < heads  # one predicate for all rows of a thread
    else:
        exist = o_h < heads
    offsets = o_s * stride_s + o_h.to(tl.int64) * stride_h
    return (p + i_b * stride_b + offsets)[:, None], exist[:, None]


@triton.jit
def _of_heads(x, BLOCK_H: tl.constexpr):
    """x (BLOCK_T, BLOCK_P), which all heads share, for the rows of `_rows`."""
    x = tl.broadcast_to(x[None, :, :], (BLOCK_H, x.shape[0], x.shape[1]))
    return tl.reshape(x, (BLOCK_H * x.shape[1], x.shape[2]))


@triton.jit
def _load(rows, mask, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr):
    """The rotated dimensions as they lie in memory: two halves, or all of them, twice.

    Conversion and splitting come later: they would wait for the data.
    """
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_P)[None, :]
        x_i = tl.load(rows + o_d, mask=mask & (o_d < 2 * PAIRS))
        x_j = x_i
    else:
        o_d = tl.arange(0, BLOCK_P)[None, :]
        mask = mask & (o_d < PAIRS)
        x_i = tl.load(rows + o_d, mask=mask)
        x_j = tl.load(rows + PAIRS + o_d, mask=mask)
    return x_i, x_j


@triton.jit
def _rotate_and_store(
    rows,
    mask,
    x_i,
    x_j,
    cos,
    sin,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Rotate what `_load` returned and store it to ``rows``. cos and sin: (rows, BLOCK_P)."""
    dtype: tl.constexpr = x_i.dtype
    if INTERLEAVED:
        x_i, x_j = tl.split(tl.reshape(x_i, (x_i.shape[0], BLOCK_P, 2)))
    y_i, y_j = rotate(x_i, x_j, cos, sin)
    y_i, y_j = narrow(y_i, dtype), narrow(y_j, dtype)
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_P)[None, :]
        tl.store(rows + o_d, tl.interleave(y_i, y_j), mask=mask & (o_d < 2 * PAIRS))
    else:
        o_d = tl.arange(0, BLOCK_P)[None, :]
        mask = mask & (o_d < PAIRS)
        tl.store(rows + o_d, y_i, mask=mask)
        tl.store(rows + PAIRS + o_d, y_j, mask=mask)


# Sizes that change from call to call must not compile a kernel each.
@triton.jit(do_not_specialize=["seq", "tiles", "groups", "sequences", "search_step"])
def rotary_kernel(
    q,
    k,
    q_out,
    k_out,
    positions,
    rope,
    lengths,
    sets,
    borders,
    seq,
    tiles,
    groups,
    sequences,
    search_step,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    SETS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotate BLOCK_T tokens of one batch row in ``groups`` groups of BLOCK_H heads of q or k.

    q, k, q_out, k_out: (pointer, batch stride, token stride, head stride) of (B, seq, heads,
    2 * PAIRS + REST), the last stride 1. positions: (pointer, batch stride, token stride) of
    (B, seq) int32 or int64. rope: pointers to steps (SETS, 2, PAIRS) int64, n_hat (SETS,) int64,
    attention_factor (SETS,) float64, max_length (SETS,) int64. lengths, sets: (pointer or None,
    stride) of (sequences,), borders of (sequences + 1,). Strides count elements.

    Grid: (B * tiles, all groups / ``groups``), ``tiles`` programs for the tokens of a row.
    Dimensions from 2 * PAIRS on are copied; in place, REST is 0 and they are left alone.
    """
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    s0 = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_T
    o_s = s0 + tl.arange(0, BLOCK_T)
    in_seq = o_s < seq
    row_s = s0 + tl.arange(0, BLOCK_H * BLOCK_T) % BLOCK_T
    i_begin = tl.program_id(1) * groups
    i_end = i_begin + groups

    rows, exists = _rows(i_begin, i_b, row_s, q, k, Q_HEADS, K_HEADS, BLOCK_T, BLOCK_H)
    mask = exists & (row_s < seq)[:, None]
    x_i, x_j = _load(rows, mask, PAIRS, INTERLEAVED, BLOCK_P)
    # Without it ptxas moves these loads below the chain of loads that ends in cosine and sine,
    # and the two latencies add up.
    tl.debug_barrier()
    cos, sin = _token_cos_sin(
        i_b,
        o_s,
        in_seq,
        positions,
        rope,
        lengths,
        sets,
        borders,
        sequences,
        search_step,
        PAIRS,
        SETS,
        CONJUGATE,
        BLOCK_P,
    )
    cos, sin = _of_heads(cos, BLOCK_H), _of_heads(sin, BLOCK_H)
    for i_group in range(i_begin, i_end):
        rows_out, _ = _rows(i_group, i_b, row_s, q_out, k_out, Q_HEADS, K_HEADS, BLOCK_T, BLOCK_H)
        rows, exists = _rows(i_group + 1, i_b, row_s, q, k, Q_HEADS, K_HEADS, BLOCK_T, BLOCK_H)
        tokens = tl.where(i_group + 1 < i_end, seq, 0)  # none after the last group
        mask_next = exists & (row_s < tokens)[:, None]
        next_i, next_j = _load(rows, mask_next, PAIRS, INTERLEAVED, BLOCK_P)
        _rotate_and_store(rows_out, mask, x_i, x_j, cos, sin, PAIRS, INTERLEAVED, BLOCK_P)
        if REST > 0:
            # The wait for these overlaps with that for the next group.
            rows, _ = _rows(i_group, i_b, row_s, q, k, Q_HEADS, K_HEADS, BLOCK_T, BLOCK_H)
            o_rest = 2 * PAIRS + tl.arange(0, BLOCK_REST)[None, :]
            mask_rest = mask & (o_rest < 2 * PAIRS + REST)
            rest = tl.load(rows + o_rest, mask=mask_rest)
            tl.store(rows_out + o_rest, rest, mask=mask_rest)
        x_i, x_j, mask = next_i, next_j, mask_next
