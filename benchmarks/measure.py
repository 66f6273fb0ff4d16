"""One row of a benchmark: rounds of a function, each after one of the ceiling that bounds it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from clock import CLOCK, seconds
from ropes import DEVICE

FEWEST, MOST = 5, 60  # rounds


class Ceiling(NamedTuple):
    """What nothing of its kind outruns: ``amount`` bytes copied, or FLOP of a matrix product."""

    name: str
    run: Callable[[], Any]
    amount: int


class Measured(NamedTuple):
    """Medians, in seconds, and the speed as a fraction of that of the ceiling."""

    median: float
    ceiling_seconds: float
    fraction: float


def measure(
    benchmark: Any,
    run: Callable[..., Any],
    arguments: Callable[[], tuple[Any, ...]],
    ceiling: Ceiling,
    amount: int,
    full_size: bool,
    seconds_a_row: float,
    fewest: int = FEWEST,
) -> Measured | None:
    """Time ``run(*arguments())`` by pytest-benchmark; ``arguments`` and the ceiling are not timed.

    Args:
        benchmark: pytest-benchmark's fixture.
        amount: of one call, in the ceiling's unit.
        run: called before, at least once, where its first call does more than later ones.
        full_size: without it three rounds, for a check that everything runs.
        seconds_a_row: what the rounds should take together, with what is not timed in them.
        fewest: rounds, however long they take.

    Returns:
        What was found, or None where pytest-benchmark is told not to measure.
    """
    ceiling_times = []

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The ceiling before each round, since the speed of a shared machine changes by the second.
        ceiling_times.append(seconds(ceiling.run))
        ready = arguments()
        CLOCK.prepare()
        return ready, {}

    def uncounted() -> float:
        """A first round: what one takes, with all that is not timed in it."""
        begin = time.perf_counter()
        ready, _ = setup()
        seconds(lambda: run(*ready))
        return time.perf_counter() - begin

    rounds = min(MOST, max(fewest, round(seconds_a_row / uncounted()))) if full_size else 3
    benchmark.pedantic(run, setup=setup, rounds=rounds)
    if benchmark.disabled:
        return None

    data = benchmark.stats.stats.data
    ceilings = ceiling_times[-len(data) :]
    share = amount / ceiling.amount
    fractions = (share * c / t for c, t in zip(ceilings, data, strict=True))
    return Measured(
        benchmark.stats.stats.median, statistics.median(ceilings), statistics.median(fractions)
    )


@lru_cache(maxsize=1)
def matmul() -> Ceiling:
    """A large bfloat16 matrix product."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    into = torch.empty_like(a)
    return Ceiling("matmul", lambda: torch.mm(a, b, out=into), 2 * size**3)
