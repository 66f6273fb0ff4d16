"""Decoding by the compiled CPU backend (csrc/cpu/decode.h): hands it addresses and strides."""

from __future__ import annotations

import torch

from .native import _GRAIN, _TYPES, _native


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
    instruction_set: str = "",
) -> None:
    """Attend to the cache, into out (like q) and lse (B, Hq, q_len) float32; see `run_decode`.

    The caches have the dtype of q, float32, bfloat16 or float16; there are no scales.
    """
    assert _native is not None
    assert k_scale is None
    assert v_scale is None
    if q.numel() == 0:
        return
    batch, queries, heads, dim = q.shape
    kv_heads = k_cache.shape[2]
    # Kept until the call returns: a converted tensor must outlive its address.
    lens, start, lengths, sets = (
        None if x is None else x.to(torch.int64).contiguous()
        for x in (cache_lens, kv_start, lengths, sets)
    )
    assert lens is not None
    elements = int(lens.sum()) * kv_heads * dim
    _native.decode(
        _TYPES[q.dtype],
        (batch, queries, heads, kv_heads, dim, steps.shape[2]),
        (q.data_ptr(), q.stride()[:3]),
        (out.data_ptr(), out.stride()[:3]),
        lse.data_ptr(),
        (k_cache.data_ptr(), k_cache.stride()[:3]),
        (v_cache.data_ptr(), v_cache.stride()[:3]),
        _table(block_table),
        k_cache.shape[1],
        lens.data_ptr(),
        _address(start),
        _table(key_positions),
        key_positions is not None and key_positions.dtype == torch.int64,
        steps.shape[0],
        (
            steps.data_ptr(),
            n_hat.data_ptr(),
            attention_factor.data_ptr(),
            max_length.data_ptr(),
        ),
        (_address(lengths), _address(sets)),
        interleaved,
        softmax_scale,
        window,
        softcap,
        1 if elements < _GRAIN else torch.get_num_threads(),
        instruction_set,
    )


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _table(x: torch.Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0)) if x is None else (x.data_ptr(), x.stride())
