"""torch.library ops of fused attention: schemas, fakes and autograd.

Canonical arguments: q (B, Sq, Hq, D), k and v (B, Sk, Hk, D), all unrotated, positions (B, Sq),
key_positions (B, Sk); window 0 and softcap 0 mean none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..backends import choose as backends
from ..calls.masks import Mask
from ..calls.records import Rotation, Scoring

_NAMESPACE = "longrope_kernels"
_REST = (
    "Tensor positions, Tensor key_positions, "
    "Tensor steps, Tensor n_hat, Tensor attention_factor, Tensor max_length, "
    "Tensor? lengths, Tensor? sets, Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? kv_start, "
    "bool interleaved, bool causal, float softmax_scale, int window, float softcap, "
    "str? k_rotation, str backend"
)
_TENSORS, _FLAGS = 11, 7  # of _REST
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_library.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor out, Tensor lse)", tags=_TAGS
)
_library.define(
    "attention_backward(Tensor d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"Tensor lse, {_REST}) -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=_TAGS,
)

attention = torch.ops.longrope_kernels.attention.default
attention_backward = torch.ops.longrope_kernels.attention_backward.default


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _dim = q.shape
    return torch.empty_like(q), q.new_empty((batch, heads, queries), dtype=torch.float32)


def _fake_backward(
    d_out: torch.Tensor, d_lse: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    out, lse = _fake(q, k, v)
    k_rotation, backend = rest[-2:]
    backends.run_attention(q, k, v, out, lse, _pack(rest), k_rotation, backend)
    return out, lse


def _run_backward(
    d_out: torch.Tensor, d_lse: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> Any:
    out, lse = rest[:2]
    grads = _fake_backward(d_out, d_lse, q, k, v)
    tensors = (d_out, d_lse, q, k, v, out, lse, *grads)
    backends.run_attention_backward(*tensors, _pack(rest[2:]), rest[-1])
    return grads


def _pack(rest: tuple[Any, ...]) -> Scoring:
    """The arguments that `_REST` names, but for the last two."""
    positions, key_positions, steps, n_hat, attention_factor, max_length = rest[:6]
    lengths, sets, cu_seqlens, cu_seqlens_k, kv_start, interleaved = rest[6:12]
    causal, softmax_scale, window, softcap = rest[12:16]
    rotation = Rotation(steps, n_hat, attention_factor, max_length, lengths, sets, interleaved)
    mask = Mask(causal, window or None, kv_start, cu_seqlens, cu_seqlens_k)
    return Scoring(positions, key_positions, rotation, mask, softmax_scale, softcap)


for _key in ("CPU", "CUDA"):
    _library.impl("attention", _run, _key)
    _library.impl("attention_backward", _run_backward, _key)
torch.library.register_fake(f"{_NAMESPACE}::attention", _fake, lib=_library)
torch.library.register_fake(f"{_NAMESPACE}::attention_backward", _fake_backward, lib=_library)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = attention(*arguments)
        q, k, v, *rest = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *rest[:_TENSORS])
        ctx.flags = rest[_TENSORS:]
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Any, d_lse: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing allows no more
        if d_out is None:
            d_out = torch.zeros_like(saved[3])
        elif d_out.stride(-1) != 1:
            d_out = d_out.contiguous()
        if d_lse is not None:
            d_lse = d_lse.contiguous()
        grads = attention_backward(d_out, d_lse, *saved, *ctx.flags)
        return (*grads, *(None,) * (_TENSORS + _FLAGS))


def _differentiable(*arguments: Any) -> Any:
    if torch.is_grad_enabled() and any(x.requires_grad for x in arguments[:3]):
        return _Attention.apply(*arguments)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return attention(*arguments)


_library.impl("attention", _differentiable, "Autograd")
