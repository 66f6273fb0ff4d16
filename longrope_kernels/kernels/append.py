"""Appending: new keys and values of some tokens into a cache, k and v in one launch.

It is bound by memory, and at few tokens by its launch: each element is read once and written once,
16 bytes at a time, and a thread has those of k and of v in flight together. Where a token goes is
read by its program: from the lengths of the batch, or from a mapping. Not measured on a GPU yet.

Short names: see rotation.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..calls.records import AppendCall
from .launch import Launch, as_bytes, matrix_args, tensor_args, vector_args

_WARPS = 4
# Triton's default; there is no loop.
_STAGES = 3
# Programs that fill a GPU: from there on each takes twice the rows.
_FULL_GRID = 1024


def plan(call: AppendCall) -> Launch:
    """The launch of a call, for tensors that are not empty; no tensor is read."""
    k, v, cache, slot_mapping = call
    batch, tokens, heads, dim = k.shape
    stored = as_bytes(cache)[:2]
    float8 = stored[0].dtype == torch.uint8
    rows = batch * tokens * heads
    block_d = 1 << (dim - 1).bit_length()
    block_r = max(1, 32 * _WARPS * 16 // (block_d * k.element_size()))
    if rows >= _FULL_GRID * block_r:
        block_r *= 2
    constants = {
        "HEADS": heads,
        "DIM": dim,
        "FLOAT8": float8,
        "BLOCK_R": block_r,
        "BLOCK_D": block_d,
    }
    args = (
        tensor_args(k),
        tensor_args(v),
        *map(tensor_args, stored),
        matrix_args(slot_mapping),
        vector_args(cache.lens),
        matrix_args(cache.block_table),
        vector_args(cache.k_scale),
        vector_args(cache.v_scale),
        *(tokens, rows, cache.k.shape[1]),
    )
    return Launch(append_kernel, (-(-rows // block_r),), args, constants, _WARPS, _STAGES)


@triton.jit
def e4m3_of(x):
    """float8 (e4m3fn) codes (uint8) of float32: clamped to 448, to nearest even; NaN stays NaN.

    From the bits, so that one code path serves devices with and without the conversion, and the
    interpreter.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    rest = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = (rest - 0x3C000000 + 0x7FFFF + ((rest >> 20) & 1)) >> 20
    # Adding 2**14 aligns a subnormal's last bit, 2**-9, with the float's, and rounds on the way.
    shifted = rest.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(rest < 0x3C800000, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)


@triton.jit
def _stored(x, scale, i_h, exists, FLOAT8: tl.constexpr):
    """x (BLOCK_R, BLOCK_D) as the cache holds it; scale: (pointer or None, stride) of heads."""
    if FLOAT8:
        x = x.to(tl.float32)
        if scale[0] is not None:
            a = tl.load(scale[0] + i_h * scale[1], mask=exists, other=1.0)
            x = tl.div_rn(x, tl.broadcast_to(a[:, None], x.shape))
        x = e4m3_of(x)
    return x


@triton.jit
def _place(i_b, t, exists, slot_mapping, cache_lens, table, tokens, slots):
    """Where token t of row i_b goes: the row (or block) of the cache, the slot there, and if."""
    if slot_mapping[0] is not None:
        p_address = slot_mapping[0] + i_b * slot_mapping[1] + t * slot_mapping[2]
        address = tl.load(p_address, mask=exists, other=-1).to(tl.int64)
        written = address >= 0
        address = tl.maximum(address, 0)
        row = address // slots
        slot = address % slots
    else:
        length = tl.load(cache_lens[0] + i_b * cache_lens[1], mask=exists, other=0).to(tl.int64)
        slot = length - tokens + t
        written = exists & (slot >= 0)
        row = i_b
        if table[0] is not None:
            # Of 32 bits, which take a tenth of the instructions to divide.
            at = tl.maximum(slot, 0).to(tl.int32)
            p_row = table[0] + i_b * table[1] + at // slots * table[2]
            row = tl.load(p_row, mask=written, other=0).to(tl.int64)
            slot = (at % slots).to(tl.int64)
    return row, slot, written


# Sizes that change from call to call must not compile a kernel each.
@triton.jit(do_not_specialize=["tokens", "rows", "slots"])
def append_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    cache_lens,
    table,
    k_scale,
    v_scale,
    tokens,
    rows,
    slots,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_R rows of k and of v, a head of a token each, into the cache.

    Grid: (rows / BLOCK_R,). k, v: (pointer, batch stride, token stride, head stride) of (batch,
    tokens, HEADS, DIM); k_cache, v_cache: those of (rows or blocks, slots, HEADS, DIM), with FLOAT8
    bytes. slot_mapping: (pointer or None, row stride, stride) of (batch, tokens), and without it
    cache_lens: (pointer, stride) of (batch,), and table: (pointer or None, row stride, stride).
    k_scale, v_scale: (pointer or None, stride) of (HEADS,).
    """
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = r < rows
    i_h = r % HEADS
    token = r // HEADS
    i_b = token // tokens
    t = token % tokens
    row, slot, written = _place(i_b, t, exists, slot_mapping, cache_lens, table, tokens, slots)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    mask = written[:, None] & (o_d < DIM)
    b_k = tl.load(k[0] + (i_b * k[1] + t * k[2] + i_h * k[3])[:, None] + o_d, mask=mask)
    b_v = tl.load(v[0] + (i_b * v[1] + t * v[2] + i_h * v[3])[:, None] + o_d, mask=mask)
    b_k = _stored(b_k, k_scale, i_h, exists, FLOAT8)
    b_v = _stored(b_v, v_scale, i_h, exists, FLOAT8)
    p_k = k_cache[0] + (row * k_cache[1] + slot * k_cache[2] + i_h * k_cache[3])[:, None] + o_d
    p_v = v_cache[0] + (row * v_cache[1] + slot * v_cache[2] + i_h * v_cache[3])[:, None] + o_d
    tl.store(p_k, b_k, mask=mask)
    tl.store(p_v, b_v, mask=mask)
