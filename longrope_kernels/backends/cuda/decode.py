"""Decoding by the compiled CUDA backend (csrc/cuda/decode.h): splits, their scratch, the call."""

from __future__ import annotations

import torch

from ...calls.records import DecodeCall
from ...kernels.splits import Splits, choose_splits
from .device import (
    TYPES,
    emulating,
    extension,
    integers,
    matrix,
    on_device,
    place_of,
    rope_of,
    strided,
)

# Keys of a tile, and rows of a block; csrc/cuda/decode.h has the same.
_TILE = 64
_ROWS = 8
# Blocks that run on a multiprocessor at once, by the largest head_dim of a kernel.
_BLOCKS = {64: 4, 128: 3, 256: 2}
# Tiles that are worth a block.
_LEAST_TILES = 2
# What the emulator stands for: enough that small tests see several splits.
_EMULATED_MULTIPROCESSORS = 16


def _splits_of(call: DecodeCall) -> Splits:
    (batch, queries, heads, dim), kv_heads = call.q.shape, call.keys.heads
    capacity = call.keys.capacity
    units = batch * kv_heads * -(-queries * (heads // kv_heads) // _ROWS)
    blocks = next(count for most, count in _BLOCKS.items() if dim <= most)
    if emulating():
        return choose_splits(units, batch, capacity, _TILE, _EMULATED_MULTIPROCESSORS, 1)
    multiprocessors = torch.cuda.get_device_properties(call.q.device).multi_processor_count
    places = multiprocessors * blocks
    return choose_splits(units, batch, capacity, _TILE, places, _LEAST_TILES)


def decode(call: DecodeCall, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Attend to the cache, into out (B, q_len, Hq, D) and lse (B, Hq, q_len) float32, contiguous.

    q is bfloat16 or float16, the caches of that dtype or float8_e4m3fn. What is launched follows
    from shapes and strides alone, so that one captured graph serves all lengths.
    """
    q, cache, tables, selection, scores = call
    if out.numel() == 0:
        return
    if cache.empty:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    batch, queries, heads, dim = q.shape
    splits = _splits_of(call)
    scratch = None
    if splits.most > 1:
        shape = (splits.most, *lse.shape)
        scratch = lse.new_empty(*shape, dim), lse.new_empty(shape)
    with on_device(q):
        extension().decode(
            (TYPES[q.dtype], cache.k.dtype == torch.float8_e4m3fn),
            (batch, queries, heads, cache.heads, dim),
            strided(q),
            strided(out),
            lse.data_ptr(),
            strided(cache.k),
            strided(cache.v),
            (*matrix(cache.block_table), cache.k.shape[1]),
            (*_vector(cache.k_scale), *_vector(cache.v_scale)),
            integers(cache.lens),
            integers(cache.start),
            (*matrix(cache.positions), _is_int64(cache.positions)),
            rope_of(tables),
            (integers(selection.lengths), integers(selection.sets), _of_queries(selection.lengths)),
            tables.interleaved,
            scores.scale,
            min(scores.window, 2**30),
            scores.cap,
            splits,
            (0, 0) if scratch is None else (scratch[0].data_ptr(), scratch[1].data_ptr()),
            place_of(q),
        )


def _of_queries(lengths: torch.Tensor | None) -> int:
    """The stride of lengths between queries."""
    return 0 if lengths is None or lengths.dim() == 1 else lengths.stride(1)


def _vector(x: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _is_int64(x: torch.Tensor | None) -> bool:
    return x is not None and x.dtype == torch.int64
