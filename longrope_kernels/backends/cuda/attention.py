"""Attention by the compiled CUDA kernel: the pre-pass over k and its scratch. No gradients.

q is rotated by the kernel itself.
"""

from __future__ import annotations

import torch

from ...calls.masks import see_nothing
from ...calls.records import AttentionCall, RotaryCall
from .device import extension, on_device, place_of
from .rotary import rotary

# Rotated copies larger than this are made for one KV head at a time.
_SCRATCH_BYTES = 256 * 2**20
# Tiles of k and v that the kernel keeps in shared memory, 2 to 4; 0 is its own choice.
_STAGES = 0


def forward(
    call: AttentionCall, out: torch.Tensor, lse: torch.Tensor, k_rotation: str | None
) -> None:
    """Attend into out, like q, and lse (B, Hq, Sq) float32, base e.

    k is rotated in a pre-pass, and ``k_rotation`` is None.
    """
    if out.numel() == 0:
        return
    q, positions, keys, tables, selection, scores, _ = call
    k, kv_heads, groups = keys.k, keys.heads, call.groups
    assert keys.positions is not None
    if k.shape[1] == 0:
        see_nothing(out, lse, call.sinks)
        return
    (batch, slots, _, dim) = k.shape
    q, v = _aligned(q), _aligned(keys.v)
    of_keys = selection._replace(borders=keys.borders)
    kv_bytes = batch * slots * dim * k.element_size()
    at_once = min(max(1, _SCRATCH_BYTES // kv_bytes), kv_heads)
    scratch = k.new_empty(batch, at_once, slots, dim).transpose(1, 2)
    with on_device(q):
        for first in range(0, kv_heads, at_once):
            of_k = slice(first, min(first + at_once, kv_heads))
            of_q = slice(first * groups, of_k.stop * groups)
            rotated, part = scratch[:, :, : of_k.stop - first], k[:, :, of_k]
            of_part = RotaryCall(part, part[:, :, :0], keys.positions, tables, of_keys)
            rotary(of_part, rotated, rotated[:, :, :0])
            part_of_call = AttentionCall(
                q[:, :, of_q],
                positions,
                keys._replace(k=rotated, v=v[:, :, of_k]),
                tables,
                selection,
                scores,
            )
            of_out = out[:, :, of_q], lse[:, of_q]
            extension().attention(part_of_call, *of_out, _STAGES, place_of(q))


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where not every row of a head begins at a multiple of 16 bytes."""
    strides = (stride for stride, size in zip(x.stride(), x.shape[:3], strict=False) if size > 1)
    whole = all(stride % 8 == 0 for stride in strides) and x.data_ptr() % 16 == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)
