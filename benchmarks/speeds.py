"""What every row tells beside its time: amounts, speeds, and shares of what bounds them."""

from __future__ import annotations

from typing import Any

from measure import Measured
from report import results

# What the ceilings of this run reached, told before all rows: bytes or FLOP a second, by name.
REACHED: dict[str, float] = {}


def told(found: Measured, ceiling: str, nbytes: int | None, flops: int | None) -> dict[str, Any]:
    """For pytest-benchmark's ``extra_info``.

    Args:
        found: of the row.
        ceiling: the name of what was timed in turns with it.
        nbytes: what the work has to read and write; None for nothing.
        flops: what it has to compute; None for nothing.
    """
    kind = "matmul" if ceiling == "matmul" else "copy"
    return {
        "bytes": nbytes,
        "flops": flops,
        **results.speeds(found.median, nbytes, flops, REACHED),
        "ceiling": ceiling,
        f"{kind}_seconds": found.ceiling_seconds,
        f"{kind}_fraction": found.fraction,
        "peak_bytes": found.peak_bytes,
    }
