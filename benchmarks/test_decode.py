"""One step over a cache of unrotated keys, rotation included, against its peers.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option the caches are
short, and it is a check that everything runs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clock import CLOCK
from decodes import (
    FLASHINFER,
    NAMES,
    OURS,
    SDPA,
    Shape,
    allowed,
    implementation,
    make_inputs,
    missing,
    reading,
)
from measure import measure
from ropes import DEVICE, assert_right
from table import Row, Table, median_of

bf16, fp32 = torch.bfloat16, torch.float32
if DEVICE.type == "cuda":
    SHAPES = [Shape((131072,), bf16), Shape((4096,) * 32, bf16), Shape((8192,), bf16)]
    MIXED = Shape((300, 4096, 4097, 32768) * 4, bf16)
else:
    SHAPES = [Shape((n,), dtype) for n in (4096, 32768) for dtype in (bf16, fp32)]
    MIXED = Shape((300, 4096, 4097, 8000), bf16)
SHAPES.append(MIXED)

NOT_TIMED = {name: reason for name in NAMES if (reason := missing(name))}
TABLE = Table(
    "decoding: q (B, 1, 32, 128) against keys and values of 8 heads of 128, medians",
    "GB/s",
    1e9,
    "of read" if DEVICE.type == "cpu" else "of copy",
    "x SDPA",
    "of read, of copy: median ratio to reading (copying) the cache, timed before each round",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 0.7


def _serves(name: str, shape: Shape) -> bool:
    if name == FLASHINFER:  # one sequence, and plain RoPE
        return len(shape.lengths) == 1
    return not (name in OURS and OURS[name][0] == "triton" and shape.dtype == fp32)


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        pytest.param(shape, name, id=f"{shape}-{name}")
        for shape in SHAPES
        for name in NAMES
        if name not in NOT_TIMED and _serves(name, shape)
    ],
)
def test_decode(benchmark: Any, request: pytest.FixtureRequest, shape: Shape, name: str) -> None:
    full_size = bool(request.config.getoption("benchmark_only"))
    if not full_size:
        shape = shape._replace(lengths=tuple(min(n, 130 + i) for i, n in enumerate(shape.lengths)))
    benchmark.group = f"decode, {shape}"
    inputs = make_inputs(shape)
    run = implementation(name, inputs)
    if name != FLASHINFER:  # which rotates by plain RoPE
        assert_right(name, "out", run()[:, :, inputs.q_heads], inputs.truth, allowed(name, inputs))
    itemsize = 1 if name in OURS and OURS[name][1] == "float8" else shape.dtype.itemsize
    traffic = shape.traffic(itemsize)
    found = measure(benchmark, run, tuple, reading(inputs), traffic, full_size, SECONDS_A_ROW)
    if found is None:
        return
    sdpa = found.median if name == SDPA else median_of(ROWS, benchmark.group, SDPA)
    row = Row(benchmark.group, name, found.median, traffic, found.fraction, sdpa)
    ROWS.append(row)
    benchmark.extra_info.update(
        work="decode",
        kind=f"batch {len(shape.lengths)}, {str(shape.dtype).removeprefix('torch.')}",
        tokens=max(shape.lengths),
        bytes=traffic,
        gb_per_s=1e-9 * traffic / row.median,
        flops=shape.flops,
        copy_seconds=found.ceiling_seconds,
        copy_fraction=row.fraction,
        speedup_over_sdpa=row.speedup,
    )
