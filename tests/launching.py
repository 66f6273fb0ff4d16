"""Fixtures of launches*.py: kernels that are not compiled, and calls that start them.

Here a kernel is "compiled" to an object that says which it is, by a driver that stands in for CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parents[1])]

import pytest
import torch
import triton
from stand_in_driver import Driver, installed
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from longrope_kernels import Rope, apply_rotary, attention, decode
from longrope_kernels.backends.triton import launch as launches
from longrope_kernels.kernels.launch import Launch

bf16 = torch.bfloat16
TWO = Rope.longrope([1.0] * 16, [2.0] * 16, 4096, 8192)
PARTS = ("rotary", "append", "decode", "attention")


def not_compiled(source: Any, target: Any, options: dict[str, Any]) -> CompiledKernel:
    """A kernel that remembers that it was started."""
    assert source.fn.cache_key  # notes which globals it uses
    COMPILED.append(source.name)
    kernel: Any = object.__new__(CompiledKernel)
    kernel.src, kernel.name = source, source.name
    kernel.module, kernel._module_pid, kernel.metadata_group = 1, None, {}
    ALIVE.append(kernel)  # Triton 3.8 unloads what is freed, by the driver of that time
    kernel.function, kernel.packed_metadata = 7, ("metadata of", id(kernel))

    note = triton.runtime.driver.active.launcher_cls(source, kernel)

    def start(*given: Any) -> None:
        (x, y, z, stream, function, metadata), args = given[:6], given[9:]
        assert (stream, function, metadata) == (0, 7, kernel.packed_metadata)
        STARTED.append((kernel, (x, y, z), args))
        note(*given)

    kernel._run = start
    return kernel  # type: ignore[no-any-return]


COMPILED: list[str] = []
ALIVE: list[CompiledKernel] = []
STARTED: list[tuple[CompiledKernel, tuple[int, ...], tuple[Any, ...]]] = []


@pytest.fixture(scope="module", autouse=True)
def driver() -> Iterator[Driver]:
    before = triton.compiler.compile
    triton.compiler.compile = not_compiled
    with installed() as there:
        yield there
    triton.compiler.compile = before


@pytest.fixture(autouse=True)
def _forget() -> None:
    launches._CHOSEN.clear()
    launches._READY.clear()
    STARTED.clear()
    COMPILED.clear()


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that went Triton's own way."""
    seen: list[str] = []
    run = JITFunction.run

    def watched(self: Any, *args: Any, **named: Any) -> Any:
        seen.append(self.__name__)
        return run(self, *args, **named)

    monkeypatch.setattr(JITFunction, "run", watched)
    return seen


def tensors(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def rotate(**named: Any) -> Any:
    q, k = tensors(1, 1, 4, 32), tensors(1, 1, 2, 32)
    return apply_rotary(q, k, torch.tensor([[3]]), TWO, backend="triton", **named)


def attend(slots: int = 8, **named: Any) -> Any:
    q, k, v = tensors(1, slots, 4, 32), tensors(1, slots, 2, 32), tensors(1, slots, 2, 32)
    at, lengths = torch.arange(slots), torch.tensor([8])
    return attention(q, k, v, at, TWO, lengths=lengths, backend="triton", **named)


def decode_one(capacity: int = 128, **named: Any) -> Any:
    q, k, v = tensors(1, 1, 4, 32), tensors(1, capacity, 2, 32), tensors(1, capacity, 2, 32)
    return decode(q, k, v, torch.tensor([3]), TWO, backend="triton", **named)


def new() -> dict[str, torch.Tensor]:
    return {"k_new": tensors(1, 1, 2, 32), "v_new": tensors(1, 1, 2, 32)}


LENGTHS = {"lengths": torch.tensor([8])}
CALLS = {
    "rotary": (lambda: rotate(**LENGTHS), ["rotary_kernel"]),
    "rotary in place": (lambda: rotate(**LENGTHS, inplace=True), ["rotary_kernel"]),
    "decode": (decode_one, ["decode_kernel"]),
    "decode and append": (lambda: decode_one(**new()), ["append_kernel", "decode_kernel"]),
    "decode in splits": (lambda: decode_one(4096), ["decode_kernel"]),
    "attention, k rotated before": (lambda: attend(400), ["rotary_kernel", "attention_kernel"]),
    "attention, few queries": (attend, ["attention_kernel"]),
}


def runs(call: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """What a call gives `run`: a plan, and arguments of it."""
    found: list[tuple[Any, ...]] = []
    run = launches.run
    modules = [import_module(f"longrope_kernels.backends.triton.{name}") for name in PARTS]
    for module in modules:
        module.run = lambda *given: found.append(given)
    try:
        call()
    finally:
        for module in modules:
            module.run = run
    return found


def plans() -> dict[str, Launch]:
    """A launch of each kernel, taken from a call."""
    found = [plan(*given) for call, _ in CALLS.values() for plan, *given in runs(call)]
    return {plan.kernel.__name__: plan for plan in found}
