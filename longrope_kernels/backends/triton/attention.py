"""Attention by the Triton kernels: the pre-pass, its scratch, and the launches."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...calls.kinds import by_kind
from ...calls.masks import see_nothing
from ...calls.records import AttentionCall, Keys, RotaryCall, Selection
from ...kernels import attention as kernels
from ...kernels import attention_backward as gradients
from ...rope.tables import Tables
from . import device
from .launch import run, run_launch
from .rotary import rotary

# Rotated copies larger than this are made for one KV head at a time.
_SCRATCH_BYTES = 256 * 2**20
# From this stride of tokens on an offset within a tile of them would pass 32 bits.
_LONG_STRIDE = 2**23
_ALL = slice(None)  # heads


def forward(
    call: AttentionCall, out: torch.Tensor, lse: torch.Tensor, k_rotation: str | None
) -> None:
    """Attend into out, like q, and lse (B, Hq, Sq) float32, base e.

    A query that sees no key gets 0, and -inf or its sink. k_rotation: "prepass", "registers", or
    None for `kernels.attention.choose_rotation`.
    """
    way = _way_of(call, k_rotation)
    if way is None:
        see_nothing(out, lse, call.sinks)
        return
    q, (k, v, *_) = call.q, call.keys
    arch = device.arch_of(q)
    if way.copies_v:
        v = v.contiguous()
    if way.parts is None:
        if way.copies_k:
            k = k.contiguous()
        if k is not call.keys.k or v is not call.keys.v:
            call = _with(call, q, k, v)
        run(kernels.plan, call, out, lse, False, arch)
        return
    scratch = None
    for heads, kv in way.parts:
        scratch = _rotated_keys(call, kv, scratch)
        part = _with(call, _part(q, heads), scratch, _part(v, kv), heads)
        run(kernels.plan, part, _part(out, heads), _part(lse, heads, 1), True, arch)


class _Way(NamedTuple):
    parts: tuple[tuple[slice, slice], ...] | None  # of `_heads_at_once`; None: no pre-pass
    copies_k: bool
    copies_v: bool


@by_kind
def _way_of(call: AttentionCall, k_rotation: str | None) -> _Way | None:
    """How the forward pass goes; None where there is no query or no key."""
    q, (k, v, *_) = call.q, call.keys
    if q.numel() == 0 or k.shape[1] == 0:
        return None
    if k_rotation is None:
        sequences = call.selection.sequences(q.shape[0])
        k_rotation = kernels.choose_rotation(q.shape[0] * q.shape[1], sequences, call.groups)
    parts = None
    if k_rotation == "prepass":
        parts = _heads_at_once(call, k.numel() // k.shape[2] * k.element_size())
    return _Way(parts, k.stride(1) >= _LONG_STRIDE, v.stride(1) >= _LONG_STRIDE)


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


def _with(
    call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: slice = _ALL
) -> AttentionCall:
    """The call with other tensors, of some of its heads."""
    sinks = None if call.sinks is None else _part(call.sinks, heads, 0)
    return AttentionCall(q, call.positions, Keys(k, v, *call.keys[2:]), *call[3:6], sinks)


def _short_strides(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where an offset within a tile of tokens would pass 32 bits."""
    return x.contiguous() if x.stride(1) >= _LONG_STRIDE else x


def _heads_at_once(call: AttentionCall, bytes_of_head: int) -> tuple[tuple[slice, slice], ...]:
    """Heads of q and their KV heads, so many at a time that the scratch stays within its bound."""
    kv_heads, groups = call.keys.heads, call.groups
    step = max(1, _SCRATCH_BYTES // bytes_of_head)
    if step >= kv_heads:
        return ((_ALL, _ALL),)
    parts = [slice(kv, min(kv + step, kv_heads)) for kv in range(0, kv_heads, step)]
    return tuple((slice(kv.start * groups, kv.stop * groups), kv) for kv in parts)


def _part(x: torch.Tensor, heads: slice, axis: int = 2) -> torch.Tensor:
    """x of some of its heads; a view of all would cost the host more than all else."""
    return x if heads is _ALL else x.narrow(axis, heads.start, heads.stop - heads.start)


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
        strides = heads * seq * dim, dim, seq * dim, 1
        scratch = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    elif scratch.shape[2] > heads:
        scratch = scratch.narrow(2, 0, heads)
    none = x.new_empty((batch, seq, 0, dim))
    rotary(RotaryCall(x, none, positions, tables, selection), scratch, none)
    return scratch
