"""What huge pages bring on a CPU: the native backend with and without asking for them.

    python benchmarks/huge_pages.py --out huge_pages.json

- by dtype: the rotation of q (1, 4096, 32, 128) and k of 8 heads, out of place, beside ``clone``;
- decode: a step of 32 heads over a `KVCache` of 32768 bfloat16 keys, 8 heads of 128.

The ways take turns; a time is the median of a run, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from longrope_kernels import KVCache, Rope, apply_rotary
from longrope_kernels.backends import native
from longrope_kernels.report import machine

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16)


def without() -> AbstractContextManager[Any]:
    """Nothing is large enough to ask for them."""
    return mock.patch.object(native, "_HUGE", 1 << 62)


def rotation(dtype: torch.dtype, tokens: int, calls: int, runs: int) -> dict[str, list[float]]:
    """The times of each way to rotate, a number for each run."""
    q, k = (torch.randn(1, tokens, heads, 128).to(dtype) for heads in (32, 8))
    positions, rope = torch.arange(tokens), Rope.plain(128)

    def rotate() -> Any:
        return apply_rotary(q, k, positions, rope, backend="native")

    def rotate_without() -> Any:
        with without():
            return rotate()

    ways = {
        "clone": lambda: (q.clone(), k.clone()),
        "with_huge_pages": rotate,
        "without": rotate_without,
    }
    return _measured(ways, calls, runs)


def decoding(tokens: int, calls: int, runs: int) -> dict[str, list[float]]:
    """The times of a step over either cache, a number for each run."""
    q, k, v = (
        torch.randn(1, n, heads, 128).bfloat16() for n, heads in ((1, 32), *[(tokens, 8)] * 2)
    )
    ways: dict[str, Callable[[], Any]] = {}
    for name, asking in (("with_huge_pages", nullcontext()), ("without", without())):
        with asking:
            cache = KVCache(Rope.plain(128), 1, tokens, 8, 128)
        cache.append(k, v)
        ways[name] = partial(cache.decode, q, backend="native")
    return _measured(ways, calls, runs)


def _measured(ways: dict[str, Callable[[], Any]], calls: int, runs: int) -> dict[str, list[float]]:
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
    tokens, keys, *rounds = (64, 256, 3, 1) if chosen.quick else (4096, 32768, 31, 2)
    results: dict[str, Any] = {"machine": machine.describe(ROOT)}
    for dtype in DTYPES:
        results[str(dtype).removeprefix("torch.")] = rotation(dtype, tokens, *rounds)
    results["decode"] = decoding(keys, *rounds)
    for name in list(results)[1:]:
        for way, milliseconds in results[name].items():
            print(f"{name:10}{way:17}" + " ".join(f"{ms:8.2f}" for ms in milliseconds))
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
