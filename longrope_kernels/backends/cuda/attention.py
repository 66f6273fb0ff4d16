"""Attention by the compiled CUDA kernel: the pre-pass over k, its scratch, and the gradients.

q is rotated by the kernel itself. The gradients are matrix products of PyTorch in float32, a tile
of queries at a time, over q and k that the standalone rotation has turned.
"""

from __future__ import annotations

import torch

from ...calls.records import Rotation, Scoring
from .device import extension, factors_of, integers, on_device, place_of, rotary, strided

_TYPES = {torch.bfloat16: 1, torch.float16: 2}

# Rotated copies larger than this are made for one KV head at a time.
_SCRATCH_BYTES = 256 * 2**20
# Scores that the backward makes at once.
_SCORES = 2**26
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
            _rotate(k[:, :, of_k], rotated, key_positions, rotation, mask.cu_seqlens_k, False)
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


def backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    scoring: Scoring,
) -> None:
    """The gradients of `forward`; see `run_attention_backward`."""
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    positions, key_positions, rotation, mask, softmax_scale, softcap = scoring
    of_q = (positions, rotation, mask.cu_seqlens)
    of_k = (key_positions, rotation, mask.cu_seqlens_k)
    (batch, queries), (keys, kv_heads) = q.shape[:2], k.shape[1:3]
    groups = q.shape[2] // kv_heads
    seen = mask.visible(batch, queries, keys, q.device)[:, None]
    some = lse > -torch.inf
    top = torch.where(some, lse, 0.0)[..., None]
    with on_device(q):
        q_rot, k_rot = torch.empty_like(q), torch.empty_like(k)
        _rotate(q, q_rot, *of_q, False)
        _rotate(k, k_rot, *of_k, False)
        at_once = max(1, _SCORES // (batch * groups * keys))
        for head in range(kv_heads):
            heads = slice(head * groups, (head + 1) * groups)
            y, z = (x[:, None, :, head].float() for x in (k_rot, v))  # (B, 1, Sk, D)
            d_y, d_z = torch.zeros_like(y), torch.zeros_like(z)
            for first in range(0, queries, at_once):
                tile = slice(first, first + at_once)
                x, o, d_o = (
                    t[:, tile, heads].transpose(1, 2).float() for t in (q_rot, out, d_out)
                )  # (B, G, tile, D)
                scores = softmax_scale * (x @ y.mT)
                if softcap > 0:
                    scores = softcap * torch.tanh(scores / softcap)
                p = torch.where(seen[:, :, tile], torch.exp(scores - top[:, heads, tile]), 0.0)
                delta = (o * d_o).sum(-1)
                if d_lse is not None:
                    delta -= torch.where(some[:, heads, tile], d_lse[:, heads, tile], 0.0)
                d_scores = p * (d_o @ z.mT - delta[..., None])
                if softcap > 0:
                    d_scores *= 1 - (scores / softcap) ** 2
                dq[:, tile, heads] = (softmax_scale * (d_scores @ y)).transpose(1, 2).to(dq.dtype)
                d_y += (d_scores.mT @ x).sum(1, keepdim=True)
                d_z += (p.mT @ d_o).sum(1, keepdim=True)
            dk[:, :, head] = (softmax_scale * d_y[:, 0]).to(dk.dtype)
            dv[:, :, head] = d_z[:, 0].to(dv.dtype)
        _rotate(dq, dq, *of_q, True)
        _rotate(dk, dk, *of_k, True)


def _rotate(
    x: torch.Tensor,
    y: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
    conjugate: bool,
) -> None:
    """x (B, S, H, D) into y."""
    rotary(x, x[:, :, :0], y, y[:, :, :0], positions, rotation, cu_seqlens, conjugate)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where not every row of a head begins at a multiple of 16 bytes."""
    strides = (stride for stride, size in zip(x.stride(), x.shape[:3], strict=False) if size > 1)
    whole = all(stride % 8 == 0 for stride in strides) and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)
