"""The Triton backend: CUDA, and under ``TRITON_INTERPRET=1`` the interpreter on CPU tensors."""

from __future__ import annotations

import importlib.util
import os

import torch


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
    steps: torch.Tensor,
    n_hat: torch.Tensor,
    attention_factor: torch.Tensor,
    max_length: torch.Tensor,
    lengths: torch.Tensor | None,
    sets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Rotate q and k into q_out and k_out, which may be q and k, by one kernel.

    Args:
        q, k: (B, S, Hq, D) and (B, S, Hk, D) with a unit last stride; Hq or Hk may be 0.
        q_out, k_out: of the same shapes.
        positions: (B, S) int32 or int64, any strides.
        steps, n_hat, attention_factor, max_length: as in `RopeTables`.
        lengths, sets: (sequences,) or None; ``sets`` wins.
        cu_seqlens: (sequences + 1,) or None; with it B = 1 and S counts all tokens.
        interleaved: as in `Rope`.
        conjugate: negate the sine: the gradient.
    """
    from ..kernels import rotary as kernels

    launch = kernels.plan(
        q,
        k,
        q_out,
        k_out,
        positions,
        steps,
        n_hat,
        attention_factor,
        max_length,
        lengths,
        sets,
        cu_seqlens,
        interleaved,
        conjugate,
    )
    if launch is None:
        return
    kernel = kernels.rotary_kernel[launch.grid]
    # Triton launches on the current device, which need not be that of q.
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            kernel(*launch.args, **launch.constants, num_warps=launch.warps)
    else:
        kernel(*launch.args, **launch.constants, num_warps=launch.warps)
