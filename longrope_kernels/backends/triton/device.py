"""The Triton backend: CUDA, and under ``TRITON_INTERPRET=1`` the interpreter on CPU tensors."""

from __future__ import annotations

import importlib.util
import os

import torch

from ...calls.records import Rotation


def missing() -> str | None:
    """Why Triton cannot run in this process and how to get it, or None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install longrope-kernels[triton]"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided before they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    positions: torch.Tensor,
    rotation: Rotation,
    cu_seqlens: torch.Tensor | None,
    conjugate: bool,
) -> None:
    """Rotate q and k into q_out and k_out by one kernel; see `run_rotary`."""
    from ...kernels import rotary as kernels

    launch = kernels.plan(q, k, q_out, k_out, positions, rotation, cu_seqlens, conjugate)
    if launch is None:
        return
    kernel = kernels.rotary_kernel[launch.grid]
    # Triton launches on the current device, which need not be that of q.
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            kernel(*launch.args, **launch.constants, num_warps=launch.warps)
    else:
        kernel(*launch.args, **launch.constants, num_warps=launch.warps)
