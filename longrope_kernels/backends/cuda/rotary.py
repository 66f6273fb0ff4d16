"""The rotation by the compiled CUDA kernel."""

from __future__ import annotations

import torch

from ...calls.records import RotaryCall
from .device import TYPES, extension, integers, on_device, place_of, rope_of


def rotary(call: RotaryCall, q_out: torch.Tensor, k_out: torch.Tensor) -> None:
    """Rotate q and k into q_out and k_out, which may be they; see csrc/cuda/rotary.h."""
    q, k, positions, tables, selection, conjugate = call
    batch, seq, _, dim = q.shape
    with on_device(q):
        extension().rotary(
            _heads(q, q_out),
            _heads(k, k_out),
            TYPES[q.dtype],
            (batch, seq, dim),
            positions.data_ptr(),
            positions.dtype == torch.int64,
            positions.stride(),
            rope_of(tables),
            integers(selection.lengths),
            integers(selection.sets),
            integers(selection.borders),
            selection.sequences(batch),
            tables.interleaved,
            conjugate,
            place_of(q),
        )


def _heads(x: torch.Tensor, out: torch.Tensor) -> tuple[object, ...]:
    return x.data_ptr(), out.data_ptr(), x.shape[2], x.stride()[:3], out.stride()[:3]
