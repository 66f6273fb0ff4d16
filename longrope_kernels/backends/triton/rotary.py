"""The rotation by one Triton kernel."""

from __future__ import annotations

import torch

from ...calls.records import RotaryCall
from .launch import on_device, run_launch


def rotary(call: RotaryCall, q_out: torch.Tensor, k_out: torch.Tensor) -> None:
    """Rotate q and k into q_out and k_out, which may be they."""
    from ...kernels import rotary as kernels

    launch = kernels.plan(call, q_out, k_out)
    if launch is not None:
        with on_device(call.q):
            run_launch(launch)
