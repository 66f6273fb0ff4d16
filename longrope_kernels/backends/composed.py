"""Attention composed of our rotation, made before, and torch's scaled_dot_product_attention."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from ..calls.masks import Mask


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, softmax_scale: float
) -> torch.Tensor:
    """Softmax attention of rotated q and k.

    Args:
        q, k, v: (B, Sq, Hq, D), (B, Sk, Hk, D), (B, Sk, Hk, D); Hq a multiple of Hk.
        mask: which keys a query sees.
        softmax_scale: multiplies the scores.

    Returns:
        (B, Sq, Hq, D) of the dtype of q. A query that sees no key gets 0.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if mask.cu_seqlens is None or mask.cu_seqlens_k is None:
        return _dense(q, k, v, mask, softmax_scale).transpose(1, 2)
    if mask.cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        # Reading the borders would wait for the device: one mask over all tokens instead.
        return _masked(q, k, v, mask, softmax_scale).transpose(1, 2)
    begins, begins_k = mask.cu_seqlens.tolist(), mask.cu_seqlens_k.tolist()
    parts = []
    for i in range(len(begins) - 1):
        queries, keys = slice(begins[i], begins[i + 1]), slice(begins_k[i], begins_k[i + 1])
        start = None if mask.kv_start is None else mask.kv_start[i : i + 1]
        alone = Mask(mask.causal, mask.window, start)
        parts.append(_dense(q[:, :, queries], k[:, :, keys], v[:, :, keys], alone, softmax_scale))
    return torch.cat(parts, dim=2).transpose(1, 2)


def _dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, softmax_scale: float
) -> torch.Tensor:
    """The call that lets torch take its fastest kernel; a mask in memory only where none fits."""
    queries, keys = q.shape[2], k.shape[2]
    if mask.window is None and mask.kv_start is None:
        if not mask.causal:
            return _sdpa(q, k, v, softmax_scale)
        if queries == keys:
            return _sdpa(q, k, v, softmax_scale, is_causal=True)
        if queries < keys and not torch.compiler.is_compiling():  # a graph break
            return _sdpa(q, k, v, softmax_scale, attn_mask=causal_lower_right(queries, keys))
    return _masked(q, k, v, mask, softmax_scale)


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, softmax_scale: float
) -> torch.Tensor:
    seen = mask.visible(q.shape[0], q.shape[2], k.shape[2], q.device)
    return _sdpa(q, k, v, softmax_scale, attn_mask=seen[:, None])


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    if k.shape[2] == 0:  # nothing to see; torch gives NaN. The empty sums keep the gradients.
        return torch.zeros_like(q) + (q[..., :0].sum() + k.sum() + v.sum())
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        is_causal=is_causal,
        scale=softmax_scale,
        # Constants, also where a graph is traced with dynamic sizes: torch wants a plain bool.
        enable_gqa=operator.index(q.shape[1]) != operator.index(k.shape[1]),
    )
