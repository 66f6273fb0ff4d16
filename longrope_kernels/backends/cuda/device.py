"""The compiled CUDA backend (csrc/cuda): hands the addresses of a call to the extension.

Under ``LONGROPE_CUDA_EMULATE=1`` the same kernels run on CPU tensors, in an emulator that tests
build (tests/cpp/emulator), slowly.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from functools import cache
from types import ModuleType

import torch


def emulating() -> bool:
    """Whether the kernels run in the emulator, on CPU tensors."""
    return os.environ.get("LONGROPE_CUDA_EMULATE") == "1"


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"longrope_kernels.{name}"), ""
    except ImportError as error:
        return None, str(error)


def extension() -> ModuleType:
    """The module that runs here, which is there where `missing` is None."""
    module, error = _load("_cuda_emulated" if emulating() else "_cuda")
    if module is None:
        raise RuntimeError(error)
    return module


def missing() -> str | None:
    """Why the extension cannot run, or None."""
    if emulating():
        module, error = _load("_cuda_emulated")
        return None if module is not None else f"its emulator is not built ({error})"
    module, error = _load("_cuda")
    if module is None:
        return (
            f"its extension is not built ({error}); install the package where there is nvcc "
            "(LONGROPE_BUILD_CUDA=1 pip install . or pip install -e .)"
        )
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def place_of(x: torch.Tensor) -> tuple[int, int]:
    """The device of x and its current stream."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Kernels are launched on the current device, which need not be that of x."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()
