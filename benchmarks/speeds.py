"""What every row tells beside its time: amounts, speeds, and shares of what bounds them."""

from __future__ import annotations

from typing import Any

from measure import Measured

# What the ceilings of this run reached, told before all rows: bytes or FLOP a second, by name.
REACHED: dict[str, float] = {}


def told(found: Measured, ceiling: str, nbytes: int | None, flops: int | None) -> dict[str, Any]:
    """For pytest-benchmark's ``extra_info``.

    Args:
        found: of the row.
        ceiling: the name of what was timed in turns with it.
        nbytes: what the work has to read and write; None for nothing.
        flops: what it has to compute; None for nothing.

    Returns:
        ``gb_per_s`` and ``of_copy``, ``tflop_per_s`` and ``of_matmul``, as far as they are known,
        beside what was given and found.
    """
    kind = "matmul" if ceiling == "matmul" else "copy"
    known: dict[str, Any] = {"bytes": nbytes, "flops": flops}
    for amount, speed, unit, of in (
        (nbytes, "gb_per_s", 1e9, "copy"),
        (flops, "tflop_per_s", 1e12, "matmul"),
    ):
        if amount:
            known[speed] = amount / found.median / unit
            if of in REACHED:
                known[f"of_{of}"] = amount / found.median / REACHED[of]
    return {
        **known,
        "ceiling": ceiling,
        f"{kind}_seconds": found.ceiling_seconds,
        f"{kind}_fraction": found.fraction,
        "peak_bytes": found.peak_bytes,
    }
