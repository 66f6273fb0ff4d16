"""Runs kernels of a few lines, written by hand."""

from __future__ import annotations

import torch

from .machine import Machine
from .memory import GlobalMemory
from .program import parse

# Bytes of shared memory that they have.
SHARED = 65536


def run(
    body: str, *tensors: torch.Tensor, threads: int = 128, unfenced_copies: bool = False
) -> Machine:
    """Run a block: %rd1 and up are the addresses of the tensors, %r1 is %tid.x, %r2 16 times it."""
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(9))
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i, _ in enumerate(tensors))
    text = f"""
.visible .entry k(
{parameters}
)
.reqntid {threads}
{{
.reg .pred %p<9>;
.reg .b32 %r<99>;
.reg .b32 %f<128>;
.reg .b64 %rd<99>;
{loads}
mov.u32 %r1, %tid.x;
shl.b32 %r2, %r1, 4;
setp.eq.s32 %p1, %r1, 0;
setp.lt.s32 %p2, %r1, 32;
setp.ge.s32 %p3, %r1, 32;
{body}
ret;
}}
"""
    memory = GlobalMemory()
    for tensor in tensors:
        memory.add(tensor)
    machine = Machine(parse(text), threads, SHARED, memory, unfenced_copies)
    machine.parameters = {f"k_param_{i}": x.data_ptr() for i, x in enumerate(tensors)}
    machine.run((0, 0, 0), (1, 1, 1))
    return machine
