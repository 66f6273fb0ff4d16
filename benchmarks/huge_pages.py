"""What huge pages bring the rotation on a CPU: the native backend with and without asking for them.

    python benchmarks/huge_pages.py --out huge_pages.json

q (1, 4096, 32, 128) and k of 8 heads, out of place, beside ``clone``. Calls of the three take
turns; a time is the median of a run, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from longrope_kernels import Rope, apply_rotary
from longrope_kernels.backends import native
from longrope_kernels.report import machine

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16)


def measure(dtype: torch.dtype, tokens: int, calls: int, runs: int) -> dict[str, list[float]]:
    """The times of each way, a number for each run."""
    q, k = (torch.randn(1, tokens, heads, 128).to(dtype) for heads in (32, 8))
    positions, rope = torch.arange(tokens), Rope.plain(128)

    def rotate() -> Any:
        return apply_rotary(q, k, positions, rope, backend="native")

    def rotate_without() -> Any:
        with mock.patch.object(native, "_HUGE", 1 << 62):
            return rotate()

    ways = {
        "clone": lambda: (q.clone(), k.clone()),
        "with_huge_pages": rotate,
        "without": rotate_without,
    }
    times = [_medians(ways, calls) for _ in range(runs)]
    return {name: [round(one[name], 2) for one in times] for name in ways}


def _medians(ways: dict[str, Callable[[], Any]], calls: int) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(calls):
        for name, way in ways.items():
            begin = time.perf_counter()
            result = way()
            spent[name].append(1e3 * (time.perf_counter() - begin))
            del result  # freed before the next one asks for memory
    return {name: statistics.median(values) for name, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--quick", action="store_true", help="small sizes; times say nothing then")
    chosen = parser.parse_args()
    sizes = (64, 3, 1) if chosen.quick else (4096, 31, 2)
    results: dict[str, Any] = {"machine": machine.describe(ROOT)}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        results[name] = measure(dtype, *sizes)
        for way, milliseconds in results[name].items():
            print(f"{name:10}{way:17}" + " ".join(f"{ms:8.2f}" for ms in milliseconds))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
