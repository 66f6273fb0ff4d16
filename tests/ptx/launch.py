"""Triton's launches, compiled as for a GPU, and run in the machine on tensors of the CPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from codegen import source
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from .machine import Machine
from .memory import GlobalMemory
from .program import Program, parse


@dataclass
class Compiled:
    """The PTX of a kernel, parsed, and what a launch of it needs."""

    program: Program
    metadata: dict[str, Any]
    machine: Machine | None = None

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.program.threads or 32 * int(self.metadata["num_warps"])


@dataclass
class Device:
    """A GPU that is not there, of compute capability ``arch`` (90 for 9.0).

    unfenced_copies: of `Order`, by default as Triton 3.6 leaves them and no kernel can mend: it
    fences no cp.async before wgmma (mended by triton-lang/triton #9610).
    """

    arch: int
    unfenced_copies: bool = True
    machine: type[Machine] = Machine
    compiled: dict[Any, Compiled] = field(default_factory=dict)

    def launch(self, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **named: Any) -> None:
        """What ``kernel[grid](*args, **named)`` does on a GPU."""
        options = {x: named.pop(x) for x in ("num_warps", "num_stages") if x in named}
        of_source = source(kernel, args, named, GPUTarget("cuda", self.arch, 32))
        compiled = self._compile(of_source, options)
        memory = GlobalMemory()
        values = []
        for kind, value in _flatten([*of_source.signature.values()], list(args)):
            if kind != "constexpr":
                values.append(_argument(value, memory))
        blocks = (*grid, 1, 1)[:3]
        count = blocks[0] * blocks[1] * blocks[2]
        for name in ("global_scratch_size", "profile_scratch_size"):
            scratch = _scratch(count * compiled.metadata.get(name, 0))
            values.append(_argument(scratch, memory))
        machine = compiled.machine
        if machine is None:
            shared = compiled.metadata["shared"]
            of_launch = (compiled.program, compiled.threads, shared, memory)
            machine = self.machine(*of_launch, self.unfenced_copies)
            compiled.machine = machine
        machine.memory = memory
        names = [name for name, _ in compiled.program.parameters]
        machine.parameters = dict(zip(names, values, strict=True))
        # z fastest, or whatever a GPU takes: no block may count on it.
        for block in itertools.product(*map(range, blocks)):
            machine.run(block, blocks)

    def _compile(self, of_source: ASTSource, options: dict[str, int]) -> Compiled:
        key = (of_source.hash(), *options.items())
        if key not in self.compiled:
            self.compiled[key] = compile_to_ptx(of_source, self.arch, options)
        return self.compiled[key]


def compile_to_ptx(of_source: ASTSource, arch: int, options: dict[str, int]) -> Compiled:
    """Triton's own stages up to PTX; assembling it is what tests/test_codegen*.py do."""
    target = GPUTarget("cuda", arch, 32)
    backend = CUDABackend(target)
    parsed = backend.parse_options(options)
    metadata: dict[str, Any] = {"target": target, **parsed.__dict__}
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, of_source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed)
    module = of_source.make_ir(target, parsed, functions, backend.get_module_map(), context)
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == "ptx":
            break
    return Compiled(parse(module), metadata)


def _scratch(size: int) -> torch.Tensor:
    """Memory that Triton's allocator gives a launch, aligned as on a GPU."""
    room = torch.full((size + 256,), -1, dtype=torch.int8)
    return room[-room.data_ptr() % 256 :]


def _flatten(kinds: list[Any], values: list[Any]) -> Iterator[tuple[str, Any]]:
    """The leaves of nested tuples, side by side."""
    for kind, value in zip(kinds, values, strict=False):  # constants come by name
        if isinstance(kind, (tuple, list)):
            yield from _flatten(list(kind), list(value))
        else:
            yield kind, value


def _argument(value: Any, memory: GlobalMemory) -> Any:
    if isinstance(value, torch.Tensor):
        memory.add(value)
        return value.data_ptr()
    return value
