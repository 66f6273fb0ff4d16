"""The rotation by one Triton kernel."""

from __future__ import annotations

import torch

from ...calls.records import RotaryCall
from ...kernels import rotary as kernels
from .launch import run


def rotary(call: RotaryCall, q_out: torch.Tensor, k_out: torch.Tensor) -> None:
    """Rotate q and k into q_out and k_out, which may be they."""
    run(kernels.plan, call, q_out, k_out)
