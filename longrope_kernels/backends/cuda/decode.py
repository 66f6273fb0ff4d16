"""Decoding by the compiled CUDA backend (csrc/cuda/decode.h): splits, their scratch, the call."""

from __future__ import annotations

import torch

from ...calls.masks import see_nothing
from ...calls.records import DecodeCall
from ...kernels.splits import Splits, choose_splits, counters_for
from .device import emulating, extension, on_device, place_of

# Keys of a tile, and rows of a block; csrc/cuda/decode.h has the same.
_TILE = 64
_ROWS = 8
# Blocks that run on a multiprocessor at once, by the largest head_dim of a kernel.
_BLOCKS = {64: 4, 128: 3, 256: 2}
# Tiles that are worth a block.
_LEAST_TILES = 2
# What the emulator stands for: enough that small tests see several splits.
_EMULATED_MULTIPROCESSORS = 16


def _units_of(call: DecodeCall) -> int:
    """Blocks, were nothing split."""
    (batch, queries, heads, _), kv_heads = call.q.shape, call.keys.heads
    return batch * kv_heads * -(-queries * (heads // kv_heads) // _ROWS)


def _splits_of(call: DecodeCall, units: int) -> Splits:
    batch, _, _, dim = call.q.shape
    capacity = call.keys.capacity
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
    q = call.q
    if out.numel() == 0:
        return
    if call.keys.empty:
        see_nothing(out, lse, call.sinks)
        return
    units = _units_of(call)
    splits = _splits_of(call, units)
    partial = 0, 0, 0
    with on_device(q):
        if splits.most > 1:
            shape = (splits.most, *lse.shape)
            scratch = lse.new_empty(*shape, q.shape[3]), lse.new_empty(shape)
            counters = counters_for(q, units * call.tables.sets)
            partial = scratch[0].data_ptr(), scratch[1].data_ptr(), counters.data_ptr()
        extension().decode(call, out, lse, (*splits, *partial), place_of(q))
