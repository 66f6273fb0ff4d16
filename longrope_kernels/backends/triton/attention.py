"""Attention by the Triton kernels: the pre-pass, its scratch, and the launches."""

from __future__ import annotations

import torch

from ...calls.records import AttentionCall, RotaryCall, Selection
from ...kernels import attention as kernels
from ...kernels import attention_backward as gradients
from ...rope.tables import Tables
from . import device
from .launch import run, run_launch
from .rotary import rotary

# Rotated copies larger than this are made for one KV head at a time.
_SCRATCH_BYTES = 256 * 2**20


def forward(
    call: AttentionCall, out: torch.Tensor, lse: torch.Tensor, k_rotation: str | None
) -> None:
    """Attend into out, like q, and lse (B, Hq, Sq) float32, base e.

    A query that sees no key gets 0 and -inf. k_rotation: "prepass", "registers", or None for
    `kernels.attention.choose_rotation`.
    """
    if out.numel() == 0:
        return
    q, k = call.q, call.keys.k
    if k.shape[1] == 0:
        out.zero_()
        lse.fill_(float("-inf"))
        return
    if k_rotation is None:
        sequences = call.selection.sequences(q.shape[0])
        k_rotation = kernels.choose_rotation(q.shape[0] * q.shape[1], sequences, call.groups)
    arch = device.arch_of(q)
    v = _short_strides(call.keys.v)

    with device.on_device(q):
        if k_rotation == "registers":
            call = _with(call, q, _short_strides(k), v)
            run(kernels.plan, call, out, lse, False, arch)
            return
        scratch = None
        for heads, kv in _heads_at_once(call, k.numel() // k.shape[2] * k.element_size()):
            scratch = _rotated_keys(call, kv, scratch)
            part = _with(call, _part(q, heads), scratch, _part(v, kv))
            of_heads = _part(out, heads), _part(lse, heads, 1)
            run(kernels.plan, part, *of_heads, True, arch)


def backward(
    call: AttentionCall,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """The gradients of `forward` into dq, dk and dv, the same in every run.

    d_out: like out, any strides. d_lse: like lse, or None; ignored where a query sees no key. q and
    k are rotated before, wherever `forward` did it.
    """
    q, k = call.q, call.keys.k
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    arch = device.arch_of(q)
    if d_out.stride(3) != 1:
        d_out = d_out.contiguous()
    d_out, v = _short_strides(d_out), _short_strides(call.keys.v)
    delta = torch.empty_like(lse)

    with device.on_device(q):
        run_launch(gradients.plan_delta(d_out, d_lse, out, lse, delta))
        k_scratch = q_scratch = None
        both = (k.numel() + q.numel()) // k.shape[2] * k.element_size()
        for heads, kv in _heads_at_once(call, both):
            k_scratch = _rotated_keys(call, kv, k_scratch)
            q_scratch = _rotated(
                _part(q, heads), q_scratch, call.positions, call.tables, call.selection
            )
            part = _with(call, q_scratch, k_scratch, _part(v, kv))
            launches = gradients.plan(
                part,
                _part(d_out, heads),
                _part(lse, heads, 1),
                _part(delta, heads, 1),
                _part(dq, heads),
                _part(dk, kv),
                _part(dv, kv),
                arch,
            )
            for launch in launches:
                run_launch(launch)


def _with(call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionCall:
    """The call with other tensors, of some of its heads."""
    return call._replace(q=q, keys=call.keys._replace(k=k, v=v))


def _short_strides(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where an offset within a tile of tokens would pass 32 bits."""
    return x.contiguous() if x.stride(1) >= 2**23 else x


def _heads_at_once(call: AttentionCall, bytes_of_head: int) -> list[tuple[slice, slice]]:
    """Heads of q and their KV heads, so many at a time that the scratch stays within its bound."""
    kv_heads, groups = call.keys.heads, call.groups
    step = min(max(1, _SCRATCH_BYTES // bytes_of_head), kv_heads)
    parts = [slice(kv, min(kv + step, kv_heads)) for kv in range(0, kv_heads, step)]
    return [(slice(kv.start * groups, kv.stop * groups), kv) for kv in parts]


def _part(x: torch.Tensor, heads: slice, axis: int = 2) -> torch.Tensor:
    """x of some of its heads; a view costs the host more than a look."""
    if heads.stop - heads.start == x.shape[axis]:
        return x
    return x.narrow(axis, heads.start, heads.stop - heads.start)


def _rotated_keys(call: AttentionCall, kv: slice, scratch: torch.Tensor | None) -> torch.Tensor:
    keys = call.keys
    assert keys.positions is not None
    selection = call.selection
    if selection.borders is not keys.borders:
        selection = selection._replace(borders=keys.borders)
    return _rotated(_part(keys.k, kv), scratch, keys.positions, call.tables, selection)


def _rotated(
    x: torch.Tensor,
    scratch: torch.Tensor | None,
    positions: torch.Tensor,
    tables: Tables,
    selection: Selection,
) -> torch.Tensor:
    """x (B, S, H, D) rotated, in ``scratch`` if there is one; the tokens of a head together."""
    batch, seq, heads, dim = x.shape
    if scratch is None:
        scratch = x.new_empty(batch, heads, seq, dim).transpose(1, 2)
    y, none = _part(scratch, slice(0, heads)), x.narrow(2, 0, 0)
    rotary(RotaryCall(x, none, positions, tables, selection), y, none)
    return y
