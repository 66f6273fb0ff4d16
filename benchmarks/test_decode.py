"""One step over a cache of unrotated keys, rotation included, against its peers.

``pytest benchmarks/ --benchmark-only`` is the measurement; without the option the caches are
short, and it is a check that everything runs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import speeds
from clock import CLOCK
from copies import Prepared
from decodes import (
    CEILING,
    NAMES,
    NO_ROTATION,
    PEERS,
    SDPA,
    Inputs,
    Shape,
    allowed,
    implementation,
    make_copies,
    missing,
    reading,
    serves,
)
from measure import Timed, measure, require_memory
from parameters import STEPS
from ropes import assert_each_right
from table import Row, Table, median_of

SHAPES = [(rank, Shape(*step)) for rank, step in STEPS]
NOT_TIMED = {name: reason for name in NAMES if (reason := missing(name))}
TABLE = Table(
    "decoding: q (B, 1, 32, 128) or as many queries as said, keys and values of 8 heads of 128, "
    "or the model named, medians",
    "GB/s",
    1e9,
    f"of {CEILING}",
    "x SDPA",
    "of read, of copy: median ratio to reading (copying) the cache, timed before each round",
)
ROWS: list[Row] = []  # for the table at the end

SECONDS_A_ROW = 0.7


@pytest.mark.benchmark(timer=CLOCK.now, disable_gc=True)
@pytest.mark.parametrize(
    ("shape", "name"),
    [
        pytest.param(*(shape, name), id=f"{shape}-{name}", marks=pytest.mark.less_important(rank))
        for rank, shape in SHAPES
        for name in NAMES
        if name not in NOT_TIMED and serves(name, shape)
    ],
)
def test_decode(benchmark: Any, request: pytest.FixtureRequest, shape: Shape, name: str) -> None:
    full_size = bool(request.config.getoption("benchmark_only"))
    if not full_size:
        lengths = tuple(min(n, 130 + i) for i, n in enumerate(shape.lengths))
        shape = shape._replace(lengths=lengths, queries=min(shape.queries, 40))
    benchmark.group = f"decode, {shape}"

    def prepare(name: str) -> Timed:
        require_memory(8 * shape.traffic(SDPA))  # a copy for each kind of cache, and in float64
        copies = make_copies(shape)
        timed = copies.in_turn(lambda inputs: _prepared(name, inputs))
        return Timed(*timed, copies.ceiling(partial(reading, name)), shape.traffic(name))

    found = measure(benchmark, request, prepare, PEERS, SECONDS_A_ROW)
    if found is None:
        return
    sdpa = found.median if name == SDPA else median_of(ROWS, benchmark.group, SDPA)
    row = Row(benchmark.group, name, found.median, found.amount, found.fraction, sdpa)
    ROWS.append(row)
    rotated = median_of(ROWS, benchmark.group, NO_ROTATION.get(name, ""))
    chunk = f", {shape.queries} queries" if shape.queries > 1 else ""
    benchmark.extra_info.update(
        work="decode",
        kind=f"batch {len(shape.lengths)}{chunk}, {str(shape.dtype)[6:]}{shape.geometry.suffix}",
        tokens=max(shape.lengths),
        copies=len(make_copies(shape).all),
        **speeds.told(found, CEILING, found.amount, shape.flops),
        time_over_rotated_keys=rotated and found.median / rotated,
        speedup_over_sdpa=row.speedup,
    )


def _prepared(name: str, inputs: Inputs) -> Prepared:
    """What to time, after its result was checked; it takes no arguments."""
    run = implementation(name, inputs)
    found = run()[:, :, inputs.q_heads]
    assert_each_right(name, "sequence", found, inputs.truth_of(name), allowed(name, inputs))
    return run, tuple
