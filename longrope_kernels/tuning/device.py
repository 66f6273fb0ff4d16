"""The current CUDA device, as `longrope tune` uses it."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .search import Built


def missing() -> str | None:
    """Why nothing can be timed here, in one line; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs triton: pip install 'longrope-kernels[triton]'"
    if not torch.cuda.is_available():
        return "needs a CUDA device, torch finds none"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 runs the kernels on the CPU; unset it"
    return None


class CudaMachine:
    """Compiles with all cores, times with events on the device."""

    # About half a millisecond, longer than Python takes for a launch.
    _BUSY_CYCLES = 1_000_000

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties: Any = torch.cuda.get_device_properties(self.device)
        self.name: str = properties.name
        self.arch: int = 10 * properties.major + properties.minor
        self.shared: int = properties.shared_memory_per_block_optin
        self.workers = max(1, len(os.sched_getaffinity(0)))
        self._l2 = torch.empty(2**28, dtype=torch.int8, device=self.device)  # larger than any L2

    def now(self) -> float:
        return time.monotonic()

    def compile(self, launches: Sequence[Any]) -> list[Built]:
        """What came out for each launch; an error of the compiler is a result too."""
        import triton

        with (
            ThreadPoolExecutor(self.workers) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            pending = [
                launch.kernel.warmup(*launch.args, grid=launch.grid, **_options(launch))
                for launch in launches
            ]
        return [_built(kernel) for kernel in pending]

    def run(self, launch: Any) -> None:
        launch.kernel[launch.grid](*launch.args, **_options(launch))

    def seconds(self, launch: Any) -> float:
        """The device is busy while the launch and both events are queued, so no gap is timed."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._l2.zero_()
        torch.cuda._sleep(self._BUSY_CYCLES)
        begin.record()
        self.run(launch)
        end.record()
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))


def _options(launch: Any) -> dict[str, Any]:
    return {**launch.constants, "num_warps": launch.warps, "num_stages": launch.stages}


def _built(kernel: Any) -> Built:
    """Load a kernel, which is when the driver says what it needs."""
    try:
        if hasattr(kernel, "result"):  # compiled in the pool just now, not found in the cache
            kernel = kernel.result()
        kernel._init_handles()
    except Exception as error:  # whatever the compiler, ptxas and the driver raise
        last_line = " ".join(str(error).splitlines()[-1:])
        return Built(error=f"{type(error).__name__}: {last_line}")
    return Built(kernel.n_regs, kernel.n_spills, kernel.metadata.shared)
