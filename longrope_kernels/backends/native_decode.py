"""Decoding by the compiled CPU backend (csrc/cpu/decode.h): hands it addresses and strides."""

from __future__ import annotations

import torch

from ..calls import CacheTensors, Rotation
from .native import _GRAIN, _TYPES, _native, addresses_of, indices


def decode(
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cache: CacheTensors,
    rotation: Rotation,
    softmax_scale: float,
    window: int,
    softcap: float,
    instruction_set: str = "",
) -> None:
    """Attend to the cache, into out and lse; see `run_decode`.

    The caches have the dtype of q, float32, bfloat16 or float16; there are no scales.
    """
    assert _native is not None
    assert cache.k_scale is None
    assert cache.v_scale is None
    if q.numel() == 0:
        return
    batch, queries, heads, dim = q.shape
    k, v, steps = cache.k, cache.v, rotation.steps
    kv_heads = k.shape[2]
    lens = indices(cache.lens)
    elements = sum(lens) * kv_heads * dim
    _native.decode(
        _TYPES[q.dtype],
        (batch, queries, heads, kv_heads, dim, steps.shape[2]),
        (q.data_ptr(), q.stride()[:3]),
        (out.data_ptr(), out.stride()[:3]),
        lse.data_ptr(),
        (k.data_ptr(), k.stride()[:3]),
        (v.data_ptr(), v.stride()[:3]),
        _table(cache.block_table),
        k.shape[1],
        lens,
        indices(cache.kv_start),
        _table(cache.key_positions),
        cache.key_positions is not None and cache.key_positions.dtype == torch.int64,
        steps.shape[0],
        addresses_of(rotation),
        indices(rotation.lengths if rotation.lengths is None else rotation.lengths.flatten()),
        indices(rotation.sets),
        rotation.interleaved,
        softmax_scale,
        window,
        softcap,
        1 if elements < _GRAIN else torch.get_num_threads(),
        instruction_set,
    )


def _table(x: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0)) if x is None else (x.data_ptr(), x.stride())
