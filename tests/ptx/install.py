"""Makes backend "triton" run what Triton compiles for a GPU that is not there."""

from __future__ import annotations

import os
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from longrope_kernels.backends.triton import device as triton
from longrope_kernels.backends.triton import private

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
    private.USED = False
    # The backend takes tensors of the CPU where it interprets.
    triton.interpreting = lambda: "LONGROPE_PTX" in os.environ
    triton.arch_of = arch_of
    return there
