"""Attention by the Triton kernels: the pre-pass, its scratch, and the launches."""

from __future__ import annotations

import os
from typing import Any

import torch

from .triton_launch import (
    arch_of,
    multiprocessors_of,
    on_device,
    run_launch,
    run_launch_with_scratch,
)

SM90_FORMS = ("tiles", "persistent", "specialized")

# Rotated copies larger than this are made for one KV head at a time.
_SCRATCH_BYTES = 256 * 2**20


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    steps: torch.Tensor,
    n_hat: torch.Tensor,
    attention_factor: torch.Tensor,
    max_length: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    interleaved: bool,
    causal: bool,
    softmax_scale: float,
    window: int,
    softcap: float,
    k_rotation: str | None,
) -> None:
    """Attend, with q and k rotated on the way, into out and lse.

    Args:
        q, out: (B, Sq, Hq, D) bfloat16 or float16, a unit last stride, any others.
        k, v: (B, Sk, Hk, D) of that dtype; Hq is a multiple of Hk.
        lse: (B, Hq, Sq) float32, the log-sum-exp of the scores, base e; -inf where a query sees no
            key (and 0 in out).
        positions, key_positions: (B, Sq) and (B, Sk) int32 or int64, any strides.
        steps, n_hat, attention_factor, max_length: as in `RopeTables`.
        lengths, sets: (sequences,) or None; ``sets`` wins.
        cu_seqlens, cu_seqlens_k: (sequences + 1,) or both None; with them B = 1.
        kv_start: (sequences,) int32 or int64 or None; keys at slots below it are hidden.
        interleaved: as in `Rope`.
        causal: a query sees no key after its own slot.
        softmax_scale: multiplies the scores, not negative.
        window: how many slots back (not causal: either way) a query sees; 0 for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0.0 for none.
        k_rotation: "prepass", "registers", or None for `kernels.attention.choose_rotation`.

    Raises:
        ValueError: naming the argument that this backend does not serve.
    """
    from ..kernels import attention as kernels

    _check(q, softmax_scale, k_rotation)
    if out.numel() == 0:
        return
    if k.shape[1] == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    groups = q.shape[2] // k.shape[2]
    if k_rotation is None:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        k_rotation = kernels.choose_rotation(q.shape[0] * q.shape[1], sequences, groups)
    tables = (steps, n_hat, attention_factor, max_length)
    of_sequences = (lengths, sets, cu_seqlens, cu_seqlens_k, kv_start)
    scores = (interleaved, causal, softmax_scale, window, softcap, arch_of(q))
    v = _short_strides(v)

    with on_device(q):
        if k_rotation == "registers":
            k = _short_strides(k)
            launch = kernels.plan(
                q, k, v, out, lse, positions, key_positions, *tables, *of_sequences, *scores
            )
            run_launch(launch)
            return
        step = _kv_heads_at_once(k.numel() // k.shape[2] * k.element_size(), k.shape[2])
        scratch = None
        for head in range(0, k.shape[2], step):
            kv = slice(head, min(head + step, k.shape[2]))
            heads = slice(kv.start * groups, kv.stop * groups)
            scratch = _rotated(
                k[:, :, kv],
                scratch,
                key_positions,
                *tables,
                lengths,
                sets,
                cu_seqlens_k,
                interleaved,
                False,
            )
            launch = _plan_rotated(
                q[:, :, heads],
                scratch,
                v[:, :, kv],
                out[:, :, heads],
                lse[:, heads],
                positions,
                tables,
                of_sequences,
                scores,
            )
            run_launch_with_scratch(launch, q.device)


def _plan_rotated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    tables: tuple[Any, ...],
    of_sequences: tuple[Any, ...],
    scores: tuple[Any, ...],
) -> Any:
    """The launch for rotated k: of the persistent kernel where asked for and served."""
    from ..kernels import attention, attention_hopper

    lengths, sets, cu_seqlens, _, kv_start = of_sequences
    interleaved, causal, softmax_scale, window, softcap, arch = scores
    pairs = tables[0].shape[2]
    of_call = (cu_seqlens, kv_start, interleaved, softmax_scale, softcap, arch)
    form = sm90_form()
    if form != "tiles" and attention_hopper.serves(q, k, v, pairs, *of_call):
        of_scores = (interleaved, causal, softmax_scale, window, arch)
        return attention_hopper.plan(
            *(q, k, v, out, lse, positions),
            *tables,
            lengths,
            sets,
            *of_scores,
            multiprocessors_of(q, interpreted=3),
            form == "specialized",
        )
    return attention.plan(*(q, k, v, out, lse, positions, None), *tables, *of_sequences, *scores)


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
    positions: torch.Tensor,
    key_positions: torch.Tensor,
    steps: torch.Tensor,
    n_hat: torch.Tensor,
    attention_factor: torch.Tensor,
    max_length: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    kv_start: torch.Tensor | None,
    interleaved: bool,
    causal: bool,
    softmax_scale: float,
    window: int,
    softcap: float,
    k_rotation: str | None,
) -> None:
    """The gradients of `forward` into dq, dk and dv; the same in every run.

    Args:
        d_out: like out, of the dtype of q, any strides.
        d_lse: like lse, any strides, or None; ignored where a query sees no key.
        out, lse: what `forward` returned.
        dq, dk, dv: like q, k and v, unit last stride.
        others: as in `forward`; k_rotation makes no difference here, q and k are rotated before.

    Raises:
        ValueError: naming the argument that this backend does not serve.
    """
    from ..kernels import attention_backward as kernels

    _check(q, softmax_scale, k_rotation)
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    groups = q.shape[2] // k.shape[2]
    tables = (steps, n_hat, attention_factor, max_length)
    of_sequences = (lengths, sets, cu_seqlens, cu_seqlens_k, kv_start)
    scores = (interleaved, causal, softmax_scale, window, softcap, arch_of(q))
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
            of_k = (*tables, lengths, sets, cu_seqlens_k, interleaved, False)
            of_q = (*tables, lengths, sets, cu_seqlens, interleaved, False)
            k_scratch = _rotated(k[:, :, kv], k_scratch, key_positions, *of_k)
            q_scratch = _rotated(q[:, :, heads], q_scratch, positions, *of_q)
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
                positions,
                key_positions,
                *tables,
                *of_sequences,
                *scores,
            )
            for launch in launches:
                run_launch(launch)


def _check(q: torch.Tensor, softmax_scale: float, k_rotation: str | None) -> None:
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
    if k_rotation not in (None, "prepass", "registers"):
        raise ValueError(f"k_rotation: expected 'prepass', 'registers' or None, got {k_rotation!r}")


def sm90_form() -> str:
    """The form of the forward kernel on compute capability 9.0, of ``LONGROPE_SM90_ATTENTION``.

    "tiles" (the default): a program for each tile, as elsewhere. "persistent": a program for each
    multiprocessor, tiles by TMA. "specialized": the same with specialised warps. The last two rest
    on compiler passes whose results nobody has run yet, so they are not taken unasked.

    Raises:
        ValueError: another value.
    """
    form = os.environ.get("LONGROPE_SM90_ATTENTION", "tiles")
    if form not in SM90_FORMS:
        raise ValueError(
            f"LONGROPE_SM90_ATTENTION: expected one of {', '.join(SM90_FORMS)}, got {form!r}"
        )
    return form


def _short_strides(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where an offset within a tile of tokens would pass 32 bits."""
    return x.contiguous() if x.stride(1) >= 2**23 else x


def _kv_heads_at_once(bytes_of_head: int, kv_heads: int) -> int:
    return min(max(1, _SCRATCH_BYTES // bytes_of_head), kv_heads)


def _rotated(
    x: torch.Tensor, scratch: torch.Tensor | None, positions: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """x (B, S, H, D) rotated, in ``scratch`` if it is large enough; the tokens of a head together.

    rest: the arguments of `kernels.rotary.plan` from ``steps`` on.
    """
    from ..kernels import rotary

    batch, seq, heads, dim = x.shape
    if scratch is None:
        scratch = x.new_empty(batch, heads, seq, dim).transpose(1, 2)
    y = scratch[:, :, :heads]
    launch = rotary.plan(x, x[:, :, :0], y, y[:, :, :0], positions, *rest)
    if launch is not None:
        rotary.rotary_kernel[launch.grid](*launch.args, **launch.constants, num_warps=launch.warps)
    return y
