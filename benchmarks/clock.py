"""The clocks: pytest-benchmark takes ``now`` as its timer, rounds begin with ``prepare``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class HostClock:
    """Wall time, in seconds. The inputs are larger than the caches, which need no clearing."""

    def prepare(self) -> None:
        pass

    def now(self) -> float:
        return time.perf_counter()


class DeviceClock:
    """Time on the device between two events, in seconds.

    ``now`` is called in pairs. The first call only queues an event: `prepare` has queued work
    before it, so that the launches under test are queued while the device is still busy and the
    second event follows the last of them without a gap.
    """

    _BUSY_CYCLES = 1_000_000  # about half a millisecond, longer than Python takes for a launch

    def __init__(self) -> None:
        self._l2 = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than any L2
        self._begin: torch.cuda.Event | None = None
        self._total = 0.0

    def prepare(self) -> None:
        self._begin = None  # a row that raised may have left half a pair
        self._l2.zero_()
        torch.cuda._sleep(self._BUSY_CYCLES)

    def now(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._begin is None:
            self._begin = event
        else:
            event.synchronize()
            self._total += 1e-3 * self._begin.elapsed_time(event)
            self._begin = None
        return self._total


CLOCK = DeviceClock() if torch.cuda.is_available() else HostClock()


def seconds(run: Callable[[], Any]) -> float:
    """One call of ``run`` by the clock of the benchmarks."""
    CLOCK.prepare()
    begin = CLOCK.now()
    result = run()
    elapsed = CLOCK.now() - begin
    del result  # freed after the clock has stopped, as pytest-benchmark does
    return elapsed
