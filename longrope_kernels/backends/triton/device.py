"""Whether Triton runs in this process."""

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
