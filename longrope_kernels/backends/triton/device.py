"""Whether Triton runs in this process, and what kernels ask of the device of a tensor."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch


def missing() -> str | None:
    """Why Triton cannot run in this process and how to get it, or None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'longrope-kernels[triton]'"
    if not interpreting() and not torch.cuda.is_available():
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, slowly"
    return None


def ptxas() -> str | None:
    """The assembler that Triton takes, its version and path; None without Triton or without it.

    TRITON_PTXAS_PATH names another one.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    from triton import knobs

    try:
        tool = knobs.nvidia.ptxas
    except RuntimeError:  # none that runs, as on ROCm
        return None
    return f"{tool.version}, {tool.path}"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which is decided before they are imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def arch_of(x: torch.Tensor) -> int:
    """The compute capability of the device of x, 90 for 9.0; 0 for the interpreter."""
    return _numbers(x.get_device())[0] if x.is_cuda else 0


def multiprocessors_of(x: torch.Tensor, interpreted: int) -> int:
    """Those of the device of x, or what the interpreter stands for."""
    return _numbers(x.get_device())[1] if x.is_cuda else interpreted


@cache
def _numbers(device: int) -> tuple[int, int]:
    """The compute capability and the multiprocessors of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of x."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


_HERE = contextlib.nullcontext()
