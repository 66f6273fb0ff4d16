"""A stand-in for the driver of a GPU: all that a launch costs the host, and no launch.

Under `installed` the backend "triton" takes tensors of the CPU, Triton compiles for a GPU that is
not there, and what would start a kernel notes it instead. Nothing is computed: outputs keep what
they held. What a call takes then is the host's part, but for the driver's own (some microseconds a
launch) and for allocations, which are the CPU's.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from longrope_kernels.backends import choose
from longrope_kernels.backends.triton import device as triton_device
from longrope_kernels.calls import kinds, values

KEPT = 64  # starts that are remembered


class Started(NamedTuple):
    """A kernel that would have been started."""

    name: str
    grid: tuple[int, int, int]
    args: tuple[Any, ...]  # those of the kernel, constants included


class Driver:
    """What Triton asks of a driver; ``started`` and ``loaded`` are what it was told to do.

    arch: the compute capability, 90 for 9.0. multiprocessors: how many the device has.
    """

    def __init__(self, arch: int, multiprocessors: int) -> None:
        self.arch = arch
        self.multiprocessors = multiprocessors
        self.started: deque[Started] = deque(maxlen=KEPT)
        self.loaded: list[str] = []
        self.utils = self

    def get_current_device(self) -> int:
        """A number that no GPU has: Triton keeps what it compiled and loaded by it."""
        return -self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": self.multiprocessors}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and the most threads of a block."""
        self.loaded.append(name)
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What starts a compiled kernel."""
        name, note = metadata.name, self.started.append

        def start(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            note(Started(name, (x, y, z), rest[4:]))

        return start


@cache
def driver_of(arch: int, multiprocessors: int) -> Driver:
    """One for all: kernels keep to the driver that loaded them."""
    return Driver(arch, multiprocessors)


@contextlib.contextmanager
def installed(arch: int = 90, multiprocessors: int = 132) -> Iterator[Driver]:
    """The stand-in in place of a driver; what a GPU's tensors would not be asked is not asked."""
    there, before = driver_of(arch, multiprocessors), driver._active
    driver.set_active(there)
    missing = choose.missing
    replaced = (
        (choose, "missing", lambda name: None if name == "triton" else missing(name)),
        (triton_device, "interpreting", lambda: True),
        (triton_device, "arch_of", lambda x: arch),
        (triton_device, "multiprocessors_of", lambda x, interpreted: multiprocessors),
        (values, "readable", lambda x: False),
    )
    kept = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    kinds.forget()
    try:
        yield there
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
        kinds.forget()
        driver._active = before
