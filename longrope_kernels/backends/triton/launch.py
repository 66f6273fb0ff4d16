"""What every launch of a Triton kernel needs: the device, its numbers, memory for descriptors."""

from __future__ import annotations

import contextlib
import contextvars
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


def run_launch_with_scratch(plan: Any, device: torch.device) -> None:
    """Launch what may ask Triton for memory (descriptors made on the device).

    Triton keeps its allocator in a context variable: set in a copy of the context, it does not
    replace the caller's. The memory belongs to the current stream, as that of every tensor does,
    also while a CUDA graph is captured.
    """
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run() -> None:
        triton.set_allocator(allocate)
        run_launch(plan)

    contextvars.copy_context().run(run)
