"""What this machine can do in the same run: copy memory and multiply matrices."""

from __future__ import annotations

from typing import Any

import pytest
import speeds
import torch
from clock import CLOCK
from measure import Ceiling, Timed, matmul, measure
from ropes import DEVICE


def copy() -> Ceiling:
    """A copy far larger than the caches; read once and written once."""
    size = 2**30 if DEVICE.type == "cuda" else 2**27
    x = torch.empty(size, dtype=torch.int8, device=DEVICE).zero_()
    into = torch.empty_like(x)
    return Ceiling("copy", lambda: into.copy_(x), 2 * size)


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True, group="ceilings")
@pytest.mark.parametrize("name", ["copy", "matmul"])
def test_ceiling(benchmark: Any, request: pytest.FixtureRequest, name: str) -> None:
    def prepare(name: str) -> Timed:
        ceiling = copy() if name == "copy" else matmul()
        return Timed(ceiling.run, tuple, ceiling, ceiling.amount)

    found = measure(benchmark, request, prepare, (), 0.5)
    if found is None:
        return
    speeds.REACHED[name] = found.amount / found.median
    amounts = (found.amount, None) if name == "copy" else (None, found.amount)
    benchmark.extra_info.update(work="ceiling", **speeds.told(found, name, *amounts))
