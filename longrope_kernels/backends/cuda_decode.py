"""Decoding by the compiled CUDA backend (csrc/cuda/decode.h): splits, their scratch, the call."""

from __future__ import annotations

import torch

from ..kernels.splits import Splits, choose_splits
from .cuda import (
    _TYPES,
    emulating,
    extension,
    factors_of,
    integers,
    on_device,
    place_of,
    strided,
)

# As in csrc/cuda/decode.h: keys of a tile, and rows of a block.
_TILE = 64
_ROWS = 8
# Blocks that run on a multiprocessor at once, by the largest head_dim of a kernel.
_BLOCKS = {64: 4, 128: 3, 256: 2}
# Tiles that are worth a block.
_LEAST_TILES = 2
# What the emulator stands for: enough that small tests see several splits.
_EMULATED_MULTIPROCESSORS = 16


def _splits_of(q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor | None) -> Splits:
    batch, queries, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    units = batch * kv_heads * -(-queries * (heads // kv_heads) // _ROWS)
    blocks = next(count for most, count in _BLOCKS.items() if dim <= most)
    if emulating():
        return choose_splits(units, batch, capacity, _TILE, _EMULATED_MULTIPROCESSORS, 1)
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    places = multiprocessors * blocks
    return choose_splits(units, batch, capacity, _TILE, places, _LEAST_TILES)


def decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cache_lens: torch.Tensor,
    block_table: torch.Tensor | None,
    key_positions: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    steps: torch.Tensor,
    n_hat: torch.Tensor,
    attention_factor: torch.Tensor,
    max_length: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    interleaved: bool,
    softmax_scale: float,
    window: int,
    softcap: float,
) -> None:
    """Attend to the cache, into out (like q) and lse (B, Hq, q_len) float32; see `run_decode`.

    q is bfloat16 or float16, the caches of that dtype or float8_e4m3fn. What is launched follows
    from shapes and strides alone, so that one captured graph serves all lengths.
    """
    if out.numel() == 0:
        return
    if k_cache.numel() == 0 or (block_table is not None and block_table.numel() == 0):
        out.zero_()
        lse.fill_(float("-inf"))
        return
    batch, queries, heads, dim = q.shape
    splits = _splits_of(q, k_cache, block_table)
    scratch = None
    if splits.most > 1:
        shape = (splits.most, *lse.shape)
        scratch = lse.new_empty(*shape, dim), lse.new_empty(shape)
    with on_device(q):
        extension().decode(
            (_TYPES[q.dtype], k_cache.dtype == torch.float8_e4m3fn),
            (batch, queries, heads, k_cache.shape[2], dim),
            strided(q),
            strided(out),
            lse.data_ptr(),
            strided(k_cache),
            strided(v_cache),
            (*_rows(block_table), k_cache.shape[1]),
            (*_vector(k_scale), *_vector(v_scale)),
            integers(cache_lens),
            integers(kv_start),
            (*_rows(key_positions), _is_int64(key_positions)),
            factors_of(steps, n_hat, attention_factor, max_length),
            (integers(lengths), integers(sets)),
            interleaved,
            softmax_scale,
            min(window, 2**30),
            softcap,
            splits,
            (0, 0) if scratch is None else (scratch[0].data_ptr(), scratch[1].data_ptr()),
            place_of(q),
        )


def _rows(x: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0)) if x is None else (x.data_ptr(), x.stride())


def _vector(x: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _is_int64(x: torch.Tensor | None) -> bool:
    return x is not None and x.dtype == torch.int64
