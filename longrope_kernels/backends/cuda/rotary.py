"""The rotation by the compiled CUDA kernel."""

from __future__ import annotations

import torch

from ...calls.records import RotaryCall
from .device import extension, on_device, place_of


def rotary(call: RotaryCall, q_out: torch.Tensor, k_out: torch.Tensor) -> None:
    """Rotate q and k into q_out and k_out, which may be they."""
    with on_device(call.q):
        extension().rotary(call, q_out, k_out, place_of(call.q))
