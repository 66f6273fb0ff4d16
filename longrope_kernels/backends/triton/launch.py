"""What every launch of a Triton kernel needs: the device and its numbers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def arch_of(x: torch.Tensor) -> int:
    """The compute capability of the device of x, 90 for 9.0; 0 for the interpreter."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def multiprocessors_of(x: torch.Tensor, interpreted: int) -> int:
    """Those of the device of x, or what the interpreter stands for."""
    if not x.is_cuda:
        return interpreted
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def run_launch(plan: Any) -> None:
    """Launch a `kernels.launch.Launch`."""
    plan.kernel[plan.grid](
        *plan.args, **plan.constants, num_warps=plan.warps, num_stages=plan.stages
    )
