"""Attention by the Triton kernels: the pre-pass, its scratch, and the launches."""

from __future__ import annotations

import torch

from ..calls import Rotation, Scoring
from .triton_launch import arch_of, on_device, run_launch

# Rotated copies larger than this are made for one KV head at a time.
_SCRATCH_BYTES = 256 * 2**20


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

    k_rotation None is `kernels.attention.choose_rotation`.
    """
    from ..kernels import attention as kernels

    _check(q, scoring.softmax_scale)
    if k_rotation not in (None, "prepass", "registers"):
        raise ValueError(f"k_rotation: expected 'prepass', 'registers' or None, got {k_rotation!r}")
    if out.numel() == 0:
        return
    if k.shape[1] == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    groups, mask = q.shape[2] // k.shape[2], scoring.mask
    if k_rotation is None:
        sequences = mask.sequences(q.shape[0])
        k_rotation = kernels.choose_rotation(q.shape[0] * q.shape[1], sequences, groups)
    arch = arch_of(q)
    v = _short_strides(v)

    with on_device(q):
        if k_rotation == "registers":
            k = _short_strides(k)
            run_launch(kernels.plan(q, k, v, out, lse, scoring, rotated=False, arch=arch))
            return
        step = _kv_heads_at_once(k.numel() // k.shape[2] * k.element_size(), k.shape[2])
        of_k = (scoring.key_positions, scoring.rotation, mask.cu_seqlens_k)
        scratch = None
        for head in range(0, k.shape[2], step):
            kv = slice(head, min(head + step, k.shape[2]))
            heads = slice(kv.start * groups, kv.stop * groups)
            scratch = _rotated(k[:, :, kv], scratch, *of_k)
            of_heads = (q[:, :, heads], scratch, v[:, :, kv], out[:, :, heads], lse[:, heads])
            run_launch(kernels.plan(*of_heads, scoring, rotated=True, arch=arch))


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
    """The gradients of `forward`, the same in every run; see `run_attention_backward`.

    q and k are rotated before, wherever `forward` did it.
    """
    from ..kernels import attention_backward as kernels

    _check(q, scoring.softmax_scale)
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    groups = q.shape[2] // k.shape[2]
    of_k = (scoring.key_positions, scoring.rotation, scoring.mask.cu_seqlens_k)
    of_q = (scoring.positions, scoring.rotation, scoring.mask.cu_seqlens)
    arch = arch_of(q)
    if d_out.stride(3) != 1:
        d_out = d_out.contiguous()
    d_out, v = _short_strides(d_out), _short_strides(v)
    delta = torch.empty_like(lse)

    with on_device(q):
        run_launch(kernels.plan_delta(d_out, d_lse, out, lse, delta))
        bytes_of_head = (k.numel() + q.numel()) // k.shape[2] * k.element_size()
        step = _kv_heads_at_once(bytes_of_head, k.shape[2])
        k_scratch = q_scratch = None
        for head in range(0, k.shape[2], step):
            kv = slice(head, min(head + step, k.shape[2]))
            heads = slice(kv.start * groups, kv.stop * groups)
            k_scratch = _rotated(k[:, :, kv], k_scratch, *of_k)
            q_scratch = _rotated(q[:, :, heads], q_scratch, *of_q)
            launches = kernels.plan(
                d_out[:, :, heads],
                q_scratch,
                k_scratch,
                v[:, :, kv],
                lse[:, heads],
                delta[:, heads],
                dq[:, :, heads],
                dk[:, :, kv],
                dv[:, :, kv],
                scoring,
                arch,
            )
            for launch in launches:
                run_launch(launch)


def _check(q: torch.Tensor, softmax_scale: float) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"q: backend 'triton' serves bfloat16 and float16, got {q.dtype}; "
            "'composed' and 'reference' serve others"
        )
    if not 16 <= q.shape[3] <= 256:
        raise ValueError(
            f"q: backend 'triton' serves a head_dim from 16 to 256, got {q.shape[3]}; "
            "'composed' and 'reference' serve others"
        )
    if softmax_scale < 0:
        raise ValueError(
            f"softmax_scale: backend 'triton' serves none below 0, got {softmax_scale}; "
            "'composed' and 'reference' do"
        )


def _short_strides(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where an offset within a tile of tokens would pass 32 bits."""
    return x.contiguous() if x.stride(1) >= 2**23 else x


def _kv_heads_at_once(bytes_of_head: int, kv_heads: int) -> int:
    return min(max(1, _SCRATCH_BYTES // bytes_of_head), kv_heads)


def _rotated(
    x: torch.Tensor,
    scratch: torch.Tensor | None,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """x (B, S, H, D) rotated, in ``scratch`` if there is one; the tokens of a head together."""
    from ..kernels import rotary

    batch, seq, heads, dim = x.shape
    if scratch is None:
        scratch = x.new_empty(batch, heads, seq, dim).transpose(1, 2)
    y = scratch[:, :, :heads]
    launch = rotary.plan(x, x[:, :, :0], y, y[:, :, :0], positions, rotation, cu_seqlens, False)
    if launch is not None:
        rotary.rotary_kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
    return y
