"""The clocks: pytest-benchmark takes ``now`` as its timer, rounds begin with ``prepare``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Clock:
    """Seconds by `_read`, or what `replay` was told."""

    def __init__(self) -> None:
        self._told: list[float] = []

    def replay(self, durations: Sequence[float]) -> None:
        """Make the next pairs of calls of ``now`` so many seconds apart, a pair for each.

        Rounds are timed in turns with those of other rows; this is how pytest-benchmark, which
        times one function after another, is told of them.
        """
        self._told = [t for duration in reversed(durations) for t in (duration, 0.0)]

    def now(self) -> float:
        return self._told.pop() if self._told else self._read()

    def prepare(self) -> None:
        """Called before each timed call."""

    def _read(self) -> float:
        raise NotImplementedError


class HostClock(Clock):
    """Wall time. The inputs are larger than the caches, which need no clearing."""

    def _read(self) -> float:
        return time.perf_counter()


class ThreadClock(Clock):
    """The processor's time for this thread alone: what others take of the cores does not count."""

    def _read(self) -> float:
        return time.thread_time()


class DeviceClock(Clock):
    """Time on the device between two events.

    ``now`` is called in pairs. The first call only queues an event: `prepare` has queued work
    before it, so that the launches under test are queued while the device is still busy and the
    second event follows the last of them without a gap.
    """

    _BUSY_CYCLES = 4_000_000  # about two milliseconds, longer than Python takes for any call

    def __init__(self) -> None:
        super().__init__()
        self._l2 = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than any L2
        self._begin: torch.cuda.Event | None = None
        self._total = 0.0

    def prepare(self) -> None:
        self._begin = None  # a row that raised may have left half a pair
        self._l2.zero_()
        torch.cuda._sleep(self._BUSY_CYCLES)

    def _read(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if self._begin is None:
            self._begin = event
        else:
            event.synchronize()
            self._total += 1e-3 * self._begin.elapsed_time(event)
            self._begin = None
        return self._total


HOST = HostClock()
THREAD = ThreadClock()
CLOCK = DeviceClock() if torch.cuda.is_available() else HOST


def seconds(run: Callable[[], Any], clock: Clock) -> float:
    """One call of ``run``."""
    clock.prepare()
    begin = clock.now()
    result = run()
    elapsed = clock.now() - begin
    del result  # freed after the clock has stopped, as pytest-benchmark does
    return elapsed
