"""Makes backend "triton" run what Triton compiles for a GPU that is not there."""

from __future__ import annotations

import os
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from longrope_kernels.backends.triton import attention as triton_attention
from longrope_kernels.backends.triton import decode as triton_decode
from longrope_kernels.backends.triton import device as triton
from longrope_kernels.backends.triton import launch as triton_launch

from .launch import Device
from .machine import Machine

# Where kernels run; None where a GPU or the interpreter runs them.
device: Device | None = None


def install(arch: int, machine: type[Machine] = Machine) -> Device:
    """From now on in this process; TRITON_INTERPRET must not be set. arch: 90 for 9.0."""
    global device
    device = there = Device(arch, machine=machine)

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        there.launch(kernel, grid, *args, **named)

    def arch_of(x: torch.Tensor) -> int:
        return arch

    JITFunction.run = run
    # The backend takes tensors of the CPU where it interprets.
    triton.interpreting = lambda: "LONGROPE_PTX" in os.environ
    for module in (triton_attention, triton_decode, triton_launch):
        module.arch_of = arch_of
    return there
