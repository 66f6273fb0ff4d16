"""Attention by the compiled CUDA kernel: the pre-pass over k, and its scratch; no gradients.

q is rotated by the kernel itself.
"""

from __future__ import annotations

import torch

from ..calls import Rotation, Scoring
from .cuda import extension, factors_of, integers, on_device, place_of, rotary, strided

_TYPES = {torch.bfloat16: 1, torch.float16: 2}

# Rotated copies larger than this are made for one KV head at a time.
_SCRATCH_BYTES = 256 * 2**20
# Tiles of k and v that the kernel keeps in shared memory, 2 to 4; 0 is its own choice.
_STAGES = 0


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scoring: Scoring,
    k_rotation: str | None,
) -> None:
    """Attend, with q and k rotated on the way, into out and lse; see `run_attention`.

    k is rotated in a pre-pass, and ``k_rotation`` is None.
    """
    if scoring.softmax_scale < 0:
        raise ValueError(
            f"softmax_scale: backend 'cuda' serves none below 0, got {scoring.softmax_scale}; "
            "'composed' and 'reference' do"
        )
    if k_rotation is not None:
        raise ValueError(f"k_rotation: expected None with backend 'cuda', got {k_rotation!r}")
    if out.numel() == 0:
        return
    if k.shape[1] == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    (batch, queries, heads, dim), (keys, kv_heads) = q.shape, k.shape[1:3]
    groups = heads // kv_heads
    q, v = _aligned(q), _aligned(v)
    positions, key_positions, rotation, mask, softmax_scale, softcap = scoring
    kv_bytes = batch * keys * dim * k.element_size()
    at_once = min(max(1, _SCRATCH_BYTES // kv_bytes), kv_heads)
    scratch = k.new_empty(batch, at_once, keys, dim).transpose(1, 2)
    with on_device(q):
        for first in range(0, kv_heads, at_once):
            of_k = slice(first, min(first + at_once, kv_heads))
            of_q = slice(first * groups, of_k.stop * groups)
            rotated = scratch[:, :, : of_k.stop - first]
            _rotate(k[:, :, of_k], rotated, key_positions, rotation, mask.cu_seqlens_k)
            of_lse = lse[:, of_q]
            extension().attention(
                _TYPES[q.dtype],
                (batch, queries, keys, of_q.stop - of_q.start, of_k.stop - first, dim),
                *map(strided, (q[:, :, of_q], rotated, v[:, :, of_k], out[:, :, of_q])),
                (of_lse.data_ptr(), of_lse.stride()[:2]),
                (positions.data_ptr(), positions.stride(), positions.dtype == torch.int64),
                factors_of(rotation),
                (integers(rotation.lengths), integers(rotation.sets)),
                (integers(mask.cu_seqlens), integers(mask.cu_seqlens_k)),
                integers(mask.kv_start),
                mask.sequences(batch),
                (rotation.interleaved, mask.causal),
                (softmax_scale, mask.window or 0, softcap),
                _STAGES,
                place_of(q),
            )


def _rotate(
    x: torch.Tensor,
    y: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """x (B, S, H, D) into y."""
    rotary(x, x[:, :, :0], y, y[:, :, :0], positions, rotation, cu_seqlens, False)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where not every row of a head begins at a multiple of 16 bytes."""
    strides = (stride for stride, size in zip(x.stride(), x.shape[:3], strict=False) if size > 1)
    whole = all(stride % 8 == 0 for stride in strides) and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)
